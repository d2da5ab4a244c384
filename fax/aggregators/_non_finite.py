"""Updates that are not finite: they are dropped, or the round fails."""

from __future__ import annotations

import jax
import numpy as np

import fax._operators as operators
import fax._reductions as reductions
from fax import _arguments
from fax.aggregators._aggregator import (
    Metrics,
    PyTree,
    Transformation,
    stateless_transformation,
)
from fax.aggregators._per_client import all_finite, each_present, zeros_unless

_CALLER = "fax.aggregators.non_finite"


def non_finite(policy: str = "drop") -> Transformation:
    """Finds clients whose update or weight is NaN or infinite.

    Clients of weight zero are ignored, as they are left out anyway.

    With ``"drop"``, the update and the weight of such a client become zero. It then counts nowhere,
    and no derivative reaches what it sent. As all aggregators of fax leave out clients of weight
    zero, no derivative reaches its local training either. Replicas in a data center are an
    exception in reverse mode, because they keep their own state.

    With ``"raise"``, the round fails. The test is part of the compiled round, on any mesh, so the
    error appears when the host waits for results of the round. JAX then raises a
    ``jax.errors.JaxRuntimeError``, whose message contains a ``FloatingPointError`` with the number
    of such clients and their rows in the cohort (``cohort.positions`` says which clients these
    are). To wait for nothing but the test, call ``jax.effects_barrier()``.

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
    _arguments.choice(_CALLER, "policy", policy, ("drop", "raise"))

    def update(
        updates: PyTree, weights: jax.Array, key: jax.Array
    ) -> tuple[PyTree, jax.Array, Metrics]:
        finite = each_present(all_finite, updates, weights, weights)
        metrics = {"non_finite": reductions.sum(~finite)}
        if policy == "raise":
            jax.debug.callback(_raise_unless_all, operators.collect(finite))
            return updates, weights, metrics

        def kept(update: PyTree, finite: jax.Array, weight: jax.Array) -> tuple[PyTree, jax.Array]:
            return zeros_unless(finite, (update, weight))

        updates, weights = each_present(kept, updates, weights, finite, weights)
        return updates, weights, metrics

    return stateless_transformation("non_finite", update)


def _raise_unless_all(finite: jax.Array) -> None:
    rows = np.flatnonzero(~np.asarray(finite))
    if rows.size:
        shown = ", ".join(map(str, rows[:10])) + (", ..." if rows.size > 10 else "")
        raise FloatingPointError(
            f"{_CALLER}: {rows.size} of {len(finite)} clients have NaN or infinity in their update "
            f"or weight, those in rows {shown} of the cohort. Try a smaller learning rate for the "
            "client optimizer, or leave such clients out with non_finite('drop')."
        )
