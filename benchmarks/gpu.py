"""Rounds on one GPU: fax by the number of vectorized clients, DrJAX, and by hand.

    python benchmarks/gpu.py [--tasks "logistic;dense"] [--seconds 480] [--json PATH]

A round of federated averaging with 10, 100 and 1,000 clients of ten steps each: the three models of
the comparison with the peers, an LSTM and a transformer. fax's default is compared with the best
of 1 to 256 vectorized clients, with DrJAX, and with two rounds by hand: all clients in `jax.vmap`,
and one after another in a loop. Programs take turns; a time is a median,
or that of the only run if it takes longer than two seconds.

It stops measuring when ``--seconds`` are over, and says what is missing. A program that the device
cannot run is in the table as such. With ``--json``, what has been measured is written after each
client function, should the device be lost. It runs on any device.
Memory is that of the compiled program, temporary and results; the most that the device had in use
is in the last line, where it tells.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from core import machine
from jax import lax
from tables import Table, show
from timing import clock, take_turns
from tpu_clients import RATE, TASKS, Task
from workloads import DrJax, Fax, Vmap, drjax

PyTree = Any
# W1 to W3, and larger models.
CHOSEN = ("EMNIST CNN", "logistic", "dense", "Shakespeare LSTM", "transformer 10 M")
CLIENTS, STEPS, TURNS = (100, 10, 1000), 10, 5
SLOW = 2.0  # seconds; a program that takes longer is measured once
VECTORIZED = (1, 4, 16, 64, 256)
OUT_OF_MEMORY, FAILED, DEFAULT = "out of memory", "failed", "fax, default"


@dataclasses.dataclass(frozen=True)
class Loop:
    """By hand, one client after another."""

    clients: int

    def program(self, fn: Callable) -> Callable:
        return fn

    def mean(self, work: Callable, server: PyTree, data: PyTree) -> PyTree:
        def add(total, own):
            return jax.tree.map(jnp.add, total, work(server, own)), None

        total, _ = lax.scan(add, jax.tree.map(jnp.zeros_like, server), data)
        return jax.tree.map(lambda t: t / self.clients, total)


def ways(clients: int, vectorized: Sequence[int]) -> dict[str, Any]:
    """The ways to write a round, the most important ones first."""
    found: dict[str, Any] = {DEFAULT: Fax(clients)}
    if drjax is not None:
        found["DrJAX"] = DrJax(clients)
    found |= {"by hand, vmap": Vmap(clients), "by hand, loop": Loop(clients)}
    return found | {f"fax, {v}": Fax(clients, v) for v in vectorized if v <= clients}


def round_of(task: Task, way: Any) -> Callable:
    """Federated averaging: steps of gradient descent at every client, and their mean."""

    def client(params, data):
        def step(y, batch):
            gradient = jax.grad(task.loss)(y, batch)
            return jax.tree.map(lambda y, g: y - RATE * g, y, gradient), None

        return jax.tree.map(jnp.subtract, lax.scan(step, params, data)[0], params)

    @way.program
    def one_round(params, data):
        return jax.tree.map(jnp.add, params, way.mean(client, params, data))

    return one_round


def arguments(task: Task, clients: int, steps: int) -> tuple[PyTree, PyTree]:
    """Small parameters, and data that any of the models can use."""
    rng = np.random.default_rng(0)

    def values(like: jax.ShapeDtypeStruct, *sizes: int) -> jax.Array:
        shape = (*sizes, *like.shape)
        if jnp.issubdtype(like.dtype, jnp.integer):
            return jnp.asarray(rng.integers(1, 62, shape), like.dtype)  # classes and tokens
        return jnp.asarray(rng.random(shape, np.float32) / 20, like.dtype)

    params = jax.tree.map(values, task.params)
    return params, jax.tree.map(lambda x: values(x, clients, steps), task.batch)


class Budget:
    """The time that is left."""

    def __init__(self, seconds: float):
        self._end = time.perf_counter() + seconds

    @property
    def spent(self) -> bool:
        return time.perf_counter() >= self._end


def measure(
    task: Task, clients: int, steps: int, vectorized: Sequence[int], budget: Budget
) -> dict[str, Any]:
    """Milliseconds and MiB of a round by way, why it did not run, or None if the time is over."""
    found: dict[str, Any] = dict.fromkeys(ways(clients, vectorized))
    try:
        args = jax.block_until_ready(arguments(task, clients, steps))
    except jax.errors.JaxRuntimeError as error:
        return dict.fromkeys(found, why(error))
    runs: dict[str, Callable] = {}
    for name, way in ways(clients, vectorized).items():
        if budget.spent:
            break
        try:
            fn = jax.jit(round_of(task, way)).lower(*args).compile()
            first, _ = clock(fn, *args)
        except jax.errors.JaxRuntimeError as error:
            found[name] = why(error)
            continue
        memory = fn.memory_analysis()
        used = memory.temp_size_in_bytes + memory.output_size_in_bytes
        found[name] = dict(mib=used / 2**20, ms=1e3 * first)
        if first < SLOW:
            runs[name] = lambda turn, fn=fn: {"s": clock(fn, *args)[0]}
    for name, times in take_turns(runs, TURNS, lambda: budget.spent).items():
        if times:
            found[name]["ms"] = 1e3 * float(np.median([each["s"] for each in times]))
    return found


def why(error: Exception) -> str:
    """Why a program did not run, for a cell. Libraries of a GPU have errors of their own."""
    print(f"{error}"[:500], file=sys.stderr)
    return OUT_OF_MEMORY if "RESOURCE_EXHAUSTED" in str(error) else FAILED


def missing(found: dict[str, dict[str, Any]]) -> list[str]:
    """What was not measured, by what it is."""
    return [f"{point}: {way}" for point, own in found.items() for way in own if own[way] is None]


def tables(found: dict[str, dict[str, Any]]) -> list[Table]:
    """Milliseconds and MiB, a row for each client function and number of clients."""
    times, memory = (
        [row(point, own, unit) for point, own in found.items()] for unit in ("ms", "mib")
    )
    return [
        dict(
            title=title, columns=list(dict.fromkeys(c for cells in rows for c in cells)), rows=rows
        )
        for title, rows in (("Milliseconds of a round", times), ("Memory, MiB", memory))
    ]


def row(point: str, own: dict[str, Any], unit: str) -> dict[str, Any]:
    cells = {way: x[unit] if isinstance(x, dict) else x for way, x in own.items()}
    numbers = {way: x for way, x in cells.items() if isinstance(x, float)}
    best = min((x for way, x in numbers.items() if way.startswith("fax")), default=None)
    ratio = {}
    if unit == "ms" and best is not None and DEFAULT in numbers:
        ratio = {"default / best": numbers[DEFAULT] / best}
    return {"": point, **cells, **ratio}


def run(
    tasks: Iterable[str],
    clients: Sequence[int],
    steps: int,
    vectorized: Sequence[int],
    seconds: float,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, dict[str, Any]]:
    """All figures. All client functions get their turn with one number of clients first.

    ``keep`` gets all that has been measured so far, after each client function.
    """
    budget, found = Budget(seconds), {}
    for count in clients:
        for name in tasks:
            point = f"{name}, {count:,} clients"
            found[point] = dict.fromkeys(ways(count, vectorized))
            if not budget.spent:
                found[point] = measure(TASKS[name](), count, steps, vectorized, budget)
                keep(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default=";".join(CHOSEN), help="separated by semicolons")
    parser.add_argument("--seconds", type=float, default=480, help="start no program after these")
    parser.add_argument("--json", metavar="PATH", help="write the figures to a file")
    options = parser.parse_args()
    tasks = options.tasks.split(";")
    if unknown := set(tasks) - set(TASKS):
        parser.error(f"--tasks: {', '.join(unknown)} unknown, choose of {', '.join(TASKS)}")
    device = jax.devices()[0]
    print(
        f"{device.device_kind}, " + ", ".join(f"{key} {value}" for key, value in machine().items())
    )

    def keep(found: dict[str, Any]) -> None:
        if options.json:
            figures = dict(device=device.device_kind, machine=machine(), rounds=found)
            with open(options.json, "w") as file:
                json.dump(figures, file, indent=2)

    found = run(tasks, CLIENTS, STEPS, VECTORIZED, options.seconds, keep)
    for table in tables(found):
        show(table)
    for each in missing(found):
        print(f"not measured, for lack of time: {each}")
    if stats := device.memory_stats():
        print(f"most in use: {stats.get('peak_bytes_in_use', 0) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
