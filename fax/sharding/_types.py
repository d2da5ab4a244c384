"""The types of placed values and of their rows, shardings included.

Along Explicit axes of a mesh a sharding is part of a type. A placed value is spread over its
placement's axes there if its rows can be divided evenly, and along no other dimension. Along
Auto axes the same is a constraint for the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from jax import lax
from jax.core import ShapedArray
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes, reshard

from fax._placement import Placement
from fax.sharding._mesh import num_shards, split_axes


def placed_aval(row: ShapedArray, group: Placement) -> ShapedArray:
    """The type of rows, one for each participant."""
    sharding = _in_scope(row)
    axes = _even_axes(group, AxisType.Explicit)
    spec = PartitionSpec(axes or None, *sharding.spec)
    return row.update(shape=(group.size, *row.shape), sharding=sharding.update(spec=spec))


def row_aval(placed: ShapedArray) -> ShapedArray:
    """The type of one participant's row."""
    spec = PartitionSpec(*placed.sharding.spec[1:])
    return placed.update(shape=placed.shape[1:], sharding=placed.sharding.update(spec=spec))


def as_placed(x: jax.Array, group: Placement) -> jax.Array:
    """Rows with the sharding that their type should have."""
    aval = jax.typeof(x)
    if aval.sharding.spec[0] is None and not _explicit_axes(group):
        return x
    row = _without_axes(row_aval(aval), group)
    return _with_sharding(x, placed_aval(row, group))


def as_server(x: jax.Array, group: Placement) -> jax.Array:
    """A server value, the same on all devices along the placement's axes."""
    return _with_sharding(x, server_aval(jax.typeof(x), group)) if _explicit_axes(group) else x


def server_aval(aval: ShapedArray, group: Placement) -> ShapedArray:
    """The type of a server value, spread over other axes only."""
    return _without_axes(aval, group) if _explicit_axes(group) else aval


def spread_rows(x: jax.Array, group: Placement) -> jax.Array:
    """Spreads rows over the placement's axes, if they can be divided evenly."""
    return _constrain(as_placed(x, group), _even_axes(group, AxisType.Auto), group)


def gather_rows(x: jax.Array, group: Placement) -> jax.Array:
    """All rows, on every device along the placement's axes."""
    return _constrain(as_server(x, group), (), group)


def as_before(x: jax.Array, before: ShapedArray) -> jax.Array:
    """A value with the sharding of a type, as a cotangent has to have that of its primal."""
    wanted = _in_scope(before)
    return _with_sharding(x, before.update(sharding=wanted)) if wanted.mesh.explicit_axes else x


def without_explicit_axes(fn: Callable, out_specs: Sequence[PartitionSpec]) -> Callable:
    """A function of arrays that sees Auto axes only, and returns arrays of the given types."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.explicit_axes:
        return fn
    return auto_axes(fn, axes=mesh.explicit_axes, out_sharding=list(out_specs))


def _constrain(x: jax.Array, axes: tuple[str, ...], group: Placement) -> jax.Array:
    """Tells the compiler which Auto axes the leading dimension is spread over."""
    if not _axes_of_type(group, AxisType.Auto):
        return x
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return lax.with_sharding_constraint(x, PartitionSpec(axes or None, *free))


def _with_sharding(x: jax.Array, wanted: ShapedArray) -> jax.Array:
    return x if wanted.sharding == jax.typeof(x).sharding else reshard(x, wanted.sharding)


def _in_scope(aval: ShapedArray) -> NamedSharding:
    """The sharding of a type; that of what came from outside is on the mesh in scope."""
    mesh = jax.sharding.get_abstract_mesh()
    if aval.sharding.mesh.empty and not mesh.empty:
        return NamedSharding(mesh, aval.sharding.spec)
    return aval.sharding


def _without_axes(aval: ShapedArray, group: Placement) -> ShapedArray:
    sharding = _in_scope(aval)
    taken = split_axes(group)

    def left(entry):
        names = entry if isinstance(entry, tuple) else (entry,)
        return tuple(name for name in names if name is not None and name not in taken) or None

    return aval.update(sharding=sharding.update(spec=PartitionSpec(*map(left, sharding.spec))))


def _axes_of_type(group: Placement, kind: AxisType) -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(axis for axis in split_axes(group) if types[axis] == kind)


def _explicit_axes(group: Placement) -> tuple[str, ...]:
    return _axes_of_type(group, AxisType.Explicit)


def _even_axes(group: Placement, kind: AxisType) -> tuple[str, ...]:
    """The axes of a type that rows are spread over: none if they cannot be divided evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    uneven = group.size % num_shards(split_axes(group), mesh)
    return () if uneven else _axes_of_type(group, kind)
