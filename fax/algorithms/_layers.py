"""Layers: which parameters belong to the same layer, whether layers are stacked or not.

A model has one leaf per layer, such as ``blocks/3/kernel``, or one leaf for all layers with an
axis of layers, as models do that loop over their layers with `jax.lax.scan`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path

from fax import _arguments

PyTree = Any
Piece = str | tuple[str, int, tuple[int, ...]]
_WHERE = "fax.algorithms.layer_fragments"
_NUMBERED = re.compile(r"(.*?)(\d+)")
_STACKED_NAME = re.compile(r"layers|blocks|stack$|^scan", re.IGNORECASE)


class Layers(NamedTuple):
    """The layers that a leaf belongs to: one, or as many as it has indices along an axis.

    Attributes:
      stem: what the paths of these layers have in common.
      numbers: of the layers.
      axis: the axis of layers, or None.
      named: whether this is a layer by its name, rather than what is beside all layers.
    """

    stem: str
    numbers: range
    axis: int | None
    named: bool


def name_of(path: Any) -> str:
    """The path of a leaf, such as ``blocks/3/kernel``."""
    return keystr(path, simple=True, separator="/")


def shapes_of(where: str, params: PyTree) -> dict[str, tuple[int, ...]]:
    """The shapes of the leaves by their paths, which have to be different."""
    leaves = [(name_of(path), jnp.shape(x)) for path, x in tree_flatten_with_path(params)[0]]
    names = [name for name, _ in leaves]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"{where}: two leaves of the parameters have the path {twice!r}, so fragments "
            "cannot tell them apart. Use names without '/'."
        )
    return dict(leaves)


def inside(path: str, names: Iterable[str]) -> list[str]:
    """The leaves that are at a path or below it."""
    return [name for name in names if name == path or name.startswith(f"{path}/")]


def layer_fragments(
    params: PyTree,
    fragments: int,
    *,
    pattern: str = "strided",
    layers: Mapping[str, int] | None = None,
    others_first: bool = False,
) -> list[list[Piece]]:
    """Distributes the layers of a model over fragments, for `streaming_diloco`.

    Layers are numbered in the order of the tree. With the pattern ``"strided"``, layer l is in
    fragment l mod P; with ``"contiguous"``, the first layers are in the first fragment, the next
    ones in the second, and so on.

    A layer is all that has the same path up to its first number, such as ``blocks/3``. What has no
    number in its path is a layer, too: all leaves with the same path but for the last name.

    Or layers are stacked: a subtree has one axis of layers. Without ``layers=``, a subtree is a
    stack of layers if all of this is true:

    - It is the outermost on its path whose name contains ``layers`` or ``blocks``, ends in
      ``stack`` or begins with ``scan``. A number at the end of the name is ignored if there is no
      other subtree with the same name and another number.
    - It has at least two leaves, and no number in its path or as a child (as lists have).
    - All of its leaves have the same size, at least 2, along one axis, and along no other.

    It is an error if all have the same size along several axes, if one leaf has no other axis, or
    if the subtree's children are numbered as well, because this could also be a subtree without an
    axis of layers. In these cases pass ``layers=``.

    Args:
      params: the parameters, or `jax.ShapeDtypeStruct` in their place.
      fragments: their number, P.
      pattern: ``"strided"`` or ``"contiguous"``.
      layers: the path of each subtree with stacked layers, and the axis of layers, as in
        ``{"decoder/layers": 0}``. Single leaves with the same parent are parts of the same layers.
        With ``{}`` no layers are stacked. Default: as above.
      others_first: whether everything that is not a stacked layer, or has no number in its path, is
        fragment 0, as in MaxText. Layers are then in the other P - 1 fragments.

    Returns:
      For each fragment the paths of its leaves, or ``(path, axis, indices)`` for a part of a leaf.

    Raises:
      ValueError: if there are fewer layers than fragments, an argument is out of range, or it is
        ambiguous what the layers are.

    Example:

      >>> layers = {"b": jnp.ones((6, 5)), "w": jnp.ones((6, 4, 5))}
      >>> params = {"embed": jnp.ones((9, 4)), "layers": layers}
      >>> for fragment in fax.algorithms.layer_fragments(params, 3, others_first=True):
      ...     print(fragment)
      ['embed']
      [('layers/b', 0, (0, 2, 4)), ('layers/w', 0, (0, 2, 4))]
      [('layers/b', 0, (1, 3, 5)), ('layers/w', 0, (1, 3, 5))]
    """
    return distribute(_WHERE, params, fragments, pattern, layers, others_first)


def distribute(
    where: str,
    params: PyTree,
    fragments: int,
    pattern: str = "strided",
    layers: Mapping[str, int] | None = None,
    others_first: bool = False,
) -> list[list[Piece]]:
    """`layer_fragments`, for ``where``."""
    expected = "an int of at least 1"
    fragments = _arguments.count(where, "fragments", fragments, least=0, expected=expected)
    _arguments.flag(where, "others_first", others_first)
    _arguments.choice(where, "pattern", pattern, ("strided", "contiguous"))
    shapes = shapes_of(where, params)
    if not shapes:
        raise ValueError(f"{where}: params has no leaves, expected a pytree of arrays.")
    found = _layers(where, shapes, layers)
    stems = list(dict.fromkeys(own.stem for own in found.values()))
    keys = {
        (stems.index(own.stem), number)
        for own in found.values()
        if own.named or not others_first
        for number in own.numbers
    }
    order = {key: position for position, key in enumerate(sorted(keys))}
    first = int(others_first)
    if not 1 <= fragments - first <= len(order):
        beside = " and one for what is beside them" if others_first else ""
        least, most = 1 + first, len(order) + first
        wanted = f"{least} to {most}" if least < most else f"{least}"
        raise ValueError(
            f"{where}: fragments is {fragments}, expected {wanted}, the number of layers "
            f"that the parameters have{beside}."
        )
    count = fragments - first
    parts: list[list[Piece]] = [[] for _ in range(fragments)]
    for name, own in found.items():
        if others_first and not own.named:
            parts[0].append(name)
            continue
        positions = [order[stems.index(own.stem), number] for number in own.numbers]
        ps = [p % count if pattern == "strided" else p * count // len(order) for p in positions]
        for p in sorted(set(ps)):
            indices = tuple(i for i, other in enumerate(ps) if other == p)
            if own.axis is None or len(indices) == len(ps):
                parts[first + p].append(name)
            else:
                parts[first + p].append((name, own.axis, indices))
    if others_first and not parts[0]:
        raise ValueError(
            f"{where}: others_first is True, but all parameters are in layers. Leave it out."
        )
    return parts


def _layers(
    where: str, shapes: Mapping[str, tuple[int, ...]], layers: Mapping[str, int] | None
) -> dict[str, Layers]:
    stacks = _found_stacks(where, shapes) if layers is None else _stacks(where, shapes, layers)
    return {name: stacks.get(name) or _unstacked(name) for name in shapes}


def _unstacked(name: str) -> Layers:
    """The layer of a leaf that is not stacked, by its path."""
    parts = name.split("/")
    for depth, part in enumerate(parts):
        if found := _NUMBERED.fullmatch(part):
            number = int(found[2])
            return Layers(
                "/".join([*parts[:depth], found[1]]), range(number, number + 1), None, True
            )
    return Layers("/".join(parts[:-1] or parts), range(1), None, False)


def _stacks(
    where: str, shapes: Mapping[str, tuple[int, ...]], layers: Mapping[str, int]
) -> dict[str, Layers]:
    """The stacks that the user names."""
    if not isinstance(layers, Mapping):
        raise ValueError(
            f"{where}: layers is {layers!r:.80}, expected a mapping from the path of a subtree "
            "with stacked layers to the axis of layers, such as {'decoder/layers': 0}."
        )
    stacks: dict[str, Layers] = {}
    for path, axis in layers.items():
        axis = _arguments.count(where, f"layers[{path!r}]", axis, least=0)
        own = inside(path, shapes) if isinstance(path, str) else []
        if not own:
            raise ValueError(
                f"{where}: layers has the path {path!r:.80}, but the parameters have only "
                f"{', '.join(shapes)}."
            )
        stem = path.rpartition("/")[0] if path in shapes else path
        for name in own:
            size = shapes[name][axis] if axis < len(shapes[name]) else 0
            known = next((len(s.numbers) for s in stacks.values() if s.stem == stem), size)
            why = None
            if not size:
                why = ", which has no layers along this axis"
            elif size != known:
                why = f", expected {known} layers along this axis, as in other leaves"
            elif name in stacks:
                why = ", and is in layers twice"
            if why:
                raise ValueError(
                    f"{where}: layers has the path {path!r} with axis {axis}, but {name!r} has "
                    f"shape {shapes[name]}{why}."
                )
            stacks[name] = Layers(stem, range(size), axis, True)
    return stacks


def _found_stacks(where: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Layers]:
    """The stacks that are found by their names and shapes."""
    subtrees: dict[str, list[str]] = {}
    for name in shapes:
        if path := _candidate(name, shapes):
            subtrees.setdefault(path, []).append(name)
    stacks: dict[str, Layers] = {}
    for path, own in subtrees.items():
        children = {name.removeprefix(f"{path}/").split("/")[0] for name in own}
        numbered = [_NUMBERED.fullmatch(child) for child in children]
        if len(own) < 2 or any(child.isdecimal() for child in children):
            continue
        rank = min(len(shapes[name]) for name in own)
        sizes = {a: {shapes[name][a] for name in own} for a in range(rank)}
        shared = {a: size.pop() for a, size in sizes.items() if len(size) == 1}
        shared = {a: size for a, size in shared.items() if size > 1}
        if not shared:
            continue
        is_list = all(numbered) and len({found[1] for found in numbered if found}) == 1
        if len(shared) > 1 or rank == 1 or (is_list and len(children) > 1):
            choices = " or ".join(f"along axis {a} ({size})" for a, size in shared.items())
            raise ValueError(
                f"{where}: {path!r} may have stacked layers {choices}, or not be a stack. Pass "
                "fragments=fax.algorithms.layer_fragments(params, ..., "
                f"layers={{{path!r}: {min(shared)}}}) with the axis of layers, or layers={{}} if "
                "no layers are stacked."
            )
        [(axis, size)] = shared.items()
        stacks.update({name: Layers(path, range(size), axis, True) for name in own})
    return stacks


def _candidate(name: str, names: Iterable[str]) -> str | None:
    """The outermost subtree that a leaf is in whose name is that of stacked layers, if any."""
    *parts, _ = name.split("/")
    for depth, part in enumerate(parts):
        path = "/".join(parts[: depth + 1])
        numbered = _NUMBERED.fullmatch(part)
        if numbered:
            stem = "/".join([*parts[:depth], numbered[1]])
            others = re.compile(re.escape(stem) + r"\d+/")
            if any(others.match(other) and not inside(path, [other]) for other in names):
                return None  # one of several layers
        if _STACKED_NAME.search((numbered[1] if numbered else part).rstrip("_")):
            return path
        if numbered:
            return None
    return None
