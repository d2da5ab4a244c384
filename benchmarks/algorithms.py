"""What algorithms and aggregators cost beyond federated averaging, and DiLoCo against plain JAX.

    python benchmarks/algorithms.py [--only overhead|outer|memory] [--json PATH]

*Overhead*: a jitted round of every algorithm relative to that of `fedavg`, with the same clients,
batches and model, a dense network 784-200-200-62. *Outer*: rounds of DiLoCo with a loss of almost
no cost against the same handwritten loops. Rounds with more outer steps, or with more inner steps,
differ by the time of these steps. *Memory*: temporary memory of rounds of 8 and of 64 clients.
Programs take turns, in an order that is reversed every time. A ratio is the median over turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import diloco_by_hand
import jax
import jax.numpy as jnp
import numpy as np
import optax
from core import machine
from tables import Table, show, verdict

import fax
from fax import aggregators, algorithms

PyTree = Any
CLIENTS, BATCH, STEPS, POPULATION, RATE = 20, 20, 4, 40, 0.05
TURNS, REPEATS = 7, 4
SGD = optax.sgd(RATE)
MODEL = fax.models.create("emnist_dense")
LOSS = MODEL.loss
SAME = "at most 1.3"

# Algorithms and aggregators, with the target, or the reason why they cost more than fedavg.
ALGORITHMS: dict[str, tuple[Callable[[], algorithms.Algorithm], str]] = {
    "fedopt, server_adam": (
        lambda: algorithms.fedopt(LOSS, SGD, algorithms.server_adam(0.01)),
        SAME,
    ),
    "fedprox": (lambda: algorithms.fedprox(LOSS, SGD, mu=0.01), SAME),
    "scaffold": (
        lambda: algorithms.scaffold(LOSS, RATE, num_clients=POPULATION),
        "reads and writes a state for each client",
    ),
    "mime": (
        lambda: algorithms.mime(LOSS, optax.sgd(RATE, momentum=0.9)),
        "three gradients a batch instead of one",
    ),
    "mime_lite": (
        lambda: algorithms.mime_lite(LOSS, optax.sgd(RATE, momentum=0.9)),
        "two gradients a batch instead of one",
    ),
    "agnostic_fedavg": (
        lambda: algorithms.agnostic_fedavg(LOSS, SGD, num_domains=3, domain_learning_rate=0.1),
        "first evaluates the domains' losses",
    ),
    "apfl": (
        lambda: algorithms.apfl(LOSS, SGD, num_clients=POPULATION),
        "trains two models, one of them a mixture",
    ),
    "hyp_cluster, 2 clusters": (
        lambda: algorithms.hyp_cluster(LOSS, SGD, num_clusters=2),
        "first evaluates every model",
    ),
    "reptile": (lambda: algorithms.reptile(LOSS, SGD, optax.sgd(0.5)), SAME),
    "maml": (
        lambda: algorithms.maml(LOSS, SGD, optax.sgd(0.1)),
        "differentiates through the steps",
    ),
    "local_sgd": (lambda: algorithms.local_sgd(LOSS, SGD, replicas=CLIENTS), "keeps replicas"),
    "diloco": (lambda: algorithms.diloco(LOSS, SGD, replicas=CLIENTS), "keeps replicas"),
    "streaming_diloco": (
        lambda: algorithms.streaming_diloco(LOSS, SGD, replicas=CLIENTS, steps=4, fragments=2),
        "keeps replicas and what is on its way",
    ),
    "papa": (
        lambda: algorithms.papa(LOSS, SGD, replicas=CLIENTS, steps=2),
        "keeps replicas, which come together several times a round",
    ),
}
AGGREGATORS: dict[str, tuple[Callable[[], aggregators.Aggregator], str]] = {
    "mean": (aggregators.mean, SAME),
    "clip_by_norm": (lambda: aggregators.chain(aggregators.clip_by_norm(1.0)), SAME),
    "uniform_quantization": (
        lambda: aggregators.chain(aggregators.uniform_quantization(16)),
        "a random number for each parameter and client",
    ),
    "drive": (lambda: aggregators.chain(aggregators.drive()), "two rotations for each client"),
    "top_k": (
        lambda: aggregators.chain(
            aggregators.error_feedback(aggregators.top_k(0.1), num_clients=POPULATION)
        ),
        "a selection, and a memory for each client",
    ),
    "secure_sum": (
        lambda: aggregators.secure_sum(1.0, 1000.0),
        "masks of all pairs of clients",
    ),
    "gaussian": (lambda: aggregators.gaussian(1.0, 1.0, expected_clients=CLIENTS), SAME),
    "median": (aggregators.median, "collects and sorts all rows"),
    "krum": (lambda: aggregators.krum(2), "collects all rows, distances of all pairs"),
    "geometric_median": (aggregators.geometric_median, "several passes over the updates"),
}


def population(clients: int) -> fax.data.InMemory:
    rng = np.random.default_rng(0)

    def client() -> dict[str, np.ndarray]:
        n = int(rng.integers(80, 160))
        return {
            "x": rng.random((n, 28, 28, 1), dtype=np.float32),
            "y": rng.integers(0, 62, n).astype(np.int32),
            "domain": rng.integers(0, 3, n).astype(np.int32),
            "query": rng.random(n) < 0.3,
        }

    return fax.data.InMemory({i: client() for i in range(clients)})


def cohort_of(clients: int) -> fax.data.Cohort:
    data = population(max(clients, POPULATION))
    rounds = fax.data.cohorts(data, clients, BATCH, max_steps=STEPS, resident=True)
    with rounds:
        return next(rounds)


def overhead() -> list[Table]:
    params = MODEL.init(jax.random.key(0))
    cohort = cohort_of(CLIENTS)

    keys = jax.random.split(jax.random.key(1), 2)
    models = {"hyp_cluster, 2 clusters": jax.vmap(MODEL.init)(keys)}

    def compiled(algorithm: algorithms.Algorithm, name: str = "") -> Callable[[], Any]:
        state = algorithm.init(models.get(name, params))
        run = functools.partial(jax.jit(algorithm.round), state, cohort)
        jax.block_until_ready(run())
        return run

    base = compiled(algorithms.fedavg(LOSS, SGD))
    tables = []
    for title, made in (
        ("A round of algorithms over that of fedavg", ALGORITHMS),
        (
            "A round of fedavg with aggregators over that without",
            {
                name: (lambda make=make: algorithms.fedavg(LOSS, SGD, aggregator=make()), why)
                for name, (make, why) in AGGREGATORS.items()
            },
        ),
    ):
        rows = []
        for name, (make, why) in made.items():
            ratio, seconds = versus(compiled(make(), name), base)
            target = verdict(SAME, ratio <= 1.3) if ratio <= 1.3 or why == SAME else why
            rows.append({"": name, "ms a round": 1e3 * seconds, "ratio": ratio})
            rows[-1]["target or reason"] = target
        columns = ["", "ms a round", "ratio", "target or reason"]
        tables.append(dict(title=title, columns=columns, rows=rows))
    return tables


def versus(
    one: Callable[[], Any], other: Callable[[], Any], repeats: int = REPEATS
) -> tuple[float, float]:
    """The median ratio of the times of both, and the median time of the first."""
    times: list[list[float]] = [[], []]
    for turn in range(TURNS):
        for which in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter()
            for _ in range(repeats):
                jax.block_until_ready((one, other)[which]())
            times[which].append((time.perf_counter() - start) / repeats)
    return float(np.median(np.divide(*times))), float(np.median(times[0]))


# DiLoCo's inner and outer steps

REPLICAS, UNITS, LAYERS, BATCHES = 4, 512, 16, 16  # 4,194,304 parameters


def cheap(params: PyTree, batch: PyTree, key: jax.Array | None) -> jax.Array:
    """A loss whose gradient takes one pass over the parameters."""
    return batch["x"] * sum(jnp.sum(x * x) for x in jax.tree.leaves(params))


def outer() -> list[Table]:
    inner = optax.adamw(1e-3)
    nesterov = optax.sgd(0.7, momentum=0.9, nesterov=True)
    params = [jnp.ones((UNITS, UNITS)) / UNITS for _ in range(LAYERS)]
    data = fax.data.InMemory({i: {"x": np.ones(1, np.float32)} for i in range(REPLICAS)})
    init, by_hand = diloco_by_hand.make_round(cheap, inner, nesterov, REPLICAS)

    def programs(count: int, steps: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Rounds of fax and by hand, of a number of outer steps of so many inner steps each."""
        with fax.data.cohorts(
            data,
            REPLICAS,
            1,
            sampler="stream",
            max_steps=count * steps,
            resident=False,
            placement="replicas",
        ) as rounds:
            cohort = next(rounds)
        algorithm = algorithms.diloco(cheap, inner, nesterov, replicas=REPLICAS, steps=steps)
        ours = functools.partial(jax.jit(algorithm.round), algorithm.init(params), cohort)
        x = cohort.batches["x"].reshape(REPLICAS, count, steps, 1).swapaxes(0, 1)
        hand = functools.partial(by_hand, init(params), {"x": x})
        np.testing.assert_allclose(ours()[0].params[0], hand()[0][0][0], rtol=1e-5)
        return ours, hand

    rows = []
    for count, steps in ((4, BATCHES // 4), (1, BATCHES), (1, BATCHES // 2)):
        ratio, seconds = versus(*programs(count, steps), repeats=1)
        title = f"{REPLICAS} replicas, {count} x {steps} inner steps"
        rows.append({"": title, "ms": 1e3 * seconds, "by hand": 1e3 * seconds / ratio})
        rows[-1]["ratio"] = ratio
    often, once, half = rows
    for what, most, more, less, times in (
        ("an outer step", 1.1, often, once, 3),
        ("an inner step", 1.03, once, half, BATCHES // 2),
    ):
        one = {key: (more[key] - less[key]) / times for key in ("ms", "by hand")}
        ratio = one["ms"] / one["by hand"]
        target = verdict(f"at most {most}", ratio <= most)
        rows.append({"": f"{what}, by the difference", **one, "ratio": ratio, "target": target})
    title = f"DiLoCo over JAX by hand, {LAYERS * UNITS * UNITS:,} parameters"
    return [dict(title=title, columns=list(rows[-1]), rows=rows)]


# Memory

SUMS = ("fedopt, server_adam", "fedprox", "mime", "mime_lite", "agnostic_fedavg", "reptile", "maml")
SUMMED = ("mean", "clip_by_norm", "uniform_quantization", "drive", "gaussian")


def memory() -> list[Table]:
    params = MODEL.init(jax.random.key(0))
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    made = {"fedavg": lambda: algorithms.fedavg(LOSS, SGD)}
    made |= {name: ALGORITHMS[name][0] for name in SUMS}
    made |= {
        f"fedavg, {name}": lambda name=name: algorithms.fedavg(
            LOSS, SGD, aggregator=AGGREGATORS[name][0]()
        )
        for name in SUMMED
    }

    def temporary(algorithm: algorithms.Algorithm, clients: int) -> float:
        arguments = algorithm.init(params), cohort_of(clients)
        compiled = jax.jit(algorithm.round).lower(*arguments).compile()
        return float(compiled.memory_analysis().temp_size_in_bytes / size)

    rows = []
    for name, make in made.items():
        few, many = (temporary(make(), clients) for clients in (8, 64))
        met = verdict("independent of clients", many <= few + 0.3)
        rows.append({"": name, "8 clients": few, "64 clients": many, "target": met})
    title = "Temporary memory of a round, in models"
    return [dict(title=title, columns=list(rows[0]), rows=rows)]


PARTS = {"overhead": overhead, "outer": outer, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--json", metavar="PATH", help="write the figures to a file")
    options = parser.parse_args()
    tables = []
    for part in options.only:
        for table in PARTS[part]():
            show(table)
            tables.append(table)
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine().items()))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(dict(machine=machine(), tables=tables), file, indent=2)


if __name__ == "__main__":
    main()
