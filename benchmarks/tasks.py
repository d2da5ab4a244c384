"""Training and evaluation of the benchmark models, against the same models in handwritten JAX.

    python benchmarks/tasks.py [--only NAME ...] [--turns N] [--json PATH]

The data are synthetic and have the true shapes. A round of training is one jitted function, the
federated averaging of a cohort with all examples on the device. fax is compared with a scan over
clients and steps that branches over padding. Evaluation uses all clients' examples, also on the
device. fax is compared with a jitted pass over as many examples in large batches. The two take
turns, in an order that is reversed every time. A ratio is the median over turns; above 1, fax is
faster.

A second table shows rounds of the language models with clients one after another and vectorized.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from core import machine, show, verdict
from jax import lax

import fax

PyTree = Any
RATE, EVALUATION_BATCH = 0.01, 256
AT_ONCE = (1, 2, 5, 10)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A model with the cohort that it is usually trained on.

    Attributes:
      forward: the handwritten forward pass, ``forward(params, x, key)``, with dropout if there is a
        key.
      shape: the shape of ``"x"``; None for a sequence.
      classes: the number of classes or tokens.
      clients: the number of clients per round.
      batch: the number of examples per batch.
      examples: the smallest and largest number of examples of a client.
      evaluated: the number of clients in evaluation, and the smallest and largest number of their
        examples.
      length: the length of a sequence.
    """

    forward: Callable
    shape: tuple[int, ...] | None
    classes: int
    clients: int
    batch: int
    examples: tuple[int, int]
    evaluated: tuple[int, int, int]
    length: int = 0


# The models by hand


def linear(p: PyTree, x: jax.Array) -> jax.Array:
    return x @ p["kernel"] + p["bias"]


def dropout(x: jax.Array, keep: float, key: jax.Array | None) -> jax.Array:
    if key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, keep, x.shape), x / keep, 0)


def convolution(p: PyTree, x: jax.Array) -> jax.Array:
    dimensions = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(x, p["kernel"], (1, 1), "VALID", dimension_numbers=dimensions)
    return x + p["bias"]


def product_of_slices(p: PyTree, x: jax.Array) -> jax.Array:
    """The same convolution, tens of times faster in a loop on a CPU."""
    height, width = x.shape[1] - 2, x.shape[2] - 2
    slices = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    kernel = p["kernel"].reshape(-1, p["kernel"].shape[-1])
    return jnp.concatenate(slices, -1) @ kernel + p["bias"]


def emnist_conv(params: PyTree, x: jax.Array, key: jax.Array | None) -> jax.Array:
    one, other = (None, None) if key is None else jax.random.split(key)
    convolve = convolution if key is None else product_of_slices
    for name in ("conv1", "conv2"):
        x = jax.nn.relu(convolve(params[name], x))
    if key is None:
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    else:
        x = x.reshape(len(x), 12, 2, 12, 2, -1).max((2, 4))
    x = dropout(x, 0.75, one).reshape(len(x), -1)
    x = dropout(jax.nn.relu(linear(params["hidden"], x)), 0.5, other)
    return linear(params["out"], x)


def dense(params: PyTree, x: jax.Array, key: jax.Array | None) -> jax.Array:
    x = x.reshape(len(x), -1)
    *hidden, out = params["layers"].values()
    for layer in hidden:
        x = jax.nn.relu(linear(layer, x))
    return linear(out, x)


def lstm(params: PyTree, x: jax.Array) -> jax.Array:
    """A scan over steps, differentiated by JAX. The inputs are multiplied before the scan."""

    def step(state, z):
        h, c = state
        i, g, f, o = jnp.split(z + h @ params["recurrent"], 4, -1)
        c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((len(x), len(params["recurrent"])))
    _, states = lax.scan(step, (zeros, zeros), linear(params, x.swapaxes(0, 1)))
    return states.swapaxes(0, 1)


def shakespeare(params: PyTree, x: jax.Array, key: jax.Array | None) -> jax.Array:
    x = jnp.tanh(lstm(params["lstm1"], params["embed"]["embedding"][x]))
    return linear(params["out"], jnp.tanh(lstm(params["lstm2"], x)))


def stackoverflow(params: PyTree, x: jax.Array, key: jax.Array | None) -> jax.Array:
    x = jnp.tanh(lstm(params["lstm"], params["embed"]["embedding"][x]))
    return linear(params["out"], linear(params["project"], x))


def char_lstm(params: PyTree, x: jax.Array, key: jax.Array | None) -> jax.Array:
    return linear(params["out"], lstm(params["lstm"], params["embed"]["embedding"][x]))


PICTURE = (28, 28, 1)
EMNIST_TEST = (3_400, 5, 40)  # about the true number of examples, 77,483
TASKS = {
    "emnist_conv": Task(emnist_conv, PICTURE, 62, 10, 10, (28, 400), EMNIST_TEST),
    "emnist_dense": Task(dense, PICTURE, 62, 340, 20, (28, 400), EMNIST_TEST),
    "emnist_logistic": Task(dense, PICTURE, 62, 10, 10, (28, 400), EMNIST_TEST),
    "cifar100_logistic": Task(dense, (24, 24, 3), 100, 10, 20, (100, 100), (200, 100, 100)),
    "shakespeare_lstm": Task(shakespeare, None, 90, 10, 10, (2, 40), (50, 2, 40), 80),
    "stackoverflow_lstm": Task(stackoverflow, None, 10_004, 50, 16, (4, 28), (40, 8, 48), 20),
    "dense": Task(dense, (64,), 10, 20, 5, (5, 40), (2000, 5, 40)),
    "char_lstm": Task(char_lstm, None, 100, 16, 8, (16, 256), (100, 16, 256), 80),
}


def population(task: Task, clients: int, fewest: int, most: int) -> fax.data.InMemory:
    rng = np.random.default_rng(0)
    data = {}
    for number in range(clients):
        count = int(rng.integers(fewest, most + 1))
        if task.shape is None:
            tokens = rng.integers(1, task.classes, (count, task.length + 1)).astype(np.int32)
            data[number] = {"x": tokens[:, :-1], "y": tokens[:, 1:]}
        else:
            x = rng.random((count, *task.shape), dtype=np.float32)
            y = rng.integers(0, task.classes, count).astype(np.int32)
            data[number] = {"x": x, "y": y}
    return fax.data.InMemory(data)


# By hand


def losses_by_hand(task: Task, params: PyTree, batch: PyTree, key: jax.Array | None) -> tuple:
    scores = task.forward(params, batch["x"], key)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"])
    hits = scores.argmax(-1) == batch["y"]
    if task.shape is None:
        real = batch["y"] != 0
        tokens = jnp.maximum(real.sum(-1), 1)
        losses, hits = ((x * real).sum(-1) / tokens for x in (losses, hits))
    return losses, hits


@functools.partial(jax.jit, static_argnums=0)
def round_by_hand(task: Task, params: PyTree, cohort: fax.data.Cohort) -> tuple:
    """Federated averaging as a loop over clients and a loop over their steps."""
    examples, rows = cohort.batches.examples, cohort.batches.rows

    def loss(params, batch, mask, key):
        losses, hits = losses_by_hand(task, params, batch, key)
        return (losses * mask).sum() / mask.sum(), ((losses * mask).sum(), (hits * mask).sum())

    def client(total, own):
        rows, mask, key, weight = own

        def step(state, at):
            rows, mask, number = at

            def run(state):
                local, tally = state
                batch = {name: x[rows] for name, x in examples.items()}
                grads, new = jax.grad(loss, has_aux=True)(
                    local, batch, mask, jax.random.fold_in(key, number)
                )
                local = jax.tree.map(lambda p, g: p - RATE * g, local, grads)
                return local, jax.tree.map(jnp.add, tally, new)

            return lax.cond(mask.any(), run, lambda s: s, state), None

        zero = (jnp.zeros(()), jnp.zeros(()))
        (local, tally), _ = lax.scan(step, (params, zero), (rows, mask, jnp.arange(len(rows))))
        update = jax.tree.map(lambda y, x: weight * (y - x), local, params)
        return jax.tree.map(jnp.add, total, (update, tally)), None

    zero = (jax.tree.map(jnp.zeros_like, params), (jnp.zeros(()), jnp.zeros(())))
    weights = cohort.num_examples.astype(jnp.float32)
    (total, tally), _ = lax.scan(client, zero, (rows, cohort.mask, cohort.keys, weights))
    params = jax.tree.map(lambda x, t: x + t / weights.sum(), params, total)
    return params, tally


@functools.partial(jax.jit, static_argnums=0)
def batch_by_hand(task: Task, params: PyTree, batch: PyTree) -> tuple:
    losses, hits = losses_by_hand(task, params, batch, None)
    return losses.sum(), hits.sum()


# Measurements


def measure(name: str, turns: int) -> list[dict[str, Any]]:
    task, model = TASKS[name], fax.models.create(name)
    params = model.init(jax.random.key(0))
    return [train(name, task, model, params, turns), test(name, task, model, params, turns)]


def training_cohort(task: Task) -> fax.data.Cohort:
    data = population(task, 2 * task.clients, *task.examples)
    return next(fax.data.cohorts(data, task.clients, task.batch, resident=True))


def train(name, task, model, params, turns) -> dict[str, Any]:
    cohort = training_cohort(task)
    algorithm = fax.algorithms.fedavg(model.loss, optax.sgd(RATE))
    step, state = jax.jit(algorithm.round), algorithm.init(params)
    examples = int(cohort.mask.sum())
    return row(
        name,
        "training",
        examples,
        lambda: step(state, cohort),
        lambda: round_by_hand(task, params, cohort),
        turns,
        lambda ratio: verdict("at least 0.9", ratio >= 0.9),
    )


def at_once(name: str, turns: int) -> dict[str, Any]:
    """Seconds per round, by the number of clients that a device works on at once."""
    task = TASKS[name]
    model, rounds = fax.models.create(name), {}
    params = model.init(jax.random.key(0))
    # Neighbors of similar length, as is best for vectorization.
    cohort = by_length(training_cohort(task))
    for number in AT_ONCE:
        algorithm = fax.algorithms.fedavg(model.loss, optax.sgd(RATE), vectorize=number)
        step, state = jax.jit(algorithm.round), algorithm.init(params)
        rounds[number] = functools.partial(step, state, cohort)
        jax.block_until_ready(rounds[number]())
    seconds: dict[int, list[float]] = {number: [] for number in AT_ONCE}
    for turn in range(turns):
        for number in AT_ONCE if turn % 2 else reversed(AT_ONCE):
            start = time.perf_counter()
            jax.block_until_ready(rounds[number]())
            seconds[number].append(time.perf_counter() - start)
    return {"": name} | {f"{n} at once": float(np.median(own)) for n, own in seconds.items()}


def by_length(cohort: fax.data.Cohort) -> fax.data.Cohort:
    """The cohort with its longest clients first."""
    order = np.argsort(-np.asarray(cohort.mask).sum((1, 2)), kind="stable")
    rows = dataclasses.replace(cohort, batches=cohort.batches.rows)
    rows = jax.tree.map(lambda x: x[order], rows)
    return dataclasses.replace(rows, batches=dataclasses.replace(cohort.batches, rows=rows.batches))


def test(name, task, model, params, turns) -> dict[str, Any]:
    data = population(task, *task.evaluated)
    clients = [data.client(i) for i in data.client_ids()]
    x, y = (np.concatenate([own[feature] for own in clients]) for feature in "xy")
    count = -(-len(x) // EVALUATION_BATCH)
    size = -(-len(x) // count)
    batches = [
        jax.device_put(
            {
                "x": np.resize(x[i : i + size], (size, *x.shape[1:])),
                "y": np.resize(y[i : i + size], (size, *y.shape[1:])),
            }
        )
        for i in range(0, len(x), size)
    ]
    sequences = task.shape is None
    ready = fax.metrics.prepare(data, batch_size=EVALUATION_BATCH)
    metrics = {
        "loss": fax.metrics.TokenLoss() if sequences else fax.metrics.CrossEntropy(),
        "accuracy": fax.metrics.TokenAccuracy() if sequences else fax.metrics.Accuracy(),
    }
    return row(
        name,
        "evaluation",
        len(x),
        lambda: fax.metrics.evaluate(model.apply, params, ready, metrics),
        lambda: jax.device_get([batch_by_hand(task, params, batch) for batch in batches]),
        turns,
        lambda ratio: verdict("at least 1 / 1.3", ratio >= 1 / 1.3),
    )


def row(name, what, examples, ours, by_hand, turns, target) -> dict[str, Any]:
    for run in (ours, by_hand):
        jax.block_until_ready(run())
    seconds: list[list[float]] = [[], []]
    for turn in range(turns):
        for which in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter()
            jax.block_until_ready((ours, by_hand)[which]())
            seconds[which].append(time.perf_counter() - start)
    ratio = float(np.median(np.divide(seconds[1], seconds[0])))
    speeds = [examples / float(np.median(own)) for own in seconds]
    return {
        "": f"{name}, {what}",
        "fax": speeds[0],
        "by hand": speeds[1],
        "fax / by hand": ratio,
        "target": target(ratio),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", metavar="PATH", help="write the figures to a file")
    options = parser.parse_args()
    rows = []
    for name in options.only:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        rows += measure(name, options.turns)
    tables = [dict(title="Examples a second", columns=list(rows[0]), rows=rows)]
    if languages := [name for name in options.only if TASKS[name].shape is None]:
        rows = [at_once(name, options.turns) for name in languages]
        tables.append(dict(title="Seconds of a round", columns=list(rows[0]), rows=rows))
    for table in tables:
        show(table)
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine().items()))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(dict(machine=machine(), tables=tables), file, indent=2)


if __name__ == "__main__":
    main()
