"""DRIVE: one bit for each coordinate of a randomly rotated update, and a scale."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fax.aggregators._aggregator import Transformation
from fax.aggregators._leaves import bits_of, leafwise, straight_through
from fax.aggregators._rotation import padded_size, random_signs, rotate, unrotate


def drive() -> Transformation:
    """DRIVE: sends the signs of a randomly rotated leaf, and one number.

    With the random rotation R of `hadamard`, of a leaf x padded to d = 2^m numbers, the server
    decodes

        x' = S R^T sign(R x),    S = ‖x‖_2^2 / ‖R x‖_1

    This scale makes x' unbiased under a uniformly random rotation, and the expected squared error
    (pi / 2 - 1) ‖x‖^2 for large d. The rotation here is the structured one of the paper's section
    6: quick, and close to this for updates with many coordinates that matter; it is not unbiased
    for all x, as for the few numbers of a tiny leaf. Each client rotates by signs of its
    own, which the server draws again from the client's key, since with common ones the errors of
    similar updates would be alike and would not average out. Each leaf has a scale of its own, for
    layers differ in scale. To derivatives it is the identity, as those of its expectation are.

    A client sends for each leaf d bits, and S, in float32 for shorter floats.

    Returns:
      The transformation. Its metric ``"clients/bits"`` is what each client sends.

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
