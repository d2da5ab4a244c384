"""What a replica sends is split over its devices, so that each byte crosses to the others once.

A replica may have several devices. What some of them have in common, such as parameters that are
sharded over ``model`` alone on a mesh with the axes ``data`` and ``model``, would be summed over
the replicas on each of them. Instead each of them sums a part, and then they gather the parts,
over the connections within a replica, which are faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec, reshard
from jax.tree_util import tree_flatten_with_path, tree_leaves, tree_map_with_path

import fax
from fax._placement import resolve
from fax.algorithms._layers import name_of
from fax.sharding._mesh import other_axes, split_axes

PyTree = Any
Specs = dict[str, PartitionSpec]


class Crossing(NamedTuple):
    """How the leaves of an update are sharded over the devices of a replica, by their paths.

    Attributes:
      before: as the parameters are.
      across: with every device having a part of its own, where sizes allow that.
      explicit: whether shardings are types.
    """

    before: Specs
    across: Specs
    explicit: bool

    def split(self, updates: PyTree) -> PyTree:
        """Updates of replicas, before they are summed. Call it in a program."""

        def one(own: PyTree) -> PyTree:
            # Without the first sharding, the compiler could shard the parameters like the second.
            return self._as(self.across, self._as(self.before, own))

        return fax.map(one, updates) if self.across else updates

    def join(self, update: PyTree) -> PyTree:
        """An update after the sum."""
        return self._as(self.before, update) if self.across else update

    def spec(self, name: str) -> PartitionSpec | None:
        """How a leaf crosses, or None if that is left to the compiler."""
        return self.across.get(name, self.before.get(name))

    def _as(self, specs: Specs, tree: PyTree) -> PyTree:
        place = reshard if self.explicit else lax.with_sharding_constraint

        def one(path: Any, x: jax.Array) -> jax.Array:
            name = name_of(path)
            return place(x, specs[name]) if name in self.across else x

        return tree_map_with_path(one, tree)


def specs_of(where: str, sharding: PyTree) -> Specs | None:
    """The shardings of a replica's parameters by their paths, or None if they are not given."""
    if sharding is None:
        return None
    leaves = tree_flatten_with_path(sharding, is_leaf=lambda x: isinstance(x, PartitionSpec))[0]
    specs = {name_of(path): spec for path, spec in leaves}
    for name, spec in specs.items():
        if not isinstance(spec, PartitionSpec):
            raise ValueError(
                f"{where}: sharding has {spec!r:.80} for {name!r}, expected a "
                "jax.sharding.PartitionSpec for each leaf of the parameters."
            )
        used = _used(spec)
        if twice := [axis for axis in used if used.count(axis) > 1]:
            raise ValueError(
                f"{where}: sharding has {spec} for {name!r}, which has the mesh axis {twice[0]!r} "
                "twice. Shard only one axis of a leaf over it."
            )
    return specs


def check_specs(where: str, specs: Specs | None, params: PyTree) -> None:
    """Checks that there is a sharding for each leaf of the parameters."""
    if specs is None:
        return
    shapes = {name_of(path): jnp.shape(x) for path, x in tree_flatten_with_path(params)[0]}
    if "" in {*specs} - {*shapes}:
        raise ValueError(
            f"{where}: sharding is {specs['']}, expected a pytree with a "
            f"jax.sharding.PartitionSpec for each leaf of the parameters: {', '.join(shapes)}."
        )
    for name in sorted({*shapes} ^ {*specs}):
        if name in specs and f"{name}/value" in shapes:
            raise ValueError(
                f"{where}: sharding has a leaf {name!r}, but params has '{name}/value', in a box "
                "of flax. Pass parameters without boxes, which flax.linen.unbox(params) returns."
            )
        one, other = ("sharding", "params") if name in specs else ("params", "sharding")
        raise ValueError(
            f"{where}: {one} has a leaf {name!r}, but {other} does not. Pass a "
            "jax.sharding.PartitionSpec for each leaf of the parameters."
        )
    for name, shape in shapes.items():
        if len(specs[name]) > len(shape):
            raise ValueError(
                f"{where}: sharding has {specs[name]} for {name!r}, which has only "
                f"{len(shape)} axes."
            )


def crossing(where: str, specs: Specs | None, updates: PyTree, typed: bool) -> Crossing:
    """How placed updates cross between replicas. Call it in a program.

    Args:
      where: the algorithm, for messages.
      specs: how a replica's parameters are sharded over Auto axes. Along Explicit axes the types
        of the updates say so.
      updates: placed, with the same paths as the parameters.
      typed: whether updates may be sharded differently along Explicit axes, which changes types.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = split_axes(resolve(None, where), mesh)
    sizes = {axis: mesh.shape[axis] for axis in other_axes(axes, mesh)}
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    kinds = {types[axis] for axis in sizes}
    if specs is not None and not mesh.empty:
        _check_axes(where, specs, mesh.axis_names, axes)
    before: Specs = {}
    across: Specs = {}
    explicit = kinds == {AxisType.Explicit}
    if len(kinds) == 1 and axes and tree_leaves(updates):
        for path, x in tree_flatten_with_path(updates)[0]:
            name = name_of(path)
            if explicit:
                before[name] = PartitionSpec(*jax.typeof(x).sharding.spec[1:])
            elif specs is not None:
                _check_even(where, name, specs[name], x.shape[1:], mesh)
                before[name] = specs[name]
            else:
                continue
            wide = _wide(before[name], x.shape[1:], sizes)
            if wide is not None and (typed or not explicit):
                across[name] = wide
    return Crossing(before, across, explicit)


def sharded(specs: Specs | None, tree: PyTree) -> PyTree:
    """Parameters of a replica, or the state of an optimizer, sharded as is given for parameters.

    Otherwise the compiler could shard them as it shards what crosses, in the middle of training.
    In a state, the path of what belongs to a parameter ends with the parameter's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if specs is None or mesh.empty or mesh.explicit_axes:
        return tree
    if any(axis not in mesh.axis_names for spec in specs.values() for axis in _used(spec)):
        return tree  # `crossing` refuses it

    def one(path: Any, x: jax.Array) -> jax.Array:
        ends = (name_of(path[begin:]) for begin in range(len(path) + 1))
        spec = next((specs[end] for end in ends if end in specs), None)
        if spec is None or len(spec) > x.ndim:
            return x
        even = all(rest == 0 for _, _, rest in _divided(spec, x.shape, mesh))  # or it is refused
        return lax.with_sharding_constraint(x, spec) if even else x

    return tree_map_with_path(one, tree)


def _check_axes(where: str, specs: Specs, known: tuple[str, ...], taken: tuple[str, ...]) -> None:
    for name, spec in specs.items():
        for axis in _used(spec):
            if axis not in known or axis in taken:
                why = "is that of the replicas" if axis in taken else "is not in the mesh in scope"
                raise ValueError(
                    f"{where}: sharding has {spec} for {name!r}, but the mesh axis {axis!r} {why}. "
                    f"Name axes over which a replica is sharded, of {', '.join(known)}."
                )


def _check_even(
    where: str, name: str, spec: PartitionSpec, shape: tuple[int, ...], mesh: AbstractMesh
) -> None:
    for axis, devices, rest in _divided(spec, shape, mesh):
        if rest:
            raise ValueError(
                f"{where}: sharding has {spec} for {name!r}, but what is sent of it at once has "
                f"size {shape[axis]} along axis {axis}, which is not a multiple of the {devices} "
                f"devices along {', '.join(_names(spec[axis]))}. Shard another axis, or choose "
                "other fragments."
            )


def _divided(
    spec: PartitionSpec, shape: tuple[int, ...], mesh: AbstractMesh
) -> Iterator[tuple[int, int, int]]:
    """For each axis: its number, over how many devices it is sharded, and the rest."""
    for axis, (size, entry) in enumerate(zip(shape, spec)):
        devices = math.prod(mesh.shape[name] for name in _names(entry))
        yield axis, devices, size % devices


def _used(spec: PartitionSpec) -> list[str]:
    return [axis for entry in spec for axis in _names(entry)]


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _wide(
    spec: PartitionSpec, shape: tuple[int, ...], sizes: Mapping[str, int]
) -> PartitionSpec | None:
    """The sharding with all axes that it does not use, or None if there is nothing to add."""
    entries = [list(_names(entry)) for entry in spec] + [[] for _ in shape[len(spec) :]]
    local = [size / math.prod(sizes.get(a, 1) for a in own) for size, own in zip(shape, entries)]
    changed = False
    for axis in sizes:
        if axis in _used(spec):
            continue
        fitting = [d for d, size in enumerate(local) if size % sizes[axis] == 0]
        if fitting:
            # As the last axis of its dimension, it only divides what a device has already.
            largest = max(fitting, key=lambda d: local[d])
            entries[largest].append(axis)
            local[largest] /= sizes[axis]
            changed = True
    return PartitionSpec(*(tuple(own) or None for own in entries)) if changed else None
