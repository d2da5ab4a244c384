"""Stochastic quantization: numbers are rounded at random to a few levels, without bias."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from fax import _arguments
from fax.aggregators._aggregator import Format, Transformation
from fax.aggregators._encoding import bits_of, leafwise, shortened, straight_through
from fax.aggregators._norms import largest_of, unit_of, wide

_MOST_PACKED = 256  # levels, in eight bits


def uniform_quantization(levels: int, *, entropy_coded: bool = False) -> Transformation:
    """Rounds each number at random to one of the two nearest of evenly spaced levels.

    A leaf x of d numbers between a = min_j x_j and b = max_j x_j has k levels:

        B_r = a + r (b - a) / (k - 1),   r = 0 ... k - 1

    A number between B_r and B_{r+1} becomes B_{r+1} with probability
    (x_j - B_r) / (B_{r+1} - B_r), so that the result is unbiased. Its variance is at most
    ((b - a) / (k - 1))^2 / 4, so that E ‖x' - x‖^2 <= d ‖x‖^2 / (2 (k - 1)^2). Each leaf has its
    own levels, since layers differ in scale. Each client has its own random numbers, so that the
    mean squared error of a mean of n clients falls as 1 / n. Derivatives are those of the
    expectation, x, as if nothing were rounded. Inside `hadamard`, b - a is smaller. In float16 and
    bfloat16, what is decoded is rounded to the nearest number of that dtype in the end.

    For each leaf, a client sends d ceil(log2 k) bits, and a and b, in float32 for shorter floats.
    With up to 256 levels, replicas in a data center send each other these, with 2, 4 or 8 bits for
    a number, if updates are float32 or float64; see `fax.algorithms.diloco`. Then the distance of
    levels is rounded up to 24 - ceil(log2 k) significant bits (in float64, 53 instead of 24), and
    the last level, b, is a little closer to the one before it. The result is unbiased nevertheless.

    Args:
      levels: k, an int from 2 to 65536.
      entropy_coded: whether to count the bits of an arithmetic code instead. If h_r numbers are at
        level r, the code takes sum_r h_r log2(d / h_r) + 2 bits, and the histogram takes
        k log2((d + k) e / k) bits.

    Returns:
      The transformation. Its metric ``"clients/bits"`` is how many bits each client sends.

    Raises:
      ValueError: if ``levels`` is out of range; when used, if a leaf does not hold real floats.

    References:
      Suresh et al., Distributed mean estimation with limited communication, arXiv:1611.00429,
      sections 2.2 and 4.

    Example:

      >>> aggregator = fax.aggregators.chain(fax.aggregators.uniform_quantization(levels=3))
      >>> @fax.program(clients=2)
      ... def average(updates, weights, key):
      ...     update, _, metrics = aggregator.aggregate(updates, weights, ((), ()), key)
      ...     return update, metrics
      >>> updates = jnp.array([[0.0, 2.0, 4.0], [4.0, 6.0, 8.0]])
      >>> average(updates, jnp.ones(2), jax.random.key(0))
      (Array([2., 4., 6.], dtype=float32), {'clients/bits': Array([70., 70.], dtype=float32)})
    """
    caller = "fax.aggregators.uniform_quantization"
    levels = _arguments.count(caller, "levels", levels, least=2, most=65536)
    entropy_coded = _arguments.flag(caller, "entropy_coded", entropy_coded)
    at = functools.partial(_at_level, levels)

    def encode(x: jax.Array, random: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        low, high = jnp.min(x), jnp.max(x)
        step = _step(levels, low, high)
        below = jnp.clip(jnp.floor((x - low) / jnp.where(step > 0, step, 1)), 0, levels - 2)
        nearest = at(low, high, below)
        gap = at(low, high, below + 1) - nearest
        up = random < (x - nearest) / jnp.where(gap > 0, gap, 1)
        # The largest is always the last level, so that the levels are known from the result.
        level = jnp.where(x < high, below + up, levels - 1)
        fixed = x.size * math.ceil(math.log2(levels))
        bits = _arithmetic_code(level, levels) if entropy_coded else fixed
        return straight_through(x, at(low, high, level)), bits + 2 * bits_of(x.dtype)

    packed = levels <= _MOST_PACKED and not entropy_coded
    return leafwise("uniform_quantization", encode, format=_format(levels) if packed else None)


def _step(levels: int, low: jax.Array, high: jax.Array) -> jax.Array:
    """The distance of levels. Products with numbers of levels are exact."""
    step = (high - low) / (levels - 1)
    if levels > _MOST_PACKED:
        return step
    lost = math.ceil(math.log2(levels))
    return shortened(step, lost, 2**lost - 1)


def _at_level(levels: int, low: jax.Array, high: jax.Array, level: jax.Array) -> jax.Array:
    return jnp.where(level < levels - 1, low + level * _step(levels, low, high), high)


def _format(levels: int) -> Format:
    """A number takes the least of 2, 4 and 8 bits that has as many levels."""
    bits = next(bits for bits in (2, 4, 8) if levels <= 2**bits)

    def encode(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        if not x.size:
            return jnp.zeros(x.shape, jnp.uint8), jnp.zeros(2, x.dtype)
        ends = jnp.stack([jnp.min(x), jnp.max(x)])
        unit = unit_of(largest_of([ends], wide(x)))
        x, (low, high) = x * unit.inverse, ends * unit.inverse
        step = _step(levels, low, high)
        position = jnp.where(step > 0, (x - low) / jnp.where(step > 0, step, 1), 0)
        level = jnp.where(x < high, jnp.clip(jnp.round(position), 0, levels - 1), levels - 1)
        return level.astype(jnp.uint8), ends

    def decode(codes: jax.Array, ends: jax.Array) -> jax.Array:
        unit = unit_of(largest_of([ends], wide(ends)))
        low, high = ends * unit.inverse
        values = _at_level(levels, low, high, codes.astype(low.dtype)) * unit.value
        return values.astype(ends.dtype)

    return Format(bits, encode, decode)


def _arithmetic_code(level: jax.Array, levels: int) -> jax.Array:
    """The bits of an arithmetic code and its histogram."""
    size = level.size
    counts = jnp.bincount(level.astype(jnp.int32), length=levels).astype(jnp.float32)
    code = jnp.sum(counts * jnp.log2(size / jnp.maximum(counts, 1)))
    histogram = levels * math.log2((size + levels) * math.e / levels)
    return jnp.ceil(code + 2 + histogram)
