"""Updates sent in four bits: a sign and three bits of exponent."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fax.aggregators._aggregator import Metrics, PyTree, Transformation, each_present
from fax.aggregators._leaves import check_floats
from fax.aggregators._norms import largest_of, unit_of, wide

BITS = 4
_LEVELS = [2.0**e for e in range(-6, 1)]
# A number is rounded up from the middle between its neighbours on.
_STEPS = [((low + high) / 2, high - low) for low, high in zip([0.0, *_LEVELS], _LEVELS)]


def e3m0() -> Transformation:
    """Rounds updates to four bits, E3M0: a sign, three bits of exponent and none of mantissa.

    Each leaf u of a client's update is sent as a scale s = max abs(u), to the precision of float32,
    and for every entry the nearest of

        ±s {0, 2^-6, 2^-5, ..., 1/2, 1}

    where a tie goes away from zero; what is less than s 2^-7 becomes zero. Nothing else is
    rounded: weights stay what they are, and the updates come out in float32, or float64 if they
    were, so that whatever follows adds them up in that precision. The derivative is that of the
    rounded value, which moves with s alone. What is simulated is the rounding; between devices
    the sum travels in float32.

    Returns:
      The transformation. A client sends 4 bits for each entry and 32 for each leaf.

    Raises:
      ValueError: when updates have a leaf that is not of real floats.

    References:
      Douillard et al., Streaming DiLoCo with overlapping communication, arXiv:2501.18512.

    Example:

      >>> aggregator = fax.aggregators.chain(fax.aggregators.e3m0())
      >>> @fax.program(clients=2)
      ... def average(updates):
      ...     update, _, metrics = aggregator.aggregate(
      ...         updates, jnp.ones(2), aggregator.init(updates[0]), jax.random.key(0)
      ...     )
      ...     return update, metrics["clients/bits"]
      >>> average(jnp.array([[8.0, 3.1, -0.1], [8.0, 2.9, 0.01]]))
      (Array([ 8.    ,  3.    , -0.0625], dtype=float32), Array([44., 44.], dtype=float32))
    """

    def update(
        updates: PyTree, weights: jax.Array, state: PyTree, key: jax.Array
    ) -> tuple[PyTree, jax.Array, PyTree, Metrics]:
        leaves = jax.tree.leaves(updates)
        check_floats("e3m0", updates)
        bits = sum(BITS * math.prod(x.shape[1:]) + 32 for x in leaves)
        sent = each_present(lambda update: jax.tree.map(rounded, update), updates, weights)
        return sent, weights, state, {"clients/bits": jnp.full(len(leaves[0]), bits, jnp.float32)}

    return Transformation(lambda params: (), update)


def rounded(x: jax.Array) -> jax.Array:
    """One leaf, as it arrives."""
    x = x.astype(wide(x))
    unit = unit_of(largest_of([x], x.dtype))
    x = x * unit.inverse
    scale = jnp.max(jnp.abs(x), initial=0)
    scale = scale.astype(jnp.float32).astype(x.dtype)
    size = jnp.abs(x) / jnp.where(scale > 0, scale, 1)
    level = sum((jnp.where(size >= middle, step, 0) for middle, step in _STEPS), jnp.zeros_like(x))
    return jnp.sign(x) * level * scale * unit.value
