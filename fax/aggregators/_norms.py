"""Norms of updates over the whole range of floats, and updates shortened to a limit.

Squares of large numbers overflow and those of small ones vanish, and what an attacker sends is
either. So norms are computed in units of a power of two, in which the largest element is about 1:
that is exact. One cannot simply divide by the largest element. Compilers multiply by its inverse
instead, which is denormal for the largest numbers, and processors take denormal numbers for zero.
For the same reason such numbers count as zero here, on every processor.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

PyTree = Any

_BLOCK = 32  # XLA adds up in blocks, of blocks, of about so many numbers.
_OTHER_ROUNDINGS = 16  # of squares, the root, the limit, the scale and products


class Unit(NamedTuple):
    """A power of two and its inverse. Both are normal numbers, so that products are exact."""

    value: jax.Array
    inverse: jax.Array


class Norm(NamedTuple):
    """The norm of an update.

    Attributes:
      unit: what it is measured in.
      size: the norm in this unit; NaN if an element is not finite.
      error: what rounding changes at most, relative to the size.
    """

    unit: Unit
    size: jax.Array
    error: float

    @property
    def value(self) -> jax.Array:
        """The norm as a number, infinite where that is too large."""
        return self.unit.value * self.size


def unit_of(largest: jax.Array) -> Unit:
    """The power of two next to a number that is not negative, from below if it is in range.

    It is 1 for numbers that count as zero, and for NaN. Some room is left at the ends of the range,
    as compilers multiply units by constants first.
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
    leaves, unit = _in_units(update)
    total: Any = sum(jnp.sum(x * x) for x in leaves)
    total = jnp.where(jnp.isfinite(total), total, jnp.nan).astype(unit.value.dtype)
    # The root has no derivative at zero.
    size = jnp.where(total == 0, 0, jnp.sqrt(jnp.where(total == 0, 1, total)))
    return Norm(unit, size, _error(leaves, size.dtype))


def l1_norm(update: PyTree) -> Norm:
    """The L1 norm of all leaves together."""
    leaves, unit = _in_units(update)
    total: Any = sum(jnp.sum(jnp.abs(x)) for x in leaves)
    size = jnp.where(jnp.isfinite(total), total, jnp.nan).astype(unit.value.dtype)
    return Norm(unit, size, _error(leaves, size.dtype))


def shrunk(update: PyTree, norm: Norm, limit: Any) -> PyTree:
    """An update of this norm, scaled down to the limit if it is above it, in `wide` dtypes.

    Its exact norm is at most the limit, however numbers were rounded on the way: the norm is taken
    to be as large as rounding may have hidden. An update that is not finite stays so.
    """
    most = norm.size * (1 + norm.error)
    over = most > limit * norm.unit.inverse
    scale = limit / jnp.where(over, most, 1)

    def one(x: Any) -> jax.Array:
        x = jnp.asarray(x, wide(x))
        inverse, factor = norm.unit.inverse, scale
        small = ((x * inverse) * factor).astype(x.dtype)
        x = jnp.where(over, small, x)
        denormal = jnp.abs(x) < jnp.finfo(x.dtype).tiny
        return jnp.where(denormal, x - lax.stop_gradient(x), x)  # zero, with its derivative

    return jax.tree.map(one, update)


def toward_zero(x: jax.Array, dtype: Any) -> jax.Array:
    """A float in a shorter dtype, never larger in magnitude. Its derivative is that of a cast."""
    wide, narrow = jnp.finfo(x.dtype), jnp.finfo(dtype)
    if narrow.nmant >= wide.nmant:
        return x.astype(dtype)
    cut = wide.nmant - narrow.nmant
    exact = lax.stop_gradient(x)
    kept = lax.bitcast_convert_type((_bits(exact) >> cut) << cut, x.dtype)
    if narrow.minexp > wide.minexp:  # below are numbers of a fixed distance
        step = narrow.smallest_subnormal.astype(x.dtype)
        kept = jnp.where(jnp.abs(exact) < narrow.tiny, jnp.trunc(exact / step) * step, kept)
    return kept.astype(dtype) + (x - exact).astype(dtype)


def wide(x: Any) -> Any:
    """The dtype in which numbers like these are added up."""
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def difference(a: jax.Array, b: jax.Array) -> jax.Array:
    """a - b in their `wide` dtype, in which shorter floats do not overflow."""
    return a.astype(wide(a)) - b.astype(wide(b))


def largest_of(leaves: list[jax.Array], dtype: Any) -> jax.Array:
    """The largest magnitude; NaN if there is NaN."""
    largest = jnp.zeros((), dtype)
    for x in leaves:
        largest = jnp.maximum(largest, jnp.max(jnp.abs(lax.stop_gradient(x)), initial=0))
    return largest


def _in_units(update: PyTree) -> tuple[list[jax.Array], Unit]:
    """The leaves of an update in units of its largest element, in one dtype."""
    leaves = jax.tree.leaves(update)
    dtype = jnp.result_type(jnp.float32, *map(wide, leaves))
    leaves = [jnp.asarray(x, dtype) for x in leaves]
    unit = unit_of(largest_of(leaves, dtype))
    return [x * unit.inverse for x in leaves], unit


def _error(leaves: list[jax.Array], dtype: Any) -> float:
    """What rounding changes of a norm at most, relative to it: each step by half of ``eps``."""
    largest = max((x.size for x in leaves), default=0)
    in_blocks = _BLOCK * math.ceil(math.log(max(largest, 2), _BLOCK))
    roundings = min(largest, in_blocks) + len(leaves) + _OTHER_ROUNDINGS
    return roundings * float(jnp.finfo(dtype).eps) / 2


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, f"uint{jnp.finfo(x.dtype).bits}")
