"""Federated data in SQLite files, as FedJAX and TensorFlow Federated publish them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fax import _arguments
from fax.data._check import Schema, checked, federated, unknown
from fax.data._protocol import ClientId, DataError, FederatedData
from fax.data._tables import MEND, TFF, FedJAX, rows
from fax.data._write import whole

_MAGIC = b"SQLite format 3\0"


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
        _arguments.path("fax.data.SQLite", "path", path, error=DataError)
        self._path = _decompressed(Path(path).absolute(), sha256)
        _check_header(self._path)
        self._schema = Schema()
        self._reset()
        with self._reading("the names of its tables") as connection:
            names = "SELECT name FROM sqlite_master WHERE type = 'table'"
            tables = {name for (name,) in connection.execute(names)}
        self._format: FedJAX | TFF
        if "federated_data" in tables:
            if split is not None or features is not None:
                raise DataError(
                    f"fax.data.SQLite: {self._path} has FedJAX's format, which has neither splits "
                    "nor a choice of features. Leave out split and features."
                )
            self._format = FedJAX()
        elif {"examples", "client_metadata"} <= tables:
            with self._reading("its splits") as connection:
                self._format = TFF(self._path, connection, split, features)
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
        federated("fax.data.SQLite.write", "data", data)
        _arguments.path("fax.data.SQLite.write", "path", path, error=DataError)
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
                connection.executemany("INSERT INTO federated_data VALUES (?, ?, ?)", rows(data))
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
                    f"client {client_id!r} has {length} examples, but should have {count}. {MEND}"
                )
            self._schema.check(client_id, examples)
        except DataError as error:
            raise DataError(f"{self._path}: {error}") from error.__cause__
        return examples

    def __len__(self) -> int:
        return len(self.client_ids())

    def __repr__(self) -> str:
        return f"SQLite({str(self._path)!r})"

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
            raise DataError(f"{self._path}: cannot read {what}: {error}. {MEND}") from error

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


def _check_header(path: Path) -> None:
    """Checks that a file is SQLite's, and as long as it says itself."""
    with path.open("rb") as file:
        header = file.read(100)
    if len(header) < 100 or not header.startswith(_MAGIC):
        raise DataError(f"fax.data.SQLite: {path} is no SQLite file. {MEND}")
    page = int.from_bytes(header[16:18], "big")
    page = 65536 if page == 1 else page
    pages = int.from_bytes(header[28:32], "big")
    # Bytes 24 and 92 are equal if the number of pages is up to date.
    if header[24:28] == header[92:96] and path.stat().st_size < page * pages:
        raise DataError(
            f"fax.data.SQLite: {path} has {path.stat().st_size} bytes of {page * pages}. {MEND}"
        )


def _decompressed(path: Path, sha256: str | None) -> Path:
    """The path of an SQLite file, once its checksum is right and it is decompressed."""
    if sha256 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256.lower():
            raise DataError(f"{path} has the SHA-256 checksum {found}, expected {sha256}. {MEND}")
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
        raise DataError(f"{path} cannot be decompressed: {error}. {MEND}") from error
    return plain
