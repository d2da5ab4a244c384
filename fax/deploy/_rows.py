"""Equations on rows that clients hold: which treat every row alike, and where the rows are then.

A plan keeps the axis of rows wherever it is, because a transposed or vectorized program has it
anywhere. Such an equation runs at each client on its row, with that axis of size 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax import lax
from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p

from fax._compat import Named
from fax.deploy._values import Value, aval_of
from fax.primitives._rowwise import is_elementwise


class OfRows(NamedTuple):
    """An equation on single rows: its parameters, and the axis of the rows of its results."""

    params: dict[str, Any]
    axis: int


Rule = Callable[[JaxprEqn, int, int], OfRows | None]


def of_rows(eqn: JaxprEqn, axes: Sequence[int | None], size: int) -> OfRows | None:
    """The equation on rows, None if it mixes them.

    Args:
      eqn: the equation.
      axes: for each operand the axis of its rows, None if the server has it.
      size: the number of rows.
    """
    found = {axis for axis in axes if axis is not None}
    if len(found) > 1 or not eqn.outvars:
        return None
    (axis,) = found
    if is_elementwise(eqn) or eqn.primitive in _OTHER_ELEMENTWISE:
        # An axis of size 1 may be repeated.
        same = aval_of(eqn.outvars[0]).shape[axis] == size
        return OfRows(dict(eqn.params), axis) if same else None
    rule = _RULES.get(eqn.primitive) or _NAMED_RULES.get(eqn.primitive.name)
    return rule(eqn, axis, size) if rule else None


_OTHER_ELEMENTWISE = {p.nextafter_p, p.shift_left_p, p.shift_right_arithmetic_p}
_OTHER_ELEMENTWISE |= {p.shift_right_logical_p, p.population_count_p, p.reduce_precision_p}


def _without(eqn: JaxprEqn, name: str, axis: int) -> OfRows | None:
    """An operation that removes the axes in a parameter."""
    removed = eqn.params[name]
    if axis in removed:
        return None
    return OfRows(dict(eqn.params), axis - sum(other < axis for other in removed))


def _reduction(eqn: JaxprEqn, axis: int, size: int) -> OfRows | None:
    del size
    return _without(eqn, "axes", axis)


def _squeeze(eqn: JaxprEqn, axis: int, size: int) -> OfRows | None:
    del size
    return _without(eqn, "dimensions", axis)


def _transpose(eqn: JaxprEqn, axis: int, size: int) -> OfRows | None:
    del size
    return OfRows(dict(eqn.params), eqn.params["permutation"].index(axis))


def _along(name: str) -> Rule:
    """An operation along one axis."""

    def rule(eqn: JaxprEqn, axis: int, size: int) -> OfRows | None:
        del size
        return None if eqn.params[name] == axis else OfRows(dict(eqn.params), axis)

    return rule


def _one(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], 1, *shape[axis + 1 :])


def _broadcast(eqn: JaxprEqn, axis: int, size: int) -> OfRows | None:
    new = eqn.params["broadcast_dimensions"][axis]
    shape = eqn.params["shape"]
    if shape[new] != size:
        return None
    return OfRows(dict(eqn.params, shape=_one(shape, new), sharding=None), new)


def _reshape(eqn: JaxprEqn, axis: int, size: int) -> OfRows | None:
    if eqn.params["dimensions"] is not None:
        return None
    before, sizes = math.prod(aval_of(eqn.invars[0]).shape[:axis]), eqn.params["new_sizes"]
    products = itertools.accumulate((1, *sizes), lambda total, n: total * n)
    places = (
        i for i, (n, total) in enumerate(zip(sizes, products)) if (n, total) == (size, before)
    )
    new = next(places, None)
    if new is None:
        return None
    return OfRows(dict(eqn.params, new_sizes=_one(sizes, new), sharding=None), new)


def _slice(eqn: JaxprEqn, axis: int, size: int) -> OfRows | None:
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"]
    if start[axis] != 0 or limit[axis] != size or (strides and strides[axis] != 1):
        return None
    return OfRows(dict(eqn.params, limit_indices=_one(limit, axis)), axis)


def _pad(eqn: JaxprEqn, axis: int, size: int) -> OfRows | None:
    del size
    return None if any(eqn.params["padding_config"][axis]) else OfRows(dict(eqn.params), axis)


_REDUCTIONS = {p.reduce_sum_p, p.reduce_max_p, p.reduce_min_p, p.reduce_prod_p}
_REDUCTIONS |= {p.reduce_and_p, p.reduce_or_p, p.argmax_p, p.argmin_p}
_CUMULATIVE = (p.cumsum_p, p.cumprod_p, p.cummax_p, p.cummin_p, p.cumlogsumexp_p)
_RULES: dict[Any, Rule] = {
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_CUMULATIVE, _along("axis")),
    p.squeeze_p: _squeeze,
    p.transpose_p: _transpose,
    p.concatenate_p: _along("dimension"),
    p.broadcast_in_dim_p: _broadcast,
    p.reshape_p: _reshape,
    p.slice_p: _slice,
    p.pad_p: _pad,
}
_NAMED_RULES: dict[str, Rule] = {Named.SPLIT: _along("axis")}


# Rows by their numbers


def takes_rows(eqn: JaxprEqn, operands: Sequence[Value]) -> bool:
    """Whether a gather takes whole rows, by numbers that the server knows."""
    held, numbers = operands
    shape = held.aval.shape
    dims = eqn.params["dimension_numbers"]
    return (
        held.axis == 0
        and not numbers.held
        and tuple(dims.collapsed_slice_dims) == (0,)
        and tuple(dims.start_index_map) == (0,)
        and tuple(dims.offset_dims) == tuple(range(1, len(shape)))
        and tuple(eqn.params["slice_sizes"]) == (1, *shape[1:])
    )


def rows_of_numbers(numbers: Value) -> int | None:
    """The axis of the rows that are taken, None if the numbers are not a vector of numbers."""
    # It has one more axis, of size 1.
    return 0 if numbers.aval.ndim == 2 and numbers.aval.shape[1] == 1 else None


def replaces_rows(eqn: JaxprEqn, operands: Sequence[Value]) -> bool:
    """Whether a scatter replaces whole rows, by numbers that the server knows."""
    held, numbers, rows = operands
    dims = eqn.params["dimension_numbers"]
    return (
        held.axis == 0
        and not numbers.held
        and rows.axis in (None, 0)
        and rows_of_numbers(numbers) is not None
        and tuple(dims.inserted_window_dims) == (0,)
        and tuple(dims.scatter_dims_to_operand_dims) == (0,)
        and tuple(dims.update_window_dims) == tuple(range(1, rows.aval.ndim))
        and rows.aval.shape[1:] == held.aval.shape[1:]
        and eqn.params["mode"] != lax.GatherScatterMode.CLIP
    )
