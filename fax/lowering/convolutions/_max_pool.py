"""The derivative of a maximum over windows, as comparisons of slices.

XLA has an operation for it, which finds the maximum of each window, one position after the other.
On CPU that takes 4 to 20 times as long as the maximum itself. Here the elements of the windows are
compared slice by slice, for all windows at once, and each slice gets the cotangents of the windows
in which it is the maximum. For ties it is the first element, as in XLA.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fax._arithmetic import identity

# Each element of a window adds a few operations, which take time to compile.
_MOST_ELEMENTS = 64


def is_max_pool(params: dict[str, Any], dtype: Any) -> bool:
    """Whether `max_pool_cotangent` can write a ``select_and_scatter_add`` of these parameters."""
    small = math.prod(params["window_dimensions"]) <= _MOST_ELEMENTS
    maximum = params["select_prim"] is lax.ge_p
    return small and maximum and jnp.issubdtype(dtype, jnp.floating)


def max_pool_cotangent(
    params: dict[str, Any], out: Any, cotangent: jax.Array, operand: jax.Array
) -> jax.Array:
    """The cotangent of the operand of a maximum over windows.

    Args:
      params: of the equation, a ``select_and_scatter_add``.
      out: the type of its result, which is that of the operand.
      cotangent: the cotangent of the maxima.
      operand: the operand.
    """
    window, strides = params["window_dimensions"], params["window_strides"]
    lows = [low for low, _ in params["padding"]]
    starts = list(np.ndindex(*window))
    reach = [(n - 1) * s + 1 for n, s in zip(cotangent.shape, strides, strict=True)]
    # Space for all windows. Elements after the last window are in none.
    sizes = [r + w - 1 for r, w in zip(reach, window, strict=True)]
    least = identity("max", operand.dtype)
    fill = [
        (low, size - low - n, 0) for low, size, n in zip(lows, sizes, operand.shape, strict=True)
    ]
    padded = lax.pad(operand, least, fill)

    def element(start: tuple[int, ...]) -> jax.Array:
        limits = [i + r for i, r in zip(start, reach, strict=True)]
        return lax.slice(padded, start, limits, strides)

    best, winner = element(starts[0]), jnp.zeros(cotangent.shape, jnp.int32)
    for number, start in enumerate(starts[1:], start=1):
        other = element(start)
        stays = lax.ge(best, other)
        best = lax.select(stays, best, other)
        winner = lax.select(stays, winner, lax.full_like(winner, number))

    back = [(-low, low + n - size, 0) for low, size, n in zip(lows, sizes, out.shape, strict=True)]
    zero = cotangent.dtype.type(0)
    if tuple(strides) == tuple(window):  # no element is in two windows
        total = _to_winners(cotangent, winner, window, zero)
        return lax.pad(total, zero, back)
    nothing = lax.full_like(cotangent, 0)

    def won(number: int, start: tuple[int, ...]) -> jax.Array:
        own = lax.select(lax.eq(winner, np.int32(number)), cotangent, nothing)
        ends = [size - i - r for size, i, r in zip(sizes, start, reach, strict=True)]
        config = [(i, end, s - 1) for i, end, s in zip(start, ends, strides, strict=True)]
        return lax.pad(own, zero, config)

    total = functools.reduce(lax.add, [won(*numbered) for numbered in enumerate(starts)])
    return lax.pad(total, zero, back)


def _to_winners(
    cotangent: jax.Array, winner: jax.Array, window: Sequence[int], zero: np.ndarray
) -> jax.Array:
    """The cotangent of each element if windows do not overlap."""
    dims = range(cotangent.ndim)
    apart = [size for pair in zip(cotangent.shape, window, strict=True) for size in pair]

    def broadcast(x: jax.Array, offset: int) -> jax.Array:
        return lax.broadcast_in_dim(x, apart, [2 * dim + offset for dim in dims])

    numbers = jnp.arange(math.prod(window), dtype=winner.dtype).reshape(window)
    won = lax.eq(broadcast(winner, 0), broadcast(numbers, 1))
    received = lax.select(won, broadcast(cotangent, 0), lax.full(apart, zero, cotangent.dtype))
    return received.reshape([n * w for n, w in zip(cotangent.shape, window, strict=True)])
