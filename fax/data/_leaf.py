"""Federated data in LEAF's JSON files, of which only the clients that are asked for are read."""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fax import _arguments, _functions
from fax.data._check_examples import first_ids
from fax.data._columns import column_array
from fax.data._lazy import Lazy
from fax.data._protocol import ClientId, DataError, FederatedData

# A whole string, or a bracket outside of strings.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
_COLON = re.compile(rb"\s*:")


def from_leaf(
    path: str | os.PathLike[str],
    *,
    convert: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
) -> FederatedData:
    """Opens data in LEAF's format: JSON files with ``users``, ``num_samples`` and ``user_data``.

    Files are not loaded. They are searched once for where each client's examples begin and end, and
    these bytes are read whenever the client is asked for. Clients are in the order of the names of
    files, and of ``user_data`` in each. See Caldas et al., arXiv:1812.01097.

    Args:
      path: a folder of ``.json`` files, such as ``data/train`` of one of LEAF's datasets; or one
        file.
      convert: ``convert(examples)`` makes arrays of a client's examples, which it is passed as in
        the file: a dict with lists, ``"x"`` and ``"y"``. It is needed for examples that have
        different lengths. If the data are sent to other processes, it has to be picklable.

    Returns:
      The clients. Their ids are strings.

    Raises:
      DataError: if a file is damaged, is not in this format, or has a client that another one has;
        when a client is read, if its examples cannot be made arrays, or are not ``num_samples``.

    Example:

      >>> import json, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "all_data_0.json")
      >>> _ = path.write_text(json.dumps({
      ...     "users": ["ada", "bob"],
      ...     "num_samples": [2, 1],
      ...     "user_data": {
      ...         "ada": {"x": [[0.0, 1.0], [1.0, 0.0]], "y": [3, 5]},
      ...         "bob": {"x": [[0.5, 0.5]], "y": [3]},
      ...     },
      ... }))
      >>> data = fax.data.from_leaf(path.parent)
      >>> data.client_ids(), data.num_examples("ada"), data.client("bob")["y"]
      (('ada', 'bob'), 2, array([3]))
    """
    where = "fax.data.from_leaf"
    _arguments.path(where, "path", path, error=DataError)
    if convert is not None:
        _functions.function(where, "convert", convert, {1: "convert(examples)"}, error=DataError)
    given = Path(path).absolute()
    files = sorted(given.glob("*.json")) if given.is_dir() else [given]
    if not given.exists():
        raise FileNotFoundError(f"{where}: there is no file or folder {given}")
    if not files:
        raise DataError(f"{where}: {given} has no .json files.")
    return LEAF(files, convert)


class LEAF(Lazy):
    """What `from_leaf` returns."""

    def __init__(self, files: list[Path], convert: Callable[..., Any] | None) -> None:
        self._convert = convert
        # For each client: its file, where its examples begin and end, and how many there are.
        self._clients: dict[ClientId, tuple[Path, int, int, int]] = {}
        for file in files:
            found = _clients_of(file)
            if twice := [name for name in found if name in self._clients]:
                other = self._clients[twice[0]][0]
                raise DataError(
                    f"{file} has {len(twice)} clients that {other} has as well, {first_ids(twice)}."
                )
            self._clients |= {name: (file, *span) for name, span in found.items()}
        super().__init__(self._clients)

    def _length(self, client_id: ClientId) -> int:
        return self._clients[client_id][3]

    def _read(self, client_id: ClientId) -> Any:
        path, start, end, count = self._clients[client_id]
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(end - start)
        try:
            examples = json.loads(content)
        except ValueError as error:
            raise DataError(
                f"{path} cannot be read: {error}. The file is damaged, or has changed."
            ) from error
        if self._convert is not None:
            examples = self._convert(examples)
        if not isinstance(examples, Mapping):
            return examples
        how = "for example with convert= and fax.data.pad"
        arrays = {name: column_array(str(path), name, x, how) for name, x in examples.items()}
        for name, x in arrays.items():
            if len(x) != count:
                raise DataError(f"{path}: {name!r} has {len(x)} rows, num_samples says {count}.")
        return arrays


def _clients_of(path: Path) -> dict[str, tuple[int, int, int]]:
    """Where the examples of each client of a file begin and end, and how many there are."""
    spans: dict[str, tuple[int, int]] = {}
    lists: dict[str, Any] = {}
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            for keys, start, end in _values(text):
                if keys in (("users",), ("num_samples",)):
                    lists[keys[0]] = json.loads(text[start:end])
                elif len(keys) == 2 and keys[0] == "user_data":
                    if keys[1] in spans:
                        raise ValueError(f"user_data has client {keys[1]!r} twice")
                    spans[keys[1]] = start, end
    except (
        ValueError,
        OSError,
    ) as error:  # an empty file, JSON that ends early, bytes that are no text
        raise DataError(
            f"{path} cannot be read: {error}. It is damaged, or not one of LEAF's files."
        ) from error
    if missing := [
        name for name in ("users", "num_samples") if not isinstance(lists.get(name), list)
    ]:
        raise DataError(f"{path} has no list {missing[0]}, so it is not one of LEAF's files.")
    if strange := [name for name in lists["users"] if not isinstance(name, str)]:
        raise DataError(f"{path}: users has {first_ids(strange)}, expected strings.")
    sizes = dict(zip(lists["users"], lists["num_samples"]))
    if len(lists["users"]) != len(lists["num_samples"]) or sizes.keys() != spans.keys():
        different = sorted(map(str, sizes.keys() ^ spans.keys()))
        raise DataError(
            f"{path} has {len(lists['users'])} users, {len(lists['num_samples'])} num_samples and "
            f"{len(spans)} clients in user_data, expected the same clients in all of them"
            + (f". They differ in {first_ids(different)}." if different else ".")
        )
    for name, size in sizes.items():
        _arguments.count(str(path), f"num_samples of client {name!r}", size, error=DataError)
    return {name: (*span, sizes[name]) for name, span in spans.items()}


def _values(text: mmap.mmap) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """The lists and objects of a JSON text, by the keys that lead to them, two at most.

    Only brackets and strings are looked at. What is between them is parsed when a client is read.
    """
    keys: list[str] = []  # one for each object around, as far as two
    starts: list[int] = []  # of the lists and objects around
    for token in _TOKEN.finditer(text):
        first = text[token.start() : token.start() + 1]
        depth = len(starts)
        if first in b"[{":
            starts.append(token.start())
        elif first in b"]}":
            if not starts:
                raise ValueError(f"there is a bracket too many at byte {token.start()}")
            start = starts.pop()
            if 1 <= len(starts) == len(keys) <= 2:
                yield tuple(keys), start, token.end()
        elif (
            depth <= 2
            and (depth == 1 or keys[:1] == ["user_data"])
            and _COLON.match(text, token.end())
        ):
            keys[depth - 1 :] = [json.loads(token.group())]
        if first == b"}" and len(starts) <= len(keys):
            del keys[len(starts) :]
    if starts:
        raise ValueError("it ends before its last bracket")
