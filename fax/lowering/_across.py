"""Reductions of the devices' totals across devices, with a single collective for all sums.

Not every compiler reduces every dtype. XLA's for CPU aborts at maxima of bfloat16. That for TPU
emulates numbers of 64 bits by pairs of 32, and of these only sums of signed ones have an all-reduce
there; so what it lacks is expressed by what it has.

A maximum or minimum of floats is NaN if one of them is. XLA does not promise this across devices,
and on CPU it ignores NaN. So they are compared as integers of the same order and size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fax import _arithmetic

Arrays = Sequence[jax.Array]


def across(
    platform: str, axes: tuple[str, ...], modes: Sequence[str], totals: Arrays
) -> list[jax.Array]:
    """Reduces totals over the devices along mesh axes.

    Args:
      platform: ``cpu``, ``tpu`` or another one.
      axes: the mesh axes, which are manual.
      modes: ``sum``, ``max`` or ``min`` for each total.
      totals: this device's.
    """
    reduced = list(totals)
    for mode, collective in (("sum", lax.psum), ("max", lax.pmax), ("min", lax.pmin)):
        which = [i for i, own in enumerate(modes) if own == mode]
        paired = [i for i in which if platform == "tpu" and mode != "sum" and _is_long(totals[i])]
        for i in paired:
            reduced[i] = _extreme_of_pairs(mode, totals[i], axes)
        which = [i for i in which if i not in paired]
        wide = [totals[i].astype(_sendable(platform, totals[i].dtype)) for i in which]
        values = [x if mode == "sum" else _arithmetic.ordered(mode, x) for x in wide]
        sent = collective(values, axes) if values else ()
        for i, x, value in zip(which, wide, sent, strict=True):
            value = value if mode == "sum" else _arithmetic.from_ordered(value, x.dtype)
            reduced[i] = value.astype(totals[i].dtype)
    return reduced


def _sendable(platform: str, dtype: Any) -> Any:
    """A dtype that XLA reduces across devices, to which and back nothing is lost."""
    if jnp.issubdtype(dtype, jnp.bool_):
        return jnp.int32
    if platform == "tpu" and dtype == jnp.uint64:
        return jnp.int64  # whose sums have the same bits
    return _arithmetic.accumulator_dtype(dtype)


def _is_long(x: jax.Array) -> bool:
    return x.dtype in (jnp.float64, jnp.int64, jnp.uint64)


def _extreme_of_pairs(mode: str, x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The largest or smallest of numbers of 64 bits: first of high parts, then of low ones."""
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    turn: Callable = (lax.neg if is_float else lax.bitwise_not) if mode == "min" else lambda x: x
    high, low = (_float_pair if is_float else _int_pair)(turn(x))
    top = _arithmetic.from_ordered(lax.pmax(_arithmetic.ordered("max", high), axes), high.dtype)
    least = jnp.asarray(-jnp.inf if is_float else 0, low.dtype)
    rest = lax.pmax(jnp.where(high == top, low, least), axes)
    if is_float:  # NaN as top is NaN here, too
        return turn(top.astype(x.dtype) + rest.astype(x.dtype))
    return turn((top.astype(x.dtype) << 32) | rest.astype(x.dtype))


def _int_pair(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    signed = jnp.issubdtype(x.dtype, jnp.signedinteger)
    return (x >> 32).astype(jnp.int32 if signed else jnp.uint32), x.astype(jnp.uint32)


def _float_pair(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As a TPU has it: the nearest float32, and what it lacks."""
    high = x.astype(jnp.float32)
    low = (x - high.astype(x.dtype)).astype(jnp.float32)
    return high, jnp.where(jnp.isfinite(high), low, 0)
