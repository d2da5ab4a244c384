"""Handwritten digits by DP-FedAvg: accuracy against privacy.

    python examples/private_digits.py

Each of 1,437 clients has one image and takes part in all rounds. Its update is clipped to a norm
that follows the median of all clients' norms, and Gaussian noise is added to the sum of updates
(McMahan et al., arXiv:1710.06963; Andrew et al., arXiv:1905.03871). The training runs with several
amounts of noise side by side, using `jax.vmap` over the noise multiplier; noise 0 is not private.
The example prints the accuracy on 360 held-out images and the epsilon of each, and draws them to
runs/private_digits.png.

Epsilon holds for populations that differ in one client, at delta = 1e-4, after all rounds. This is
a simulation: the noise is derived from the seed, so that runs can be compared. Where noise has to
be secret, leave out ``key=``. Each run has its own key; otherwise, the difference of two runs would
have less noise than either of them.
"""

import argparse
import time
from pathlib import Path

import _digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import fax

NOISE = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
DELTA = 1e-4


def loss(params, batch, key):
    return optax.softmax_cross_entropy_with_integer_labels(scores(params, batch["x"]), batch["y"])


def scores(params, x):
    return x @ params["weights"] + params["bias"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    (images, labels), (held_out, answers) = _digits.load(options.seed)
    examples = zip(images, labels)
    data = fax.data.InMemory({i: {"x": x[None], "y": y[None]} for i, (x, y) in enumerate(examples)})
    cohorts = fax.data.cohorts(data, len(data), batch_size=1, seed=options.seed)

    def algorithm(noise_multiplier, key):
        aggregator = fax.aggregators.gaussian(1.0, noise_multiplier, quantile=0.5, key=key)
        return fax.algorithms.fedavg(
            loss,
            optax.sgd(1.0),
            optax.sgd(1.0, momentum=0.8),
            aggregator=aggregator,
            vectorize=16,
        )

    @jax.jit
    @jax.vmap
    def accuracy(state):
        return jnp.mean(scores(state.params, held_out).argmax(1) == answers)

    noise = jnp.array(NOISE)
    train = jax.vmap(lambda z, state, cohort: algorithm(z, None).round(state, cohort), (0, 0, None))
    train = jax.jit(train)
    start = {"weights": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
    keys = jax.random.split(jax.random.key(options.seed), len(NOISE))
    state = jax.vmap(lambda z, key: algorithm(z, key).init(start))(noise, keys)  # it holds the key

    begin = time.perf_counter()
    for _ in (progress := tqdm(range(options.rounds), unit="round")):
        state, _ = train(noise, state, next(cohorts))
        shown = accuracy(state)
        progress.set_postfix(public=f"{shown[0]:.1%}", noisiest=f"{shown[-1]:.1%}", refresh=False)
    seconds = time.perf_counter() - begin
    cohorts.close()

    reached = np.asarray(accuracy(state))
    costs = [fax.aggregators.epsilon(z, options.rounds, DELTA) for z in NOISE]
    for z, cost, own in zip(NOISE, costs, reached):
        print(f"noise multiplier {z:4g}: epsilon {cost:6.2f}, test accuracy {own:.1%}")
    path = draw(costs, 100 * reached)
    best = NOISE.index(8.0)
    print(
        f"{options.rounds} rounds of {len(data)} clients in {seconds:.1f} s: test accuracy "
        f"{reached[best]:.1%} at epsilon {costs[best]:.2f}, delta {DELTA:g}, and "
        f"{reached[0]:.1%} without privacy, see {path}"
    )


def draw(costs, accuracy):
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.semilogx(costs[1:], accuracy[1:], marker="o", label="DP-FedAvg")
    axes.axhline(accuracy[0], color="gray", linestyle="--", label="without privacy")
    axes.set(xlabel=f"epsilon, at delta = {DELTA:g}", ylabel="test accuracy (%)")
    axes.set_title("digits, one image per client")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right")
    path = Path("runs", "private_digits.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()
