"""A privacy budget: a limit on epsilon, which is spent by the releases that states count."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fax import _arguments
from fax.aggregators._accounting import Setting
from fax.aggregators._aggregator import PyTree
from fax.aggregators._noise import NoiseState, noise_states, secret_words


class PrivacyBudgetError(RuntimeError):
    """A state costs more privacy than the budget has left, or reused noise.

    Example:

      >>> private = fax.aggregators.gaussian(clip_norm=1.0, noise_multiplier=20.0)
      >>> state = private.init(jnp.zeros(3))
      >>> state = state._replace(noise=state.noise._replace(releases=jnp.int32(29)))
      >>> budget = fax.aggregators.Budget(epsilon=1.0, delta=1e-5, noise_multiplier=20.0)
      >>> try:
      ...     budget.spend(state)
      ... except fax.aggregators.PrivacyBudgetError:
      ...     print(f"{budget.rounds} releases were allowed")
      28 releases were allowed
    """


class Budget:
    """A limit on epsilon, which the releases of a training run spend.

    Call ``spend(state)`` with each state, before you publish, save, or look at anything in it. It
    takes from the budget what the aggregators in the state have released since the last call,
    however many releases a round makes. ``spent`` is the number of releases so far, and ``epsilon``
    is what they cost together.

    Noise must never be used twice. So a budget records how often each key was used. Save ``record``
    in each checkpoint. To resume training, use ``Budget(..., record=...)`` and a state with a new
    key, from `renewed`, since more may have been released with the old key after the checkpoint.

    Attributes:
      limit: the limit on epsilon.
      rounds: how many releases the budget allows in all.
      delta: delta.
      record: the number of releases with each key, a dict from a hash to an int.

    Args:
      epsilon: the limit.
      delta, noise_multiplier, sampling_rate, sampling, mechanism: see `fax.aggregators.epsilon`.
      record: the record of the earlier budget, when training is resumed.

    Raises:
      ValueError: if an argument is out of range, or more was spent than the limit allows.
      ImportError: if `dp-accounting` is not installed.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2
      >>> private = fax.aggregators.gaussian(clip_norm=1.0, noise_multiplier=20.0)
      >>> algorithm = fax.algorithms.fedavg(loss, optax.sgd(0.1), aggregator=private)
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(3)}, "bob": {"x": jnp.zeros(2)}})
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=2)
      >>> budget = fax.aggregators.Budget(epsilon=1.0, delta=1e-5, noise_multiplier=20.0)
      >>> budget.rounds
      28
      >>> state, _ = algorithm.round(algorithm.init(0.0), next(rounds))
      >>> budget.spend(state)
      >>> budget.spent, round(budget.epsilon, 2)
      (1, 0.16)
    """

    def __init__(
        self,
        epsilon: float,
        delta: float,
        noise_multiplier: float,
        *,
        sampling_rate: float | None = None,
        sampling: str = "uniform",
        mechanism: str = "gaussian",
        record: Mapping[str, int] | None = None,
    ) -> None:
        caller = "fax.aggregators.Budget"
        self.limit: float = float(_arguments.number(caller, "epsilon", epsilon, above=0))
        self.delta: float = float(_arguments.number(caller, "delta", delta, above=0, below=1))
        if not isinstance(record, Mapping | None):
            raise ValueError(
                f"{caller}: record is {_arguments.shown(record)}, expected the record of an "
                "earlier budget, a dict from a hash to a number of releases."
            )
        self.record: dict[str, int] = {
            name: _arguments.count(caller, f"record[{name!r}]", count, least=0)
            for name, count in (record or {}).items()
        }
        self._old = frozenset(self.record)
        self._setting = Setting.of(caller, noise_multiplier, sampling_rate, sampling, mechanism)
        most = 1
        while self._of(most) <= self.limit and most < 2**24:
            most *= 2
        self.rounds: int = bisect.bisect_right(range(1, most + 1), self.limit, key=self._of)
        if self.spent > self.rounds:
            raise ValueError(
                f"{caller}: record has {self.spent} releases, expected at most {self.rounds}, "
                f"which epsilon={self.limit:g} allows. Start again with more noise."
            )

    def __repr__(self) -> str:
        return (
            f"Budget(limit={self.limit:g}, delta={self.delta:g}, "
            f"spent={self.spent} of {self.rounds} releases)"
        )

    def _of(self, rounds: int) -> float:
        return self._setting.epsilon(rounds, self.delta)

    @property
    def spent(self) -> int:
        """The number of releases so far."""
        return sum(self.record.values())

    @property
    def epsilon(self) -> float:
        """The epsilon of the releases so far."""
        return self._of(self.spent)

    def spend(self, state: PyTree) -> None:
        """Takes from the budget what a state has released since the last call.

        It waits until the state is computed. To wait less often, call it for every tenth state, or
        for the state that `fax.algorithms.many_rounds` returns. Just do not publish any state
        before it.

        Args:
          state: of an algorithm or an aggregator.

        Raises:
          PrivacyBudgetError: if the budget does not allow the state, or if training continued with
            a key of an earlier training run or from an older state. Nothing is spent then, and
            nothing in this state may be published.
          ValueError: if no aggregator in the state counts releases, or if the state is that of
            several training runs.
        """
        caller = "fax.aggregators.Budget.spend"
        found = noise_states(caller, state)
        if not found:
            raise ValueError(
                f"{caller}: no aggregator in state counts releases, as gaussian and laplace do. A "
                "whole training run with dp_ftrl is a single event: its cost is "
                "epsilon(noise_multiplier, rounds=1, delta=...)."
            )
        counts: dict[str, int] = {}
        for own in found:
            name = hashlib.sha256(np.asarray(own.key).tobytes()).hexdigest()[:32]
            counts[name] = counts.get(name, 0) + int(own.releases)
        record = dict(self.record)
        for name, count in counts.items():
            known = record.get(name, 0)
            if count and (name in self._old or count < known):
                raise PrivacyBudgetError(
                    f"{caller}: state has made {count} releases with a key for which the record "
                    f"has {known} already, so noise was used twice. To resume training, use "
                    "fax.aggregators.renewed(state)."
                )
            if count:
                record[name] = count
        total = sum(record.values())
        if total > self.rounds:
            raise PrivacyBudgetError(
                f"{caller}: with this state there are {total} releases, but epsilon={self.limit:g} "
                f"with delta={self.delta:g} allows only {self.rounds}, and {self.spent} are spent. "
                "Do not publish this state. The result is the last state that was spent."
            )
        self.record = record


def renewed(state: PyTree, key: jax.Array | None = None) -> PyTree:
    """A state whose noise comes from a new key, to resume training from a checkpoint.

    Rounds after the checkpoint are run again. If they had the same noise, anyone who has seen both
    results could subtract one from the other.

    Args:
      state: of an algorithm or an aggregator.
      key: see `gaussian`.

    Returns:
      The state, with aggregators that have not counted any release yet. The state of `dp_ftrl`
      stays as it is, since its noise depends on earlier rounds: resume it from the last state that
      was published.

    Raises:
      ValueError: as for ``key`` in `gaussian`.

    Example:

      >>> private = fax.aggregators.gaussian(clip_norm=1.0, noise_multiplier=1.0)
      >>> state = private.init(jnp.zeros(3))
      >>> bool((fax.aggregators.renewed(state).noise.key != state.noise.key).any())
      True
    """
    count = 0

    def one(x: Any) -> Any:
        nonlocal count
        if not isinstance(x, NoiseState):
            return x
        own, count = None if key is None else jax.random.fold_in(key, count), count + 1
        words = secret_words("fax.aggregators.renewed", own, x)
        return NoiseState(words, jnp.zeros_like(x.releases))

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, NoiseState))
