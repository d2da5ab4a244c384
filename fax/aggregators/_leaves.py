"""What encodings of updates share: clients' functions that fuse, and encodings of single leaves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import fax._operators as operators
from fax.aggregators._aggregator import Metrics, Transformation, each_present
from fax.aggregators._norms import largest_of, unit_of, wide

PyTree = Any

# Of a leaf's numbers [size] and random ones from 0 to 1: what the server decodes, and the bits.
Encoding = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array | float]]


def leafwise(
    caller: str, encode: Encoding, draws: Callable[[int], int] = lambda size: size
) -> Transformation:
    """A transformation without state that encodes each leaf of each client's update by itself.

    Args:
      caller: the name of the transformation, for messages.
      encode: of floats of at least 32 bits, in units of a power of two in which the largest of a
        leaf is about 1, so that squares neither overflow nor vanish. Leaves without numbers are
        left out, and those with NaN or infinity become NaN.
      draws: how many random numbers a leaf takes.
    """

    def init(params: PyTree) -> tuple:
        check_floats(caller, params)
        return ()

    scaled = _in_units(encode)

    def client(update: PyTree, key: jax.Array) -> tuple[PyTree, jax.Array]:
        leaves, treedef = jax.tree.flatten(update)
        bits, decoded = jnp.zeros((), jnp.float32), []
        for x, random in zip(leaves, uniform(key, [draws(x.size) for x in leaves])):
            if x.size:
                values, own = scaled(x.reshape(-1).astype(wide(x.dtype)), random)
                finite = jnp.isfinite(x).all()
                values = jnp.where(finite, saturated(values, x.dtype), jnp.nan)
                x, bits = values.reshape(x.shape), bits + own
            decoded.append(x)
        return jax.tree.unflatten(treedef, decoded), bits

    def update(
        updates: PyTree, weights: jax.Array, state: PyTree, key: jax.Array
    ) -> tuple[PyTree, jax.Array, PyTree, Metrics]:
        check_floats(caller, updates)
        updates, bits = each_present(client, updates, weights, operators.keys(key))
        return updates, weights, state, {"clients/bits": bits}

    return Transformation(init, update)


def _in_units(encode: Encoding) -> Encoding:
    """An encoding of numbers in units of their size: s encode(x / s), whose derivative has no s."""

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


def uniform(key: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """Random float32 from 0 to 1 in arrays of these sizes, of one call, which compiles quicker."""
    return split(jax.random.uniform(key, (sum(sizes),), jnp.float32), sizes)


def split(x: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """A vector in parts of these sizes."""
    ends = list(itertools.accumulate(sizes))
    return [x[end - size : end] for end, size in zip(ends, sizes)]


def straight_through(x: jax.Array, decoded: jax.Array) -> jax.Array:
    """``decoded``, with the derivatives of x.

    Those of an encoding are zero almost everywhere, but those of its expectation, which is x if
    it is unbiased, are these.
    """
    return lax.stop_gradient(decoded) + (x - lax.stop_gradient(x))


def saturated(x: jax.Array, dtype: Any) -> jax.Array:
    """Floats in another dtype, of which those that are too large become the largest."""
    most = jnp.finfo(dtype).max.astype(x.dtype)
    return jnp.clip(x, -most, most).astype(dtype)


def bits_of(dtype: Any) -> int:
    return jnp.dtype(dtype).itemsize * 8


def check_floats(caller: str, tree: PyTree) -> None:
    """Checks that updates are real floats."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"fax.aggregators.{caller}: updates{jax.tree_util.keystr(path)} is an array of "
                f"{dtype}, expected real floats. What is counted, and not trained, belongs into "
                "the model_state."
            )
