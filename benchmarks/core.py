"""The core benchmark: fax against DrJAX and against `jax.vmap` by hand.

    python benchmarks/core.py [--only trace|compile|compute|sums|rounds|memory] [--json PATH]

Runs of the three take turns, so that a temporarily busy machine slows all of them. Times are
medians; a ratio is the median of the ratios of runs in the same turn.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import workloads
from compiling import compiling
from peers.workloads import cohort, examples
from sums import sums
from tables import Table, show, verdict
from timing import Times, clock, compare, take_turns
from workloads import NAMES, WAYS, Batches, Fax

import fax

TRACED_ROUNDS, TRACED_CLIENTS, TRACED_LEAVES = 200, 10, (100, 400, 1600)
COMPUTE = dict(clients=16, steps=4, batch=64, widths=(784, 512, 512, 62))
ROUNDS = {
    "logistic regression": dict(clients=100, widths=workloads.LOGISTIC),
    "dense network": dict(clients=50, widths=workloads.DENSE),
}
WARM_UP_ROUNDS, TIMED_ROUNDS = 2, 11
LAYERS, UNITS, EXAMPLES = 16, 256, 4
MODEL_BYTES = 4 * LAYERS * UNITS * UNITS
MEMORY_CLIENTS = {"fax": (8, 64, 256, 4096), "DrJAX": (8, 64, 256), "vmap": (8, 64, 256)}


# Tracing


def trace() -> list[Table]:
    """The time to trace and lower programs of many rounds or leaves, and their gradients."""
    return [trace_rounds(), trace_leaves()]


def lowering(fn: Callable, *args: Any) -> float:
    """CPU seconds to trace and lower a function, which uses one thread."""
    start = time.process_time()
    jax.jit(fn).trace(*args).lower()
    return time.process_time() - start


def trace_rounds() -> Table:
    """A program of many small rounds, which are all the same or differ in a number."""
    x = jnp.ones(8)

    def of(way: Any, turn: int) -> Times:
        del turn
        alike = [1.0] * TRACED_ROUNDS
        many_rounds, for_gradient = (many_small_rounds(way(TRACED_CLIENTS), alike) for _ in "ab")
        different = many_small_rounds(way(TRACED_CLIENTS), [*map(float, range(TRACED_ROUNDS))])
        return {
            "program": lowering(many_rounds, x),
            "gradient": lowering(jax.grad(lambda x: jnp.sum(for_gradient(x))), x),
            "program, all rounds different": lowering(different, x),
        }

    runs = {way.name: functools.partial(of, way) for way in WAYS}
    take_turns(runs, 1)
    times = take_turns(runs, 9)
    rows = []
    for quantity in ("program", "gradient", "program, all rounds different"):
        row = {"": quantity} | compare(times, quantity, per=TRACED_ROUNDS)
        if quantity == "program":
            row["target"] = verdict("at most 3 times vmap", row["vmap / fax"] >= 1 / 3)
        rows.append(row)
    return timing_table(f"Trace and lower {TRACED_ROUNDS} rounds, ms a round", rows)


def many_small_rounds(way: Any, numbers: Iterable[float]) -> Callable:
    """Makes a new program, which is in no cache, with a round for each number."""

    @way.program
    def program(x):
        for number in numbers:
            x = way.mean(lambda z, _, number=number: z * 2 + number, x, ())
        return x

    return program


def trace_leaves() -> Table:
    """A round of a model with many leaves, with operations on each leaf after the map."""
    data = jnp.ones((TRACED_CLIENTS, 3))

    def of(way: Any, leaves: int, turn: int) -> Times:
        del turn
        params = [jnp.ones(3)] * leaves
        one_round, for_gradient = (round_of_leaves(way(TRACED_CLIENTS)) for _ in range(2))

        def total(params, data):
            return sum(map(jnp.sum, for_gradient(params, data)))

        return {
            "program": lowering(one_round, params, data),
            "gradient": lowering(jax.grad(total), params, data),
        }

    rows = []
    for leaves in TRACED_LEAVES:
        times = take_turns({way.name: functools.partial(of, way, leaves) for way in WAYS}, 3)
        for quantity in ("program", "gradient"):
            row = {"": f"{quantity}, {leaves} leaves"} | compare(times, quantity)
            row["target"] = verdict("at most 3 times vmap", row["vmap / fax"] >= 1 / 3)
            rows.append(row)
    return timing_table("Trace and lower a round of many leaves, ms", rows)


def round_of_leaves(way: Any) -> Callable:
    """Makes a new program, which is in no cache."""

    @way.program
    def program(params, data):
        def between(updates):
            for _ in range(2):
                updates = jax.tree.map(jnp.subtract, updates, way.broadcast(params))
            return updates

        def work(params, data):
            return [leaf * data for leaf in params]

        return way.mean(work, params, data, between=between)

    return program


# A round of large matrix products


def compute() -> Table:
    """The time of a round in which all clients are vectorized and arithmetic dominates."""
    clients, steps, batch, widths = (COMPUTE[k] for k in ("clients", "steps", "batch", "widths"))
    rng = np.random.default_rng(0)
    shape = (clients, steps, batch)
    batches = jax.device_put(
        Batches(
            rng.random((*shape, widths[0]), dtype=np.float32),
            rng.integers(0, widths[-1], shape, dtype=np.int32),
            np.ones(shape, np.float32),
        )
    )
    params = workloads.init(widths)
    work = functools.partial(workloads.epoch, skip=False)

    def compiled(way: Any) -> Callable:
        fn = way.program(lambda params, batches: way.mean(work, params, batches))
        return jax.jit(fn).lower(params, batches).compile()

    ways = [Fax(clients, vectorize=clients)] + [way(clients) for way in WAYS if way is not Fax]
    compiled_by = {way.name: compiled(way) for way in ways}
    results = [fn(params, batches) for fn in compiled_by.values()]
    for other in results[1:]:
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), results[0], other)

    def of(fn: Callable, turn: int) -> Times:
        del turn
        return {"round": clock(fn, params, batches)[0]}

    runs = {name: functools.partial(of, fn) for name, fn in compiled_by.items()}
    take_turns(runs, 3)
    row = {"": "round"} | compare(take_turns(runs, 21), "round")
    row["target"] = verdict("within 5 % of vmap", row["vmap / fax"] >= 1 / 1.05)
    title = f"{clients} clients at once, {steps} steps of batch {batch}, ms a round"
    return timing_table(title, [row])


# Rounds of federated averaging


def rounds() -> list[Table]:
    """The time of rounds of federated averaging over clients of different sizes."""
    return [rounds_of(name, **workload) for name, workload in ROUNDS.items()]


def rounds_of(workload: str, clients: int, widths: Sequence[int]) -> Table:
    """Trains in all ways on the same cohorts, from the same parameters."""
    cohorts = [cohort(number, clients) for number in range(WARM_UP_ROUNDS + TIMED_ROUNDS)]
    for client in np.unique(np.concatenate(cohorts)):
        examples(int(client))
    params = workloads.init(widths)
    runs = {
        f"{way.name}, {how}": Training(way(clients), prepare, params, cohorts)
        for way in WAYS
        for how, prepare in workloads.PREPARATIONS.items()
    }
    take_turns(runs, WARM_UP_ROUNDS)
    times = take_turns({name: run.timed for name, run in runs.items()}, TIMED_ROUNDS)
    baseline = next(iter(runs))
    call, whole = (compare(times, quantity, baseline) for quantity in ("call", "round"))
    losses = {name: evaluate(run.params) for name, run in runs.items()}
    np.testing.assert_allclose(list(losses.values()), losses[baseline], rtol=0.01)
    rows = []
    for name in runs:
        row: Table = {"": name, "compiled call": call[name], "whole round": whole[name]}
        if name != baseline:
            row["call / first"] = call[f"{name} / {baseline}"]
            row["round / first"] = whole[f"{name} / {baseline}"]
        if name == "DrJAX, padded on the host":
            row["target"] = verdict(
                "at least 3", min(row["call / first"], row["round / first"]) >= 3
            )
        rows.append(row | {"final loss": losses[name]})
    return dict(
        title=f"Federated averaging, {workload}, {clients} clients, ms a round",
        columns=[*rows[0], "call / first", "round / first", "target"],
        rows=rows,
    )


class Training:
    """Training in one of the ways. Calling it runs a round."""

    def __init__(self, way: Any, prepare: Callable, params: Any, cohorts: Sequence[np.ndarray]):
        self.params = params
        self._state = workloads.adam().init(params)
        self._prepare = prepare
        self._cohorts = cohorts
        self._round = jax.jit(workloads.federated_averaging(way))
        of_every_shape = {workloads.padded_shape(cohort): i for i, cohort in enumerate(cohorts)}
        for number in of_every_shape.values():  # so that no timed round compiles
            jax.block_until_ready(self._call(prepare(number, cohorts[number])))

    def __call__(self, number: int) -> Times:
        start = time.perf_counter()
        data = jax.device_put(self._prepare(number, self._cohorts[number]))
        jax.block_until_ready(data)
        seconds, (self.params, self._state) = clock(self._call, data)
        return {"call": seconds, "round": time.perf_counter() - start}

    def timed(self, turn: int) -> Times:
        return self(WARM_UP_ROUNDS + turn)

    def _call(self, data: Any) -> Any:
        return self._round(self.params, self._state, data)


def evaluate(params: Any) -> float:
    """The loss on five clients' examples."""
    x, y = map(np.concatenate, zip(*map(examples, range(1, 6)), strict=True))
    return float(jax.jit(workloads.loss)(params, Batches(x, y, np.ones(len(y), np.float32))))


# Memory


def memory() -> Table:
    """The temporary memory of a compiled program, as reported by XLA."""
    columns = [(way, n) for way in WAYS for n in MEMORY_CLIENTS[way.name]]
    rows: dict[str, Table] = {}
    for way, n in columns:
        for name, (fn, args) in memory_programs(way(n)).items():
            compiled = jax.jit(fn).lower(*args).compile()
            used = compiled.memory_analysis().temp_size_in_bytes / MODEL_BYTES
            rows.setdefault(name, {"": name})[f"{way.name}, {n}"] = used
    for row in rows.values():
        of_fax = [row[f"fax, {n}"] for n in MEMORY_CLIENTS["fax"]]
        row["target"] = verdict("constant", max(of_fax) <= 1.05 * min(of_fax))
    names = [f"{name}, {n}" for name in NAMES for n in MEMORY_CLIENTS[name]]
    title = f"Temporary memory by number of clients, in models of {MODEL_BYTES // 4:,} parameters"
    return dict(title=title, columns=["", *names, "target"], rows=list(rows.values()))


def memory_programs(way: Any) -> dict[str, tuple[Callable, Sequence[Any]]]:
    """The programs to compile, and the types of their arguments."""
    params = [jax.ShapeDtypeStruct((UNITS, UNITS), jnp.float32)] * LAYERS
    data = jax.ShapeDtypeStruct((way.clients, EXAMPLES, UNITS), jnp.float32)
    weights = jax.ShapeDtypeStruct((way.clients,), jnp.float32)
    mask = jax.ShapeDtypeStruct((way.clients,), bool)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    update = functools.partial(workloads.local_steps, rate=0.1, steps=1)

    @way.program
    def mean(params, data):
        return way.mean(update, params, data)

    @way.program
    def weighted_mean(params, data, weights):
        return way.mean(update, params, data, weights=weights)

    @way.program
    def masked_mean(params, data, mask):
        return way.mean(update, params, data, where=mask)

    @way.program
    def after_many_steps(params, data, rate):
        work = functools.partial(workloads.local_steps, rate=rate, steps=100)
        return way.mean(work, params, data)

    def mean_of_many_steps(params, data):
        return after_many_steps(params, data, 0.1)

    def tangent(params, data, rate):
        of_rate = functools.partial(after_many_steps, params, data)
        return jax.jvp(of_rate, (rate,), (jnp.ones_like(rate),))

    @way.program
    def squares(params, data, weights):
        means = way.mean(jax.checkpoint(update), params, data, weights=weights)
        return sum(jnp.sum(leaf**2) for leaf in means)

    return {
        "mean": (mean, (params, data)),
        "weighted mean": (weighted_mean, (params, data, weights)),
        "masked mean": (masked_mean, (params, data, mask)),
        "mean, 100 local steps": (mean_of_many_steps, (params, data)),
        "JVP, 100 local steps": (tangent, (params, data, rate)),
        "gradient, parameters": (jax.grad(squares), (params, data, weights)),
        "gradient, both": (jax.grad(squares, (0, 2)), (params, data, weights)),
    }


# Reporting


def timing_table(title: str, rows: Sequence[Table]) -> Table:
    columns = ["", *NAMES, "DrJAX / fax", "vmap / fax", "target"]
    return dict(title=title, columns=columns, rows=rows)


def machine() -> dict[str, Any]:
    drjax = workloads.drjax
    return {
        "platform": f"{platform.system()} {platform.machine()}, {jax.default_backend()}",
        "CPUs": os.cpu_count(),
        "Python": platform.python_version(),
        "jax": jax.__version__,
        "DrJAX": drjax.__version__ if drjax else "not installed",
        "fax": fax.__version__,
    }


def without_drjax(table: Table) -> Table:
    """The table with "not installed" in place of DrJAX's figures."""
    blank = {c: "not installed" for c in table["columns"] if c.startswith("DrJAX")}
    return table | {"rows": [blank | row for row in table["rows"]]}


PARTS = {
    "trace": trace,
    "compile": compiling,
    "compute": compute,
    "sums": sums,
    "rounds": rounds,
    "memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="run one part")
    parser.add_argument("--json", metavar="PATH", help="write the figures to a file")
    options = parser.parse_args()
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    tables = []
    for name in [options.only] if options.only else PARTS:
        made = PARTS[name]()
        for table in made if isinstance(made, list) else [made]:
            tables.append(table)
            show(table if workloads.drjax else without_drjax(table))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(dict(machine=machine(), tables=tables), file, indent=2)


if __name__ == "__main__":
    main()
