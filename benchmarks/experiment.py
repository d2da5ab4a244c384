"""What `fax.experiment.run` costs: rounds with logging, and checkpoints of a large model.

    python benchmarks/experiment.py [--only overhead|checkpoints] [--rounds N] [--json PATH]

The rounds are those of W2, logistic regression with 100 clients (`peers/workloads.py`), each with
its metrics fetched and logged. The bare loop is the same jitted round on the same cohorts, with the
loss fetched. It does a round after each round of the run, in the same process, so that whatever
else the machine does slows both. Another pair of loops has rounds that do nothing, so that nearly
all of their time is overhead. The processor time of the process is shown, too. A ratio is the
median over rounds, and so is a difference.

A checkpoint is written while rounds go on. What holds them up is compared with a copy of the state
in memory, and rounds without a checkpoint with those during which one is written.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from peers import models, workloads

import fax
from fax.algorithms import Algorithm
from fax.experiment._checkpoints import Checkpoints


def w2() -> tuple[Algorithm, Any, dict[str, Any]]:
    """The algorithm of W2, its state, and the arguments of cohorts."""
    workload = workloads.WORKLOADS["W2"]

    def loss(params, batch, key):
        return models.losses(params, batch["x"], batch["y"], None)

    algorithm = fax.algorithms.fedavg(
        loss, optax.sgd(workloads.CLIENT_RATE), models.server_optimizer()
    )
    clients = range(workloads.CLIENTS)
    data = fax.data.InMemory(
        {str(c): dict(zip("xy", workloads.examples(c), strict=True)) for c in clients}
    )
    cohorts = dict(data=data, clients=workload.clients, batch_size=workloads.BATCH)
    return algorithm, algorithm.init(workloads.initial(workload)), cohorts


def nothing(size: int = 0, work: int = 0) -> tuple[Algorithm, Any, dict[str, Any]]:
    """A round that only moves ``size`` parameters, and multiplies matrices ``work`` times."""

    def step(params, cohort):
        x = jnp.eye(512) / 2 + params["w"][0] * 1e-9
        x = jax.lax.fori_loop(0, work, lambda _, x: x @ x, x)
        params = {"w": params["w"] + 1e-9 * x[0, 0], "b": params["b"]}
        return params, {"loss": params["w"][0], "clients/loss": jnp.zeros(4)}

    algorithm = Algorithm(lambda params: params, step, lambda state: state)
    data = fax.data.InMemory({str(i): {"x": np.ones(4, np.float32)} for i in range(8)})
    rng = np.random.default_rng(0)
    state = {
        "w": jnp.asarray(rng.normal(size=max(size, 1)).astype(np.float32)),
        "b": jnp.zeros(3),
    }
    return algorithm, state, dict(data=data, clients=4, batch_size=4)


class Clock:
    """The seconds of each round, and the seconds of the processor."""

    def __init__(self) -> None:
        self.times = [self._now()]

    def after_round(self, run: Any) -> None:
        self.times.append(self._now())

    def rounds(self) -> np.ndarray:
        """Seconds [rounds, 2]."""
        return np.diff(self.times, axis=0)

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


class Bare:
    """Does a round of the bare loop after each round of a run, and measures both."""

    def __init__(self, algorithm: Algorithm, state: Any, cohorts: Any) -> None:
        self._step, self._state, self._cohorts = jax.jit(algorithm.round), state, cohorts
        self._clock = Clock()

    def after_round(self, run: Any) -> None:
        self._clock.after_round(run)
        self._state, metrics = self._step(self._state, next(self._cohorts))
        float(metrics["loss"])
        self._clock.after_round(run)

    def times(self) -> tuple[np.ndarray, np.ndarray]:
        """Seconds [rounds, 2] of the bare loop and of the run. The first rounds compile."""
        rounds = self._clock.rounds()
        return rounds[1::2][3:], rounds[::2][3:]


def overhead(rounds: int) -> dict[str, float]:
    """Milliseconds a round, and the ratio."""
    result = {}
    # Rounds that do nothing are short, so that there may be more of them.
    for name, (algorithm, state, arguments), count in (
        ("W2", w2(), rounds),
        ("nothing", nothing(), 10 * rounds),
    ):
        with (
            fax.data.cohorts(**arguments) as own,
            fax.data.cohorts(**arguments) as others,
            tempfile.TemporaryDirectory() as folder,
        ):
            bare = Bare(algorithm, state, others)
            options = dict(rounds=count, folder=folder, every=count, callbacks=[bare])
            fax.experiment.run(algorithm, state, own, **options)
        for number, clock in enumerate(("wall", "processor")):
            one, other = (own[:, number] for own in bare.times())
            result |= {
                f"{name}, {clock}, bare": 1e3 * float(np.median(one)),
                f"{name}, {clock}, run": 1e3 * float(np.median(other)),
                f"{name}, {clock}, run - bare": 1e3 * float(np.median(other - one)),
                f"{name}, {clock}, run / bare": float(np.median(other / one)),
            }
    return result


def checkpoints(size: int, rounds: int = 32, every: int = 8) -> dict[str, float]:
    """Milliseconds of rounds, of what holds them up, and of a copy of the state."""
    algorithm, state, cohorts = nothing(size, work=10)
    clock = Clock()
    for _ in range(5):
        np.array(state["w"], copy=True)
        clock.after_round(None)
    copies = clock.rounds()
    with (
        mock.patch.object(Checkpoints, "save", Timed(Checkpoints.save)) as saves,
        mock.patch.object(Checkpoints, "wait", Timed(Checkpoints.wait)) as waits,
        fax.data.cohorts(**cohorts) as iterator,
        tempfile.TemporaryDirectory() as folder,
    ):
        clock = Clock()
        options = dict(rounds=rounds, folder=folder, every=every, callbacks=[clock])
        fax.experiment.run(algorithm, state, iterator, **options)
        # Before a checkpoint is written, the one before has to be. The last two waits are at ends.
        held = np.array(saves.times) - np.array([waits.times[0], *waits.times[2:-1]])
    times = clock.rounds()
    after = np.arange(1, rounds + 1) % every == 1
    found = {
        "a copy of the state": copies,
        "delay of a round by a checkpoint": held[1:],
        "a round": times[~after][2:],
        "a round, with the checkpoint before it": times[after][1:],
    }
    return {
        f"{name}, {kind}": 1e3 * value
        for name, own in found.items()
        for kind, value in zip(("wall", "processor"), map(float, np.median(own, axis=0)))
    }


class Timed:
    """A method that notes how long its calls take."""

    def __init__(self, method: Callable) -> None:
        self._method = method
        self.times: list[tuple[float, float]] = []

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return self if owner is None else functools.partial(self, owner)

    def __call__(self, *args: Any) -> None:
        clock = Clock()
        self._method(*args)
        clock.after_round(None)
        self.times += map(tuple, clock.rounds())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("overhead", "checkpoints"))
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--parameters", type=int, default=50_000_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    jax.set_mesh(fax.sharding.use_cpu_devices())
    from core import machine  # which computes something

    parts = {
        "overhead": lambda: overhead(options.rounds),
        "checkpoints": lambda: checkpoints(options.parameters),
    }
    found: dict[str, Any] = {"machine": machine()}
    for part, measure in parts.items():
        if options.only not in (None, part):
            continue
        found[part] = measure()
        for name, value in found[part].items():
            print(f"{name:50} {value:8.3f}{'' if '/' in name else ' ms'}", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
