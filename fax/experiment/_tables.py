"""Tables of a configuration, as TOML has them: read, changed, and checked one at a time."""

from __future__ import annotations

import os
import tomllib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fax import _arguments
from fax._nearest import did_you_mean
from fax.experiment import _catalog

Table = dict[str, Any]

NONE = "none"  # TOML has no null
# Tables of something that has a name, and the key of this name.
NAMED = {**dict.fromkeys(("task", "model", "algorithm", "aggregator"), "name")}
NAMED |= dict.fromkeys(("client", "server"), "optimizer")


def read(source: str | os.PathLike[str]) -> Table:
    """The tables of a TOML file, or of the task with this name."""
    if str(source) in _catalog.catalog("tasks"):
        return {"task": {"name": str(source)}}
    path = Path(source)
    if path.suffix != ".toml":
        raise ValueError(
            f"{source!s} is neither a task nor a TOML file, nor module:name. "
            f"{did_you_mean(source, _catalog.catalog('tasks'))}"
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: this is not TOML: {error}") from error


def merged(tables: Mapping[str, Any], *changes: Mapping[str, Any]) -> Table:
    """Tables with changes, which are nested in the same way. A name counts as a table with it."""
    found = dict(tables)
    for change in changes:
        for key, value in change.items():
            old = found.get(key)
            old = _named(old) if key in NAMED and isinstance(old, str) else old
            if isinstance(value, Mapping) and isinstance(old, Mapping):
                first = NAMED.get(key)
                # Options belong to what was named before.
                keep = first is None or value.get(first, old.get(first)) == old.get(first)
                found[key] = merged(old, value) if keep else dict(value)
            else:
                found[key] = value
    return found


def _named(value: Any) -> Any:
    """A table that is given by its name alone."""
    return {"name": value} if isinstance(value, str) else value


def table_of(where: str, key: str, value: Any, kind: str) -> Table:
    """Checks a table with the name of one of the catalog, and its options."""
    value = _named(value)
    known = _catalog.catalog(kind)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        found = dict(value) if isinstance(value, Mapping) else _arguments.shown(value)
        raise ValueError(
            f"{where}: {key} is {found}, expected a name, or a table with a name and options. "
            f"{did_you_mean('', known)}"
        )
    name = value["name"]
    if name not in known:
        raise ValueError(f"{where}: {key} {name!r} does not exist. {did_you_mean(name, known)}")
    check_keys(where, f"{key}.", value, ["name", *_catalog.options(kind, name)], f" for {name}")
    missing = [option for option in _catalog.required(kind, name) if option not in value]
    if missing:
        raise ValueError(
            f"{where}: {key}.{missing[0]} is missing. {name} needs it, and has no default for it."
        )
    nested = {k: v for k, v in value.items() if k in ("transformation", "values")}
    parts = {k: table_of(where, f"{key}.{k}", v, "aggregators") for k, v in nested.items()}
    return {**value, **parts}


def optimizer_of(where: str, key: str, value: Any, default: Mapping[str, Any]) -> Table:
    """Checks the table of an optimizer. Without a name, it changes the default."""
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{where}: {key} is {_arguments.shown(value)}, expected a table, such as "
            f"{{optimizer = 'sgd', rate = 0.1}}."
        )
    if "optimizer" not in value:
        value = {**default, **value}
    name, known = value["optimizer"], _catalog.catalog("optimizers")
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"{where}: {key}.optimizer {name!r} does not exist. {did_you_mean(name, known)}"
        )
    options = ["optimizer", *_catalog.options("optimizers", name)]
    check_keys(where, f"{key}.", value, options, f" for {name}")
    if "rate" not in value:
        raise ValueError(f"{where}: {key}.rate is missing, the learning rate of {name}.")
    _arguments.number(where, f"{key}.rate", value["rate"], above=0)
    return dict(value)


def check_keys(
    where: str, prefix: str, table: Mapping[str, Any], known: Iterable[str], what: str = ""
) -> None:
    known = list(known)
    for key in table:
        if key not in known:
            near = did_you_mean(f"{prefix}{key}", [f"{prefix}{each}" for each in known])
            raise ValueError(f"{where}: there is no key {prefix}{key}{what}. {near}")


def fields_of(where: str, prefix: str, table: Mapping[str, Any], schema: type) -> Table:
    """Checks a table's values by the fields of a dataclass. Its ints are numbers of something."""
    types = typing.get_type_hints(schema)
    dots = f"{prefix}." if prefix else ""
    check_keys(where, dots, table, types)
    found = {key: typed(where, f"{dots}{key}", value, types[key]) for key, value in table.items()}
    for key, value in found.items():
        if key == "seed":
            _arguments.seed(where, value)
        elif type(value) is int and value < 1:
            raise ValueError(f"{where}: {dots}{key} is {value}, expected an int of at least 1.")
    return found


def typed(where: str, key: str, value: Any, expected: Any) -> Any:
    """Checks the type of a value: an int, a string, True or False, or an int or none."""
    optional = type(None) in typing.get_args(expected)
    if optional and value in (NONE, None):
        return None
    kind = typing.get_args(expected)[0] if optional else expected
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        words = {int: "an int", str: "a string", bool: "true or false"}[kind]
        or_none = f', or "{NONE}"' if optional else ""
        raise ValueError(f"{where}: {key} is {_arguments.shown(value)}, expected {words}{or_none}.")
    return value
