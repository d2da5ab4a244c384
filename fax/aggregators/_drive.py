"""DRIVE: one bit for each coordinate of a randomly rotated update, and a scale."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fax.aggregators._aggregator import Transformation
from fax.aggregators._encoding import bits_of, leafwise, straight_through
from fax.aggregators._rotation import padded_size, random_signs, rotate, unrotate


def drive() -> Transformation:
    """DRIVE: sends the signs of a randomly rotated leaf, and one number.

    A leaf x is padded to d = 2^m numbers. With the random rotation R of `hadamard`, the server
    decodes

        x' = S R^T sign(R x),    S = ‖x‖_2^2 / ‖R x‖_1

    With a uniformly random rotation, this scale makes x' unbiased, and the expected squared error
    is (pi / 2 - 1) ‖x‖^2 for large d. The rotation here is the structured one from section 6 of the
    paper. It is fast, and behaves similarly for updates in which many coordinates matter. It is not
    unbiased for every x, for example not for leaves of a few numbers. Each client has its own
    random signs, which the server draws again from the client's key. With common signs, the errors
    of similar updates would be similar, and would not average out. Each leaf has its own scale,
    since layers differ in scale. The derivative is that of the identity.

    For each leaf, a client sends d bits, and S, in float32 for shorter floats.

    Returns:
      The transformation. Its metric ``"clients/bits"`` is how many bits each client sends.

    Raises:
      ValueError: when used, if a leaf does not hold floats.

    References:
      Vargaftik et al., DRIVE: One-bit distributed mean estimation, arXiv:2105.08339.

    Example:

      >>> aggregator = fax.aggregators.chain(fax.aggregators.drive())
      >>> @fax.program(clients=2)
      ... def average(updates, weights, key):
      ...     return aggregator.aggregate(updates, weights, ((), ()), key)[2]
      >>> average(jnp.ones((2, 1000)), jnp.ones(2), jax.random.key(0))
      {'clients/bits': Array([1056., 1056.], dtype=float32)}
    """

    def encode(x: jax.Array, random: jax.Array) -> tuple[jax.Array, float]:
        signs = random_signs(random)
        rotated = rotate(x, signs)
        length = jnp.sum(jnp.abs(rotated))
        scale = jnp.sum(x**2) / jnp.where(length > 0, length, 1)
        one_bit = jnp.where(rotated >= 0, scale, -scale)
        decoded = unrotate(one_bit, signs, x.size)
        return straight_through(x, decoded), rotated.size + bits_of(x.dtype)

    return leafwise("drive", encode, padded_size)
