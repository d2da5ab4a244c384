"""The time from a Python function to an executable, for a round of federated averaging.

`fax.algorithms.fedavg` is compared with the same round in handwritten JAX, a loop over clients and
a loop over their steps. Both have the same loss function, cohort and results, and work on one
client at a time. No repetition finds anything in a cache. If libtpu is installed, both are also
compiled for a TPU, which does not have to be there.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from tables import Table, verdict
from timing import Times, compare, take_turns

import fax

PyTree = Any
CLIENTS, STEPS, BATCH, EXAMPLES = 50, 10, 20, 5000
RATE, TURNS, TARGET = 0.1, 5, 1.15
PICTURE, TOKENS = jax.ShapeDtypeStruct((28, 28, 1), jnp.float32), jnp.zeros(80, jnp.int32)
LABEL = jnp.zeros((), jnp.int32)
MODELS = {
    "emnist_logistic": {"x": PICTURE, "y": LABEL},
    "emnist_dense": {"x": PICTURE, "y": LABEL},
    "emnist_conv": {"x": PICTURE, "y": LABEL},
    "shakespeare_lstm": {"x": TOKENS, "y": TOKENS},
}
PHASES = ("trace", "lower", "compile", "total")


def compiling() -> list[Table]:
    """The time to trace, lower and compile a round, for CPU and for TPU."""
    tables = [compiling_for(jax.devices("cpu")[0], "CPU")]
    if importlib.util.find_spec("libtpu"):
        tables.append(compiling_for(fax.sharding.topology("v5e:2x2")[0], "TPU v5e"))
    return tables


def compiling_for(device: Any, name: str) -> Table:
    rows = [compiling_model(model, device) for model in MODELS]
    columns = ["", "fax", "by hand", *PHASES[:-1], "fax / by hand", "target"]
    return dict(title=f"Compile a round for {name}, ms", columns=columns, rows=rows)


def compiling_model(name: str, device: Any) -> Table:
    """The whole time, and for each phase the ratio of fax to the handwritten program."""
    model = fax.models.create(name)
    algorithm = fax.algorithms.fedavg(model.loss, optax.sgd(RATE), vectorize=1)
    params = jax.eval_shape(model.init, jax.random.key(0))
    state, cohort = jax.eval_shape(algorithm.init, params), cohort_of(MODELS[name])
    by_hand = functools.partial(round_by_hand, model.loss)
    runs = {
        "fax": functools.partial(compile_once, algorithm.round, (state, cohort), device),
        "by hand": functools.partial(compile_once, by_hand, (params, cohort), device),
    }
    take_turns(runs, 1)
    times = take_turns(runs, TURNS)
    found = {phase: compare(times, phase, baseline="by hand") for phase in PHASES}
    ratios = {phase: own["fax / by hand"] for phase, own in found.items()}
    met = verdict(f"at most {TARGET}", ratios["total"] <= TARGET)
    return {"": name, "target": met} | found["total"] | ratios


def compile_once(fn: Callable, types: PyTree, device: Any, turn: int) -> Times:
    """Seconds of each phase for a function that is in no cache."""
    del turn
    jax.clear_caches()
    sharding = jax.sharding.SingleDeviceSharding(device)
    jitted = jax.jit(lambda *args: fn(*args), in_shardings=sharding, out_shardings=sharding)
    times = [time.process_time()]
    traced = jitted.trace(*types)
    times.append(time.process_time())
    lowered = traced.lower(lowering_platforms=(device.platform,))
    times.append(time.process_time())
    lowered.compile()
    times.append(time.process_time())
    seconds = [end - start for start, end in itertools.pairwise(times)]
    return dict(zip(PHASES, [*seconds, sum(seconds)], strict=True))


def cohort_of(example: PyTree) -> fax.data.Cohort:
    """The types of a cohort whose examples are on the device."""

    def build(example: PyTree) -> fax.data.Cohort:
        def full(dtype: Any, *shape: int) -> jax.Array:
            return jnp.zeros((CLIENTS, *shape), dtype)

        examples = jax.tree.map(lambda x: jnp.zeros((EXAMPLES, *x.shape), x.dtype), example)
        batches = fax.data.Gathered(examples, full(jnp.int32, STEPS, BATCH))
        keys = jax.random.split(jax.random.key(0), CLIENTS)
        mask = full(bool, STEPS, BATCH)
        return fax.data.Cohort(batches, mask, full(jnp.int32), full(jnp.int32), keys)

    return jax.eval_shape(build, example)


def round_by_hand(loss: Callable, params: PyTree, cohort: fax.data.Cohort) -> tuple:
    """Federated averaging, with the mean loss and metrics of all and of each client."""
    examples, rows = cohort.batches.examples, cohort.batches.rows

    def mean_loss(params, batch, mask, key):
        losses, metrics = loss(params, batch, key)
        sums = {k: jnp.where(mask, x, 0).sum() for k, x in (metrics | {"loss": losses}).items()}
        count = mask.sum(dtype=jnp.float32)
        return sums["loss"] / jnp.maximum(count, 1), sums | {"count": count}

    def step(rows, mask, key, state):
        local, tally = state
        batch = {name: x[rows] for name, x in examples.items()}
        gradient, new = jax.grad(mean_loss, has_aux=True)(local, batch, mask, key)
        local = jax.tree.map(lambda p, g: p - RATE * g, local, gradient)
        return local, jax.tree.map(jnp.add, tally, new)

    def client(totals, own):
        rows, mask, key, count = own

        def at(state, own):
            number, rows, mask = own
            key_of_step = jax.random.fold_in(key, number)
            run = functools.partial(step, rows, mask, key_of_step)
            return lax.cond(mask.any(), run, lambda state: state, state), None

        (local, tally), _ = lax.scan(at, (params, zeros), (jnp.arange(STEPS), rows, mask))
        update = jax.tree.map(lambda y, x: count * (y - x), local, params)
        return jax.tree.map(jnp.add, totals, (update, tally)), means(tally)

    def means(tally):
        return {k: x / jnp.maximum(tally["count"], 1) for k, x in tally.items() if k != "count"}

    zeros = dict.fromkeys(("loss", "accuracy", "count"), jnp.zeros(()))
    start = jax.tree.map(jnp.zeros_like, params), zeros
    counts = cohort.num_examples.astype(jnp.float32)
    (total, tally), each = lax.scan(client, start, (rows, cohort.mask, cohort.keys, counts))
    params = jax.tree.map(lambda x, t: x + t / jnp.maximum(counts.sum(), 1), params, total)
    return params, means(tally), each
