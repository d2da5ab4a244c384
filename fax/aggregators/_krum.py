"""Krum: the updates that are closest to most of the others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

import fax._operators as operators
import fax._reductions as reductions
from fax import _arguments
from fax.aggregators._aggregator import Aggregator, Metrics, PyTree, stateless_aggregator
from fax.aggregators._norms import difference, l2_norm
from fax.aggregators._per_client import present_rows


def krum(byzantine: int) -> Aggregator:
    """The update that is closest to most of the others, among n clients with f attackers.

    The score of client i is the sum of the squared distances ‖u_i - u_j‖^2 to its n - f - 2 nearest
    neighbors. The result is the update with the lowest score, or the first of several.

    Weights only say which clients take part: those of weight zero are neither chosen nor neighbors
    of others, and all others count the same. If m of the n clients are left, a client has m - f - 2
    neighbors, at least one, and the guarantee holds if m > 2 f + 2. If none is left, the update is
    zero. An update with NaN is far from all others. Every update is sent to the server. On a mesh,
    each device computes the distances from its own clients to all clients.

    Args:
      byzantine: f, at least 0.

    Returns:
      The aggregator, without state. Its metric ``"clients/chosen"`` is bool [clients]. The choice
      has no derivative.

    Raises:
      ValueError: if ``byzantine`` is out of range; when used, if n is not above 2 f + 2.

    References:
      Blanchard et al., Machine learning with adversaries: Byzantine tolerant gradient descent,
      arXiv:1703.02757.

    Example:

      >>> @fax.program(clients=5)
      ... def choose(updates):
      ...     krum = fax.aggregators.krum(byzantine=1)
      ...     return krum.aggregate(updates, jnp.ones(5), (), jax.random.key(0))[0]
      >>> choose(jnp.array([1.0, 1.5, 2.0, 2.2, 1e30]))
      Array(2., dtype=float32)
    """
    return _krum("krum", byzantine, 1)


def multi_krum(byzantine: int, select: int) -> Aggregator:
    """The unweighted mean of the updates with the lowest scores of `krum`.

    Args:
      byzantine: f, at least 0.
      select: how many updates are averaged. At least 1, and at most n - f, the number of honest
        clients. If m of the n clients are left, at most m - f are averaged, but at least one.

    Returns:
      The aggregator; see `krum`.

    Raises:
      ValueError: if an argument is out of range; when used, if n is not above 2 f + 2.

    References:
      Blanchard et al., Machine learning with adversaries: Byzantine tolerant gradient descent,
      arXiv:1703.02757.

    Example:

      >>> @fax.program(clients=5)
      ... def choose(updates):
      ...     krum = fax.aggregators.multi_krum(byzantine=1, select=2)
      ...     return krum.aggregate(updates, jnp.ones(5), (), jax.random.key(0))[0]
      >>> choose(jnp.array([1.0, 1.5, 2.0, 2.2, 1e30]))
      Array(1.75, dtype=float32)
    """
    return _krum("multi_krum", byzantine, select)


def _krum(name: str, byzantine: int, select: int) -> Aggregator:
    caller = f"fax.aggregators.{name}"
    f = _arguments.count(caller, "byzantine", byzantine, least=0)
    select = _arguments.count(caller, "select", select, least=1)

    def aggregate(updates: PyTree, weights: jax.Array, key: jax.Array) -> tuple[PyTree, Metrics]:
        n = len(weights)
        if n <= 2 * f + 2:
            raise ValueError(
                f"{caller}: byzantine is {f} in a round of {n} clients, expected at most "
                f"{max((n - 3) // 2, 0)}. With {f} attackers, use at least {2 * f + 3} clients."
            )
        if select > n - f:
            raise ValueError(
                f"{caller}: select is {select} in a round of {n} clients with byzantine={f}, "
                f"expected at most {n - f}, since the others may be attackers."
            )
        updates = present_rows(updates, weights)
        present = operators.collect(weights != 0)
        left = jnp.sum(present)
        neighbors = jnp.maximum(left - f - 2, 1)
        rows = lax.stop_gradient(operators.collect(updates))

        def score(
            own: PyTree, number: jax.Array, rows: PyTree, present: jax.Array, neighbors: jax.Array
        ) -> jax.Array:
            def distance(other: PyTree) -> jax.Array:
                return l2_norm(difference(own, other)).value

            distances = lax.map(distance, rows)
            others = present & (jnp.arange(n) != number)
            near = jnp.sort(jnp.where(others & ~jnp.isnan(distances), distances, jnp.inf))
            # The root of the sum of squares is ordered in the same way. Squares would overflow.
            own_score = l2_norm(jnp.where(jnp.arange(n) < neighbors, near, 0)).value
            return jnp.where(present[number] & ~jnp.isnan(own_score), own_score, jnp.inf)

        scores = operators.map(
            score,
            lax.stop_gradient(updates),
            operators.index(),
            *operators.broadcast((rows, present, neighbors)),
        )
        scores = operators.collect(scores)
        # Clients that are left out come last, behind those that are infinitely far from others.
        order = jnp.lexsort((scores, ~present))
        among = jnp.arange(n) < jnp.clip(left - f, 1, select)
        best = jnp.zeros(n, bool).at[order].set(among) & present
        chosen = operators.distribute(best)
        return reductions.mean(updates, where=chosen), {"clients/chosen": chosen}

    return stateless_aggregator(name, aggregate)
