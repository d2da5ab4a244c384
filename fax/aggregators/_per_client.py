"""What clients do with their updates, so that those of weight zero take no part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax

import fax._operators as operators
import fax._reductions as reductions
from fax.aggregators._aggregator import PyTree
from fax.primitives._round import Vectorize


def each(fn: Callable[..., Any], *args: PyTree) -> Any:
    """`fax.map`, vectorized like the map that makes the arguments, so that the two fuse.

    Updates are then encoded as clients finish. If a mean follows, they never exist all at once.
    In gradients they are computed again if the clients' function is under `jax.checkpoint`.
    """
    return operators.map(fn, *args, vectorize=cast(Any, Vectorize.INHERITED))


def each_present(fn: Callable[..., Any], updates: PyTree, weights: jax.Array, *args: PyTree) -> Any:
    """`each`, where ``fn(update, *args)`` sees zeros in place of updates whose weight is zero.

    This is about values. Derivatives stop where a reduction leaves these clients out.
    """

    def own(update: PyTree, weight: jax.Array, *args: PyTree) -> Any:
        return fn(zeros_unless(weight != 0, update), *args)

    return each(own, updates, weights, *args)


def zeros_unless(flag: jax.Array, values: PyTree) -> PyTree:
    """The values, or zeros."""
    return optax.tree.where(flag, values, optax.tree.zeros_like(values))


def all_finite(*values: PyTree) -> jax.Array:
    """Whether one client's values are all finite."""
    finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(values)]
    return jnp.all(jnp.stack([jnp.bool_(True), *finite]))


def present_rows(rows: PyTree, weights: jax.Array) -> PyTree:
    """The rows of clients whose weight is not zero, and zeros for the others.

    Neither the values of the others nor their derivatives reach any result, even if they are NaN.
    In gradients these rows are kept, and not computed again; see `each_present`.
    """
    return reductions.rows_where(rows, weights != 0)


def rows_after(weights: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """The new rows of clients whose weight is not zero, and the old ones of others, to the bit.

    No derivative reaches the computation of new rows that are left out, even if it is singular.
    """

    def choose(new: PyTree) -> PyTree:
        def own(weight: jax.Array, new: PyTree, old: PyTree) -> PyTree:
            return optax.tree.where(weight != 0, new, old)

        return each(own, weights, new, old)

    # The values are chosen in the map that makes the new rows. For derivatives, the mask has to be
    # on what that map returns, and the barrier keeps the choice out of it.
    rows = lax.stop_gradient(choose(new))
    masked = choose(lax.optimization_barrier(present_rows(new, weights)))

    def one(row: jax.Array, masked: jax.Array) -> jax.Array:
        float_like = jnp.issubdtype(row.dtype, jnp.inexact)
        return _differentiated_as(row, masked) if float_like else row

    return jax.tree.map(one, rows, masked)


@jax.custom_jvp
def _differentiated_as(value: jax.Array, other: jax.Array) -> jax.Array:
    """The value, with the derivatives of an equal one."""
    return value


@_differentiated_as.defjvp
def _differentiated_as_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return _differentiated_as(*primals), tangents[1]
