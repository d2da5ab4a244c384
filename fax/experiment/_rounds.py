"""`Run`: the rounds of an experiment, and their metrics."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from fax.algorithms import Algorithm, ClientStore, many_rounds
from fax.data import Cohorts
from fax.experiment._arrays import Leaf, split
from fax.experiment._checkpoints import Keep
from fax.experiment._history import plain

PyTree = Any


class NotFiniteError(FloatingPointError):
    """A loss or the parameters of a run are NaN or infinite.

    Example:

      >>> issubclass(fax.experiment.NotFiniteError, FloatingPointError)
      True
    """


class Run:
    """What callbacks see of a run.

    Attributes:
      algorithm: as passed to `run`.
      cohorts: as passed to `run`.
      rounds: how many rounds there will be in all.
      rounds_per_call: how many of them are in one program.
      block: how many rounds the last program had.
      folder: of the run, or None.
      callbacks: as passed to `run`.
      evaluations: the names of the evaluations.
      round: how many rounds are done, including those before a resume.
      state: the algorithm's state.
      results: the numbers that the evaluations of this round returned, by name, or an empty dict.
      measured: the arrays that the last evaluations returned, by name.
      history: the metrics of each round: dicts of numbers with the key ``"round"``, and with
        ``"bits"``, what has been sent in all rounds so far, if the algorithm counts it.
      reason: why the run stops before its last round, or "".
    """

    algorithm: Algorithm | ClientStore
    state: PyTree
    cohorts: Cohorts
    rounds: int
    rounds_per_call: int
    block: int
    folder: Path | None
    callbacks: tuple[Any, ...]
    evaluations: tuple[str, ...]
    keep: Keep
    round: int
    reason: str
    initial: list[Leaf]

    def __init__(
        self,
        algorithm: Algorithm | ClientStore,
        state: PyTree,
        cohorts: Cohorts,
        *,
        rounds: int,
        rounds_per_call: int = 1,
        folder: Path | None = None,
        callbacks: Sequence[Any] = (),
        evaluations: Sequence[str] = (),
        keep: Keep | None = None,
        check: bool = True,
    ):
        self.algorithm, self.state, self.cohorts = algorithm, state, cohorts
        self.rounds, self.rounds_per_call, self.folder = rounds, rounds_per_call, folder
        self.callbacks, self.keep = tuple(callbacks), keep or Keep()
        self.evaluations = tuple(evaluations)
        self.round, self.block, self.reason = 0, 0, ""
        self.results: dict[str, float] = {}
        self.measured: dict[str, np.ndarray] = {}
        self.history: list[dict[str, Any]] = []
        self.initial = split(state, "state")[0]
        self._check, self._start = check, time.monotonic()
        if isinstance(algorithm, ClientStore):
            self._step = algorithm.round
        else:
            self._step = jax.jit(algorithm.round)
            self._many = functools.partial(many_rounds, algorithm)
        # Of blocks of rounds that the devices may still work on: the number of the first round, the
        # cohort's, how many rounds there are, and their metrics.
        self._pending: list[tuple[int, int, int, Mapping[str, Any]]] = []
        self._metrics: dict[str, Any] = {}
        self._clients: dict[str, Any] = {}
        self._cohort = 0  # the number of the cohort that they are of

    @property
    def name(self) -> str:
        """The name of the algorithm. That of a user's own is its class's: its repr may differ."""
        own = getattr(self.algorithm, "algorithm", self.algorithm)
        return repr(own) if isinstance(own, Algorithm) else type(own).__qualname__

    @property
    def params(self) -> PyTree:
        """The parameters of the model to evaluate."""
        return self.algorithm.params(self.state)

    @property
    def metrics(self) -> dict[str, Any]:
        """The numbers of the last round. It waits until the devices have computed them.

        What a callback adds to it goes into the history.
        """
        self.fetch()
        return self._metrics

    @property
    def clients(self) -> dict[str, np.ndarray]:
        """The metrics of the last round that are arrays, such as ``"clients/loss"`` [clients].

        If there is one of clients, ``"clients/id"`` has their ids.
        """
        self.fetch()
        found = {name: _everywhere(x) for name, x in self._clients.items()}
        if any(name.startswith("clients/") for name in found):
            ids = list(map(str, self.cohorts.client_ids(self._cohort)))
            found = {"clients/id": np.array(ids), **found}
        return found

    @property
    def elapsed(self) -> float:
        """The seconds since this process began the run."""
        return time.monotonic() - self._start

    def advance(self, rounds: int) -> None:
        """Runs a block of rounds. It returns before the devices are done."""
        self._complete()
        before = self.cohorts.round
        if self.cohorts._closed:
            raise ValueError(
                "fax.experiment.run: cohorts is closed, and has no more rounds. Make it anew by "
                "fax.data.cohorts, and close it after the run."
            )
        if rounds == 1:
            self.state, metrics = self._step(self.state, next(self.cohorts))
        else:
            self.state, metrics = self._many(self.state, self.cohorts, rounds)
        self._pending.append((self.round + 1, before, rounds, metrics))
        self.round += rounds
        self.block = rounds
        self.results = {}

    def fetch(self) -> None:
        """Waits for the metrics of all rounds so far, and appends them to the history.

        Raises:
          NotFiniteError: if a loss is NaN or infinite.
        """
        pending, self._pending = self._pending, []
        numbers = jax.device_get([_numbers(rounds, found) for *_, rounds, found in pending])
        error = None
        for (first, cohort, rounds, found), own in zip(pending, numbers):
            sent = [_everywhere(x) for name, x in found.items() if name.endswith("/bits")]
            for at in range(rounds):
                self._metrics = {k: plain(x[at] if rounds > 1 else x, k) for k, x in own.items()}
                if sent:
                    before = self.history[-1].get("bits", 0.0) if self.history else 0.0
                    now = [np.sum(x[at] if rounds > 1 else x, dtype=np.float64) for x in sent]
                    self._metrics["bits"] = before + float(sum(now))
                self.history.append({"round": first + at, **self._metrics})
                if self._check and error is None and not _finite(self._metrics):
                    self._clients = _arrays(own, found, rounds, at)
                    self._cohort = cohort + at
                    error = NotFiniteError(self._blame(first + at, cohort + at))
            self._clients = _arrays(own, found, rounds, rounds - 1)
            self._cohort = cohort + rounds - 1
        if error is not None:
            raise error

    def settle(self) -> None:
        """Completes the history with what evaluations and callbacks have found."""
        self.fetch()
        self._complete()

    def _complete(self) -> None:
        """Adds what was found after the last round, if its metrics are in the history."""
        if self.history and self.history[-1]["round"] == self.round:
            found = {**self._metrics, **self.results}
            both = self._metrics.keys() & self.results.keys()
            twice = [name for name in found if name == "round" or name in both]
            if twice:
                raise ValueError(
                    f"fax.experiment.run: two numbers of a round have the name {twice[0]!r}. "
                    "Choose another name in the algorithm, the callback or the evaluation."
                )
            self.history[-1].update({name: plain(x, name) for name, x in found.items()})

    def check(self) -> None:
        """Checks the losses and the parameters before they are saved.

        Raises:
          NotFiniteError: if a loss or a parameter is NaN or infinite.
        """
        self.fetch()
        if self._check and not bool(_all_finite(self.params)):
            raise NotFiniteError(
                f"fax.experiment.run: parameters are NaN or infinite after round {self.round}, "
                "though the losses so far are finite. Use a smaller learning rate, clip updates, "
                "or pass on_nan='restore'."
            )

    def _blame(self, number: int, cohort: int) -> str:
        """Says in which round a loss is not finite, and for which clients."""
        values = self._metrics
        name = next(name for name in values if not _finite({name: values[name]}))
        each = self.clients.get("clients/loss")
        ids = self.cohorts.client_ids(cohort)
        who = "It is finite for each client alone"
        if each is not None and len(each) == len(ids) and not np.all(np.isfinite(each)):
            bad = np.flatnonzero(~np.isfinite(each))
            some = ", ".join(repr(ids[i]) for i in bad[:5])
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            who = f"It is not finite for {len(bad)} of {len(ids)} clients: {some}{more}"
        return (
            f"fax.experiment.run: {name} is {values[name]} in round {number}. {who}. Check "
            "these clients' data, use a smaller learning rate, or pass on_nan='restore' to go back "
            "to the last checkpoint, or 'ignore'."
        )


def _numbers(rounds: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics that are one number for each round."""
    return {k: x for k, x in metrics.items() if np.ndim(x) == (rounds > 1)}


def _arrays(
    numbers: Mapping[str, Any], metrics: Mapping[str, Any], rounds: int, at: int
) -> dict[str, Any]:
    """The metrics of a round that are not ``numbers``."""
    others = {name: x for name, x in metrics.items() if name not in numbers}
    return {name: x[at] if rounds > 1 else x for name, x in others.items()}


def _finite(values: Mapping[str, Any]) -> bool:
    """Whether the losses are finite. Other metrics may have no value in a round."""
    losses = [x for name, x in values.items() if name.rpartition("/")[2] == "loss"]
    return bool(np.all(np.isfinite(losses)))


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in floats]))


def _everywhere(x: Any) -> np.ndarray:
    """An array of all processes on the host."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
