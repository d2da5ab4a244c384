"""Sums on the devices that are about as exact as in 64 bits, although JAX has only 32.

Terms are split into parts whose sums are exact, or nearly so: integers into groups of bits whose
sums cannot overflow, floats into multiples of powers of two that are small enough for exact sums,
and a small remainder. The host adds up the sums of the parts in 64 bits.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# A float32 holds integers up to 2**24.
_MANTISSA = 24


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """Terms or sums that are split into parts. Everything that adds up pytrees adds them up.

    Attributes:
      arrays: the parts, of one shape.
      bits: for integers, how many bits apart the parts are. None for floats.
    """

    arrays: tuple[jax.Array, ...]
    bits: int | None = dataclasses.field(metadata={"static": True})

    def add(self, other: Parts) -> Parts:
        """The sum of both. The rounding errors of floats are added to their last part."""
        if self.bits is not None or len(self.arrays) == 1:
            return jax.tree.map(jnp.add, self, other)
        *totals, rest = (_add(a, b) for a, b in zip(self.arrays, other.arrays, strict=True))
        last = rest[0] + sum(lost for _, lost in totals)
        return Parts((*(total for total, _ in totals), last), None)

    def value(self) -> np.ndarray:
        """The number that is split into these parts, in 64 bits, on the host."""
        arrays = [np.asarray(x) for x in self.arrays]
        if self.bits is not None:
            arrays = [x.astype(np.int64) << self.bits * k for k, x in enumerate(arrays)]
        else:
            complex_ = np.iscomplexobj(arrays[0])
            arrays = [x.astype(np.complex128 if complex_ else np.float64) for x in arrays]
        return functools.reduce(np.add, arrays)[()]


def into_parts(x: jax.Array, most: int) -> Parts:
    """Splits terms [terms, ...] into parts that are to be added up.

    Args:
      x: bools, integers or floats.
      most: the largest number of terms that are added up on the devices.
    """
    if jnp.issubdtype(x.dtype, jnp.bool_):
        return Parts((x.astype(jnp.int32),), 0)
    if jnp.issubdtype(x.dtype, jnp.integer):
        return _split_integers(x, most)
    if jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits <= 32:
        return _split_floats(x.astype(jnp.float32), most)
    return Parts((x,), None)


def _split_integers(x: jax.Array, most: int) -> Parts:
    width = jnp.iinfo(x.dtype).bits
    if width == 64:  # x64 is enabled
        return Parts((x,), 0)
    bits = 31 - most.bit_length()
    if width <= bits:
        return Parts((x.astype(jnp.int32),), 0)
    low = np.asarray((1 << bits) - 1, x.dtype)
    starts = range(0, width, bits)
    # A shift to the right preserves the sign, so the last part is signed.
    groups = [(x >> np.asarray(start, x.dtype)) for start in starts]
    groups = [*(group & low for group in groups[:-1]), groups[-1]]
    return Parts(tuple(group.astype(jnp.int32) for group in groups), bits)


def _split_floats(x: jax.Array, most: int) -> Parts:
    # Sums of ``most`` multiples of a unit are exact if each multiple has at most this many bits.
    bits = max(_MANTISSA - most.bit_length(), 2)
    rest, finite = jnp.where(jnp.isfinite(x), x, 0), jnp.isfinite(x)
    exponent = jnp.frexp(jnp.max(jnp.abs(rest), axis=0, initial=0))[1]
    parts = []
    for number in range(1, -(-_MANTISSA // bits)):
        # A power of two, made from its bits, because exp2 may not be exact.
        power = jnp.clip(exponent - number * bits, -100, 126)
        unit = lax.bitcast_convert_type((power + 127) << 23, jnp.float32)
        parts.append(jnp.trunc(rest / unit) * unit)
        rest = rest - parts[-1]
    return Parts((*parts, jnp.where(finite, rest, x)), None)


def _add(one: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum of two floats, and its rounding error."""
    total = one + other
    added = total - one
    lost = (one - (total - added)) + (other - added)
    return total, jnp.where(jnp.isfinite(total), lost, 0)
