"""Updates that are not finite: left out of a round, or a reason to stop."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fax._operators as operators
import fax._reductions as reductions
from fax import _arguments
from fax.aggregators._aggregator import Metrics, Transformation, each_present, where

PyTree = Any

_WHERE = "fax.aggregators.non_finite"


def non_finite(policy: str = "drop") -> Transformation:
    """Looks for NaN and infinities in clients' updates and weights.

    Those of clients whose weight is zero are not looked at, for they are left out anyway.

    With ``"drop"`` such a client's update and weight become zero: it counts nowhere, and no
    derivative reaches what it sent. All aggregators of fax leave out clients of weight zero, so
    that derivatives do not reach its singular local training either.

    With ``"raise"`` the round fails. The test is part of the compiled round, on any mesh, and
    what it raises is seen where the host waits for results of the round: JAX reports it
    as a ``jax.errors.JaxRuntimeError`` whose message has the ``FloatingPointError``, with the
    number of clients and the rows of the cohort that they are in (``cohort.positions`` tells
    who that is). ``jax.effects_barrier()`` waits for nothing else.

    Args:
      policy: ``"drop"`` or ``"raise"``.

    Returns:
      The transformation. Its metric ``"non_finite"`` is the number of such clients, an integer.

    Raises:
      ValueError: if ``policy`` is neither.

    Example:

      >>> aggregator = fax.aggregators.chain(fax.aggregators.non_finite("drop"))
      >>> @fax.program(clients=3)
      ... def average(updates):
      ...     state = aggregator.init(jnp.zeros(()))
      ...     return aggregator.aggregate(updates, jnp.ones(3), state, jax.random.key(0))
      >>> update, _, metrics = average(jnp.array([1.0, jnp.nan, 3.0]))
      >>> update, metrics["non_finite"]
      (Array(2., dtype=float32), Array(1, dtype=int32))
    """
    _arguments.choice(_WHERE, "policy", policy, ("drop", "raise"))

    def update(
        updates: PyTree, weights: jax.Array, state: PyTree, key: jax.Array
    ) -> tuple[PyTree, jax.Array, PyTree, Metrics]:
        finite = each_present(_is_finite, updates, weights, weights)
        metrics = {"non_finite": reductions.sum(~finite)}
        if policy == "raise":
            jax.debug.callback(_refuse, operators.collect(finite))
            return updates, weights, state, metrics

        def kept(update: PyTree, finite: jax.Array, weight: jax.Array) -> tuple[PyTree, jax.Array]:
            return where(finite, (update, weight))

        updates, weights = each_present(kept, updates, weights, finite, weights)
        return updates, weights, state, metrics

    return Transformation(lambda params: (), update)


def _is_finite(*values: PyTree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(values)]))


def _refuse(finite: jax.Array) -> None:
    rows = np.flatnonzero(~np.asarray(finite))
    if rows.size:
        shown = ", ".join(map(str, rows[:10])) + (", ..." if rows.size > 10 else "")
        raise FloatingPointError(
            f"{_WHERE}: {rows.size} of {len(finite)} clients have NaN or infinity in their update "
            f"or weight, those in rows {shown} of the cohort. Try a smaller rate of the clients' "
            "optimizer, or leave such clients out by non_finite('drop')."
        )
