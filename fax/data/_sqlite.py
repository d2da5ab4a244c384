"""Federated data in SQLite files, as FedJAX and TensorFlow Federated publish them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sqlite3
import threading
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fax.data import _msgpack, _tfexample
from fax.data._check import Schema, checked, unknown
from fax.data._protocol import ClientId, DataError, FederatedData
from fax.data._write import whole

_MAGIC = b"SQLite format 3\0"
_MEND = "The file is damaged or incomplete: get it once more."


class SQLite:
    """Federated data in an SQLite file, of FedJAX's or TensorFlow Federated's format.

    FedJAX's has a table ``federated_data`` with a row for each client, and says itself what the
    features are. TensorFlow Federated's has a row for each example, a ``tf.train.Example``, in
    several splits: ``split`` chooses one, and ``features`` which features to read and what they
    are. Neither package is needed. A file that is compressed, ``.lzma`` or ``.xz``, is
    decompressed once, to the path without that suffix.

    Client ids are strings; bytes, as FedJAX has them, are decoded as UTF-8 (with
    ``surrogateescape``, so that none is lost). The order of clients is that of the rows in
    FedJAX's, and that of sorted ids in TensorFlow Federated's. The ids and the numbers of examples
    are read when they are first needed, a client's examples whenever the client is asked for. Each
    thread reads by a connection of its own. The source can be pickled; what arrives opens the
    file anew.

    Args:
      path: of the file.
      split: the name of the split, for example ``"train"``.
      features: maps the names of features to pairs of a dtype and the shape in one example. The
        dtype ``bytes`` stands for byte strings; they become an array of dtype object.
      sha256: the file's checksum in hexadecimal, compared once when it is opened.

    Raises:
      FileNotFoundError: if there is no such file.
      DataError: if the file is damaged, or does not have the checksum or the split; when a client
        is read, if its row is damaged.

    Example:

      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "names.sqlite")
      >>> people = fax.data.InMemory({"ada": {"age": jnp.array([36])}})
      >>> data = fax.data.SQLite.write(path, people)
      >>> fax.data.SQLite(path).client("ada")
      {'age': array([36], dtype=int32)}

      A file of TensorFlow Federated's is opened as::

          SQLite(
              "emnist_all.sqlite.lzma",
              split="digits_only_train",
              features={"pixels": (np.float32, (28, 28)), "label": (np.int32, ())},
          )
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str | None = None,
        features: Mapping[str, tuple[Any, tuple[int, ...]]] | None = None,
        *,
        sha256: str | None = None,
    ) -> None:
        self._path = _decompressed(Path(path).absolute(), sha256)
        _check_header(self._path)
        self._schema = Schema()
        self._reset()
        with self._reading("the names of its tables") as connection:
            names = "SELECT name FROM sqlite_master WHERE type = 'table'"
            tables = {name for (name,) in connection.execute(names)}
        self._format: _FedJAX | _TFF
        if "federated_data" in tables:
            if split is not None or features is not None:
                raise DataError(
                    f"fax.data.SQLite: {self._path} has FedJAX's format, which has neither splits "
                    "nor a choice of features. Leave out split and features."
                )
            self._format = _FedJAX()
        elif {"examples", "client_metadata"} <= tables:
            with self._reading("its splits") as connection:
                self._format = _TFF(self._path, connection, split, features)
        else:
            raise DataError(
                f"fax.data.SQLite: {self._path} has the tables {sorted(tables)}, expected "
                "federated_data (FedJAX) or examples and client_metadata (TensorFlow Federated)."
            )

    def _reset(self) -> None:
        self._connections = threading.local()
        self._lock = threading.Lock()
        self._clients: tuple[tuple[str, ...], Mapping[str, tuple[Any, int]]] | None = None

    @staticmethod
    def write(path: str | os.PathLike, data: FederatedData) -> SQLite:
        """Writes federated data to an SQLite file of FedJAX's format.

        The file gets its name when it is whole and on the disk. Features can be numbers, bools,
        and arrays of dtype object that hold byte strings. Client ids are strings or bytes.

        Args:
          path: of the file. It must not exist.
          data: what to write.

        Returns:
          The file, opened.

        Raises:
          DataError: if the file exists, or a client cannot be written.
          OSError: if the disk is full. Nothing is left behind then.
        """
        path = Path(path).absolute()
        with whole("fax.data.SQLite.write", path) as temporary:
            connection = sqlite3.connect(temporary)
            try:
                # No journal: if something goes wrong, the file is thrown away.
                connection.execute("PRAGMA journal_mode = OFF")
                connection.execute(
                    "CREATE TABLE federated_data (client_id BLOB NOT NULL PRIMARY KEY, "
                    "data BLOB NOT NULL, num_examples INTEGER NOT NULL)"
                )
                # The numbers of examples can be read without going through the examples.
                connection.execute(
                    "CREATE INDEX client_sizes ON federated_data (client_id, num_examples)"
                )
                rows = _rows(data)
                connection.executemany("INSERT INTO federated_data VALUES (?, ?, ?)", rows)
                connection.commit()
            finally:
                connection.close()
        return SQLite(path)

    def client_ids(self) -> tuple[str, ...]:
        return self._index()[0]

    def num_examples(self, client_id: ClientId) -> int:
        return self._row(client_id)[1]

    def client(self, client_id: ClientId) -> dict[str, np.ndarray]:
        key, count = self._row(client_id)
        assert isinstance(client_id, str)
        with self._reading(f"client {client_id!r}") as connection:
            found = self._format.read(connection, client_id, key, count)
        try:
            examples = checked(client_id, self._format.parse(client_id, found))
            length = len(next(iter(examples.values())))
            if length != count:
                raise DataError(
                    f"client {client_id!r} has {length} examples, but should have {count}. {_MEND}"
                )
            self._schema.check(client_id, examples)
        except DataError as error:
            raise DataError(f"{self._path}: {error}") from error.__cause__
        return examples

    def __len__(self) -> int:
        return len(self.client_ids())

    def _row(self, client_id: ClientId) -> tuple[Any, int]:
        try:
            return self._index()[1][client_id]  # type: ignore[index]
        except (KeyError, TypeError):
            raise unknown(client_id, self) from None

    def _index(self) -> tuple[tuple[str, ...], Mapping[str, tuple[Any, int]]]:
        """The ids in order; and where each client is, and its number of examples."""
        if self._clients is None:
            with self._lock:
                if self._clients is None:
                    with self._reading("the clients' ids") as connection:
                        index = self._format.index(connection)
                    if not index:
                        raise DataError(f"{self._path} has no clients.")
                    self._clients = tuple(index), index
        return self._clients

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[sqlite3.Connection]:
        """This thread's connection. What SQLite complains about is put into words."""
        try:
            mine = self._connections
            # A connection must not be taken along to another process by a fork.
            if getattr(mine, "process", None) != os.getpid():
                mine.connection, mine.process = _Connection(self._path), os.getpid()
            yield mine.connection.connection
        except (sqlite3.Error, MemoryError, OverflowError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self._path}: cannot read {what}: {error}. {_MEND}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_format": self._format, "_schema": self._schema}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


class _Connection:
    """A connection for reading, closed when its thread ends or the source is gone."""

    def __init__(self, path: Path) -> None:
        uri = f"{path.as_uri()}?mode=ro"
        self.connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
        self.connection.execute("PRAGMA cell_size_check = ON")  # find damage early
        self.connection.execute("PRAGMA trusted_schema = OFF")

    def __del__(self) -> None:
        if hasattr(self, "connection"):
            self.connection.close()


class _FedJAX:
    """A table with a row for each client: its id, its examples, and how many they are."""

    def index(self, connection: sqlite3.Connection) -> dict[str, tuple[int, int]]:
        # Without ORDER BY, so that an index over the sizes spares going through the examples.
        query = "SELECT rowid, client_id, num_examples FROM federated_data"
        found: dict[str, tuple[int, int]] = {}
        for row, client_id, count in connection.execute(query):
            name = _text(client_id)
            _check_entry(name, count, name in found)
            found[name] = row, count
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def read(self, connection: sqlite3.Connection, client_id: str, key: int, count: int) -> bytes:
        query = "SELECT client_id, data FROM federated_data WHERE rowid = ?"
        rows = connection.execute(query, [key]).fetchall()
        if len(rows) != 1 or _text(rows[0][0]) != client_id:
            raise sqlite3.DatabaseError("its row is not where it was")
        return rows[0][1]

    def parse(self, client_id: str, data: Any) -> dict[str, np.ndarray]:
        try:
            return _msgpack.unpack(zlib.decompress(data))
        except (zlib.error, ValueError, TypeError, MemoryError) as error:
            raise DataError(f"client {client_id!r} cannot be read: {error}. {_MEND}") from error


class _TFF:
    """A table with a row for each example, and one with the number of examples of each client."""

    def __init__(
        self, path: Path, connection: sqlite3.Connection, split: str | None, features: Any
    ) -> None:
        where = f"fax.data.SQLite: {path} has TensorFlow Federated's format"
        splits = sorted({str(split) for split, _ in _metadata(connection)})
        if split not in splits:
            raise DataError(f"{where} and the splits {splits}, but split is {split!r}. Choose one.")
        if features is None:
            query = "SELECT serialized_example_proto FROM examples WHERE split_name = ? LIMIT 1"
            for (message,) in connection.execute(query, [split]):
                raise DataError(
                    f"{where}, which does not say what to read. Pass features: the first example "
                    f"has {_tfexample.describe(message)}, to which you can give other shapes."
                )
        self._split, self._features = split, _tfexample.feature_types(features)

    def index(self, connection: sqlite3.Connection) -> dict[str, tuple[None, int]]:
        found = {
            client_id: (None, count)
            for (split, client_id), count in _metadata(connection).items()
            if split == self._split
        }
        return dict(sorted(found.items()))

    def read(
        self, connection: sqlite3.Connection, client_id: str, key: None, count: int
    ) -> list[bytes]:
        query = (
            "SELECT serialized_example_proto FROM examples WHERE split_name = ? AND client_id = ? "
            "ORDER BY rowid"
        )
        cursor = connection.execute(query, [self._split, client_id])
        rows = cursor.fetchmany(count + 1)  # a damaged file may give rows for ever
        cursor.close()
        if len(rows) != count:
            found = len(rows) if len(rows) < count else "more"
            raise sqlite3.DatabaseError(f"it should have {count} examples, but has {found}")
        return [message for (message,) in rows]

    def parse(self, client_id: str, messages: Any) -> dict[str, np.ndarray]:
        if not messages:
            raise DataError(f"client {client_id!r} has no examples. Leave the client out.")
        return _tfexample.stack(client_id, messages, self._features)


def _metadata(connection: sqlite3.Connection) -> dict[tuple[str, str], int]:
    """The number of examples by split and client."""
    counts: dict[tuple[str, str], int] = {}
    query = "SELECT split_name, client_id, num_examples FROM client_metadata"
    for split, client_id, count in connection.execute(query):
        if not isinstance(split, str) or not isinstance(client_id, str):
            raise sqlite3.DatabaseError(f"client {client_id!r} of split {split!r} is no text")
        _check_entry(client_id, count, (split, client_id) in counts)
        counts[split, client_id] = count
    return counts


def _check_entry(client_id: str, count: Any, again: bool) -> None:
    if again:  # and stop: a damaged file may give the same rows for ever
        raise sqlite3.DatabaseError(f"client {client_id!r} comes twice")
    if not isinstance(count, int) or count < 0:
        raise sqlite3.DatabaseError(f"client {client_id!r} has {count!r} examples")


def _text(client_id: Any) -> str:
    if isinstance(client_id, bytes):
        return client_id.decode("utf-8", "surrogateescape")
    if not isinstance(client_id, str):
        raise sqlite3.DatabaseError(f"client id {client_id!r} is neither bytes nor text")
    return client_id


def _rows(data: FederatedData) -> Iterator[tuple[bytes, bytes, int]]:
    """The rows of a table of FedJAX's format."""
    schema = Schema()
    for client_id in data.client_ids():
        if not isinstance(client_id, (str, bytes)):
            raise DataError(
                f"client {client_id!r} is named by a {type(client_id).__name__}, but ids in files "
                "are strings or bytes."
            )
        examples = checked(client_id, data.client(client_id))
        schema.check(client_id, examples)
        try:
            packed = zlib.compress(_msgpack.pack(examples))
        except ValueError as error:
            raise DataError(f"client {client_id!r} cannot be written: {error}.") from error
        if isinstance(client_id, str):
            client_id = client_id.encode("utf-8", "surrogateescape")
        yield client_id, packed, len(next(iter(examples.values())))


def _check_header(path: Path) -> None:
    """Checks that a file is SQLite's, and as long as it says itself."""
    with path.open("rb") as file:
        header = file.read(100)
    if len(header) < 100 or not header.startswith(_MAGIC):
        raise DataError(f"fax.data.SQLite: {path} is no SQLite file. {_MEND}")
    page = int.from_bytes(header[16:18], "big")
    page = 65536 if page == 1 else page
    pages = int.from_bytes(header[28:32], "big")
    # Bytes 24 and 92 are equal if the number of pages is up to date.
    if header[24:28] == header[92:96] and path.stat().st_size < page * pages:
        raise DataError(
            f"fax.data.SQLite: {path} has {path.stat().st_size} bytes of {page * pages}. {_MEND}"
        )


def _decompressed(path: Path, sha256: str | None) -> Path:
    """The path of an SQLite file, once its checksum is right and it is decompressed."""
    if sha256 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256.lower():
            raise DataError(f"{path} has the SHA-256 checksum {found}, expected {sha256}. {_MEND}")
    elif not path.is_file():
        raise FileNotFoundError(f"fax.data.SQLite: there is no file {path}")
    if path.suffix not in (".lzma", ".xz"):
        return path
    plain = path.with_suffix("")
    if plain.exists():
        if plain.stat().st_mtime < path.stat().st_mtime:
            raise DataError(
                f"{plain} is older than {path}, from which it should come. Remove it, and it is "
                "decompressed anew; or open it without the suffix."
            )
        return plain
    import lzma  # some Pythons are built without it

    try:
        with (
            whole("fax.data.SQLite", plain) as temporary,
            lzma.open(path) as source,
            temporary.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path} cannot be decompressed: {error}. {_MEND}") from error
    return plain
