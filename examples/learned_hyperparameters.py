"""Learned hyperparameters: gradients through several rounds replace a search.

Twenty clients train a linear classifier of handwritten digits. Eight of them label every digit as
the next one, and the server does not know which. The loss on validation images after eight rounds
of FedOpt is differentiated with respect to its hyperparameters (federated automatic
differentiation, Rush et al., arXiv:2301.07806): the learning rates of the clients and the server,
the momentum of the server, and the weight of each client.

    python examples/learned_hyperparameters.py

compares forward with reverse mode, runs gradient descent, and compares the learned values with a
grid of fixed values, which are all trained in one vectorized program. The comparison uses test
images, and batches in a new order. The results are drawn to runs/learned_hyperparameters.png.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure
from tqdm import tqdm

import fax

jax.config.update("jax_enable_x64", True)  # to compare the modes

CLIENTS, CORRUPTED, ALPHA = 20, 8, 5.0
ROUNDS, BATCH_SIZE = 8, 8
GRID = {  # the fixed values; the weights are the clients' numbers of examples
    "client rate": (0.03, 0.1, 0.3, 1.0),
    "server rate": (0.3, 1.0, 3.0),
    "momentum": (0.0, 0.5, 0.9),
}


def loss(params, batch, key):
    scores = batch["x"] @ params["kernel"] + params["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"])


def accuracy(params, batch):
    scores = batch["x"] @ params["kernel"] + params["bias"]
    return jnp.mean(scores.argmax(axis=1) == batch["y"])


def values(meta):
    """The hyperparameters as functions of unconstrained numbers."""
    return {
        "client rate": jnp.exp(meta["client rate"]),
        "server rate": jnp.exp(meta["server rate"]),
        "momentum": jax.nn.sigmoid(meta["momentum"]),
        "weights": jax.nn.softmax(meta["weights"]),
    }


def free(client_rate, server_rate, momentum, weights):
    """The inverse of `values`."""
    # A momentum of exactly 0 would be at minus infinity.
    odds = jnp.maximum(momentum, 1e-9) / (1 - momentum)
    given = {"client rate": client_rate, "server rate": server_rate, "momentum": odds}
    return jax.tree.map(jnp.log, {**given, "weights": weights})


def train(meta, cohorts):
    """The parameters after all rounds."""
    chosen = values(meta)
    algorithm = fax.algorithms.fedopt(
        loss,
        optax.sgd(chosen["client rate"]),
        optax.sgd(chosen["server rate"], momentum=chosen["momentum"]),
    )

    def one(state, cohort):
        # The mean is weighted by the numbers of examples. Replace them with the learned weights.
        weights = chosen["weights"][cohort.positions]
        return algorithm.round(state, dataclasses.replace(cohort, num_examples=weights))[0], None

    state = algorithm.init({"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)})
    return algorithm.params(lax.scan(one, state, cohorts)[0])


def validation_loss(meta, cohorts, validation):
    return jnp.mean(loss(train(meta, cohorts), validation, None))


@jax.jit
def sweep(metas, cohorts, validation, test):
    """Evaluates all settings in one program."""

    def one(meta):
        params = train(meta, cohorts)
        of_validation, of_test = (jnp.mean(loss(params, x, None)) for x in (validation, test))
        return of_validation, of_test, accuracy(params, test)

    return jax.vmap(one)(metas)


def read(seed):
    """The clients' data, some of them corrupted, and the validation and test examples."""
    task = fax.tasks.load("digits", clients=CLIENTS, alpha=ALPHA, seed=seed)

    def misread(client_id, examples):
        wrong = int(client_id) < CORRUPTED
        return {**examples, "y": (examples["y"] + 1) % 10 if wrong else examples["y"]}

    held_out = fax.data.partition.iid(task.test.client("held out"), 2, seed=seed)
    return fax.data.map(task.train, misread), held_out.client("0"), held_out.client("1")


def all_rounds(data, seed):
    """One cohort of all clients for each round, stacked along a leading axis."""
    with fax.data.cohorts(data, CLIENTS, BATCH_SIZE, seed=seed, resident=False) as cohorts:
        return jax.tree.map(lambda *x: jnp.stack(x), *(next(cohorts) for _ in range(ROUNDS)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    data, validation, test = read(options.seed)
    cohorts = all_rounds(data, options.seed)
    examples = jnp.array([data.num_examples(i) for i in data.client_ids()], float)
    meta = start = free(0.1, 1.0, 0.5, examples)

    gradient = jax.jit(jax.value_and_grad(validation_loss))
    _, reverse = gradient(meta, cohorts, validation)
    forward = jax.jit(jax.jacfwd(validation_loss))(meta, cohorts, validation)
    (ahead, _), (back, _) = ravel_pytree(forward), ravel_pytree(reverse)
    print(
        f"forward and reverse mode through {ROUNDS} rounds, by {back.size} hyperparameters: "
        f"largest relative difference {jnp.max(jnp.abs(ahead / back - 1)):.1e}"
    )

    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, options.steps))
    state, losses, history = optimizer.init(meta), [], []
    for _ in (progress := tqdm(range(options.steps), unit="step")):
        value, slope = gradient(meta, cohorts, validation)
        losses.append(float(value))
        history.append(values(meta))
        updates, state = optimizer.update(slope, state)
        meta = optax.apply_updates(meta, updates)
        progress.set_postfix(validation=f"{losses[-1]:.3f}", refresh=False)
    learned = values(meta)
    history.append(learned)

    fixed = [x.ravel() for x in np.meshgrid(*GRID.values(), indexing="ij")]
    settings = [free(*x, examples) for x in zip(*fixed)]
    without_weights = {**meta, "weights": start["weights"]}
    unseen = all_rounds(data, options.seed + 1)
    metas = jax.tree.map(lambda *x: jnp.stack(x), *settings, without_weights, meta)
    results = np.stack(sweep(metas, unseen, validation, test), axis=1)
    grid, (_, rates_loss, rates), (_, last_loss, last) = results[:-2], results[-2], results[-1]
    best = np.argmin(grid[:, 0])
    chosen = ", ".join(f"{name} {x[best]:g}" for name, x in zip(GRID, fixed))
    print(f"best of the grid by validation: {chosen}")
    print(", ".join(f"{name} {learned[name]:.2f}" for name in GRID), end=" are learned, ")
    clean, corrupted = learned["weights"][CORRUPTED:].mean(), learned["weights"][:CORRUPTED].mean()
    print(f"mean weight {clean:.4f} of clean and {corrupted:.4f} of corrupted clients")
    path = draw(losses, history, grid[best, 0], learned["weights"], examples / examples.sum())
    print(
        f"test accuracy {last:.1%}, loss {last_loss:.3f} as learned ({rates:.1%}, {rates_loss:.3f} "
        f"with weights by examples), {grid[best, 2]:.1%}, {grid[best, 1]:.3f} by the best of "
        f"{len(grid)} fixed settings ({grid[:, 2].max():.1%} if test images chose), see {path}"
    )


def draw(losses, history, best, weights, examples):
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    figure.get_layout_engine().set(wspace=0.08)
    left, middle, right = figure.subplots(1, 3)
    left.plot(losses, label="learned")
    left.axhline(best, color="gray", linestyle="--", label="best of the grid")
    left.set(xlabel="meta-step", ylabel=f"validation loss after {ROUNDS} rounds", yscale="log")
    for name in GRID:
        middle.plot([float(x[name]) for x in history], label=name)
    middle.set(xlabel="meta-step", ylabel="value", yscale="log")
    numbers = np.arange(CLIENTS)
    wrong = numbers < CORRUPTED
    right.bar(numbers[~wrong], weights[~wrong], color="tab:green", label="true labels")
    right.bar(numbers[wrong], weights[wrong], color="tab:red", label="wrong labels")
    right.step(numbers, examples, where="mid", color="black", linewidth=1, label="by examples")
    right.set(xlabel="client", ylabel="weight", xticks=numbers[::2])
    for axes in (left, middle, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path = Path("runs", "learned_hyperparameters.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()
