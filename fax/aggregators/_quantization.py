"""Stochastic quantization: numbers are rounded at random to a few levels, without bias."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fax import _arguments
from fax.aggregators._aggregator import Transformation
from fax.aggregators._encoding import bits_of, leafwise, straight_through


def uniform_quantization(levels: int, *, entropy_coded: bool = False) -> Transformation:
    """Rounds each number at random to one of the two nearest of evenly spaced levels.

    A leaf x of d numbers between a = min_j x_j and b = max_j x_j has k levels:

        B_r = a + r (b - a) / (k - 1),   r = 0 ... k - 1

    A number between B_r and B_{r+1} becomes B_{r+1} with probability
    (x_j - B_r) / (B_{r+1} - B_r), so that the result is unbiased. Its variance is at most
    ((b - a) / (k - 1))^2 / 4, so that E ‖x' - x‖^2 <= d ‖x‖^2 / (2 (k - 1)^2). Each leaf has its
    own levels, since layers differ in scale. Each client has its own random numbers, so that the
    mean squared error of a mean of n clients falls as 1 / n. Derivatives are those of the
    expectation, x, as if nothing were rounded. Inside `hadamard`, b - a is smaller.

    For each leaf, a client sends d ceil(log2 k) bits, and a and b, in float32 for shorter floats.

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

    def encode(x: jax.Array, random: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        low, high = jnp.min(x), jnp.max(x)
        step = (high - low) / (levels - 1)
        position = (x - low) / jnp.where(step > 0, step, 1)
        below = jnp.clip(jnp.floor(position), 0, levels - 2)
        level = below + (random < position - below)
        fixed = x.size * math.ceil(math.log2(levels))
        bits = _arithmetic_code(level, levels) if entropy_coded else fixed
        return straight_through(x, low + level * step), bits + 2 * bits_of(x.dtype)

    return leafwise("uniform_quantization", encode)


def _arithmetic_code(level: jax.Array, levels: int) -> jax.Array:
    """The bits of an arithmetic code and its histogram."""
    size = level.size
    counts = jnp.bincount(level.astype(jnp.int32), length=levels).astype(jnp.float32)
    code = jnp.sum(counts * jnp.log2(size / jnp.maximum(counts, 1)))
    histogram = levels * math.log2((size + levels) * math.e / levels)
    return jnp.ceil(code + 2 + histogram)
