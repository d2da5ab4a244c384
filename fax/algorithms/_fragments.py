"""Fragments: which parts of the parameters are sent together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec, reshard
from jax.tree_util import tree_flatten_with_path, tree_map_with_path

from fax import _functions
from fax.algorithms._layers import Piece, distribute, inside, name_of, shapes_of

PyTree = Any
Fragments = int | Callable[[str], int] | Sequence[Sequence[Piece]]


class Span(NamedTuple):
    """A part of a leaf: some indices along an axis, in ascending order."""

    axis: int
    indices: tuple[int, ...]


# The leaves of a fragment by their paths, each with the part that is in it, or None for all of it.
Fragment = dict[str, Span | None]


def pick(tree: PyTree, fragment: Fragment) -> dict[str, jax.Array]:
    """The parts of leaves that are in a fragment, by the paths of the leaves."""
    leaves = {name_of(path): leaf for path, leaf in tree_flatten_with_path(tree)[0]}
    return {name: _taken(leaves[name], span) for name, span in fragment.items()}


def paste(tree: PyTree, fragment: Fragment, new: dict[str, jax.Array]) -> PyTree:
    """The tree with the parts of leaves that are in a fragment replaced."""

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        name = name_of(path)
        return _replaced(leaf, fragment[name], new[name]) if name in fragment else leaf

    return tree_map_with_path(one, tree)


def _taken(x: jax.Array, span: Span | None) -> jax.Array:
    if span is None:
        return x
    axis, indices = span
    x = _whole(x, axis)
    steps = {b - a for a, b in itertools.pairwise(indices)}
    if len(steps) <= 1:
        step = steps.pop() if steps else 1
        return lax.slice_in_dim(x, indices[0], indices[-1] + 1, step, axis)
    parts = [lax.slice_in_dim(x, a, b, axis=axis) for a, b in _runs(indices)]
    return jnp.concatenate(parts, axis)


def _replaced(x: jax.Array, span: Span | None, new: jax.Array) -> jax.Array:
    if span is None:
        return new
    # Not one scatter: slices are updated in place, and a compiler can split them over devices.
    begin, spec = 0, jax.typeof(x).sharding.spec
    x = _whole(x, span.axis)
    for a, b in _runs(span.indices):
        part = lax.slice_in_dim(new, begin, begin + b - a, axis=span.axis)
        x = lax.dynamic_update_slice_in_dim(x, part, a, span.axis)
        begin += b - a
    return reshard(x, spec) if any(spec[span.axis : span.axis + 1]) else x


def _whole(x: jax.Array, axis: int) -> jax.Array:
    """An array with all of an axis on each device, because Explicit axes cannot shard parts of it.

    Along Auto axes, the compiler decides.
    """
    spec = jax.typeof(x).sharding.spec
    if not any(spec[axis : axis + 1]):
        return x
    return reshard(x, PartitionSpec(*spec[:axis], None, *spec[axis + 1 :]))


def _runs(indices: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending indices as intervals [begin, end)."""
    runs: list[tuple[int, int]] = []
    for i in indices:
        if runs and runs[-1][1] == i:
            runs[-1] = runs[-1][0], i + 1
        else:
            runs.append((i, i + 1))
    return runs


def _shown(indices: Iterable[int]) -> str:
    """Indices for a message, such as ``0-3, 7``."""
    return ", ".join(f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in _runs(sorted(indices)))


def check_fragments(where: str, fragments: Fragments) -> Fragments:
    """Checks what can be checked without the parameters. Iterators, which end, become lists."""
    if callable(fragments):
        _functions.function(where, "fragments", fragments, {1: "fragments(path)"})
    elif isinstance(fragments, Sequence) and not isinstance(fragments, str):
        return [
            [_listed(*_checked(where, p, piece)) for piece in _pieces(own)]
            for p, own in enumerate(fragments)
        ]
    elif not isinstance(fragments, int) or isinstance(fragments, bool):
        raise ValueError(
            f"{where}: fragments is {fragments!r:.80}, expected a number of fragments, a function "
            "from the path of a leaf to the number of its fragment, or for each fragment a list of "
            "paths, or of (path, axis, indices)."
        )
    return fragments


def cut(where: str, fragments: Fragments, params: PyTree) -> list[Fragment]:
    """The fragments of the parameters.

    Args:
      where: the algorithm, for messages.
      fragments: see `fax.algorithms.streaming_diloco`.
      params: the parameters. Every index of every leaf is in exactly one fragment.
    """
    fragments = check_fragments(where, fragments)
    shapes = shapes_of(where, params)
    if callable(fragments):
        pieces = _numbered(where, fragments, list(shapes))
    elif isinstance(fragments, int):
        pieces = distribute(where, params, fragments)
    else:
        pieces = list(map(list, fragments))
    owners: dict[str, dict[int, Span | None]] = {name: {} for name in shapes}
    for p, own in enumerate(pieces):
        for piece in own:
            path, axis, indices = _checked(where, p, piece)
            names = inside(path, shapes)
            if not names:
                raise ValueError(
                    f"{where}: fragment {p} has the path {path!r}, but the parameters have only "
                    f"{', '.join(shapes)}."
                )
            for name in names:
                span = _span(where, p, name, shapes[name], axis, indices)
                _add(where, p, name, owners[name], span)
    for name, spans in owners.items():
        _check_covered(where, name, shapes[name], list(spans.values()))
    parts = [
        {name: spans[p] for name, spans in owners.items() if p in spans} for p in range(len(pieces))
    ]
    for p, part in enumerate(parts):
        if not part:
            raise ValueError(
                f"{where}: fragment {p} of {len(parts)} has no leaf of the parameters. Number "
                "fragments from 0 without gaps."
            )
    return parts


def _numbered(where: str, fragments: Callable[[str], int], names: list[str]) -> list[list[Piece]]:
    numbers = {name: fragments(name) for name in names}
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(
                f"{where}: fragments({name!r}) returned {number!r:.80}, expected the number of "
                "a fragment, an int of at least 0. Each leaf must be in a fragment."
            )
    count = max(numbers.values(), default=-1) + 1
    return [[name for name in names if numbers[name] == p] for p in range(count)]


def _pieces(own: Any) -> list[Piece]:
    """The pieces of a fragment, which may be a single one."""
    one = isinstance(own, str) or (isinstance(own, tuple) and len(own) == 3 and _is_axis(own[1]))
    return [own] if one else list(own) if isinstance(own, Iterable) else [own]


def _is_axis(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _checked(where: str, p: int, piece: Any) -> tuple[str, int | None, set[int]]:
    """A piece as (path, axis, indices)."""
    if isinstance(piece, str):
        return piece, None, set()
    if isinstance(piece, tuple) and len(piece) == 3 and isinstance(piece[0], str):
        path, axis, indices = piece
        found = list(indices) if isinstance(indices, Iterable) else [-1]
        try:
            found = [-1 if isinstance(i, bool) else i.__index__() for i in found]
        except AttributeError:
            found = [-1]
        if _is_axis(axis) and axis >= 0 and found and min(found) >= 0:
            if len(set(found)) < len(found):
                raise ValueError(
                    f"{where}: fragment {p} has an index of {path!r} along axis {axis} twice: "
                    f"{found!r:.80}."
                )
            return path, axis, set(found)
    raise ValueError(
        f"{where}: fragment {p} has {piece!r:.80}, expected the path of a leaf or of a subtree, or "
        "(path, axis, indices) with an axis and indices of at least 0, such as "
        "('layers', 0, range(4))."
    )


def _listed(path: str, axis: int | None, indices: set[int]) -> Piece:
    return path if axis is None else (path, axis, tuple(sorted(indices)))


def _span(
    where: str, p: int, name: str, shape: tuple[int, ...], axis: int | None, indices: set[int]
) -> Span | None:
    if axis is None:
        return None
    if axis >= len(shape):
        raise ValueError(
            f"{where}: fragment {p} has a part of {name!r} along axis {axis}, but its shape is "
            f"{shape}."
        )
    if len(indices) == shape[axis] and max(indices) < shape[axis]:
        return None
    if max(indices) >= shape[axis]:
        outside = _shown(i for i in indices if i >= shape[axis])
        raise ValueError(
            f"{where}: fragment {p} has the indices {outside} of {name!r} along axis {axis}, "
            f"expected less than its size there, {shape[axis]}."
        )
    return Span(axis, tuple(sorted(indices)))


def _add(where: str, p: int, name: str, spans: dict[int, Span | None], span: Span | None) -> None:
    """Adds a part of a leaf to a fragment, if no fragment has any of it."""
    for other, known in spans.items():
        both = f"{where}: fragments {other} and {p} overlap: both have"
        if other == p and span == known:
            return
        if span is None or known is None:
            raise ValueError(f"{both} {name!r}.")
        if span.axis != known.axis:
            raise ValueError(
                f"{both} parts of {name!r}, along axis {known.axis} and along axis {span.axis}. "
                "Use the same axis of a leaf everywhere."
            )
        if common := {*span.indices} & {*known.indices}:
            raise ValueError(
                f"{both} the indices {_shown(common)} of {name!r} along axis {span.axis}."
            )
    known = spans.get(p)
    if span is not None and known is not None:
        span = Span(span.axis, tuple(sorted({*span.indices, *known.indices})))
    spans[p] = span


def _check_covered(where: str, name: str, shape: tuple[int, ...], spans: list[Span | None]) -> None:
    missing = repr(name)
    if spans:
        if spans[0] is None:
            return
        axis = spans[0].axis
        covered = {i for span in spans if span is not None for i in span.indices}
        left = set(range(shape[axis])) - covered
        if not left:
            return
        missing = f"the indices {_shown(left)} of {name!r} along axis {axis}"
    raise ValueError(
        f"{where}: no fragment has {missing}. Fragments have to cover the parameters, or "
        "else some of them would never be averaged."
    )
