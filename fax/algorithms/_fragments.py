"""Fragments: which leaves of the parameters are sent together."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.tree_util import keystr, tree_flatten_with_path, tree_map_with_path

from fax import _arguments

PyTree = Any
Fragments = int | Callable[[str], int] | Sequence[Sequence[str]]


def name_of(path: Any) -> str:
    """The path of a leaf, such as ``blocks/3/kernel``."""
    return keystr(path, simple=True, separator="/")


def pick(tree: PyTree, names: Sequence[str]) -> dict[str, jax.Array]:
    """Some leaves by their paths."""
    leaves = {name_of(path): leaf for path, leaf in tree_flatten_with_path(tree)[0]}
    return {name: leaves[name] for name in names}


def paste(tree: PyTree, leaves: dict[str, jax.Array]) -> PyTree:
    """The tree with some leaves replaced, by their paths."""
    return tree_map_with_path(lambda path, leaf: leaves.get(name_of(path), leaf), tree)


def cut(where: str, fragments: Fragments, params: PyTree) -> list[list[str]]:
    """The paths of the leaves of each fragment.

    Args:
      where: the algorithm, for messages.
      fragments: see `fax.algorithms.streaming_diloco`.
      params: the parameters. Each leaf goes into exactly one fragment.
    """
    names = [name_of(path) for path, _ in tree_flatten_with_path(params)[0]]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"{where}: two leaves of the parameters have the path {twice!r}, so fragments "
            "cannot tell them apart. Use names without '/'."
        )
    if callable(fragments):
        _arguments.function(where, "fragments", fragments, {1: "fragments(path)"})
        numbers = {name: fragments(name) for name in names}
        for name, number in numbers.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ValueError(
                    f"{where}: fragments({name!r}) returned {number!r:.80}, expected the number of "
                    "a fragment, an int of at least 0. Each leaf must be in a fragment."
                )
        count = max(numbers.values(), default=-1) + 1
    elif isinstance(fragments, int) and not isinstance(fragments, bool):
        layers, count = _layers(names), fragments
        if not 1 <= count <= len(set(layers.values())):
            raise ValueError(
                f"{where}: fragments is {fragments}, expected 1 to {len(set(layers.values()))}, "
                "the number of layers that the parameters have."
            )
        numbers = {name: layer % count for name, layer in layers.items()}
    elif isinstance(fragments, Sequence) and not isinstance(fragments, str):
        numbers, count = _listed(where, fragments, names), len(fragments)
    else:
        raise ValueError(
            f"{where}: fragments is {fragments!r:.80}, expected a number of fragments, a function "
            "from the path of a leaf to the number of its fragment, or a list of paths for each "
            "fragment."
        )
    parts = [[name for name in names if numbers[name] == p] for p in range(count)]
    for p, part in enumerate(parts):
        if not part:
            raise ValueError(
                f"{where}: fragment {p} of {count} has no leaf of the parameters. Number fragments "
                "from 0 without gaps."
            )
    return parts


def _listed(where: str, fragments: Sequence[Sequence[str]], names: list[str]) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for p, paths in enumerate(fragments):
        for path in [paths] if isinstance(paths, str) else paths:
            own = [name for name in names if name == path or name.startswith(f"{path}/")]
            if not own:
                raise ValueError(
                    f"{where}: fragment {p} has the path {path!r}, but the parameters have only "
                    f"{', '.join(names)}."
                )
            for name in own:
                if numbers.setdefault(name, p) != p:
                    raise ValueError(
                        f"{where}: fragments {numbers[name]} and {p} overlap: both have {name!r}."
                    )
    for name in names:
        if name not in numbers:
            raise ValueError(
                f"{where}: no fragment has {name!r}. Fragments have to cover the parameters, or "
                "else some of them would never be averaged."
            )
    return numbers


def _layers(names: list[str]) -> dict[str, int]:
    """The number of the layer that each leaf is in."""
    keys: dict[str, tuple[str, int]] = {}
    for name in names:
        parts = name.split("/")
        for depth, part in enumerate(parts):
            if found := re.fullmatch(r"(.*?)(\d+)", part):
                keys[name] = "/".join([*parts[:depth], found[1]]), int(found[2])
                break
        else:
            keys[name] = "/".join(parts[:-1] or parts), 0
    stems = list(dict.fromkeys(stem for stem, _ in keys.values()))
    order = sorted(set(keys.values()), key=lambda key: (stems.index(key[0]), key[1]))
    return {name: order.index(key) for name, key in keys.items()}
