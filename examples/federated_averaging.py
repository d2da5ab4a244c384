"""Federated averaging of a small network that reads handwritten digits.

The training images are split over 100 clients, each with its own mix of digits. In every round a
random cohort trains the server's parameters on its own images (McMahan et al., arXiv:1602.05629);
the server takes the negative mean of what changed as a gradient (Reddi et al., arXiv:2003.00295).

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
from jax import lax
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


def shuffled_batches(examples, key):
    """One epoch's batches, [steps, BATCH_SIZE, ...], of which the padded ones come last."""
    noise = jax.random.uniform(key, examples["mask"].shape)
    order = jnp.argsort(jnp.where(examples["mask"], noise, jnp.inf))
    return jax.tree.map(lambda x: x[order].reshape(-1, BATCH_SIZE, *x.shape[1:]), examples)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--clients-per-round", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    (images, labels), test = _digits.load(options.seed)
    rng = np.random.default_rng(options.seed)
    owner = _digits.dirichlet_partition(labels, CLIENTS, ALPHA, rng)
    data = jax.device_put(_digits.stack(images, labels, owner, CLIENTS, BATCH_SIZE))

    graph, params = nnx.split(Network(nnx.Rngs(options.seed)))
    client_optimizer = optax.sgd(0.1)
    server_optimizer = optax.sgd(0.2, momentum=0.9)

    def mean_loss(params, examples):
        logits = nnx.merge(graph, params)(examples["image"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, examples["label"])
        return jnp.mean(losses, where=examples["mask"])

    def local_update(params, examples, key):
        """How a client's training changes the parameters, and its loss before."""

        def train(carry, batch):
            params, state = carry
            gradient = jax.grad(mean_loss)(params, batch)
            updates, state = client_optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        def step(carry, batch):  # a batch of padding is skipped
            return lax.cond(batch["mask"].any(), train, lambda same, _: same, carry, batch), None

        def epoch(carry, key):
            return lax.scan(step, carry, shuffled_batches(examples, key))[0], None

        start = (params, client_optimizer.init(params))
        (trained, _), _ = lax.scan(epoch, start, jax.random.split(key, EPOCHS))
        return jax.tree.map(jnp.subtract, trained, params), mean_loss(params, examples)

    @fax.program(clients=options.clients_per_round)
    def mean_update(params, cohort, key):
        updates = fax.map(local_update, fax.broadcast(params), cohort, fax.keys(key))
        num_examples = cohort["mask"].sum(axis=1)
        return fax.mean(updates, weights=num_examples, where=num_examples > 0)

    @jax.jit
    def federated_round(params, state, data, key):
        sampling, training = jax.random.split(key)
        members = jax.random.choice(sampling, CLIENTS, (options.clients_per_round,), replace=False)
        cohort = jax.tree.map(lambda x: x[members], data)
        update, loss = mean_update(params, cohort, training)
        gradient = jax.tree.map(jnp.negative, update)
        updates, state = server_optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    @jax.jit
    def accuracy(params, images, labels):
        return jnp.mean(nnx.merge(graph, params)(images).argmax(axis=1) == labels)

    state = server_optimizer.init(params)
    losses, accuracies, seconds = [], [], []
    keys = jax.random.split(jax.random.key(options.seed), options.rounds)
    for key in (progress := tqdm(keys, unit="round")):
        start = time.perf_counter()
        params, state, loss = jax.block_until_ready(federated_round(params, state, data, key))
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
        accuracies.append(float(accuracy(params, *test)))
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
