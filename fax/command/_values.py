"""Settings on the command line: ``client.rate=0.03``, and ``client.rate=.01,.03`` for a grid."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from typing import Any


def value(text: str) -> Any:
    """A number, true, false, or any other value of TOML; and otherwise a string."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def assignment(text: str) -> tuple[str, str]:
    """The key and the text of ``KEY=VALUE``."""
    key, equals, rest = text.partition("=")
    if not equals or not all(key.split(".")) or not rest:
        raise ValueError(f"{text!r} is not of the form KEY=VALUE, as in client.rate=0.03.")
    return key.strip(), rest.strip()


def tables(assignments: Iterable[str]) -> dict[str, Any]:
    """Nested tables of ``["client.rate=0.03", ...]``."""
    found: dict[str, Any] = {}
    for text in assignments:
        key, rest = assignment(text)
        found = put(found, key, value(rest))
    return found


def put(found: dict[str, Any], key: str, new: Any) -> dict[str, Any]:
    """Tables with one more value, whose key says in which table it is."""
    first, _, rest = key.partition(".")
    inner = found.get(first)
    if isinstance(inner, str):
        inner = {"name": inner}
    if rest and not isinstance(inner, dict | None):
        raise ValueError(f"{key}={new} needs a table, but {first} is {inner}.")
    if not rest and isinstance(inner, dict) and isinstance(new, str):
        new = {**inner, "name": new}
    return {**found, first: put(inner or {}, rest, new) if rest else new}


def grid(assignments: Iterable[str]) -> dict[str, list[Any]]:
    """The values of each key of ``["client.rate=.01,.03", ...]``."""
    found: dict[str, list[Any]] = {}
    for text in assignments:
        key, rest = assignment(text)
        values = [value(each) for each in rest.split(",") if each]
        if not values:
            raise ValueError(f"{text!r} has no values. Give some, as in client.rate=0.03,0.1.")
        if key in found:
            raise ValueError(f"{key} is twice in the grid. Give all of its values at once.")
        if len({*map(str, values)}) < len(values):
            raise ValueError(f"{text!r} has the same value twice.")
        found[key] = values
    return found
