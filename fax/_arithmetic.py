"""The arithmetic of reductions: identities, accumulator dtypes, and operations.

A reduction over participants is a commutative monoid: an operation with an identity. That is all
that a schedule needs to divide the work in any way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray

from fax._compat import on_device


def elements(shape: Iterable[Any]) -> int:
    """The number of elements. A size that is not known, as in some exports, counts as 2^40."""
    known = [int(size) if isinstance(size, int | np.integer) else 2**40 for size in shape]
    return math.prod(known)


def accumulator_dtype(dtype: Any) -> Any:
    """The dtype of a sum's accumulator: float32 for shorter floats, else the same."""
    short = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return np.dtype("float32") if short else dtype


def total_dtype(mode: str, dtype: Any) -> Any:
    """The dtype of a total. A sum needs more precision than its terms; a maximum is one of them."""
    return accumulator_dtype(dtype) if mode == "sum" else dtype


def identity(mode: str, dtype: Any) -> Any:
    """The result of a reduction over no participants."""
    if mode == "sum":
        return np.zeros((), dtype)
    if jnp.issubdtype(dtype, jnp.bool_):
        return np.asarray(mode == "min")
    if jnp.issubdtype(dtype, jnp.floating):
        infinite = np.asarray(np.inf if mode == "min" else -np.inf).astype(dtype)
        if np.isnan(infinite):  # a short format without infinities, or without a sign
            finite = jnp.finfo(dtype)
            infinite = np.asarray(finite.max if mode == "min" else finite.min).astype(dtype)
        return infinite
    limits = jnp.iinfo(dtype)
    return np.asarray(limits.min if mode == "max" else limits.max, dtype)


def combine(mode: str, one: jax.Array, other: jax.Array) -> jax.Array:
    """Combines two totals."""
    return {"sum": lax.add, "max": lax.max, "min": lax.min}[mode](one, other)


def reduce_rows(mode: str, rows: jax.Array) -> jax.Array:
    """Reduces over the leading axis, in the total's dtype."""
    if mode == "sum":
        return jnp.sum(rows, axis=0, dtype=total_dtype(mode, rows.dtype))
    reduce = jnp.max if mode == "max" else jnp.min
    if rows.dtype == jnp.float8_e8m0fnu:  # of these, JAX finds NaN, as there is no infinity
        return reduce(rows.astype(jnp.float32), axis=0).astype(rows.dtype)
    return reduce(rows, axis=0)


def neutral(mode: str, aval: ShapedArray) -> jax.Array:
    """A total over no participants, or rows of none, which can have any values."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return _no_keys(aval)
    value = identity("sum" if mode == "placed" else mode, aval.dtype)
    total = lax.broadcast(value, aval.shape)
    # What a policy of `jax.checkpoint` offloads is in the host's memory.
    return total if on_device(aval) else jax.device_put(total, aval.memory_space)


def _no_keys(aval: ShapedArray) -> jax.Array:
    """Random keys of a type. Only an array or a tracer has the implementation."""
    kinds = []

    def data_of(keys):
        kinds.append(jax.random.key_impl(keys))
        return jax.random.key_data(keys)

    data = jax.eval_shape(data_of, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    return jax.random.wrap_key_data(jnp.zeros(data.shape, data.dtype), impl=kinds[0])


def ordered(mode: str, x: jax.Array) -> jax.Array:
    """Integers in the order of floats, with NaN at the end that a maximum or minimum takes.

    XLA does not promise that an extremum across devices is NaN if one of the numbers is, and on CPU
    it ignores NaN.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"int{8 * x.dtype.itemsize}"))
    limits = jnp.iinfo(bits.dtype)
    worst = limits.max if mode == "max" else limits.min
    return jnp.where(jnp.isnan(x), jnp.asarray(worst, bits.dtype), _turned(bits))


def from_ordered(x: jax.Array, dtype: Any) -> jax.Array:
    """The floats of such integers, or ``x`` if it was not a float."""
    floating = jnp.issubdtype(dtype, jnp.floating)
    return lax.bitcast_convert_type(_turned(x), dtype) if floating else x


def _turned(bits: jax.Array) -> jax.Array:
    """The bits of floats as integers of the same order, and back: negative ones are reversed."""
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)
