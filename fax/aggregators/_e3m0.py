"""E3M0: updates in four bits, a sign and three bits of exponent."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from fax.aggregators._aggregator import (
    Format,
    Metrics,
    PyTree,
    Transformation,
    of_floats,
    stateless_transformation,
)
from fax.aggregators._norms import largest_of, unit_of, wide
from fax.aggregators._per_client import each_present

_BITS = 4
_EXPONENT_BITS = 3
_BIAS = 127  # of float32's exponents
_LEVELS = [2.0**e for e in range(-6, 1)]
# A number is rounded up from the middle between its neighbors on.
_STEPS = [((low + high) / 2, high - low) for low, high in zip([0.0, *_LEVELS], _LEVELS)]


def e3m0() -> Transformation:
    """Rounds updates to four bits, E3M0: a sign, three bits of exponent, and no mantissa.

    A client sends each leaf u of its update as a scale s = max abs(u), in float32, and for every
    number the nearest of

        ±s {0, 2^-6, 2^-5, ..., 1/2, 1}

    Ties are rounded away from zero, and numbers smaller than s 2^-7 become zero. The rounded
    updates are float32, or float64 if the updates were, so that whatever follows adds them up in
    that precision. The derivative is that of the rounded value, which depends on s alone.
    Replicas in a data center send each other four bits for each number; see
    `fax.algorithms.diloco`. Everywhere else, sums between devices travel in float32.

    Returns:
      The transformation. Its metric ``"clients/bits"`` is how many bits each client sends:
      4 for each number, and 32 for each leaf.

    Raises:
      ValueError: when used, if a leaf does not hold real floats.

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
        updates: PyTree, weights: jax.Array, key: jax.Array
    ) -> tuple[PyTree, jax.Array, Metrics]:
        bits = sum(_BITS * math.prod(x.shape[1:]) + 32 for x in jax.tree.leaves(updates))
        sent = each_present(lambda update: jax.tree.map(_rounded, update), updates, weights)
        return sent, weights, {"clients/bits": jnp.full(weights.shape, bits, jnp.float32)}

    format = Format(_BITS, _encode, _decode)
    return of_floats("e3m0", stateless_transformation("e3m0", update, format))


def _rounded(x: jax.Array) -> jax.Array:
    """One leaf, as the server decodes it."""
    x = x.astype(wide(x))
    unit = unit_of(largest_of([x], x.dtype))
    x = x * unit.inverse
    scale = jnp.max(jnp.abs(x), initial=0)
    scale = scale.astype(jnp.float32).astype(x.dtype)
    size = _relative_to(scale, x)
    level = sum((jnp.where(size >= middle, step, 0) for middle, step in _STEPS), jnp.zeros_like(x))
    return jnp.sign(x) * level * scale * unit.value


def _relative_to(scale: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.abs(x) / jnp.where(scale > 0, scale, 1)


def _encode(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A sign, and which of the magnitudes of a rounded leaf it is."""
    unit = unit_of(largest_of([x], x.dtype))
    x = x * unit.inverse
    scale = jnp.max(jnp.abs(x), initial=0)
    size = _relative_to(scale, x)
    codes = sum(((size >= middle).astype(jnp.uint8) for middle, _ in _STEPS), jnp.uint8(0))
    return codes | (x < 0).astype(jnp.uint8) << _EXPONENT_BITS, scale * unit.value


def _decode(codes: jax.Array, scale: jax.Array) -> jax.Array:
    number = codes & (2**_EXPONENT_BITS - 1)
    # A power of two from the bits of its exponent is exact on every processor.
    exponent = number.astype(jnp.int32) + (_BIAS - len(_LEVELS))
    power = lax.bitcast_convert_type(exponent << jnp.finfo(jnp.float32).nmant, jnp.float32)
    level = jnp.where(number > 0, power, 0)
    return jnp.where(codes > number, -level, level).astype(scale.dtype) * scale
