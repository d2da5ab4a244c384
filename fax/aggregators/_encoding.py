"""Encodings of updates, leaf by leaf: what the server decodes, and how many bits are sent."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import fax._operators as operators
from fax.aggregators._aggregator import (
    Format,
    Metrics,
    PyTree,
    Transformation,
    of_floats,
    stateless_transformation,
)
from fax.aggregators._norms import largest_of, unit_of, wide
from fax.aggregators._per_client import each_present

# From the numbers of a leaf, [size], and random ones from 0 to 1: what the server decodes, and the
# bits that the client sends.
Encoding = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array | float]]


def leafwise(
    name: str,
    encode: Encoding,
    draws: Callable[[int], int] = lambda size: size,
    format: Format | None = None,
) -> Transformation:
    """A transformation without state that encodes each leaf of each client's update by itself.

    Args:
      name: of the function that makes the transformation.
      encode: of floats of at least 32 bits, in units of a power of two in which the largest number
        of a leaf is about 1, so that squares neither overflow nor vanish. It is not called for
        leaves without numbers. Leaves with NaN or infinity become NaN.
      draws: how many random numbers a leaf of this size takes.
      format: of what it returns.
    """
    encode = in_units_of_the_largest(encode)

    def client(update: PyTree, key: jax.Array) -> tuple[PyTree, jax.Array]:
        leaves, treedef = jax.tree.flatten(update)
        bits, decoded = jnp.zeros((), jnp.float32), []
        for x, random in zip(leaves, random_numbers(key, [draws(x.size) for x in leaves])):
            if x.size:
                values, own = encode(x.reshape(-1).astype(wide(x.dtype)), random)
                finite = jnp.isfinite(x).all()
                values = jnp.where(finite, cast_saturating(values, x.dtype), jnp.nan)
                x, bits = values.reshape(x.shape), bits + own
            decoded.append(x)
        return jax.tree.unflatten(treedef, decoded), bits

    def update(
        updates: PyTree, weights: jax.Array, key: jax.Array
    ) -> tuple[PyTree, jax.Array, Metrics]:
        updates, bits = each_present(client, updates, weights, operators.keys(key))
        return updates, weights, {"clients/bits": bits}

    return of_floats(name, stateless_transformation(name, update, format))


def in_units_of_the_largest(encode: Encoding) -> Encoding:
    """s encode(x / s) for the size s of the largest number. Its derivative does not contain s."""

    def parts(x: jax.Array, random: jax.Array) -> tuple[Callable, jax.Array, jax.Array]:
        def own(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            values, bits = encode(x, random)
            return values, jnp.asarray(bits, jnp.float32)

        unit = unit_of(largest_of([x], x.dtype))
        return own, x * unit.inverse, unit.value

    @jax.custom_jvp
    def scaled(x: jax.Array, random: jax.Array) -> tuple[jax.Array, jax.Array]:
        own, x, unit = parts(x, random)
        values, bits = own(x)
        return values * unit, bits

    @scaled.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple:
        own, x, unit = parts(*primals)
        (values, bits), moved = jax.jvp(own, (x,), tangents[:1])
        return (values * unit, bits), moved

    return scaled


def random_numbers(key: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """Random float32 from 0 to 1 in arrays of these sizes, from one call: it compiles quicker."""
    return parts_of(jax.random.uniform(key, (sum(sizes),), jnp.float32), sizes)


def parts_of(x: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """A vector, split into parts of these sizes."""
    ends = list(itertools.accumulate(sizes))
    return [x[end - size : end] for end, size in zip(ends, sizes)]


def straight_through(x: jax.Array, decoded: jax.Array) -> jax.Array:
    """``decoded``, with the derivatives of x.

    The derivatives of an encoding are zero almost everywhere. These are those of its expectation,
    which is x if it is unbiased.
    """
    return lax.stop_gradient(decoded) + (x - lax.stop_gradient(x))


def shortened(x: jax.Array, lost: int, extra: int = 0) -> jax.Array:
    """A float32 or float64 whose last significant bits are zero, after ``extra`` is added to them.

    Its products with integers of as many bits as it lost are exact, so that compilers can fuse them
    with sums or not.
    """
    unsigned = jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32
    bits = lax.bitcast_convert_type(x, unsigned) + jnp.asarray(extra, unsigned)
    return lax.bitcast_convert_type((bits >> lost) << lost, x.dtype)


def cast_saturating(x: jax.Array, dtype: Any) -> jax.Array:
    """Floats in another dtype. Those that are too large become the largest of that dtype."""
    most = jnp.finfo(dtype).max.astype(x.dtype)
    return jnp.clip(x, -most, most).astype(dtype)


def bits_of(dtype: Any) -> int:
    """The number of bits of a number."""
    return jnp.dtype(dtype).itemsize * 8
