"""TernGrad: each number becomes -s, 0, or s."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fax import _arguments
from fax.aggregators._aggregator import Transformation
from fax.aggregators._encoding import bits_of, leafwise, straight_through


def terngrad(clip: float | None = 2.5) -> Transformation:
    """TernGrad: clips each leaf, and rounds its numbers at random to -s, 0, or s.

        g_j = max(-c sigma, min(c sigma, x_j)),    s = max_j abs(g_j)
        x'_j = s sign(g_j) b_j,    b_j = 1 with probability abs(g_j) / s, else 0

    On average x' is g, with variance s abs(g_j) - g_j^2: clipping trades a bias for a smaller s.
    sigma is the root mean square, sqrt(mean_j x_j^2). For gradients of mean zero, as in the paper,
    it is the standard deviation. Unlike the standard deviation, it does not clip away a leaf of a
    single number or of equal numbers. Each leaf of each client has its own scale, since layers
    differ in scale. Derivatives are those of the expectation, g.

    For each leaf of d numbers, a client sends 2 d bits, and s, in float32 for shorter floats.

    Args:
      clip: c, a positive number. With None nothing is clipped, and x' is unbiased.

    Returns:
      The transformation. Its metric ``"clients/bits"`` is how many bits each client sends.

    Raises:
      ValueError: if ``clip`` is not positive; when used, if a leaf does not hold floats.

    References:
      Wen et al., TernGrad: Ternary gradients to reduce communication in distributed deep learning,
      arXiv:1705.07878.

    Example:

      >>> aggregator = fax.aggregators.chain(fax.aggregators.terngrad())
      >>> @fax.program(clients=2)
      ... def average(updates, weights, key):
      ...     update, _, metrics = aggregator.aggregate(updates, weights, ((), ()), key)
      ...     return update, metrics
      >>> average(jnp.array([[1.0, -1.0], [0.0, 0.0]]), jnp.ones(2), jax.random.key(0))
      (Array([ 0.5, -0.5], dtype=float32), {'clients/bits': Array([36., 36.], dtype=float32)})
    """
    if clip is not None:
        _arguments.number("fax.aggregators.terngrad", "clip", clip, above=0)

    def encode(x: jax.Array, random: jax.Array) -> tuple[jax.Array, float]:
        if clip is not None:
            square = jnp.mean(x**2)
            # The selection keeps the derivative of the root finite. Zeros are not clipped.
            sigma = jnp.sqrt(jnp.where(square > 0, square, 1))
            x = jnp.clip(x, -(clip * sigma).astype(x.dtype), (clip * sigma).astype(x.dtype))
        size = jnp.abs(x)
        scale = jnp.max(size)
        ternary = jnp.where(random * scale < size, scale * jnp.sign(x), 0)
        return straight_through(x, ternary), 2 * x.size + bits_of(x.dtype)

    return leafwise("terngrad", encode)
