"""The schedule of a map across devices: which device works for which participants.

The participants are divided evenly over the devices along their placement's mesh axes, in order.
If some are left over, the first devices work for one more each. The others do nothing or, where all
devices have to stay in step, the same work with discarded results. There are no dummy participants,
so users see no padding. Left-over rows are on all devices, because JAX has no uneven arrays, and
each device picks its own. Reduced outputs are reduced on each device and then, once, across
devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from fax import _arithmetic
from fax.lowering._across import across
from fax.primitives._round import Round, pick
from fax.sharding._mesh import num_shards, other_axes
from fax.sharding._types import gather_rows

Arrays = Sequence[jax.Array]


def run(
    on_one: Callable[[Arrays, int], Arrays],
    this: Round,
    operands: Arrays,
    axes: tuple[str, ...],
    manual: tuple[str, ...],
    platform: str,
) -> Arrays:
    """Runs a round for every participant, on all devices along ``axes`` of the mesh in scope.

    Args:
      on_one: runs the round on one device, given the operands and the number of participants.
      this: the round.
      operands: a value for mode ``server``, a row for each participant for mode ``placed``.
      axes: the mesh axes that participants are spread over. If empty, all are on one device.
      manual: these axes, and axes of one device that are also manual in ``on_one``.
      platform: of the devices.

    Returns:
      The outputs, each in its mode. Totals have the dtype in which they are summed.
    """
    group = this.group
    if not axes:
        return on_one(operands, group.size)
    mesh = jax.sharding.get_abstract_mesh()
    devices, others = num_shards(axes, mesh), other_axes(axes, mesh)
    even, left = divmod(group.size, devices)
    in_placed = [i.mode == "placed" for i in this.inputs]
    out_modes = [out.mode for out in this.outputs]
    out_placed = [mode == "placed" for mode in out_modes]

    def rows_from(operands, start, count):
        """The operands of a device, if all devices have all rows."""
        return [
            lax.dynamic_slice_in_dim(x, start, count) if placed else x
            for x, placed in zip(operands, in_placed, strict=True)
        ]

    def on_device(*operands):
        parts: list[Arrays] = []
        number: Any = lax.axis_index(axes) if left else 0
        if even:
            seen = rows_from(operands, number * even, even) if left else operands
            parts.append(on_one(seen, even))
        if left:
            last = jnp.minimum(even * devices + number, group.size - 1)
            one = rows_from(operands, last, 1)

            def one_more():
                return on_one(one, 1)

            parts.append(_if(number < left, one_more, out_modes, bool(others)))
        rows = [pick(out_placed, part) for part in parts]
        totals = [
            functools.reduce(functools.partial(_arithmetic.combine, mode), values)
            for mode, *values in zip(out_modes, *parts, strict=True)
            if mode != "placed"
        ]
        return rows, across(platform, axes, [m for m in out_modes if m != "placed"], totals)

    if left:
        operands = [
            gather_rows(x, group) if placed else x
            for x, placed in zip(operands, in_placed, strict=True)
        ]
    split, same = PartitionSpec(axes), PartitionSpec()
    parts, totals = jax.shard_map(
        on_device,
        in_specs=tuple(split if placed and not left else same for placed in in_placed),
        out_specs=(split, same),
        axis_names=set(manual).difference(mesh.manual_axes),
        check_vma=False,
    )(*operands)
    if left:
        parts = [[gather_rows(x, group) for x in part] for part in parts]
        parts[-1] = [x[:left] for x in parts[-1]]
    placed, reduced = map(_joined, zip(*parts, strict=True)), iter(totals)
    return [next(placed if p else reduced) for p in out_placed]


def _if(mine: jax.Array, work: Callable[[], Arrays], modes: Sequence[str], always: bool) -> Arrays:
    """The outputs of ``work`` for one participant, or identities of the reductions."""
    avals = jax.make_jaxpr(work)().out_avals

    def nothing():
        return [_arithmetic.neutral(mode, aval) for mode, aval in zip(modes, avals, strict=True)]

    if not always:
        return lax.cond(mine, work, nothing)
    return [lax.select(mine, made, none) for made, none in zip(work(), nothing(), strict=True)]


def _joined(parts: Arrays) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
