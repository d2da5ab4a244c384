"""Callbacks that stop a run: by a metric, or by the time."""

from __future__ import annotations

import difflib
import time
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fax import _arguments

if TYPE_CHECKING:
    from fax.experiment._run import Run


class EarlyStopping:
    """Stops a run when a metric has not improved for some time.

    A metric that is NaN has not improved. With blocks of several rounds, a metric of the algorithm
    has a value for each of them, and the run stops at the end of a block.

    Attributes:
      state: the ``"best"`` value, the ``"round"`` it is from, and how many values since then did
        not improve on it, ``"waited"``.

    Args:
      metric: the name of a metric of the algorithm or of an evaluation, such as ``"test/loss"``.
      patience: how many values in a row may fail to improve on the best one. A metric of an
        evaluation has a value for each evaluation, not for each round.
      mode: ``"min"`` if less is better, ``"max"`` if more is.

    Raises:
      ValueError: if an argument is invalid; and during the run, if there is no such metric.

    Example:

      >>> fax.experiment.EarlyStopping("test/accuracy", patience=5, mode="max").state
      {'best': -inf, 'round': 0, 'waited': 0}
    """

    def __init__(self, metric: str, patience: int, mode: str) -> None:
        self._where = "fax.experiment.EarlyStopping"
        self._metric = _arguments.text(self._where, "metric", metric, "the name of a metric")
        self._patience = _arguments.count(self._where, "patience", patience)
        self._sign = _sign(self._where, mode)
        self.state: dict[str, Any] = self._initial()

    def _initial(self) -> dict[str, Any]:
        return {"best": -self._sign * float("inf"), "round": 0, "waited": 0}

    def start(self, run: Run) -> str | None:
        """Forgets an earlier run. A run that has been stopped stays stopped."""
        if run.round == 0:
            self.state = self._initial()
        return self._reason()

    def after_round(self, run: Run) -> str | None:
        """Compares the metric with its best value."""
        for number, value in _values(self._where, self._metric, run):
            if self._sign * value > self._sign * self.state["best"]:
                self.state = {"best": value, "round": number, "waited": 0}
            else:
                self.state = {**self.state, "waited": self.state["waited"] + 1}
            if reason := self._reason():
                return reason
        return None

    def _reason(self) -> str | None:
        if self.state["waited"] < self._patience:
            return None
        best = f"{self.state['best']:.6g} in round {self.state['round']}"
        return f"{self._metric} has not improved on {best}"


class StopAt:
    """Stops a run when a metric reaches a target, at the end of a block of rounds.

    Args:
      metric: the name of a metric of the algorithm or of an evaluation, such as ``"test/loss"``.
      target: its value at which the run stops.
      mode: ``"min"`` to stop at this value or less, ``"max"`` to stop at this value or more.

    Raises:
      ValueError: if an argument is invalid; and during the run, if there is no such metric.

    Example:

      >>> callback = fax.experiment.StopAt("test/accuracy", 0.95, mode="max")
    """

    def __init__(self, metric: str, target: float, mode: str) -> None:
        self._where = "fax.experiment.StopAt"
        self._metric = _arguments.text(self._where, "metric", metric, "the name of a metric")
        self._target = float(_arguments.number(self._where, "target", target))
        self._sign = _sign(self._where, mode)

    def start(self, run: Run) -> str | None:
        """A run that has reached the target before stays stopped."""
        values = [row[self._metric] for row in run.history if self._metric in row]
        return next(filter(None, map(self._reason, values)), None)

    def after_round(self, run: Run) -> str | None:
        """Compares the metric with its target."""
        values = _values(self._where, self._metric, run)
        return next(filter(None, (self._reason(value) for _, value in values)), None)

    def _reason(self, value: float) -> str | None:
        if not self._sign * value >= self._sign * self._target:
            return None
        return f"{self._metric} is {value:.6g}, and the target was {self._target:.6g}"


class StopAfter:
    """Stops a run after some time, for example before a cluster ends the job.

    The time begins when the run starts or is resumed, so a resumed run has all of it again. In
    several processes, the clock is that of process 0.

    Args:
      hours: after how many hours.

    Raises:
      ValueError: if ``hours`` is not a positive number.

    Example:

      >>> callback = fax.experiment.StopAfter(hours=1.5)
    """

    def __init__(self, hours: float) -> None:
        self._hours = float(_arguments.number("fax.experiment.StopAfter", "hours", hours, above=0))

    def start(self, run: Run) -> None:
        """Notes the time. It is that of a clock that is never set back."""
        self._end = time.monotonic() + 3600 * self._hours

    def after_round(self, run: Run) -> str | None:
        """Looks at the clock."""
        over = time.monotonic() >= self._end
        if jax.process_count() > 1:  # all of them have to stop after the same round
            over = bool(multihost_utils.broadcast_one_to_all(np.int32(over)))
        return f"{self._hours:g} hours are over" if over else None


def _sign(where: str, mode: str) -> int:
    return {"min": -1, "max": 1}[_arguments.choice(where, "mode", mode, ("min", "max"))]


def _values(where: str, name: str, run: Run) -> list[tuple[int, float]]:
    """The rounds and values of a metric in the last block of rounds."""
    value = _metric(where, name, run)
    if value is None:
        return []
    earlier = [] if name in run.results else run.history[-run.block : -1]
    found = [(row["round"], float(row[name])) for row in earlier if name in row]
    return [*found, (run.round, value)]


def check_best(run: Run) -> None:
    """Checks that there is the metric by which the best checkpoint is kept.

    Callbacks may add metrics at any time, so if there are some, only metrics of evaluations are
    checked.
    """
    name = run.keep.best
    if name is not None and (not run.callbacks or _of_evaluation(name, run)):
        _metric("fax.experiment.Keep", name, run, "best")


def _of_evaluation(name: str, run: Run) -> bool:
    return any(name == own or name.startswith(f"{own}/") for own in run.evaluations)


def _metric(where: str, name: str, run: Run, argument: str = "metric") -> float | None:
    """The value of a metric, or None if it is from an evaluation, and this round has none."""
    for found in (run.results, run.metrics):
        if name in found:
            return float(found[name])
    if not run.results and _of_evaluation(name, run):
        return None
    values = sorted({*run.metrics, *(run.results or [f"{e}/..." for e in run.evaluations])})
    nearest = difflib.get_close_matches(name, values, 1)
    fix = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(
        f"{where}: {argument} is {name!r}, but the run has {_arguments.either(values)}.{fix}"
    )
