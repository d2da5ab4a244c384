"""Which devices take part in a collective together, and along which mesh axes they differ.

XLA writes groups as lists, ``{{0,2},{1,3}}``, as a reshaped and transposed iota,
``[2,2]<=[2,2]T(1,0)``, or as axes of a mesh, ``mesh['clients'=4,'model'=2] {'clients'}``. Such a
mesh may have devices in another order, ``mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}``. XLA
numbers devices in the order of JAX's mesh. A program for several TPU slices is that of one slice,
and numbers its devices alone. Only transfers between slices name devices of all slices, by ids.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

Groups = Sequence[Sequence[int]]

# Whole axes alone: a part of an axis is written with a colon.
_NAMED = r"replica_groups=@?\w*mesh\[([^\]]+)\](?:, device_ids=\((.*?)\))? \{((?:'\w+',?)*)\}"
_SLICE = 100_000  # the id of device 3 of the second slice is 200,003


def groups_of(text: str, count: int) -> Groups:
    """The groups in a collective's attributes, on ``count`` devices: numbers of devices."""
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}\s]*\})\}", text):
        return _lists(pairs[1])
    if lists := re.search(r"replica_groups=\{(\{[\d,{}\s]+\})\}", text):
        return _lists(lists[1])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims, order = (_ints(part or "") for part in iota.groups())
        return _iota(dims, order).reshape(shape).tolist()
    if named := re.search(_NAMED, text):
        sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", named[1])}
        names = re.findall(r"'(\w+)'", named[3])
        ids = _ids_of_mesh(named[2], math.prod(sizes.values())).reshape(list(sizes.values()))
        position = [list(sizes).index(name) for name in names]
        ids = np.moveaxis(ids, position, range(-len(position), 0))
        return ids.reshape(-1, math.prod(sizes[name] for name in names)).tolist()
    if "replica_groups={}" in text or "replica_groups" not in text:
        return [list(range(count))]
    raise ValueError(f"fax.inspect cannot read the replica groups in {text:.200}")


def groups_between_slices(text: str) -> Groups:
    """The groups of a transfer between slices: ids of devices."""
    found = re.search(r'_xla_megascale_target=(?:"([^"]*)"|\{(\{[^=]*\})\})', text)
    if found and found[2]:
        return _lists(found[2].replace("->", ","))
    product = re.fullmatch(r"\{([\d,:]+)\}x\{([\d,:]+)\}", found[1]) if found else None
    if product is None:
        raise ValueError(f"fax.inspect cannot read which slices communicate in {text:.200}")
    slices, devices = (_ranges(part) for part in product.groups())
    return [[_SLICE * number + device for number in slices] for device in devices]


def _ids_of_mesh(order: str | None, count: int) -> np.ndarray:
    """The devices of a mesh, from what its ``device_ids`` say, if there are any."""
    if order is None:
        return np.arange(count)
    if iota := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order):
        return _iota(*(_ints(part or "") for part in iota.groups()))
    return np.array(_ints(order))


def _iota(shape: list[int], order: list[int]) -> np.ndarray:
    """The numbers 0, 1, 2, ... in this shape, transposed."""
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(order) if order else ids


def _lists(text: str) -> Groups:
    return [_ints(group) for group in re.findall(r"\{([\d,\s]+)\}", text)]


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number.strip()]


def _ranges(text: str) -> list[int]:
    """Numbers and ranges, such as ``0:3,8``. A range includes its end."""
    ends = [[int(end) for end in part.split(":")] for part in text.split(",")]
    return [number for end in ends for number in range(end[0], end[-1] + 1)]


class Devices:
    """The devices of a mesh, by the numbers that a compiled program gives them.

    Attributes:
      axis_names: the names of the mesh axes.
      count: the number of devices that the program numbers: of the mesh, or of one slice.
    """

    def __init__(self, mesh: Mesh, num_partitions: int):
        flat = list(mesh.devices.flat)
        self.axis_names = mesh.axis_names
        self._shape = mesh.devices.shape
        self._slices = [getattr(device, "slice_index", 0) for device in flat]
        self._by_id = {device.id: position for position, device in enumerate(flat)}
        # XLA counts slices from 1, and devices within each, in case their ids do not.
        for number, own in enumerate(sorted(set(self._slices)), 1):
            members = [p for p, other in enumerate(self._slices) if other == own]
            members.sort(key=lambda position: flat[position].id)
            for rank, position in enumerate(members):
                self._by_id.setdefault(_SLICE * number + rank, position)
        self.count = num_partitions
        # By slice, the positions in the mesh of the devices that the program numbers.
        self._positions = [list(range(len(flat)))]
        if num_partitions != len(flat):
            found = sorted(set(self._slices))
            self._positions = [
                [p for p, own in enumerate(self._slices) if own == number] for number in found
            ]
        if any(len(positions) != num_partitions for positions in self._positions):
            raise ValueError(
                f"fax.inspect cannot read a program that divides its work into {num_partitions} "
                f"parts, on a mesh of {len(flat)} devices."
            )

    def positions(self, found: Groups) -> list[list[int]]:
        """Groups of positions in the mesh, from groups of a program's numbers."""
        return [[own[number] for number in group] for own in self._positions for group in found]

    def positions_of_ids(self, found: Groups) -> list[list[int]]:
        """Groups of positions in the mesh, from groups of ids."""
        return [[self._by_id[number] for number in group] for group in found]

    def axes(self, found: Groups) -> tuple[str, ...]:
        """The axes along which the devices of a group differ, of groups of positions."""
        differ = np.zeros(len(self._shape), bool)
        for group in found:
            where = np.array(np.unravel_index(list(group), self._shape))
            differ |= (where != where[:, :1]).any(axis=1)
        return tuple(name for name, along in zip(self.axis_names, differ, strict=True) if along)

    def cross_slices(self, found: Groups) -> bool:
        """Whether devices of a group are in different slices."""
        return any(len({self._slices[position] for position in group}) > 1 for group in found)
