"""The schedule of a map across devices: which of them works for whom.

The participants are divided evenly over the devices along their placement's mesh axes, in
order. If that leaves some over, the first devices work for one more each, and the others do
nothing or, where all devices have to keep in step, the same work for nothing. No participant
is made up, so there is no padding to be seen. Rows that are left over are on all devices, as
JAX has no uneven arrays, and each picks its own. Reduced outputs are reduced on each device
and then, once, across devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.sharding import PartitionSpec

from fax._placement import Placement
from fax.sharding import _schedule
from fax.sharding._mesh import other_axes, ways
from fax.sharding._types import gather_rows

Arrays = Sequence[jax.Array]


def run(
    work: Callable[..., Arrays],
    operands: Arrays,
    in_modes: Sequence[str],
    out_modes: Sequence[str],
    out_avals: Sequence[ShapedArray],
    group: Placement,
    vectorize: Callable[[int], int],
    axes: tuple[str, ...],
    manual: tuple[str, ...],
) -> list[jax.Array]:
    """Runs ``work`` for every participant, on all devices along ``axes`` of the mesh in scope.

    The arguments are those of `_schedule.run`, but for these:

    Args:
      group: the participants.
      vectorize: how many are worked on at once, if a device works for so many.
      axes: the mesh axes that they are spread over; without any, all are on one device.
      manual: these axes, and others of one device that ``work`` has as manual ones, too.

    Returns:
      The outputs, each in its mode, and totals in the dtype in which they are added up.
    """
    each = functools.partial(_schedule.run, work, in_modes=in_modes, out_modes=out_modes)
    if not axes:
        return each(operands, out_avals=out_avals, size=group.size, vectorize=vectorize(group.size))
    mesh = jax.sharding.get_abstract_mesh()
    devices, others = ways(axes, mesh), other_axes(axes, mesh)
    even, left = divmod(group.size, devices)
    placed_in = [mode == "placed" for mode in in_modes]
    placed_out = [mode == "placed" for mode in out_modes]

    def rows_from(operands, start, count):
        """What a device sees where all devices have all rows."""
        return [
            lax.dynamic_slice_in_dim(x, start, count) if placed else x
            for x, placed in zip(operands, placed_in, strict=True)
        ]

    def on_device(*operands):
        parts: list[Arrays] = []
        number: Any = lax.axis_index(axes) if left else 0
        if even:
            count = vectorize(even)
            seen = rows_from(operands, number * even, even) if left else operands
            parts.append(each(seen, out_avals=out_avals, size=even, vectorize=count))
        if left:
            last = jnp.minimum(even * devices + number, group.size - 1)
            one = rows_from(operands, last, 1)

            def one_more():
                return each(one, out_avals=out_avals, size=1, vectorize=1)

            parts.append(_if(number < left, one_more, out_modes, bool(others)))
        rows = [[x for x, p in zip(part, placed_out, strict=True) if p] for part in parts]
        totals = [
            functools.reduce(functools.partial(_schedule.combine, mode), values)
            for mode, *values in zip(out_modes, *parts, strict=True)
            if mode != "placed"
        ]
        return rows, _across(axes, [mode for mode in out_modes if mode != "placed"], totals)

    if left:
        operands = [
            gather_rows(x, group) if placed else x
            for x, placed in zip(operands, placed_in, strict=True)
        ]
    spread, same = PartitionSpec(axes), PartitionSpec()
    parts, totals = jax.shard_map(
        on_device,
        in_specs=tuple(spread if placed and not left else same for placed in placed_in),
        out_specs=(spread, same),
        axis_names=set(manual).difference(mesh.manual_axes),
        check_vma=False,
    )(*operands)
    if left:
        parts = [[gather_rows(x, group) for x in part] for part in parts]
        parts[-1] = [x[:left] for x in parts[-1]]
    placed, reduced = map(_joined, zip(*parts, strict=True)), iter(totals)
    return [next(placed if p else reduced) for p in placed_out]


def _if(mine: jax.Array, work: Callable[[], Arrays], modes: Sequence[str], always: bool) -> Arrays:
    """The outputs of work for one participant, or what changes nothing."""
    avals = jax.make_jaxpr(work)().out_avals

    def nothing():
        return [_schedule.nothing(mode, aval) for mode, aval in zip(modes, avals, strict=True)]

    if not always:
        return lax.cond(mine, work, nothing)
    return [lax.select(mine, made, none) for made, none in zip(work(), nothing(), strict=True)]


def _joined(parts: Arrays) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _across(axes: tuple[str, ...], modes: Sequence[str], totals: Arrays) -> list[jax.Array]:
    """Reduces each device's totals over all devices, with one collective for all sums."""
    reduced = list(totals)
    for mode, collective in (("sum", lax.psum), ("max", lax.pmax), ("min", lax.pmin)):
        which = [i for i, own in enumerate(modes) if own == mode]
        wide = [_sendable(totals[i].dtype) for i in which]
        values = [totals[i].astype(dtype) for i, dtype in zip(which, wide, strict=True)]
        for i, value in zip(which, collective(values, axes) if values else (), strict=True):
            reduced[i] = value.astype(totals[i].dtype)
    return reduced


def _sendable(dtype: Any) -> Any:
    """A dtype that XLA reduces across devices. On CPU its compiler aborts at maxima of bfloat16."""
    return jnp.int32 if jnp.issubdtype(dtype, jnp.bool_) else _schedule.accumulator_dtype(dtype)
