"""The two tasks of FedJAX's paper on TPU v2, by the compiler's estimate: fax and DrJAX.

    python benchmarks/tpu.py [--only paper|vectorize|clients] [--json PATH] [--figure PATH]

*Paper*: a round of EMNIST with 10 clients and of Stack Overflow with 50, on one core and on eight,
and what 1,500 such rounds take. *Vectorize*: these rounds on one core, by the number of clients
that are vectorized. *Clients*: rounds of 10 to 500 clients, which ``--figure`` draws.

It compiles and runs nothing, so it needs libtpu but no TPU: `pip install 'fax-jax[tpu,bench]'`.
With ``--json``, what is in the file is not compiled again, and each result is added to it.

All clients have the average number of examples of the data set. Where numbers differ, fax skips the
steps that are padding, while DrJAX computes them. The estimate leaves out collectives, waiting for
memory, and the host.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from figures import Figures
from jax import lax
from tables import Table, show
from workloads import drjax

import fax
import fax.inspect

PyTree = Any
TOPOLOGY, CORES, ROUNDS = "v2:2x2", (1, 8), 1500
CLIENTS = (10, 50, 150, 500)
VECTORIZED = (1, 2, 5, 10)  # and all
OUT_OF_MEMORY = "out of memory"


@dataclasses.dataclass(frozen=True)
class Task:
    """A task with the settings of FedJAX's experiments.

    Attributes:
      title: its name.
      model: its name in `fax.models`.
      options: of the model.
      x, y: shapes of an example's features.
      examples: the average number of a client's examples, rounded.
      batch: the number of examples in a batch.
      clients: the number of clients in a round.
      client_rate: the learning rate of SGD at the clients.
      server: the server's optimizer.
      paper: the time of 1,500 rounds on TPUs, as FedJAX's paper says it.
    """

    title: str
    model: str
    options: dict[str, Any]
    x: tuple[int, ...]
    y: tuple[int, ...]
    examples: int
    batch: int
    clients: int
    client_rate: float
    server: optax.GradientTransformation
    paper: str

    def created(self) -> fax.models.Model:
        return fax.models.create(self.model, **self.options)

    def params(self) -> PyTree:
        """The shapes of the parameters."""
        return jax.eval_shape(self.created().init, jax.random.key(0))


TASKS = {
    # 671,585 examples of 3,400 clients
    "emnist": Task(
        "EMNIST",
        "emnist_conv",
        {},
        (28, 28, 1),
        (),
        198,
        10,
        10,
        0.001,
        optax.adam(1.0, b1=0.9, b2=0.99, eps=0.01),
        "a few minutes",
    ),
    # 135,818,730 examples of 342,477 clients
    "stackoverflow": Task(
        "Stack Overflow",
        "stackoverflow_lstm",
        dict(loss_length=13.3),
        (20,),
        (20,),
        397,
        16,
        50,
        0.5,
        optax.adam(0.02),
        "about an hour",
    ),
}


# Programs


def features(task: Task, *sizes: int) -> dict[str, np.ndarray]:
    dtype = np.float32 if len(task.x) > 1 else np.int32
    return {"x": np.zeros((*sizes, *task.x), dtype), "y": np.zeros((*sizes, *task.y), np.int32)}


def with_fax(task: Task, clients: int, vectorize: int | None = None) -> tuple[Callable, tuple]:
    """A round and its arguments."""
    data = fax.data.InMemory({n: features(task, task.examples) for n in range(clients)})
    with fax.data.cohorts(data, clients, task.batch) as cohorts:
        cohort = next(cohorts)
    algorithm = fax.algorithms.fedopt(
        task.created().loss, optax.sgd(task.client_rate), task.server, vectorize=vectorize
    )
    state = jax.eval_shape(algorithm.init, task.params())
    return jax.jit(algorithm.round, donate_argnums=0), (state, cohort)


def with_drjax(task: Task, clients: int, mesh: jax.sharding.Mesh) -> tuple[Callable, tuple]:
    """The same with DrJAX: as in fax, a round also returns the loss and the share of hits."""
    loss = task.created().loss

    def client(params, key, batches, mask):
        def step(carry, at):
            params, totals = carry
            number, batch, mask = at

            def mean(params):
                losses, metrics = loss(params, batch, jax.random.fold_in(key, number))
                values = (losses, metrics["accuracy"], jnp.ones_like(losses))
                sums = [jnp.sum(jnp.where(mask, x, 0)) for x in values]
                return sums[0] / jnp.maximum(sums[2], 1), sums

            gradient, sums = jax.grad(mean, has_aux=True)(params)
            params = jax.tree.map(lambda p, g: p - task.client_rate * g, params, gradient)
            return (params, optax.tree.add(totals, sums)), None

        start = params, [jnp.zeros(())] * 3
        (trained, totals), _ = lax.scan(step, start, (jnp.arange(len(mask)), batches, mask))
        return optax.tree.sub(params, trained), totals

    @drjax.program(placements={"clients": clients})
    def one_round(params, state, keys, batches, mask, counts):
        updates, totals = drjax.map_fn(client, (drjax.broadcast(params), keys, batches, mask))
        weights = jax.tree.map(lambda u: counts.reshape(-1, *[1] * (u.ndim - 1)), updates)
        gradient = drjax.reduce_weighted_mean(updates, weights)
        moves, state = task.server.update(gradient, state, params)
        return optax.apply_updates(params, moves), state, drjax.reduce_sum(totals)

    params = task.params()
    state = jax.eval_shape(task.server.init, params)
    steps = -(-task.examples // task.batch)
    batches = features(task, clients, steps, task.batch)
    mask = np.ones((clients, steps, task.batch), bool)
    rows = np.zeros((clients, 2), np.uint32), batches, mask, np.ones(clients, np.float32)
    # JAX places an argument on several devices only if they divide it evenly.
    spec = jax.P() if clients % mesh.size else jax.P("clients")
    sharding = jax.NamedSharding(mesh, spec)
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), rows)
    return jax.jit(one_round, donate_argnums=(0, 1)), (params, state, *rows)


# Figures


class Rounds:
    """What has been compiled: the estimated seconds of a round, and the memory of a core."""

    def __init__(self, path: pathlib.Path | None):
        self._figures = Figures(path)

    def of(
        self, who: str, name: str, cores: int, clients: int, vectorize: int | None = None
    ) -> dict[str, Any]:
        """The figures of a round. ``cycles`` is None if a core has too little memory."""
        key = f"{who} | {name} | {cores} | {clients} | {vectorize or 'default'}"
        return self._figures.of(key, lambda: measure(who, name, cores, clients, vectorize))


def measure(who: str, name: str, cores: int, clients: int, vectorize: int | None) -> dict[str, Any]:
    task, start = TASKS[name], time.perf_counter()
    devices = fax.sharding.topology(TOPOLOGY)[:cores]
    mesh = fax.sharding.make_mesh(devices=devices, clients=cores)
    if who == "DrJAX":
        fn, args = with_drjax(task, clients, mesh)
    else:
        fn, args = with_fax(task, clients, vectorize)
    with jax.set_mesh(mesh):
        try:
            found = fax.inspect.report(fn, *args)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return dict(cycles=None)
    return dict(
        cycles=found.cycles,
        seconds=found.seconds,
        temporary_bytes=found.memory.temporary_bytes,
        sent_bytes=sum(each.total_bytes for each in found.collectives),
        took=round(time.perf_counter() - start, 1),
    )


def seconds(row: dict[str, Any]) -> str:
    return OUT_OF_MEMORY if row["cycles"] is None else f"{row['seconds']:.3g}"


def memory(row: dict[str, Any], name: str) -> tuple[str, str]:
    """Temporary memory in models and in MiB."""
    if row["cycles"] is None:
        return "", ""
    model = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(TASKS[name].params()))
    return f"{row['temporary_bytes'] / model:.1f}", f"{row['temporary_bytes'] / 2**20:.0f}"


# Tables


def peers() -> tuple[str, ...]:
    if drjax is None:
        print("DrJAX is not installed, and left out", file=sys.stderr)
    return ("fax", "DrJAX") if drjax else ("fax",)


def paper(figures: Rounds) -> list[Table]:
    """The tasks as in FedJAX's paper."""
    rows = []
    for name, task in TASKS.items():
        for cores in CORES:
            row = {"": f"{task.title}, {task.clients} clients", "cores": str(cores)}
            for who in peers():
                found = figures.of(who, name, cores, task.clients)
                models, mib = memory(found, name)
                row |= {f"{who}, s a round": seconds(found), f"{who}, models": models}
                row |= {f"{who}, MiB": mib}
                if who == "fax":
                    row["1,500 rounds, min"] = f"{ROUNDS * found['seconds'] / 60:.1f}"
                    row["FedJAX's paper"] = task.paper
            rows.append(row)
    return [dict(title="FedJAX's tasks on TPU v2", columns=list(rows[0]), rows=rows)]


def vectorize(figures: Rounds) -> list[Table]:
    """The same rounds on one core, by the number of vectorized clients."""
    tables = []
    for name, task in TASKS.items():
        numbers = [*(v for v in VECTORIZED if v < task.clients), task.clients]
        found = {f"fax, {v} at once": figures.of("fax", name, 1, task.clients, v) for v in numbers}
        found["fax, default"] = figures.of("fax", name, 1, task.clients)
        if "DrJAX" in peers():
            found["DrJAX"] = figures.of("DrJAX", name, 1, task.clients)
        rows: list[dict[str, Any]] = []
        for way, row in found.items():
            cycles = None if row["cycles"] is None else row["cycles"] / 1e6
            models, mib = memory(row, name)
            rows.append(
                {"": way, "million cycles": cycles, "s": seconds(row), "models": models, "MiB": mib}
            )
        title = f"{task.title}, {task.clients} clients on one core"
        tables.append(dict(title=title, columns=list(rows[0]), rows=rows))
    return tables


def clients(figures: Rounds) -> list[Table]:
    """Seconds of a round by the number of clients."""
    tables = []
    for name, task in TASKS.items():
        rows = []
        for count in CLIENTS:
            row = {"clients": str(count)}
            for who in peers():
                for cores in CORES:
                    found = figures.of(who, name, cores, count)
                    plural = "s" if cores > 1 else ""
                    row[f"{who}, {cores} core{plural}"] = seconds(found)
                    row[f"{who}, {cores}, MiB"] = memory(found, name)[1]
            rows.append(row)
        title = f"{task.title}: seconds of a round"
        tables.append(dict(title=title, columns=list(rows[0]), rows=rows))
    return tables


def draw(figures: Rounds, path: str) -> None:
    """Draws the seconds of a round by the number of clients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (name, task) in zip(figure.subplots(1, 2), TASKS.items(), strict=True):
        for who, color in zip(peers(), ("tab:blue", "tab:orange")):
            for cores, style in zip(CORES, ("-", "--"), strict=True):
                found = {n: figures.of(who, name, cores, n) for n in CLIENTS}
                fits = {n: row["seconds"] for n, row in found.items() if row["cycles"] is not None}
                label = f"{who}, {cores} core{'s' if cores > 1 else ''}"
                axes.plot(
                    list(fits), list(fits.values()), style, color=color, label=label, marker="."
                )
        axes.set(xscale="log", yscale="log", xlabel="clients a round", title=task.title)
        axes.set_xticks(CLIENTS, [str(n) for n in CLIENTS], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("seconds a round, estimated")
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)


PARTS = dict(paper=paper, vectorize=vectorize, clients=clients)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="make one table")
    parser.add_argument("--json", type=pathlib.Path, help="what has been compiled")
    parser.add_argument("--figure", metavar="PATH", help="draw rounds by clients to a file")
    options = parser.parse_args()
    figures = Rounds(options.json)
    for name in [options.only] if options.only else PARTS:
        for table in PARTS[name](figures):
            show(table)
    if options.figure:
        draw(figures, options.figure)
    print(f"\nlibtpu {importlib.metadata.version('libtpu')}, jax {jax.__version__}, {TOPOLOGY}")


if __name__ == "__main__":
    main()
