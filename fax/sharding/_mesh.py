"""Meshes, and the axes over which the participants of a placement are spread."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from fax import _arguments
from fax._placement import Placement, PlacementError, Scope

_MAKE_MESH, _LAYOUT = "fax.sharding.make_mesh", "fax.sharding.layout"

# Meshes


def make_mesh(
    *,
    devices: Sequence[Any] | None = None,  # type checkers do not know jax.Device
    axis_types: AxisType | Sequence[AxisType] = AxisType.Auto,
    **axes: int,
) -> Mesh:
    """Makes a mesh of devices with named axes, for `jax.set_mesh`.

    A program over ``clients`` that is called under ``jax.set_mesh(make_mesh(clients=4,
    model=2))`` spreads its clients over the axis ``clients``. The client function can use the
    other axes. The first axes use the slowest connections: with several hosts or slices, the
    first axes extend across them, and the last ones stay within one.

    Args:
      devices: the devices. Default: all devices.
      axis_types: how sharding is decided along the axes: by the compiler (Auto) or in types
        (Explicit). One for all axes, or one for each.
      **axes: the size of each axis, by name. One size may be -1, for the remaining devices.

    Returns:
      The mesh.

    Raises:
      PlacementError: if a size is not a positive int, the sizes do not multiply to the number
        of devices, or ``axis_types`` does not fit the axes.

    Example:

      >>> mesh = fax.sharding.make_mesh(clients=-1)
      >>> with jax.set_mesh(mesh):
      ...     pass  # call a program here
    """
    given = jax.devices() if devices is None else devices
    found = list(given) if isinstance(given, Sequence | np.ndarray) else []
    if not found or not all(hasattr(device, "process_index") for device in found):
        raise PlacementError(
            f"{_MAKE_MESH}: devices is {given!r:.80}, expected a list of devices, such as "
            "jax.devices()."
        )
    sizes = _sizes(axes, len(found))
    types: tuple[Any, ...] = ()
    if isinstance(axis_types, AxisType):
        types = (axis_types,) * len(axes)
    elif isinstance(axis_types, Sequence):
        types = tuple(axis_types)
    if len(types) != len(axes) or not all(isinstance(t, AxisType) for t in types):
        raise PlacementError(
            f"{_MAKE_MESH}: axis_types is {axis_types!r}, expected one jax.sharding.AxisType, or "
            f"one for each of the axes {', '.join(axes)}."
        )
    return Mesh(_arrange(sizes, found), tuple(axes), axis_types=types)


def _sizes(axes: Mapping[str, int], count: int) -> list[int]:
    """The sizes of the axes over ``count`` devices, with -1 replaced."""
    if not axes:
        raise PlacementError(f"{_MAKE_MESH} needs at least one axis, as in make_mesh(clients=4).")
    sizes = []
    for name, size in axes.items():
        if not (isinstance(size, int) and size == -1):
            what = "or -1 for the remaining devices"
            size = _arguments.count(_MAKE_MESH, name, size, what=what, error=PlacementError)
        sizes.append(size)
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1:
        raise PlacementError(f"{_MAKE_MESH}: only one of the sizes {dict(axes)} can be -1.")
    if count % known or (known != count and -1 not in sizes):
        raise PlacementError(
            f"{_MAKE_MESH}: the sizes {dict(axes)} do not multiply to the number of devices, "
            f"{count}. Change a size, set one of them to -1, or pass devices=."
        )
    return [count // known if size == -1 else size for size in sizes]


def _arrange(sizes: list[int], devices: list[jax.Device]) -> np.ndarray:
    """Arranges devices in the shape of a mesh, with neighbors along the last axes."""
    slices = {getattr(device, "slice_index", 0) for device in devices}
    granules = len(slices) if len(slices) > 1 else len({d.process_index for d in devices})
    left, between = granules, []
    for size in sizes:
        between.append(math.gcd(size, left))
        left //= between[-1]
    if granules == 1 or left > 1 or len(devices) % granules:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        [size // b for size, b in zip(sizes, between, strict=True)],
        between,
        devices,
        process_is_granule=len(slices) == 1,
        allow_split_physical_axes=True,
    )


# Layouts

# The axes of each placement.
_layout: contextvars.ContextVar[tuple[tuple[str, tuple[str, ...]], ...]] = contextvars.ContextVar(
    "fax_layout", default=()
)
_jit_cache_key = jax.make_user_context(None)


@contextlib.contextmanager
def layout(**axes: str | Sequence[str]) -> Iterator[None]:
    """Sets the mesh axes over which placements are spread, if not the axis with their name.

    Programs that are called under the layout follow it. Without a mesh in scope, all participants
    are on one device, whatever the layout.

    Args:
      **axes: for each placement, the name of a mesh axis, or several names, the slowest first. With
        none, ``()``, all devices run the client functions of all participants together.

    Raises:
      PlacementError: if an axis is not in the mesh in scope, is named twice, or is shared by two
        placements.

    Example:

      >>> mesh = fax.sharding.make_mesh(pod=1, clients=-1)
      >>> with jax.set_mesh(mesh), fax.sharding.layout(clients=("pod", "clients")):
      ...     pass  # call a program over clients here
    """
    for name, a in axes.items():
        names = [a] if isinstance(a, str) else a
        if not isinstance(names, Sequence) or not all(isinstance(axis, str) for axis in names):
            raise PlacementError(
                f"{_LAYOUT}: {name} is {_arguments.shown(a)}, expected the name of a mesh axis, or "
                "several names."
            )
    wanted = {name: (a,) if isinstance(a, str) else tuple(a) for name, a in axes.items()}
    combined = {**dict(_layout.get()), **wanted}
    _check(combined)
    now = tuple(sorted(combined.items()))
    token = _layout.set(now)
    try:
        with _jit_cache_key(now):
            yield
    finally:
        _layout.reset(token)


def named_in_layout() -> list[str]:
    """The placements in the layout in scope."""
    return [name for name, _ in _layout.get()]


def _check(layouts: Mapping[str, tuple[str, ...]]) -> None:
    mesh = jax.sharding.get_abstract_mesh()
    owner: dict[str, str] = {}
    for name, axes in layouts.items():
        for axis in axes:
            if not mesh.empty and axis not in mesh.axis_names:
                raise PlacementError(
                    f"{_LAYOUT}: {name} names the mesh axis {axis!r}, but the mesh in scope has "
                    f"the axes {', '.join(mesh.axis_names)}."
                )
            if axis in owner:
                raise PlacementError(
                    f"{_LAYOUT}: {name} and {owner[axis]} both name the mesh axis {axis!r}. Give "
                    "each placement axes of its own."
                    if owner[axis] != name
                    else f"{_LAYOUT}: {name} names the mesh axis {axis!r} twice."
                )
            owner[axis] = name


def laid_out(declared: Scope) -> Scope:
    """Adds the axes of the layout in scope to the placements of a program."""
    layouts = dict(_layout.get())
    scope = tuple(
        dataclasses.replace(p, axes=layouts[p.name]) if p.name in layouts else p for p in declared
    )
    known = jax.sharding.get_abstract_mesh().axis_names
    _check({p.name: p.named_axes for p in scope if p.axes is not None or p.name in known})
    return scope


def split_axes(group: Placement, mesh: AbstractMesh | None = None) -> tuple[str, ...]:
    """The mesh axes over which the participants are spread.

    An axis that is already manual, in a `jax.shard_map`, is not split again.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    known = set(mesh.axis_names).difference(mesh.manual_axes)
    return tuple(axis for axis in group.named_axes if axis in known)


def num_shards(axes: Sequence[str], mesh: AbstractMesh) -> int:
    """The number of devices along the axes."""
    return math.prod(mesh.shape[axis] for axis in axes)


def other_axes(axes: Sequence[str], mesh: AbstractMesh) -> list[str]:
    """The axes of more than one device that the client function can use."""
    taken = {*axes, *mesh.manual_axes}
    return [a for a in mesh.axis_names if a not in taken and mesh.shape[a] > 1]
