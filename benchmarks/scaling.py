"""Weak scaling: the number of clients grows with the number of devices.

    python benchmarks/scaling.py [--only compile|tpu|run] [--json PATH]

Programs are compiled for virtual CPU devices, and for TPUs if libtpu is installed, each number of
devices in its own process: the compiled program shows what a device needs and sends without running
it. The runs use one and two devices of a single thread each.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from core import machine
from tables import Table, show, verdict

import fax

DEVICES = (8, 64, 512)
CLIENTS_PER_DEVICE = 4
LAYERS, UNITS, EXAMPLES = 4, 256, 4
MODEL_BYTES = 4 * LAYERS * UNITS**2
RUN_CLIENTS, RUN_STEPS, RUN_EXAMPLES = 16, 20, 16  # per device
TURNS, ROUNDS = 7, 15
TPUS = {8: "v5p:2x2x2", 64: "v5p:4x4x4", 512: "v5p:8x8x8", 4096: "v5p:16x16x16"}
MODEL_CHIPS = 4  # that share a model, where it is sharded
COLLECTIVE = re.compile(
    r" = .+? (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


# The program


def federated_averaging(clients: int) -> Callable:
    """A round whose clients take a step of gradient descent on each of their batches."""

    def loss(params: Sequence[jax.Array], x: jax.Array) -> jax.Array:
        for weight in params:
            x = jnp.tanh(x @ weight)
        return jnp.mean(x**2)

    def train(params: Sequence[jax.Array], batches: jax.Array) -> list[jax.Array]:
        def step(p, x):
            return [w - 0.1 * g for w, g in zip(p, jax.grad(loss)(p, x), strict=True)], None

        trained, _ = jax.lax.scan(step, params, batches)
        return [new - old for new, old in zip(trained, params, strict=True)]

    @fax.program(clients=clients)
    def program(params, batches, weights):
        updates = fax.map(jax.checkpoint(train), fax.broadcast(params), batches)
        return fax.mean(updates, weights=weights)

    return program


def squares(program: Callable) -> Callable:
    return lambda *args: sum(jnp.sum(x**2) for x in program(*args))


def arguments(clients: int, steps: int, examples: int, *, sharded: bool = False) -> tuple:
    """The types of the arguments on the mesh in scope, and whether layers are sharded over it."""

    def of(shape: tuple[int, ...], *spec: str) -> jax.ShapeDtypeStruct:
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    data = of((clients, steps, examples, UNITS), "clients")
    specs = [(None, "model"), ("model", None)] if sharded else [()]
    params = [of((UNITS, UNITS), *specs[i % len(specs)]) for i in range(LAYERS)]
    return params, data, of((clients,), "clients")


# By compilation


def compiling() -> list[Table]:
    """The memory and collectives of a device, and the compilation time."""
    figures = {count: in_process("_compiled", count) for count in DEVICES}
    return [compiled_table(name, figures) for name in ("round", "gradient")]


def compiled_table(name: str, figures: dict[int, Any]) -> Table:
    of = {count: figure[name] for count, figure in figures.items()}
    first, last = of[DEVICES[0]], of[DEVICES[-1]]
    rows: list[Table] = []
    for quantity, unit in (
        ("temporary memory, models", "memory"),
        ("collectives", "collectives"),
        ("compile time, s", "seconds"),
    ):
        row: Table = {"": quantity} | {f"{count} devices": of[count][unit] for count in DEVICES}
        if unit == "seconds":
            growth = last[unit] / first[unit]
            row["target"] = verdict(f"grows less than 2 times ({growth:.2f})", growth < 2)
        else:
            values = [of[count][unit] for count in DEVICES]
            row["target"] = verdict("constant", max(values) <= 1.01 * min(values))
        rows.append(row)
    title = f"A {name} of federated averaging, {CLIENTS_PER_DEVICE} clients a device"
    return dict(title=title, columns=list(rows[0]), rows=rows)


def _compiled(count: int) -> dict[str, Any]:
    """Runs in a process with ``count`` devices."""
    jax.config.update("jax_num_cpu_devices", count)
    clients = CLIENTS_PER_DEVICE * count
    program = federated_averaging(clients)
    figures = {}
    with jax.set_mesh(fax.sharding.make_mesh(clients=count)):
        args = arguments(clients, 2, EXAMPLES)
        jax.jit(jnp.sum).lower(args[0][0]).compile()  # do not count one-time loading
        for name, fn in {"round": program, "gradient": jax.grad(squares(program))}.items():
            seconds = []
            for _ in range(3):
                jax.clear_caches()
                start = time.perf_counter()
                compiled = jax.jit(fn).lower(*args).compile()
                seconds.append(time.perf_counter() - start)
            memory = compiled.memory_analysis().temp_size_in_bytes / MODEL_BYTES
            sent = len(COLLECTIVE.findall(compiled.as_text()))
            figures[name] = dict(memory=memory, collectives=sent, seconds=min(seconds))
    return figures


# By compilation for TPUs


def compiling_for_tpus() -> list[Table]:
    """What a chip holds and sends, and the compilation time, by libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        print("\nTPUs are left out: libtpu is not installed, pip install 'fax-jax[tpu]'.")
        return []
    figures = {chips: in_process("_compiled_for_tpus", chips) for chips in TPUS}
    return [tpu_table(name, figures) for name in figures[8] if name != "empty"]


def tpu_table(name: str, figures: dict[int, Any]) -> Table:
    rows: list[Table] = []
    for quantity, unit in (
        ("temporary memory, models", "memory"),
        ("collectives", "collectives"),
        ("sent by a chip, models", "sent"),
        ("compile time, CPU s", "seconds"),
        ("without that of an empty program", "own"),
    ):
        values = [figure[name][unit] for figure in figures.values()]
        row: Table = {"": quantity}
        row |= {f"{chips:,} chips": value for chips, value in zip(figures, values, strict=True)}
        if unit in ("seconds", "own"):
            growth = values[-1] / values[0]
            row["target"] = verdict(f"grows less than 1.5 times ({growth:.2f})", growth < 1.5)
        else:
            row["target"] = verdict("constant", max(values) <= 1.01 * min(values))
        rows.append(row)
    libtpu = importlib.metadata.version("libtpu")
    title = f"{name}, {CLIENTS_PER_DEVICE} clients a chip, v5p, by the compiler's estimate, libtpu"
    return dict(title=f"{title} {libtpu}", columns=list(rows[0]), rows=rows)


def _compiled_for_tpus(chips: int) -> dict[str, Any]:
    devices = fax.sharding.topology(TPUS[chips])
    figures: dict[str, Any] = {}
    for sharded in (False, True):
        spread = dict(clients=chips // MODEL_CHIPS, model=MODEL_CHIPS) if sharded else {}
        mesh = fax.sharding.make_mesh(devices=devices, **(spread or dict(clients=chips)))
        clients = CLIENTS_PER_DEVICE * chips
        program = federated_averaging(clients)
        with jax.set_mesh(mesh):
            args = arguments(clients, 2, EXAMPLES, sharded=sharded)
            if not sharded:
                jax.jit(jnp.sum).lower(args[0][0]).compile()  # do not count one-time loading
                figures["empty"] = empty = measured(lambda *args: args[2] * 2, args)
            found = measured(program, args)
            found["own"] = found["seconds"] - empty["seconds"]
            where = f"sharded over {MODEL_CHIPS} chips" if sharded else "on every chip"
            figures[f"A round with the model {where}"] = found
    return figures


def measured(fn: Callable, args: tuple) -> dict[str, Any]:
    """What a program holds and sends. Seconds are the processor's, so that others do not matter."""
    seconds = []
    for _ in range(2):
        jax.clear_caches()
        start = time.process_time()
        compiled = jax.jit(fn).lower(*args).compile()
        seconds.append(time.process_time() - start)
    found = fax.inspect.report(compiled)
    return dict(
        memory=found.memory.temporary_bytes / MODEL_BYTES,
        collectives=sum(c.count for c in found.collectives),
        sent=sum(c.total_bytes for c in found.collectives) / MODEL_BYTES,
        seconds=min(seconds),
    )


# By running


def running() -> list[Table]:
    """The time of a round on one device, and on two with twice the clients."""
    turns = [[in_process("_timed", count) for count in (1, 2)] for _ in range(TURNS)]
    one, two = (1e3 * np.median([turn[i] for turn in turns]) for i in range(2))
    ratio = float(np.median([two / one for one, two in turns]))
    row = {
        "": "round, ms",
        f"1 device, {RUN_CLIENTS} clients": one,
        f"2 devices, {2 * RUN_CLIENTS} clients": two,
        "ratio": ratio,
        "target": verdict("at most 1.25", ratio <= 1.25),
    }
    return [dict(title="Rounds on devices of one thread each", columns=list(row), rows=[row])]


def _timed(count: int) -> float:
    """Returns seconds per round, after a warm-up. Runs in a process with ``count`` devices."""
    jax.config.update("jax_num_cpu_devices", count)
    clients = RUN_CLIENTS * count
    with jax.set_mesh(fax.sharding.make_mesh(clients=count)):
        args = jax.tree.map(random, arguments(clients, RUN_STEPS, RUN_EXAMPLES))
        fn = jax.jit(federated_averaging(clients)).lower(*args).compile()
        seconds = []
        for _ in range(1 + ROUNDS):
            start = time.perf_counter()
            jax.block_until_ready(fn(*args))
            seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def random(like: jax.ShapeDtypeStruct) -> jax.Array:
    values = np.random.default_rng(0).normal(size=like.shape) / UNITS**0.5
    return jax.device_put(values.astype(like.dtype), like.sharding)


# Processes


def in_process(name: str, count: int) -> Any:
    """Calls a function of this file in a process that has not initialized JAX."""
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    done = subprocess.run(
        [sys.executable, __file__, "--call", name, str(count)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


PARTS = dict(compile=compiling, tpu=compiling_for_tpus, run=running)
CALLED = {fn.__name__: fn for fn in (_compiled, _compiled_for_tpus, _timed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="run one part")
    parser.add_argument("--json", metavar="PATH", help="write the figures to a file")
    parser.add_argument("--call", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call:
        name, count = options.call
        print(json.dumps(CALLED[name](int(count))))
        return
    tables = []
    for name in [options.only] if options.only else PARTS:
        for table in PARTS[name]():
            tables.append(table)
            show(table)
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine().items()))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(dict(machine=machine(), tables=tables), file, indent=2)


if __name__ == "__main__":
    main()
