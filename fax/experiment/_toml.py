"""Writes tables as TOML, which Python's standard library only reads."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any


def dumps(table: Mapping[str, Any]) -> str:
    """The TOML text of a table of strings, numbers, bools, lists and tables.

    Raises:
      ValueError: if a value is something else; the message names its key.
    """
    return "\n".join(_lines(table, ())).strip() + "\n"


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    """The lines of a table: first its own values, then the tables in it."""
    tables = {k: v for k, v in table.items() if isinstance(v, Mapping)}
    own = [f"{_key(k)} = {_value(v, (*path, k))}" for k, v in table.items() if k not in tables]
    lines = [f"[{'.'.join(map(_key, path))}]", *own, ""] if path and (own or not tables) else own
    if not path and own:
        lines = [*own, ""]
    for key, value in tables.items():
        lines += _lines(value, (*path, key))
    return lines


def _key(key: Any) -> str:
    return key if isinstance(key, str) and re.fullmatch(r"[\w-]+", key, re.A) else _text(str(key))


def _text(value: str) -> str:
    # Names of files that are not UTF-8 have lone surrogates, which TOML cannot have.
    value = value.encode("utf-8", "backslashreplace").decode()
    # JSON's strings are TOML's, except that TOML also wants this one character escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any, path: tuple[str, ...]) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(float(value)) if math.isfinite(value) else str(value)  # NumPy's are floats, too
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(x, path) for x in value)}]"
    if isinstance(value, Mapping):
        pairs = (f"{_key(k)} = {_value(v, (*path, k))}" for k, v in value.items())
        return f"{{{', '.join(pairs)}}}"
    fix = " Call its tolist()." if hasattr(value, "tolist") else ""  # arrays, and NumPy's numbers
    raise ValueError(
        f"fax.experiment.run: config[{'.'.join(map(str, path))!r}] is {value!r:.80}, expected a "
        f"string, a number, True, False, a list or a dict of these, for config.toml.{fix}"
    )
