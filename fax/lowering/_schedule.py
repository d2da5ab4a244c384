"""The schedule of a map: which participants one device works on, and when.

The participants of a batch run at once, vectorized. Batches follow one another in a scan, which
carries the accumulators of the reduced outputs. So the rows behind a reduced output never exist
together.

Rounding errors of a sum grow with the number of terms, and those of equal terms all have the same
sign: a float32 total of 1e6 times 0.1 is 1 % too large, and a total of ones stops at 2^24. So a
long sum has two accumulators. The first adds up 16 participants. It is then added to the second
one and restarted with the rounding error of that addition. The error of 16 terms remains.

If participants run one by one, a second accumulator for all parameters of a model could double the
memory of a round. So large arrays have one only for more than 4,096 batches, or if batches have 16
participants or more. Without it, the error of a total is at most 1e-4 if all terms are equal, and
1e-6 if they are not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Var

from fax._arithmetic import combine, neutral, reduce_rows, total_dtype
from fax.primitives._round import Round, pick

ByIndex = dict[int, jax.Array]

# How many terms (participants or batches) one accumulator adds up.
_TERMS = 16
# Arrays with more elements are large. They get a second accumulator only for many batches.
_LARGE, _MANY_BATCHES = 256, 4096


def run(
    client: Callable[..., Sequence[jax.Array]],
    this: Round,
    operands: Sequence[jax.Array],
    size: int,
    vectorize: int,
) -> list[jax.Array]:
    """Runs a round for some participants on one device.

    Args:
      client: maps one participant's view of the operands to its contributions to the outputs.
      this: the round, with the modes of operands and outputs.
      operands: a value for mode ``server``, ``size`` rows for mode ``placed``.
      size: the number of participants.
      vectorize: how many run at once.

    Returns:
      The outputs, each in its mode. Totals have the dtype in which they are summed.
    """
    in_placed = [i.mode == "placed" for i in this.inputs]
    unchanged = _unchanged(this, operands)
    out_placed = [o.mode == "placed" and k not in unchanged for k, o in enumerate(this.outputs)]
    out_reduced = [out.mode != "placed" for out in this.outputs]
    reduced = [out.mode for out in pick(out_reduced, this.outputs)]
    rows = pick(in_placed, operands)

    def one(rows):
        own = iter(rows)
        return client(*(next(own) if p else x for x, p in zip(operands, in_placed, strict=True)))

    def split(outs):
        return pick(out_placed, outs), pick(out_reduced, outs)

    def single(rows):
        placed, parts = split(one(rows))
        dtypes = (total_dtype(m, x.dtype) for m, x in zip(reduced, parts, strict=True))
        return placed, list(map(lax.convert_element_type, parts, dtypes))

    def several(rows, count):
        if count == 1:
            placed, parts = single([lax.squeeze(x, (0,)) for x in rows])
            return [lax.expand_dims(x, (0,)) for x in placed], parts
        placed, parts = split(jax.vmap(one, axis_size=count)(rows))
        return placed, [_reduce_batch(m, x) for m, x in zip(reduced, parts, strict=True)]

    def combine_all(totals, parts):
        return [combine(m, t, p) for m, t, p in zip(reduced, totals, parts, strict=True)]

    batches, rest = divmod(size, vectorize)
    whole = batches * vectorize  # the number of participants in batches
    wholes: ByIndex = {}  # the second accumulators, by the index of their total
    if batches == 1:
        placed, totals = several(_slice(rows, 0, whole), vectorize)
    else:
        often = -(-_TERMS // vectorize)  # the number of batches between two moves
        at, put = (
            functools.partial(fn, allow_negative_indices=False)
            for fn in (lax.dynamic_index_in_dim, lax.dynamic_update_index_in_dim)
        )

        def step(state):
            number, totals, wholes, placed = state
            own = [at(x, number, keepdims=False) for x in xs]
            made, parts = single(own) if vectorize == 1 else several(own, vectorize)
            totals = combine_all(totals, parts)
            if wholes:
                due = True if often == 1 else lax.rem(number, np.int32(often)) == often - 1
                moved, wholes = _move(due, {i: totals[i] for i in wholes}, wholes)
                totals = [moved.get(i, total) for i, total in enumerate(totals)]
            placed = [put(y, x, number, 0) for y, x in zip(placed, made, strict=True)]
            return lax.add(number, np.int32(1)), totals, wholes, placed

        batch = () if vectorize == 1 else (vectorize,)
        xs = _slice(rows, 0, whole)
        if batch:
            xs = [lax.reshape(x, (batches, *batch, *x.shape[1:])) for x in xs]
        totals = [
            neutral(mode, aval.update(dtype=total_dtype(mode, aval.dtype)))
            for mode, aval in zip(reduced, pick(out_reduced, this.value_avals), strict=True)
        ]
        wholes = {
            i: lax.full_like(total, 0)
            for i, (mode, total) in enumerate(zip(reduced, totals, strict=True))
            if _needs_two(mode, total, batches, vectorize)
        }
        placed = [
            lax.broadcast(neutral("placed", aval), (batches, *batch))
            for aval in pick(out_placed, this.value_avals)
        ]
        # A `lax.scan` would be traced twice, once more when it is lowered to this.
        start = np.int32(0), totals, wholes, placed
        _, totals, wholes, placed = lax.while_loop(
            lambda state: lax.lt(state[0], np.int32(batches)), step, start
        )
        if batch:
            placed = [lax.reshape(x, (whole, *x.shape[2:])) for x in placed]
    if rest:
        last, parts = several(_slice(rows, whole, size), rest)
        placed = [lax.concatenate(pair, 0) for pair in zip(placed, last, strict=True)]
        totals = combine_all(totals, parts)
    totals = [lax.add(wholes[i], total) if i in wholes else total for i, total in enumerate(totals)]

    made, found = iter(placed), iter(totals)
    return [
        unchanged[k] if k in unchanged else next(made if out.mode == "placed" else found)
        for k, out in enumerate(this.outputs)
    ]


def _unchanged(this: Round, operands: Sequence[jax.Array]) -> ByIndex:
    """The placed outputs that are rows of an operand, which need no copy, by their index."""
    given = zip(this.jaxpr.jaxpr.invars, operands, this.inputs, strict=True)
    rows = {var: x for var, x, i in given if i.mode == "placed"}
    return {
        k: rows[part.value]
        for k, part in enumerate(this.contributions())
        if part.mode == "placed" and part.mask is None
        if isinstance(part.value, Var) and part.value in rows
    }


def _slice(rows: Sequence[jax.Array], start: int, end: int) -> list[jax.Array]:
    return [x if len(x) == end - start else lax.slice_in_dim(x, start, end) for x in rows]


def _reduce_batch(mode: str, rows: jax.Array) -> jax.Array:
    """Reduces the rows of a batch, on one device.

    XLA sums rows in a tree, unless they are products, as in a weighted mean. Those become a matrix
    product, which on CPU sums them one by one, with an error of 1e-5 for 1,000 equal rows. So small
    rows are summed 16 at a time; for large ones this would take too long.
    """
    inexact = jnp.issubdtype(rows.dtype, jnp.inexact)
    if mode == "sum" and inexact and math.prod(rows.shape[1:]) <= _LARGE:
        rows = rows.astype(total_dtype(mode, rows.dtype))
        others = rows.ndim - 1
        window, zero = (_TERMS, *[1] * others), np.zeros((), rows.dtype)
        while len(rows) > _TERMS:
            padding = [(0, -len(rows) % _TERMS), *[(0, 0)] * others]
            rows = lax.reduce_window(rows, zero, lax.add, window, window, padding)
    return reduce_rows(mode, rows)


def _needs_two(mode: str, total: jax.Array, batches: int, vectorize: int) -> bool:
    """Whether a total has two accumulators."""
    if mode != "sum" or not jnp.issubdtype(total.dtype, jnp.inexact) or batches <= _TERMS:
        return False
    # One more row is little compared to a batch of many rows.
    return total.size <= _LARGE or batches > _MANY_BATCHES or vectorize >= _TERMS


def _add_exactly(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rounded sum of two floats, and its exact rounding error.

    This is Knuth's TwoSum, in The Art of Computer Programming, volume 2, section 4.2.2.
    """
    total = lax.add(x, y)
    added = lax.sub(total, x)
    lost = lax.add(lax.sub(x, lax.sub(total, added)), lax.sub(y, added))
    # If the sum is infinite, this is NaN and must not be added to anything.
    return total, lax.select(jnp.isfinite(lost), lost, lax.full_like(lost, 0))


def _move(due: Any, totals: ByIndex, wholes: ByIndex) -> tuple[ByIndex, ByIndex]:
    """Adds totals to their second accumulators if it is due. The rounding errors remain."""
    moved = {i: _move_one(due, wholes[i], total) for i, total in totals.items()}
    return {i: lost for i, (_, lost) in moved.items()}, {i: w for i, (w, _) in moved.items()}


def _move_one(due: Any, whole: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    if due is True:
        return _add_exactly(whole, total)
    # Unlike a branch, a loop that runs at most once works in place.
    start = due, whole, total
    return lax.while_loop(
        lambda state: state[0],
        lambda state: (np.False_, *_add_exactly(*state[1:])),
        start,
    )[1:]
