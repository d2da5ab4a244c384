"""The tables in SQLite files of FedJAX and of TensorFlow Federated."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fax.data import _msgpack, _tfexample
from fax.data._check_examples import Schema, first_ids, read_client, utf8_of
from fax.data._decompress import decompress_zlib, size_limit
from fax.data._protocol import DataError, FederatedData
from fax.data._sqlite_connection import DAMAGED, ReadOnlyConnection

_LONGEST = 1_000_000_000  # bytes of a value, SQLite's default limit


class FedJAXTable:
    """A table with a row for each client: its id, its examples and their number."""

    def __init__(self, connection: ReadOnlyConnection, max_bytes: int | None) -> None:
        connection.check_stored("federated_data")
        self._max_bytes = max_bytes

    def index(self, connection: ReadOnlyConnection) -> dict[str, tuple[int, int]]:
        # Without ORDER BY, an index of ids and sizes is enough, and the examples are not read.
        query = "SELECT rowid, client_id, num_examples FROM federated_data"
        found: dict[str, tuple[int, int]] = {}
        for row, client_id, count in connection.execute(query):
            name = _text(client_id)
            _check_entry(name, count, name in found)
            found[name] = row, count
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def read(self, connection: ReadOnlyConnection, client_id: str, key: int, count: int) -> bytes:
        query = "SELECT client_id, data FROM federated_data WHERE rowid = ?"
        rows = connection.execute(query, [key]).fetchall()
        if len(rows) != 1 or _text(rows[0][0]) != client_id:
            raise sqlite3.DatabaseError("its row has been moved or removed")
        return rows[0][1]

    def parse(self, client_id: str, data: Any) -> dict[str, np.ndarray]:
        where = f"client {client_id!r}"
        try:
            if not isinstance(data, bytes):
                raise ValueError(f"its examples are of type {type(data).__name__}, not bytes")
            most = size_limit(self._max_bytes, len(data))
            return _msgpack.unpack(decompress_zlib(where, data, self._max_bytes), most)
        except DataError:
            raise
        except (zlib.error, ValueError, MemoryError) as error:
            raise DataError(f"{where} cannot be read: {error}. {DAMAGED}") from error


class TFFTables:
    """A table with a row for each example, and one with each client's number of examples."""

    def __init__(
        self, path: Path, connection: ReadOnlyConnection, split: str | None, features: Any
    ) -> None:
        connection.check_stored("examples", "client_metadata")
        where = f"fax.data.SQLite: {path} has TensorFlow Federated's format"
        splits = sorted({str(split) for split, _ in _metadata(connection)})
        if split not in splits:
            raise DataError(
                f"{where} and the splits [{first_ids(splits, 20)}], but split is {split!r:.80}. "
                "Choose one of them."
            )
        if features is None:
            query = "SELECT serialized_example_proto FROM examples WHERE split_name = ? LIMIT 1"
            for (message,) in connection.execute(query, [split]):
                raise DataError(
                    f"{where}, which does not specify the features. Pass features: the first "
                    f"example has {_tfexample.describe(message)}. You can change the shapes."
                )
        self._split, self._features = split, _tfexample.feature_types(features)

    def index(self, connection: ReadOnlyConnection) -> dict[str, tuple[None, int]]:
        found = {
            client_id: (None, count)
            for (split, client_id), count in _metadata(connection).items()
            if split == self._split
        }
        return dict(sorted(found.items()))

    def read(
        self, connection: ReadOnlyConnection, client_id: str, key: None, count: int
    ) -> list[bytes]:
        query = (
            "SELECT serialized_example_proto FROM examples WHERE split_name = ? AND client_id = ? "
            "ORDER BY rowid"
        )
        messages: list[bytes] = []
        size = 0
        for (message,) in connection.execute(query, [self._split, client_id]):
            if not isinstance(message, bytes):
                kind = type(message).__name__
                raise sqlite3.DatabaseError(f"example {len(messages)} is of type {kind}, not bytes")
            messages.append(message)
            size += len(message) + 1
            # A damaged file may return the same rows forever.
            if len(messages) > count or size > connection.size:
                break
        if len(messages) != count:
            found = len(messages) if len(messages) < count else "more"
            raise sqlite3.DatabaseError(f"it should have {count} examples, but has {found}")
        return messages

    def parse(self, client_id: str, messages: Any) -> dict[str, np.ndarray]:
        if not messages:
            raise DataError(f"client {client_id!r} has no examples. Leave the client out.")
        return _tfexample.stack(client_id, messages, self._features)


def _metadata(connection: ReadOnlyConnection) -> dict[tuple[str, str], int]:
    """The number of examples by split and client."""
    counts: dict[tuple[str, str], int] = {}
    query = "SELECT split_name, client_id, num_examples FROM client_metadata"
    for split, client_id, count in connection.execute(query):
        if not isinstance(split, str) or not isinstance(client_id, str):
            raise sqlite3.DatabaseError(f"client {client_id!r} of split {split!r} is not text")
        _check_entry(client_id, count, (split, client_id) in counts)
        counts[split, client_id] = count
    return counts


def _check_entry(client_id: str, count: Any, again: bool) -> None:
    if again:  # and stop reading, for a damaged file may return the same rows forever
        raise sqlite3.DatabaseError(f"client {client_id!r} occurs twice")
    if not isinstance(count, int) or count < 0:
        raise sqlite3.DatabaseError(f"client {client_id!r} has {count!r} examples")


def _text(client_id: Any) -> str:
    if isinstance(client_id, bytes):
        return client_id.decode("utf-8", "surrogateescape")
    if not isinstance(client_id, str):
        raise sqlite3.DatabaseError(f"client id {client_id!r} is neither bytes nor text")
    return client_id


def fedjax_rows(data: FederatedData) -> Iterator[tuple[bytes, bytes, int]]:
    """The rows of a table in FedJAX's format."""
    schema, seen = Schema(), set[bytes]()
    for client_id in data.client_ids():
        if not isinstance(client_id, (str, bytes)):
            raise DataError(
                f"client {client_id!r:.80} has an id of type {type(client_id).__name__}, but ids "
                "in files are strings or bytes."
            )
        examples = read_client(data, client_id)
        schema.check(client_id, examples)
        try:
            packed = zlib.compress(_msgpack.pack(examples))
            if len(packed) > _LONGEST:
                raise ValueError(
                    f"its compressed examples have {len(packed)} bytes, but SQLite holds at most "
                    f"{_LONGEST}. Divide it into several clients"
                )
            raw = client_id if isinstance(client_id, bytes) else utf8_of(client_id)
        except ValueError as error:
            raise DataError(f"client {client_id!r:.80} cannot be written: {error}.") from error
        if raw in seen:
            raise DataError(
                f"client {client_id!r:.80} cannot be written: as bytes, its id is the same as that "
                "of another client, one a str and one bytes. Rename one of them."
            )
        seen.add(raw)
        yield raw, packed, len(next(iter(examples.values())))
