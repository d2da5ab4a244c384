"""Federated averaging of a small network that classifies handwritten digits.

The training images are split over 100 clients, each with its own mix of digits. In every round, a
random cohort trains the server's parameters on its own images (McMahan et al., arXiv:1602.05629).
The server uses the negative mean update as a gradient (Reddi et al., arXiv:2003.00295).

    python examples/federated_averaging.py

prints the test accuracy and draws the training curves to runs/federated_averaging.png.
"""

import argparse
import time
from pathlib import Path

import _digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import fax

CLIENTS, ALPHA = 100, 0.5
EPOCHS, BATCH_SIZE = 5, 5


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images):
        return self.out(nnx.relu(self.hidden(images)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--clients-per-round", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    (images, labels), test = _digits.load(options.seed)
    data = fax.data.partition.dirichlet(
        {"x": images, "y": labels}, CLIENTS, alpha=ALPHA, seed=options.seed
    )
    cohorts = fax.data.cohorts(
        data, options.clients_per_round, BATCH_SIZE, epochs=EPOCHS, seed=options.seed
    )

    graph, params = nnx.split(Network(nnx.Rngs(options.seed)))

    def loss(params, batch, key):
        logits = nnx.merge(graph, params)(batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    @jax.jit
    def accuracy(params, images, labels):
        return jnp.mean(nnx.merge(graph, params)(images).argmax(axis=1) == labels)

    algorithm = fax.algorithms.fedavg(loss, optax.sgd(0.1), optax.sgd(0.2, momentum=0.9))
    train = jax.jit(algorithm.round)
    state = algorithm.init(params)
    losses, accuracies, seconds = [], [], []
    for _ in (progress := tqdm(range(options.rounds), unit="round")):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(train(state, next(cohorts)))
        seconds.append(time.perf_counter() - start)
        losses.append(float(metrics["loss"]))
        accuracies.append(float(accuracy(algorithm.params(state), *test)))
        progress.set_postfix(
            loss=f"{losses[-1]:.3f}", accuracy=f"{accuracies[-1]:.1%}", refresh=False
        )

    path = draw(losses, accuracies)
    print(f"test accuracy {accuracies[-1]:.1%}, {np.median(seconds):.4f} s per round, see {path}")


def draw(losses, accuracies):
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    figure.get_layout_engine().set(wspace=0.08)
    left, right = figure.subplots(1, 2)
    rounds = np.arange(1, len(losses) + 1)
    left.semilogy(rounds, losses, linewidth=1)
    left.set(xlabel="round", ylabel="training loss of the cohort")
    right.plot(rounds, 100 * np.array(accuracies), color="tab:green")
    right.set(xlabel="round", ylabel="test accuracy (%)", ylim=(50, 100))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path = Path("runs", "federated_averaging.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()
