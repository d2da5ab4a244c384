"""The reductions: sum, mean, max and min of placed pytrees, masked and weighted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.tree_util import tree_unflatten

from fax import _checks
from fax._arithmetic import accumulator_dtype
from fax._placement import Placement, resolve
from fax.primitives._reduce import max_p, mean_p, min_p, sum_p
from fax.primitives._round import PLACED, Out, map_elementwise

PyTree = Any


def sum(x: PyTree, *, where: jax.Array | None = None, placement: str | None = None) -> PyTree:
    """Sums the rows of a placed value at the server.

    Args:
      x: a placed pytree of numeric arrays of shape [n, ...].
      where: a placed bool array of shape [n]. Participants for which it is false are left out.
        If they hold NaN or inf, neither values nor gradients are affected.
      placement: which placement, if several are in scope.

    Returns:
      The server pytree sum_i x[i], with leaves of shape [...]. Integers and bools are promoted
      as `jnp.sum` does; floats narrower than float32 are added in float32 and cast at the end.

      The error of a float32 sum is at most ``1e-6 sum_i |x[i]|``, whatever the number of
      participants and ``vectorize``. For leaves of more than 256 elements whose rows are all
      equal it can be up to 1e-4 times that sum. ``docs/how_it_works.md`` says when.

    Raises:
      PlacementError: if a leading axis is not n, a leaf is not numeric, ``where`` is not bool
        of shape [n], or outside a program.

    Example:

      >>> @fax.program(clients=3)
      ... def total(x, online):
      ...     return fax.sum(x, where=online)
      >>> total(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True]))
      Array(4., dtype=float32)
    """
    here = resolve(placement, "fax.sum")
    leaves, treedef = _checks.rows("fax.sum", x, here, numeric=True)
    where = _mask("fax.sum", where, here)
    dtypes = _result_dtypes(jnp.sum, leaves)
    if where is None and dtypes == [leaf.dtype for leaf in leaves]:
        return tree_unflatten(treedef, _bind(sum_p, leaves, here))

    def cast(*rows):
        return [row.astype(dtype) for row, dtype in zip(rows, dtypes, strict=True)]

    return tree_unflatten(treedef, _reduce("sum", cast, len(leaves), leaves, where, here))


def mean(
    x: PyTree,
    *,
    weights: jax.Array | None = None,
    where: jax.Array | None = None,
    placement: str | None = None,
) -> PyTree:
    """Averages the rows of a placed value at the server.

        sum_i w_i x_i / sum_i w_i,  over the i where ``where`` is true

    Args:
      x: a placed pytree of numeric arrays of shape [n, ...].
      weights: a placed array of real numbers of shape [n], used for every leaf. They may be
        negative or zero. A weight of zero does not mask: zero times NaN is NaN. Bools are
        rejected, because they are masks: pass them as ``where``.
      where: a placed bool array of shape [n]. Participants for which it is false are left out.
        If they hold NaN or inf, neither values nor gradients are affected.
      placement: which placement, if several are in scope.

    Returns:
      The server pytree of leaves of shape [...]. Floats keep their dtype (those narrower than
      float32 are added and divided in float32); integers and bools become floats. If the
      weights sum to zero, the mean and its gradients are zero. The sums of products and of
      weights are as accurate as those of `fax.sum`.

    Raises:
      PlacementError: if a leading axis is not n, a leaf is not numeric, ``weights`` is not real
        or ``where`` not bool of shape [n], or outside a program.

    Example:

      >>> @fax.program(clients=3)
      ... def average(x, num_examples):
      ...     return fax.mean(x, weights=num_examples)
      >>> average(jnp.array([1.0, 2.0, 6.0]), jnp.array([1, 1, 2]))
      Array(3.75, dtype=float32)
    """
    here = resolve(placement, "fax.mean")
    leaves, treedef = _checks.rows("fax.mean", x, here, numeric=True)
    where = _mask("fax.mean", where, here)
    dtypes = _result_dtypes(jnp.mean, leaves)
    if weights is None and where is None and dtypes == [leaf.dtype for leaf in leaves]:
        return tree_unflatten(treedef, _bind(mean_p, leaves, here))

    wide = [accumulator_dtype(dtype) for dtype in dtypes]
    real = [jnp.finfo(dtype).dtype for dtype in wide]
    widest = np.result_type(np.float32, *real)
    weighted = weights is not None
    if weighted:
        leaves = [*leaves, _checks.vector("fax.mean", "weights", weights, here, bool_only=False)]

    def products(*rows):
        weight = rows[-1] if weighted else np.ones((), bool)
        values = [row.astype(dtype) for row, dtype in zip(rows, wide)]
        if weighted:
            values = [x * weight.astype(dtype) for x, dtype in zip(values, real, strict=True)]
        return [*values, weight.astype(widest)]

    *totals, total = _reduce("sum", products, len(dtypes) + 1, leaves, where, here)
    means = [
        _quotient(x, total.astype(of)).astype(dtype)
        for x, of, dtype in zip(totals, real, dtypes, strict=True)
    ]
    return tree_unflatten(treedef, means)


def max(
    x: PyTree,
    *,
    where: jax.Array | None = None,
    initial: jax.Array | float | None = None,
    placement: str | None = None,
) -> PyTree:
    """Takes the elementwise maximum over the rows of a placed value.

    Args:
      x: a placed pytree of real arrays of shape [n, ...].
      where: a placed bool array of shape [n]. Participants for which it is false are left out,
        whatever they hold.
      initial: a scalar that takes part in the comparison, as in `jnp.max`. It is the result if
        no participant is left. Without it, that result is the smallest value of the dtype.
      placement: which placement, if several are in scope.

    Returns:
      The server pytree max_i x[i], with leaves of shape [...] and the dtypes of ``x``. The
      participants that attain the maximum share its gradient equally. The gradient is zero if no
      participant is left, or if the maximum is NaN.

    Raises:
      PlacementError: if a leading axis is not n, a leaf is not real, ``where`` is not bool of
        shape [n], ``initial`` does not fit a leaf's dtype, or outside a program.

    Example:

      >>> @fax.program(clients=3)
      ... def hottest(x):
      ...     return fax.max(x)
      >>> hottest(jnp.array([21.5, 30.0, 19.0]))
      Array(30., dtype=float32)
    """
    return _extremum("max", max_p, jnp.maximum, x, where, initial, placement)


def min(
    x: PyTree,
    *,
    where: jax.Array | None = None,
    initial: jax.Array | float | None = None,
    placement: str | None = None,
) -> PyTree:
    """Takes the elementwise minimum over the rows of a placed value.

    Works like `fax.max`. If no participant is left, the result is the largest value of the dtype.

    Example:

      >>> @fax.program(clients=3)
      ... def coldest(x, outdoors):
      ...     return fax.min(x, where=outdoors)
      >>> coldest(jnp.array([21.5, 30.0, 19.0]), jnp.array([True, True, False]))
      Array(21.5, dtype=float32)
    """
    return _extremum("min", min_p, jnp.minimum, x, where, initial, placement)


def rows_where(x: PyTree, where: jax.Array) -> PyTree:
    """Keeps the rows for which ``where`` is true and sets the others to zero. Nothing is reduced.

    As in a reduction, rows that are left out affect neither values nor gradients. With
    ``jnp.where``, zero cotangents would reach client functions with infinite derivatives.
    """
    here = resolve(None, "fax.aggregators")
    leaves, treedef = _checks.rows("fax.aggregators", x, here)
    mask = _mask("fax.aggregators", where, here)
    rows = _reduce("placed", lambda *rows: list(rows), len(leaves), leaves, mask, here)
    return tree_unflatten(treedef, rows)


def wrapping_sum(x: jax.Array) -> jax.Array:
    """Sums the rows of placed integers in their own dtype: mod 2^32 for 32 bits.

    With ``jax_enable_x64``, `sum` would add in 64 bits, so participants would send twice as much.
    """
    return _bind(sum_p, [x], resolve(None, "fax.sum"))[0]


def _extremum(
    mode: str,
    primitive: Primitive,
    compare: Callable,
    x: PyTree,
    where: jax.Array | None,
    initial: jax.Array | float | None,
    placement: str | None,
) -> PyTree:
    caller = f"fax.{mode}"
    here = resolve(placement, caller)
    leaves, treedef = _checks.rows(caller, x, here, numeric=True, real=True)
    where = _mask(caller, where, here)
    if where is None:
        results = _bind(primitive, leaves, here)
    else:
        results = _reduce(mode, lambda *rows: list(rows), len(leaves), leaves, where, here)
    if initial is not None:
        for leaf in leaves:
            _checks.initial(caller, initial, leaf.dtype)
        results = [compare(y, initial) for y in results]
    return tree_unflatten(treedef, results)


def _bind(primitive: Primitive, leaves: Sequence[jax.Array], here: Placement) -> list[jax.Array]:
    return [primitive.bind(leaf, **here.params) for leaf in leaves]


def _mask(caller: str, where: Any, here: Placement) -> jax.Array | None:
    return None if where is None else _checks.vector(caller, "where", where, here, bool_only=True)


def _reduce(
    mode: str,
    fn: Callable[..., list[jax.Array]],
    count: int,
    rows: Sequence[jax.Array],
    where: jax.Array | None,
    here: Placement,
) -> list[jax.Array]:
    """Reduces the ``count`` arrays that ``fn`` returns for each participant, in one map."""

    def with_mask(*seen):
        return [*fn(*seen[: len(rows)]), *seen[len(rows) :]]

    out = Out(mode, None if where is None else 0)
    operands = list(rows) if where is None else [*rows, where]
    return map_elementwise(with_mask, operands, [PLACED] * len(operands), [out] * count, here)


@jax.custom_jvp
def _quotient(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y; zero, with zero derivatives, where y is zero.

    The derivative uses the quotient, which is available anyway. So the gradient of a mean with
    respect to weights does not have to keep the sum, which saves the memory of one model.
    """
    some = y != 0
    ratio = x / lax.select(some, y, jnp.ones_like(y))
    return lax.select(some, ratio, jnp.zeros_like(ratio))


@_quotient.defjvp
def _quotient_jvp(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    z = _quotient(x, y)
    return z, _quotient(dx - z * dy, y)


def _result_dtypes(fn: Callable, leaves: Sequence[jax.Array]) -> list[Any]:
    """The dtypes that a `jax.numpy` reduction returns for these leaves."""
    return [_result_dtype(fn, leaf.dtype, jax.config.jax_enable_x64) for leaf in leaves]


@functools.lru_cache
def _result_dtype(fn: Callable, dtype: Any, x64: bool) -> Any:
    del x64  # only part of the cache key
    if jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 8:
        # JAX's own sum and mean of these are errors, or means that are rounded to integers.
        dtype = np.dtype("uint8" if jnp.issubdtype(dtype, jnp.unsignedinteger) else "int8")
    return jax.eval_shape(fn, jax.ShapeDtypeStruct((1,), dtype)).dtype
