"""Norms of updates over the whole range of floats, and updates scaled down to a norm.

Squares of large numbers overflow, squares of small numbers vanish, and attackers may send either.
So norms are computed in units of a power of two, in which the largest element is about 1. Such a
scaling is exact. Dividing by the largest element would not work: compilers multiply by its inverse
instead, which is subnormal for the largest numbers, and processors may treat subnormal numbers as
zero. For the same reason subnormal numbers count as zero here, on every processor.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fax.aggregators._aggregator import PyTree

_BLOCK = 32  # XLA sums in nested blocks of about this many numbers.
_OTHER_ROUNDINGS = 16  # of squares, the root, the limit, the scale and products


class Unit(NamedTuple):
    """A power of two and its inverse. Both are normal numbers, so that products are exact."""

    value: jax.Array
    inverse: jax.Array


class Norm(NamedTuple):
    """The norm of an update.

    Attributes:
      unit: the unit of ``size``.
      size: the norm in this unit. NaN if an element is not finite.
      error: a bound on the rounding error, relative to ``size``.
    """

    unit: Unit
    size: jax.Array
    error: float

    @property
    def value(self) -> jax.Array:
        """The norm as a number. Infinite if it is too large."""
        return self.unit.value * self.size


def unit_of(largest: jax.Array) -> Unit:
    """The largest power of two that is not above a nonnegative number.

    It is 1 for numbers that count as zero, and for NaN. It stays away from the ends of the range,
    since compilers may multiply units by constants first.
    """
    info = jnp.finfo(largest.dtype)
    largest, least = lax.stop_gradient(largest), 2**8 * info.tiny
    bits = _bits(jnp.where(largest >= info.tiny, jnp.clip(largest, least, 1 / least), 1))
    bits = (bits >> info.nmant) << info.nmant
    # The exponents of a power of two and its inverse add up to twice that of 1.
    inverse = 2 * _bits(jnp.ones_like(largest)) - bits
    return Unit(*(lax.bitcast_convert_type(x, largest.dtype) for x in (bits, inverse)))


def l2_norm(update: PyTree) -> Norm:
    """The L2 norm of all leaves together."""
    leaves, unit = _leaves_in_units(update)
    total: Any = sum(jnp.sum(x * x) for x in leaves)
    total = jnp.where(jnp.isfinite(total), total, jnp.nan).astype(unit.value.dtype)
    # The root has no finite derivative at zero.
    size = jnp.where(total == 0, 0, jnp.sqrt(jnp.where(total == 0, 1, total)))
    return Norm(unit, size, _error(leaves, size.dtype))


def l1_norm(update: PyTree) -> Norm:
    """The L1 norm of all leaves together."""
    leaves, unit = _leaves_in_units(update)
    total: Any = sum(jnp.sum(jnp.abs(x)) for x in leaves)
    size = jnp.where(jnp.isfinite(total), total, jnp.nan).astype(unit.value.dtype)
    return Norm(unit, size, _error(leaves, size.dtype))


def scaled_down(update: PyTree, norm: Norm, limit: Any) -> PyTree:
    """An update of this norm, scaled down to the limit if it is above it, in `wide` dtypes.

    The exact norm of the result is at most the limit, whatever was rounded on the way: the true
    norm is taken to be the largest that rounding allows. An update that is not finite stays so.
    """
    most = norm.size * (1 + norm.error)
    over = most > limit * norm.unit.inverse
    scale = limit / jnp.where(over, most, 1)

    def one(x: Any) -> jax.Array:
        x = jnp.asarray(x, wide(x))
        inverse, factor = norm.unit.inverse, scale
        small = ((x * inverse) * factor).astype(x.dtype)
        x = jnp.where(over, small, x)
        subnormal = jnp.abs(x) < jnp.finfo(x.dtype).tiny
        return jnp.where(subnormal, x - lax.stop_gradient(x), x)  # zero, with its derivative

    return jax.tree.map(one, update)


def cast_toward_zero(x: jax.Array, dtype: Any) -> jax.Array:
    """Floats in a shorter dtype, never larger in magnitude. The derivative is that of a cast."""
    long, short = jnp.finfo(x.dtype), jnp.finfo(dtype)
    if short.nmant >= long.nmant:
        return x.astype(dtype)
    cut = long.nmant - short.nmant
    exact = lax.stop_gradient(x)
    kept = lax.bitcast_convert_type((_bits(exact) >> cut) << cut, x.dtype)
    if short.minexp > long.minexp:  # subnormal numbers of the shorter dtype are evenly spaced
        step = short.smallest_subnormal.astype(x.dtype)
        kept = jnp.where(jnp.abs(exact) < short.tiny, jnp.trunc(exact / step) * step, kept)
    return kept.astype(dtype) + (x - exact).astype(dtype)


def wide(x: Any) -> Any:
    """The dtype in which numbers like these are added up."""
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def widened(tree: PyTree) -> PyTree:
    """The leaves in their `wide` dtypes."""
    return jax.tree.map(lambda x: x.astype(wide(x)), tree)


def difference(a: PyTree, b: PyTree) -> PyTree:
    """a - b in `wide` dtypes, in which shorter floats do not overflow."""
    return optax.tree.sub(widened(a), widened(b))


def largest_of(leaves: list[jax.Array], dtype: Any) -> jax.Array:
    """The largest magnitude. NaN if there is NaN."""
    largest = jnp.zeros((), dtype)
    for x in leaves:
        largest = jnp.maximum(largest, jnp.max(jnp.abs(lax.stop_gradient(x)), initial=0))
    return largest


def _leaves_in_units(update: PyTree) -> tuple[list[jax.Array], Unit]:
    """The leaves of an update, in one dtype and in units of about the largest element."""
    leaves = jax.tree.leaves(update)
    dtype = jnp.result_type(jnp.float32, *map(wide, leaves))
    leaves = [jnp.asarray(x, dtype) for x in leaves]
    unit = unit_of(largest_of(leaves, dtype))
    return [x * unit.inverse for x in leaves], unit


def _error(leaves: list[jax.Array], dtype: Any) -> float:
    """A bound on the relative rounding error of a norm, half of ``eps`` for each rounding."""
    largest = max((x.size for x in leaves), default=0)
    in_blocks = _BLOCK * math.ceil(math.log(max(largest, 2), _BLOCK))
    roundings = min(largest, in_blocks) + len(leaves) + _OTHER_ROUNDINGS
    return roundings * float(jnp.finfo(dtype).eps) / 2


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, f"uint{jnp.finfo(x.dtype).bits}")
