"""The part of the core benchmark on sums: the cost and benefit of their second accumulator.

A sum of more than 16 batches has one; for arrays of more than 256 elements, a sum of more than
4,096 batches. The handwritten sum is a `jax.lax.scan` over clients with one accumulator.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import workloads
from tables import Table, verdict
from timing import compare, take_turns
from workloads import Batches

import fax

ADDED = {  # clients, and the shape of what they contribute
    "numbers": (1_000_000, ()),
    "4,096 numbers": (10_000, (4096,)),
    "65,536 numbers, 4,096 clients": (4096, (65_536,)),
    "65,536 numbers, 5,000 clients": (5000, (65_536,)),
}
TRAINED = [
    dict(clients=16, steps=4, batch=64, widths=(784, 512, 512, 62)),
    dict(clients=4112, steps=4, batch=20, widths=(128, 62)),
]


def sums() -> Table:
    """The cost and benefit of a sum's second accumulator, against a handwritten scan."""
    rows = [sum_of(name, *shape) for name, shape in ADDED.items()]
    rows += [training(**settings) for settings in TRAINED]
    columns = ["", "fax", "by hand", "fax / by hand", "fax, error", "by hand, error", "target"]
    return dict(title="Sums of participants one by one, ms of CPU time", columns=columns, rows=rows)


def sum_of(name: str, clients: int, shape: tuple[int, ...]) -> Table:
    """Clients that do almost no work: each multiplies the server's value by a number."""
    value, x = jnp.full(shape, 0.1), jnp.ones(clients)

    @fax.program(clients=clients)
    def total(value, x):
        sent = fax.broadcast(value)
        return fax.sum(fax.map(lambda v, x: v * x, sent, x, vectorize=1))

    def by_hand(value, x):
        start = jnp.zeros_like(value)
        return jax.lax.scan(lambda total, x: (total + value * x, None), start, x)[0]

    row, results = against_by_hand(total, by_hand, (value, x), turns=15)
    exact = clients * np.float64(np.float32(0.1))
    errors = {
        f"{way}, error": f"{np.max(np.abs(np.float64(result) / exact - 1)):.0e}"
        for way, result in results.items()
    }
    return {"": name} | row | errors


def training(clients: int, steps: int, batch: int, widths: Sequence[int]) -> Table:
    """Clients that train. Their data are one of 16 sets of batches."""
    rng = np.random.default_rng(0)
    shape = (16, steps, batch)
    pool = Batches(
        rng.random((*shape, widths[0]), dtype=np.float32),
        rng.integers(0, widths[-1], shape, dtype=np.int32),
        np.ones(shape, np.float32),
    )
    args = workloads.init(widths), jax.device_put(pool), jnp.arange(clients) % 16

    def work(params, pool, number):
        return workloads.epoch(params, jax.tree.map(lambda x: x[number], pool), skip=False)

    @fax.program(clients=clients)
    def mean(params, pool, numbers):
        sent = fax.broadcast((params, pool))
        return fax.mean(fax.map(work, *sent, numbers, vectorize=1))

    def by_hand(params, pool, numbers):
        def step(total, number):
            return jax.tree.map(jnp.add, total, work(params, pool, number)), None

        total, _ = jax.lax.scan(step, jax.tree.map(jnp.zeros_like, params), numbers)
        return jax.tree.map(lambda x: x / clients, total)

    row, _ = against_by_hand(mean, by_hand, args, turns=15)
    name = f"{clients:,} clients, {steps} steps of {'-'.join(map(str, widths))}"
    return {"": name, "target": verdict("at most 1.02", row["fax / by hand"] <= 1.02)} | row


def against_by_hand(
    fn: Callable, by_hand: Callable, args: Sequence[Any], turns: int
) -> tuple[Table, dict[str, Any]]:
    """Returns CPU times of runs that take turns, and the results."""
    fns = {"fax": jax.jit(fn), "by hand": jax.jit(by_hand)}
    results = {way: jax.device_get(fn(*args)) for way, fn in fns.items()}
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0.02, atol=1e-4), *results.values()
    )

    def of(fn: Callable, turn: int) -> dict[str, float]:
        del turn
        start = time.process_time()
        jax.block_until_ready(fn(*args))
        return {"call": time.process_time() - start}

    runs = {way: functools.partial(of, fn) for way, fn in fns.items()}
    return compare(take_turns(runs, turns), "call", baseline="by hand"), results
