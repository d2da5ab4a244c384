"""Collectives, read from compiled HLO: which mesh axes they run over, and how many bytes.

HLO writes replica groups as lists, ``{{0,2},{1,3}}``, as a reshaped and transposed iota,
``[2,2]<=[2,2]T(1,0)``, or as axes of a named mesh, ``mesh['clients'=4,'model'=2] {'clients'}``.
"""

import math
import re
from typing import NamedTuple

import numpy as np

_OPS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_LINE = re.compile(rf"= (?P<type>.+?) (?P<op>{_OPS})(?:-start)?\((?P<rest>.*)$", re.MULTILINE)
_TYPE = re.compile(r"(pred|[a-z]+)(\d*)\w*\[([\d,]*)\]")


class Collective(NamedTuple):
    op: str
    axes: frozenset[str]
    bytes: int


def collectives(compiled, mesh):
    """The collectives of a compiled function that move data between devices of the mesh."""
    found = []
    for match in _LINE.finditer(compiled.as_text()):
        groups = _groups(match["rest"], mesh.devices.size)
        axes = set().union(*(_differing_axes(group, mesh) for group in groups))
        if axes:
            found.append(Collective(match["op"], frozenset(axes), _bytes(match["type"])))
    return found


def loop_depths(compiled):
    """For each collective of a compiled function, in how many loops it is."""
    bodies, name = {}, None
    for line in compiled.as_text().splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = start[1]
            bodies[name] = []
            if line.startswith("ENTRY"):
                entry = name
        elif name:
            bodies[name].append(line)
    found = []

    def visit(name, depth):
        for line in bodies[name]:
            if _LINE.search(line):
                found.append(depth)
            loop = " while(" in line
            for called in re.findall(r"(?:body|to_apply|calls|\w+_computation)=%?([\w.\-]+)", line):
                visit(called, depth + loop)
            for branches in re.findall(r"branch_computations=\{(.*?)\}", line):
                for called in branches.split(","):
                    visit(called.strip().lstrip("%"), depth + loop)

    visit(entry, 0)
    return found


def over(found, axis):
    return [c for c in found if axis in c.axes]


def _groups(text, count):
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", text):
        return _lists(pairs[1])
    if lists := re.search(r"replica_groups=\{(\{[\d,{}]+\})\}", text):
        return _lists(lists[1])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims, order = (
            [int(k) for k in (part or "").split(",") if k] for part in iota.groups()
        )
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids.transpose(order) if order else ids).reshape(shape)
    if named := re.search(r"replica_groups=(?:@?\w*)?mesh\[(.+?)\].*?\{(.*?)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", named[1])}
        names = re.findall(r"'(\w+)'", named[2])
        ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        position = [list(sizes).index(name) for name in names]
        ids = np.moveaxis(ids, position, range(-len(position), 0))
        return ids.reshape(-1, math.prod(sizes[name] for name in names))
    if "replica_groups={}" in text:
        return [list(range(count))]
    raise AssertionError(f"unknown replica groups in {text}")


def _lists(text):
    return [[int(k) for k in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]


def _differing_axes(group, mesh):
    """The axes along which the devices of a group differ. XLA numbers them in mesh order."""
    where = np.array(np.unravel_index(list(group), mesh.devices.shape))
    return {name for name, along in zip(mesh.axis_names, where) if len(set(along)) > 1}


def _bytes(text):
    bits = {"pred": 8}
    return sum(
        math.prod(int(k) for k in shape.split(",") if k) * bits.get(kind, int(width or 8)) // 8
        for kind, width, shape in _TYPE.findall(text)
    )
