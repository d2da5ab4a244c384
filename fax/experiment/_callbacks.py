"""Callbacks: what happens between the rounds of a run."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import optax

from fax import _arguments
from fax.aggregators import Budget

if TYPE_CHECKING:
    from fax.experiment._run import Run

PyTree = Any


class Callback(Protocol):
    """What `fax.experiment.run` calls between rounds. Either method may be missing.

    A method that returns True, or the reason as a string, stops the run. If a callback has an
    attribute ``state``, a pytree of arrays and numbers, it is saved in checkpoints and set again
    when the run is resumed.

    Example:

      >>> class Print:
      ...     def after_round(self, run):
      ...         print(f"round {run.round} of {run.rounds}: {run.metrics['loss']:.3f}")
      ...         return run.metrics["loss"] < 0.01 and "the loss is small"
    """

    def start(self, run: Run) -> bool | str | None:
        """Called before the first round, and before the first one after a resume."""

    def after_round(self, run: Run) -> bool | str | None:
        """Called after each round, or after each block of rounds in one program."""


class StopAtBudget:
    """Takes each round from a privacy budget, and stops the run before it would be exceeded.

    It adds the metric ``"epsilon"``, what has been spent so far. With blocks of several rounds, a
    run stops if the budget does not allow another block.

    A resumed run repeats the rounds after its checkpoint with the same cohorts and the same noise,
    so that they release the same numbers again, and nothing new. This holds on the same devices,
    where a run is resumed exactly. Anywhere else, use `fax.aggregators.renewed`.

    Attributes:
      state: the budget's ``"record"``, and how much the ``"last"`` block of rounds released.

    Args:
      budget: a `fax.aggregators.Budget`.

    Raises:
      ValueError: if ``budget`` is something else.
      PrivacyBudgetError: during the run, if the budget does not even allow the first block of
        rounds. Nothing in this block may be published.

    Example:

      >>> budget = fax.aggregators.Budget(epsilon=1.0, delta=1e-5, noise_multiplier=20.0)
      >>> callback = fax.experiment.StopAtBudget(budget)
    """

    def __init__(self, budget: Budget) -> None:
        if not isinstance(budget, Budget):
            raise ValueError(
                f"fax.experiment.StopAtBudget: budget is {_arguments.shown(budget)}, expected a "
                "fax.aggregators.Budget."
            )
        self._budget, self._last = budget, 0

    @property
    def state(self) -> dict[str, Any]:
        return {"record": dict(self._budget.record), "last": self._last}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._budget.record = {name: int(count) for name, count in state["record"].items()}
        self._last = int(state["last"])

    def start(self, run: Run) -> str | None:
        """A run that has no budget left stays stopped."""
        return self._reason()

    def after_round(self, run: Run) -> str | None:
        """Takes from the budget what the state has released."""
        before = self._budget.spent
        self._budget.spend(run.state)
        self._last = self._budget.spent - before
        run.metrics["epsilon"] = self._budget.epsilon
        return self._reason()

    def _reason(self) -> str | None:
        own = self._budget
        if own.spent + self._last <= own.rounds:
            return None
        return (
            f"the privacy budget is spent: epsilon is {own.epsilon:.4g} at delta={own.delta:g} "
            f"after {own.spent} releases, {self._last} more would exceed the limit {own.limit:g}"
        )


class EMA:
    """An exponential moving average of the parameters of the model.

        average' = decay average + (1 - decay) params

    after each round; it starts at the initial parameters. With blocks of several rounds, the
    parameters after the last round of a block count for all of its rounds: the decay of k rounds
    is ``decay**k``. Rounds after which a run goes back to a checkpoint do not count.

    Attributes:
      state: the average, of at least 32 bits whatever the dtype of the parameters. The sharding is
        that of the parameters.

    Args:
      decay: a number from 0 to less than 1, such as 0.99: the average over about 100 rounds.

    Raises:
      ValueError: if ``decay`` is out of range.

    References:
      Polyak and Juditsky, Acceleration of stochastic approximation by averaging, SIAM J. Control
      and Optimization 30, 1992.

    Example:

      >>> average = fax.experiment.EMA(0.99)

      After ``run(..., callbacks=[average])``, evaluate ``average.state``.
    """

    def __init__(self, decay: float) -> None:
        where = "fax.experiment.EMA"
        self._decay = float(_arguments.number(where, "decay", decay, least=0, below=1))
        self.state: PyTree = None

    def start(self, run: Run) -> None:
        """Starts at the parameters of a new run."""
        if run.round == 0 or self.state is None:
            # A copy, since the state of the algorithm may be donated to the next round.
            self.state = jax.tree.map(
                lambda x: jnp.array(x, jnp.promote_types(x.dtype, jnp.float32)), run.params
            )

    def after_round(self, run: Run) -> None:
        """Moves the average toward the parameters."""
        share = 1 - self._decay**run.block
        self.state = _toward(self.state, run.params, share)


@jax.jit
def _toward(average: PyTree, params: PyTree, share: float) -> PyTree:
    return optax.tree.add_scale(average, share, optax.tree.sub(params, average))


class Profile:
    """Traces chosen rounds with `jax.profiler`, for XProf or Perfetto.

    Consecutive rounds are in one trace. With blocks of several rounds, whole blocks are traced.

    Args:
      rounds: which rounds; the first one is round 1. Choose later ones to leave out compilation.
      folder: where to write the traces. Default: ``profile`` in the folder of the run.

    Raises:
      ValueError: if an argument is invalid; at the start of the run, if it ends before a chosen
        round, or neither it nor the callback has a folder.

    Example:

      >>> callback = fax.experiment.Profile(rounds=[10, 11, 12])
    """

    def __init__(self, rounds: Iterable[int], folder: str | os.PathLike[str] | None = None) -> None:
        where = "fax.experiment.Profile"
        self._rounds = frozenset(
            _arguments.whole_numbers(where, "rounds", rounds, "range(10, 13)", least=1)
        )
        if folder is not None:
            _arguments.path(where, "folder", folder)
        self._folder = folder
        self._end: Any = None

    def start(self, run: Run) -> None:
        """Begins a trace if the first round is a chosen one."""
        where = "fax.experiment.Profile"
        if self._folder is None and run.folder is None:
            raise ValueError(
                f"{where}: the run has no folder, so there is no place for traces. Pass folder=."
            )
        if max(self._rounds, default=0) > run.rounds:
            raise ValueError(
                f"{where}: rounds has {max(self._rounds)}, but the run ends after round "
                f"{run.rounds}."
            )
        self.after_round(run)

    def after_round(self, run: Run) -> None:
        """Begins a trace before the chosen rounds, and ends it after them."""
        following = range(run.round + 1, min(run.round + run.rounds_per_call, run.rounds) + 1)
        chosen = not self._rounds.isdisjoint(following)
        tracing = self._end is not None and self._end.alive
        if chosen == tracing:
            return
        jax.block_until_ready(run.state)  # the devices are done with the rounds before
        if tracing:
            self._end()
            return
        jax.profiler.start_trace(self._folder or Path(run.folder or "", "profile"))
        # If the run ends during the trace, by an error or another callback, the trace ends too.
        self._end = weakref.finalize(run, jax.profiler.stop_trace)
