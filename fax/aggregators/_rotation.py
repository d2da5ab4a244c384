"""Random rotations, which spread the energy of a leaf over its coordinates."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from fax._keys import Use, derive
from fax.aggregators._aggregator import (
    Aggregator,
    Metrics,
    PyTree,
    Transformation,
    as_transformation,
    of_floats,
)
from fax.aggregators._encoding import random_numbers
from fax.aggregators._norms import wide
from fax.aggregators._per_client import each, each_present

_MATRIX = 64  # The number of coordinates that one product with a matrix transforms.


def hadamard(transformation: Transformation | Aggregator) -> Transformation:
    """Applies a transformation to randomly rotated leaves, and rotates them back.

    A leaf x, padded with zeros to d = 2^m numbers, becomes

        R x = H D x,    H = [[H', H'], [H', -H']] / sqrt(2)

    Here H is the orthonormal Walsh-Hadamard matrix, and D is a diagonal matrix of random signs,
    which is new in each round and the same for all clients. x may have a few large coordinates, but
    those of R x are all about ‖x‖ / sqrt(d). A quantizer then covers a range of
    O(sqrt(log d / d)) ‖x‖, and its squared error is O(log d / (k - 1)^2) ‖x‖^2 instead of
    O(d / (k - 1)^2) ‖x‖^2. The inverse rotation is exact up to rounding. Both can be differentiated
    and take d log d time.

    Args:
      transformation: is applied to the rotated leaves, each a vector of d floats. It may be a
        `chain` of transformations alone.

    Returns:
      The transformation, with the state and the metrics of the inner one. ``"clients/bits"``
      includes the padding.

    Raises:
      ValueError: if ``transformation`` is not a transformation; when used, if a leaf does not hold
        real floats.

    References:
      Suresh et al., Distributed mean estimation with limited communication, arXiv:1611.00429,
      section 3.

    Example:

      >>> quantizer = fax.aggregators.uniform_quantization(levels=16)
      >>> fax.aggregators.chain(fax.aggregators.hadamard(quantizer))
      Aggregator(chain)
    """
    transformation = as_transformation("hadamard", transformation)

    def init(params: PyTree) -> PyTree:
        return transformation.init(jax.tree.map(lambda x: padded(jnp.ravel(x) * 0), params))

    def update(
        updates: PyTree, weights: jax.Array, state: PyTree, key: jax.Array
    ) -> tuple[PyTree, jax.Array, PyTree, Metrics]:
        leaves, treedef = jax.tree.flatten(updates)
        sign_key, inner_key = (derive(key, use) for use in (Use.SIGNS, Use.INSIDE))
        sizes = [padded_size(math.prod(x.shape[1:])) for x in leaves]
        signs = [random_signs(random) for random in random_numbers(sign_key, sizes)]

        def rotated_leaves(leaves: list[jax.Array]) -> list[jax.Array]:
            return [rotate(x.reshape(-1), s) for x, s in zip(leaves, signs)]

        def original_leaves(rotated: list[jax.Array]) -> list[jax.Array]:
            return [
                unrotate(y, s, math.prod(x.shape[1:])).astype(x.dtype).reshape(x.shape[1:])
                for y, s, x in zip(rotated, signs, leaves)
            ]

        rotated = jax.tree.unflatten(treedef, each_present(rotated_leaves, leaves, weights))
        rotated, weights, state, metrics = transformation.update(rotated, weights, state, inner_key)
        updates = jax.tree.unflatten(treedef, each(original_leaves, jax.tree.leaves(rotated)))
        return updates, weights, state, metrics

    return of_floats("hadamard", Transformation(init, update))


def random_signs(random: jax.Array) -> jax.Array:
    """Signs, int8, for the coordinates of a padded vector, from random numbers from 0 to 1."""
    return jnp.where(random < 0.5, 1, -1).astype(jnp.int8)


def rotate(x: jax.Array, signs: jax.Array) -> jax.Array:
    """H D x, for a vector that is padded to the length of the signs."""
    x = padded(x)
    return _walsh_hadamard(x * signs.astype(x.dtype))


def unrotate(y: jax.Array, signs: jax.Array, size: int) -> jax.Array:
    """The inverse of `rotate`: the first ``size`` coordinates of D H y."""
    return (_walsh_hadamard(y) * signs.astype(y.dtype))[:size]


def padded(x: jax.Array) -> jax.Array:
    """A vector, in at least float32, with zeros up to a power of two."""
    return jnp.pad(x.astype(wide(x)), (0, padded_size(x.size) - x.size))


def padded_size(size: int) -> int:
    """The power of two to which a vector of this size is padded."""
    return 1 << (size - 1).bit_length() if size else 0


def _walsh_hadamard(x: jax.Array) -> jax.Array:
    """H x. H is a Kronecker product: a smaller H acts along each axis of the reshaped vector."""
    if not x.size:
        return x
    shape, rest = [], x.size
    while rest > 1:
        shape.append(min(rest, _MATRIX))
        rest //= shape[-1]
    block = x.reshape(shape)
    for size in shape:  # each product moves its axis from the first position to the last
        block = jnp.tensordot(block, _matrix(size).astype(x.dtype), (0, 0), precision="highest")
    return block.reshape(x.shape)


@functools.cache
def _matrix(size: int) -> np.ndarray:
    """The orthonormal Walsh-Hadamard matrix, which is symmetric and its own inverse."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2), matrix)
    return matrix
