"""Random rotations, which spread a leaf's energy over its coordinates before it is compressed."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fax.aggregators._aggregator import Metrics, Transformation, _call, _shown, each
from fax.aggregators._leaves import check_floats, uniform, wide

PyTree = Any

_BLOCK = 64  # Coordinates that one product with a matrix transforms.


def hadamard(transformation: Transformation) -> Transformation:
    """Lets a transformation work on randomly rotated leaves, and turns them back.

    A leaf x, padded with zeros to d = 2^m numbers, becomes

        R x = H D x,    H = [[H', H'], [H', -H']] / sqrt(2)

    with Walsh and Hadamard's orthonormal matrix H, made of those of half the size, and a diagonal D
    of random signs, which the server draws anew in each round and which is the same for all
    clients. All coordinates of R x are about ‖x‖ / sqrt(d), where x may have a few large ones; a
    quantiser then has a range of O(sqrt(log d / d)) ‖x‖ to cover, and its error is
    O(log d / (k - 1)^2) ‖x‖^2 instead of O(d / (k - 1)^2) ‖x‖^2. The rotation is undone at the
    end, exactly but for rounding, and differentiable. It takes d log d time.

    Args:
      transformation: what happens to the rotated leaves, each a vector of d floats.

    Returns:
      The transformation, with the state and the metrics of the one inside. What the padding takes
      is counted in ``"clients/bits"``.

    Raises:
      TypeError: if it is no transformation.
      ValueError: when used, if a leaf does not hold floats.

    References:
      Suresh et al., Distributed mean estimation with limited communication, arXiv:1611.00429,
      section 3.

    Example:

      >>> quantizer = fax.aggregators.uniform_quantization(levels=16)
      >>> aggregator = fax.aggregators.chain(fax.aggregators.hadamard(quantizer))
    """
    if not isinstance(transformation, Transformation):
        raise TypeError(
            f"fax.aggregators.hadamard: transformation is {_shown(transformation)}, expected a "
            f"fax.aggregators.Transformation.{_call(transformation)}"
        )

    def init(params: PyTree) -> PyTree:
        check_floats("hadamard", params)
        return transformation.init(jax.tree.map(lambda x: padded(jnp.ravel(x) * 0), params))

    def update(
        updates: PyTree, weights: jax.Array, state: PyTree, key: jax.Array
    ) -> tuple[PyTree, jax.Array, PyTree, Metrics]:
        check_floats("hadamard", updates)
        leaves, treedef = jax.tree.flatten(updates)
        sign_key, inner_key = jax.random.split(key)
        sizes = [padded_size(math.prod(x.shape[1:])) for x in leaves]
        signs = [random_signs(random) for random in uniform(sign_key, sizes)]

        def there(*leaves: jax.Array) -> list[jax.Array]:
            return [rotate(x.reshape(-1), s) for x, s in zip(leaves, signs)]

        def back(rotated: list[jax.Array]) -> list[jax.Array]:
            return [
                unrotate(y, s, math.prod(x.shape[1:])).astype(x.dtype).reshape(x.shape[1:])
                for y, s, x in zip(rotated, signs, leaves)
            ]

        rotated = jax.tree.unflatten(treedef, each(there, *leaves))
        rotated, weights, state, metrics = transformation.update(rotated, weights, state, inner_key)
        updates = jax.tree.unflatten(treedef, each(back, jax.tree.leaves(rotated)))
        return updates, weights, state, metrics

    return Transformation(init, update)


def random_signs(random: jax.Array) -> jax.Array:
    """Signs, int8, for the coordinates of a padded vector, from random numbers from 0 to 1."""
    return jnp.where(random < 0.5, 1, -1).astype(jnp.int8)


def rotate(x: jax.Array, signs: jax.Array) -> jax.Array:
    """H D x, of a vector that is padded to the length of the signs."""
    x = padded(x)
    return _transform(x * signs.astype(x.dtype))


def unrotate(y: jax.Array, signs: jax.Array, size: int) -> jax.Array:
    """The first ``size`` coordinates of what `rotate` made y of."""
    return (_transform(y) * signs.astype(y.dtype))[:size]


def padded(x: jax.Array) -> jax.Array:
    """A vector, in at least float32, with zeros up to a power of two."""
    return jnp.pad(x.astype(wide(x.dtype)), (0, padded_size(x.size) - x.size))


def padded_size(size: int) -> int:
    return 1 << (size - 1).bit_length() if size else 0


def _transform(x: jax.Array) -> jax.Array:
    """H x. As H is a Kronecker product, it is one along each axis of the vector as a block."""
    if not x.size:
        return x
    shape, rest = [], x.size
    while rest > 1:
        shape.append(min(rest, _BLOCK))
        rest //= shape[-1]
    block = x.reshape(shape)
    for size in shape:  # each product moves its axis from the first place to the last
        block = jnp.tensordot(block, _matrix(size).astype(x.dtype), (0, 0), precision="highest")
    return block.reshape(x.shape)


@functools.cache
def _matrix(size: int) -> np.ndarray:
    """Walsh and Hadamard's matrix, which is symmetric, and its own inverse."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2), matrix)
    return matrix
