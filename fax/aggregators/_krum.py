"""Krum: the updates that lie closest to most others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import fax._operators as operators
import fax._reductions as reductions
from fax import _arguments
from fax.aggregators._aggregator import Aggregator, Metrics, all_bits, present_rows
from fax.aggregators._norms import difference, l2_norm

PyTree = Any


def krum(byzantine: int) -> Aggregator:
    """The one update that is closest to most others, of n clients with f attackers.

    The score of client i is the sum of the squared distances ‖u_i - u_j‖^2 to the n - f - 2 others
    that are nearest. The update of the lowest score is taken, the first of several.

    Weights only tell who takes part: clients of weight zero are neither chosen nor anyone's
    neighbours, and all others count the same. If that leaves m of n clients, there are m - f - 2
    neighbours, at least one, and the promise holds as long as m > 2 f + 2; if none is left the
    update is zero. An update with NaN is far from all others. Every client's update is sent to the
    server. On a mesh each device computes the distances of its own clients to all.

    Args:
      byzantine: f, at least 0.

    References:
      Blanchard et al., Machine learning with adversaries: Byzantine tolerant gradient descent,
      arXiv:1703.02757.

    Returns:
      The aggregator. It has no state. Its metric ``"clients/chosen"`` is bool [clients]. The choice
      has no derivative.

    Raises:
      ValueError: if ``byzantine`` is out of range, or n is not above 2 f + 2.

    Example:

      >>> @fax.program(clients=5)
      ... def choose(updates):
      ...     krum = fax.aggregators.krum(byzantine=1)
      ...     return krum.aggregate(updates, jnp.ones(5), (), jax.random.key(0))[0]
      >>> choose(jnp.array([1.0, 1.5, 2.0, 2.2, 1e30]))
      Array(2., dtype=float32)
    """
    return _chosen("fax.aggregators.krum", byzantine, 1)


def multi_krum(byzantine: int, select: int) -> Aggregator:
    """The mean of the updates with the lowest scores of `krum`.

    Args:
      byzantine: f, at least 0.
      select: how many updates are averaged, at least 1 and at most n - f, which are honest.

    References:
      Blanchard et al., Machine learning with adversaries: Byzantine tolerant gradient descent,
      arXiv:1703.02757.

    Returns:
      The aggregator; see `krum`, also for weights: the mean has none.

    Raises:
      ValueError: if an argument is out of range, or n is not above 2 f + 2.

    Example:

      >>> @fax.program(clients=5)
      ... def choose(updates):
      ...     krum = fax.aggregators.multi_krum(byzantine=1, select=2)
      ...     return krum.aggregate(updates, jnp.ones(5), (), jax.random.key(0))[0]
      >>> choose(jnp.array([1.0, 1.5, 2.0, 2.2, 1e30]))
      Array(1.75, dtype=float32)
    """
    return _chosen("fax.aggregators.multi_krum", byzantine, select)


def _chosen(caller: str, byzantine: int, select: int) -> Aggregator:
    f = _arguments.count(caller, "byzantine", byzantine, least=0)
    select = _arguments.count(caller, "select", select, least=1)

    def aggregate(
        updates: PyTree, weights: jax.Array, state: PyTree, key: jax.Array
    ) -> tuple[PyTree, PyTree, Metrics]:
        n = len(weights)
        if n <= 2 * f + 2:
            raise ValueError(
                f"{caller}: byzantine={f} attackers among n={n} clients, expected n > 2 f + 2, so "
                f"at least {2 * f + 3} clients in a round or at most {max((n - 3) // 2, 0)} "
                "attackers."
            )
        if select > n - f:
            raise ValueError(
                f"{caller}: select={select} of n={n} clients with byzantine={f}, expected at most "
                f"n - f = {n - f}, for the rest may be attackers."
            )
        updates = present_rows(updates, weights)
        present = operators.collect(weights != 0)
        neighbours = jnp.maximum(jnp.sum(present) - f - 2, 1)
        rows = lax.stop_gradient(operators.collect(updates))

        def score(own, number, rows, present, neighbours):
            def distance(other):
                return l2_norm(jax.tree.map(difference, own, other)).value

            distances = lax.map(distance, rows)
            others = present & (jnp.arange(n) != number)
            near = jnp.sort(jnp.where(others & ~jnp.isnan(distances), distances, jnp.inf))
            # The root of the sum of squares has the same order, and squares would overflow.
            own_score = l2_norm(jnp.where(jnp.arange(n) < neighbours, near, 0)).value
            return jnp.where(present[number] & ~jnp.isnan(own_score), own_score, jnp.inf)

        scores = operators.map(
            score,
            lax.stop_gradient(updates),
            operators.index(),
            *operators.broadcast((rows, present, neighbours)),
        )
        scores = operators.collect(scores)
        order = jnp.argsort(scores, stable=True)
        best = jnp.zeros(n, bool).at[order[:select]].set(True) & present
        chosen = operators.distribute(best)
        update = reductions.mean(updates, where=chosen)
        return update, state, {"clients/bits": all_bits(updates), "clients/chosen": chosen}

    return Aggregator(lambda params: (), aggregate)
