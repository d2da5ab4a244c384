"""The schedule of a map: which participants one device works on, and when.

The participants of a batch run at once, vectorized. Batches follow one another in a loop, which
carries the accumulators of the reduced outputs (`_accumulators`). So the rows behind a reduced
output never exist together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Var

from fax._arithmetic import elements, neutral, reduce_rows, total_dtype
from fax.lowering._accumulators import LARGE, TERMS, Accumulators
from fax.primitives._round import Round, pick

ByIndex = dict[int, jax.Array]


def run(
    client: Callable[..., Sequence[jax.Array]],
    this: Round,
    operands: Sequence[jax.Array],
    size: int,
    vectorize: int,
    apart: bool,
) -> list[jax.Array]:
    """Runs a round for some participants on one device.

    Args:
      client: maps one participant's view of the operands to its contributions to the outputs.
      this: the round, with the modes of operands and outputs.
      operands: a value for mode ``server``, ``size`` rows for mode ``placed``.
      size: the number of participants.
      vectorize: how many run at once.
      apart: whether each total has accumulators of its own; see `Accumulators`.

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

    batches, rest = divmod(size, vectorize)
    whole = batches * vectorize  # the number of participants in batches
    avals = [
        aval.update(dtype=total_dtype(mode, aval.dtype))
        for mode, aval in zip(reduced, pick(out_reduced, this.value_avals), strict=True)
    ]
    accumulators = Accumulators(reduced, avals, batches, vectorize, apart)
    if batches == 1:
        placed, parts = several(_slice(rows, 0, whole), vectorize)
        state = accumulators.of(parts)
    else:

        def step(carry):
            number, state, placed = carry
            own = [_row(x, number) for x in xs]
            made, parts = single(own) if vectorize == 1 else several(own, vectorize)
            state = accumulators.add(state, parts, number)
            placed = [_with_row(y, x, number) for y, x in zip(placed, made, strict=True)]
            return lax.add(number, np.int32(1)), state, placed

        batch = () if vectorize == 1 else (vectorize,)
        xs = _slice(rows, 0, whole)
        if batch:
            xs = [lax.reshape(x, (batches, *batch, *x.shape[1:])) for x in xs]
        placed = [
            lax.broadcast(neutral("placed", aval), (batches, *batch))
            for aval in pick(out_placed, this.value_avals)
        ]
        # A `lax.scan` would be traced twice, once more when it is lowered to this.
        _, state, placed = lax.while_loop(
            lambda carry: lax.lt(carry[0], np.int32(batches)),
            step,
            (np.int32(0), accumulators.start(), placed),
        )
        if batch:
            placed = [lax.reshape(x, (whole, *x.shape[2:])) for x in placed]
    if rest:
        last, parts = several(_slice(rows, whole, size), rest)
        placed = [lax.concatenate(pair, 0) for pair in zip(placed, last, strict=True)]
        state = accumulators.add(state, parts)
    totals = accumulators.finish(state)

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


def _row(xs: jax.Array, number: jax.Array) -> jax.Array:
    sizes = (1, *xs.shape[1:])
    row = lax.dynamic_slice(xs, _start(xs, number), sizes, allow_negative_indices=False)
    return lax.squeeze(row, (0,))


def _with_row(xs: jax.Array, row: jax.Array, number: jax.Array) -> jax.Array:
    row = lax.expand_dims(row, (0,))
    return lax.dynamic_update_slice(xs, row, _start(xs, number), allow_negative_indices=False)


def _start(xs: jax.Array, number: jax.Array) -> list[Any]:
    return [number, *[np.int32(0)] * (xs.ndim - 1)]


def _reduce_batch(mode: str, rows: jax.Array) -> jax.Array:
    """Reduces the rows of a batch, on one device.

    XLA sums rows in a tree, unless they are products, as in a weighted mean. Those become a matrix
    product, which on CPU sums them one by one, with an error of 1e-5 for 1,000 equal rows. So small
    rows are summed 16 at a time; for large ones this would take too long.
    """
    inexact = jnp.issubdtype(rows.dtype, jnp.inexact)
    if mode == "sum" and inexact and elements(rows.shape[1:]) <= LARGE:
        rows = rows.astype(total_dtype(mode, rows.dtype))
        others = rows.ndim - 1
        window, zero = (TERMS, *[1] * others), np.zeros((), rows.dtype)
        while len(rows) > TERMS:
            padding = [(0, -len(rows) % TERMS), *[(0, 0)] * others]
            rows = lax.reduce_window(rows, zero, lax.add, window, window, padding)
    return reduce_rows(mode, rows)
