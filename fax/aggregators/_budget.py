"""A budget: a limit on epsilon, of which releases are taken, as states have counted them."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fax import _arguments
from fax.aggregators._accounting import epsilon_of, setting_of
from fax.aggregators._noise import NoiseState, noise_states, secret

PyTree = Any


class PrivacyBudgetError(RuntimeError):
    """A state cost more privacy than the budget has, or used noise that was used before."""


class Budget:
    """A limit on epsilon that releases are taken from, as the states of a training count them.

    Show it each state before anything of it is published, saved, or looked at: ``spend(state)``. It
    takes from the budget what the state's aggregators have released since, however many releases a
    round made.

    Noise must not be used twice. So a budget remembers how far each key was used: ``record``, which
    belongs into a checkpoint. Training that resumes takes ``Budget(..., record=...)`` and a state
    with a new key, from `renewed`, as nobody knows what was released after the checkpoint with the
    old one.

    Attributes:
      rounds: how many releases the budget is for in all.
      record: of each key the number of releases, a dict of a hash to an int.

    Args:
      epsilon: the limit.
      delta, noise_multiplier, clients, population, sampling, mechanism: see
        `fax.aggregators.epsilon`.
      record: that of the budget before, when training is resumed.

    Raises:
      ValueError: if an argument is out of range, or more was spent than the limit allows.
      ImportError: if `dp-accounting` is not installed.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2
      >>> private = fax.aggregators.gaussian(clip=1.0, noise_multiplier=20.0)
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
        clients: float | None = None,
        population: int | None = None,
        sampling: str = "uniform",
        mechanism: str = "gaussian",
        record: Mapping[str, int] | None = None,
    ):
        caller = "fax.aggregators.Budget"
        self.limit = _arguments.number(caller, "epsilon", epsilon, above=0)
        self.delta = _arguments.number(caller, "delta", delta, above=0, below=1)
        if not isinstance(record, Mapping | None):
            raise ValueError(
                f"{caller}: record is {record!r:.80}, expected the record of the budget before."
            )
        self.record = {
            name: _arguments.count(caller, f"record[{name!r}]", count, least=0)
            for name, count in (record or {}).items()
        }
        self._old = frozenset(self.record)
        self._setting = setting_of(
            caller, noise_multiplier, clients, population, sampling, mechanism
        )
        most = 1
        while self._of(most) <= epsilon and most < 2**24:
            most *= 2
        self.rounds = bisect.bisect_right(range(1, most + 1), epsilon, key=self._of)
        if self.spent > self.rounds:
            raise ValueError(
                f"{caller}: record has {self.spent} releases, expected at most {self.rounds}, for "
                f"which epsilon={epsilon:g} is enough. Start anew with more noise."
            )

    def __repr__(self) -> str:
        return (
            f"Budget(epsilon={self.limit:g}, delta={self.delta:g}, rounds={self.rounds}, "
            f"spent={self.spent})"
        )

    def _of(self, rounds: int) -> float:
        return epsilon_of(*self._setting, rounds, self.delta)

    @property
    def spent(self) -> int:
        """How many releases were spent so far."""
        return sum(self.record.values())

    @property
    def epsilon(self) -> float:
        """What was spent so far."""
        return self._of(self.spent)

    def spend(self, state: PyTree) -> None:
        """Takes from the budget what a state has released since the last one.

        It waits for the state, so that in a tight loop every tenth may be enough, or that of
        `fax.algorithms.many_rounds`; just publish none before.

        Args:
          state: of an algorithm, or an aggregator's.

        Raises:
          PrivacyBudgetError: if the budget is not enough for the state, or if it went on with a key
            of an earlier training, or from an older state. Then nothing is taken, and
            nothing of this state may be published.
          ValueError: if no aggregator in the state counts releases, or if it is of several
            trainings.
        """
        caller = "fax.aggregators.Budget.spend"
        found = noise_states(caller, state)
        if not found:
            raise ValueError(
                f"{caller}: no aggregator in the state counts releases, as gaussian and laplace do."
                " All of a training by dp_ftrl is one event: epsilon(noise_multiplier, rounds=1)."
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
                    f"{caller}: the state has made {count} releases with a key of which {known} "
                    "are in the record, so that noise was used twice. Go on with "
                    "fax.aggregators.renewed(state) where training is resumed."
                )
            if count:
                record[name] = count
        total = sum(record.values())
        if total > self.rounds:
            raise PrivacyBudgetError(
                f"{caller}: with this state there are {total} releases, but epsilon={self.limit:g} "
                f"at delta={self.delta:g} is enough for {self.rounds} only, of which {self.spent} "
                "are spent. Do not publish it: the last one that was spent is the result."
            )
        self.record = record


def renewed(state: PyTree, key: jax.Array | None = None) -> PyTree:
    """A state whose noise comes from a new key, to resume training from a checkpoint.

    Rounds that were run after the checkpoint are run again. With the same noise, whoever has seen
    both could subtract one from the other.

    Args:
      state: of an algorithm, or an aggregator's.
      key: see `gaussian`.

    Returns:
      The state, whose aggregators have counted no release yet. The state of `dp_ftrl` is left as it
      is, for its noise goes on where it was: resume from the last state that was published.

    Raises:
      ValueError: as `gaussian` for its key.

    Example:

      >>> private = fax.aggregators.gaussian(clip=1.0, noise_multiplier=1.0)
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
        words = secret("fax.aggregators.renewed", own, x)
        return NoiseState(words, jnp.zeros_like(x.releases))

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, NoiseState))
