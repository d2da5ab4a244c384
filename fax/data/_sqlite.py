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
from fax.data._atomic_write import atomic_write
from fax.data._check_examples import (
    Schema,
    check_federated,
    checked_examples,
    first_ids,
    unknown_client,
)
from fax.data._decompress import LZMAReader, check_max_bytes
from fax.data._protocol import ClientId, DataError, FederatedData
from fax.data._sqlite_connection import DAMAGED, ReadOnlyConnection, describe_error
from fax.data._sqlite_tables import FedJAXTable, TFFTables, fedjax_rows

_MAGIC = b"SQLite format 3\0"


class SQLite:
    """Federated data in an SQLite file, in the format of FedJAX or TensorFlow Federated.

    FedJAX's format has a table ``federated_data`` with a row for each client, which describes its
    own features. TensorFlow Federated's has a row for each example, a ``tf.train.Example``, in
    several splits: ``split`` chooses one, and ``features`` says which features to read, with their
    dtypes and shapes. Neither package is needed. A compressed file, ``.lzma`` or ``.xz``, is
    decompressed once, to the path without that suffix. If that file exists already, it is used;
    with ``sha256`` it is compared with what the compressed file decompresses to.

    Client ids are strings. The bytes in FedJAX's files are decoded as UTF-8, with
    ``surrogateescape`` so that no two ids become the same. Clients are in the order of rows in
    FedJAX's format, and in that of sorted ids in TensorFlow Federated's. The ids and the numbers of
    examples are read when they are first needed, and a client's examples whenever they are asked
    for. Each thread has its own connection. The source can be pickled; the copy opens the file
    again.

    Args:
      path: the path of the file.
      split: the name of the split, for example ``"train"``.
      features: maps the names of features to pairs of a dtype and the shape in one example. The
        dtype ``bytes`` stands for byte strings, which become an array of dtype object.
      sha256: the checksum of the file at ``path``, in hexadecimal. It is compared when the file is
        opened, and again whenever the file changes, and a journal next to the file is not read. A
        compressed file is decompressed each time, to compare the result with the existing file. To
        avoid that, open the decompressed file with its own checksum.
      max_bytes: the most bytes that a compressed file may decompress to, and that a client's
        examples in FedJAX's format may. Default: 256 MiB, or 100 times the compressed size if that
        is more.

    Raises:
      FileNotFoundError: if there is no such file.
      DataError: if the file is damaged or locked, has another checksum, does not have the split, or
        decompresses to more than ``max_bytes``; when a client is read, if its row is damaged or
        decompresses to too much.

    Example:

      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "names.sqlite")
      >>> people = fax.data.InMemory({"ada": {"age": jnp.array([36])}})
      >>> data = fax.data.SQLite.write(path, people)
      >>> fax.data.SQLite(path).client("ada")
      {'age': array([36], dtype=int32)}

      A file of TensorFlow Federated is opened like this::

          SQLite(
              "emnist_all.sqlite.lzma",
              split="digits_only_train",
              features={"pixels": (np.float32, (28, 28)), "label": (np.int32, ())},
          )
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str | None = None,
        features: Mapping[str, tuple[Any, tuple[int, ...]]] | None = None,
        *,
        sha256: str | None = None,
        max_bytes: int | None = None,
    ) -> None:
        where = "fax.data.SQLite"
        _arguments.path(where, "path", path, error=DataError)
        if sha256 is not None:
            _arguments.text(where, "sha256", sha256, "hexadecimal digits", error=DataError)
        self._given, self._sha256 = Path(path).absolute(), sha256
        self._max_bytes = check_max_bytes(where, max_bytes)
        if not self._given.is_file():
            raise FileNotFoundError(f"{where}: there is no file {self._given}")
        compressed = self._given.suffix in (".lzma", ".xz")
        self._path = self._given.with_suffix("") if compressed else self._given
        self._reset()
        if compressed and not self._path.exists():
            self._check_sum()
            self._decompress()
        if compressed and self._path.stat().st_mtime < self._given.stat().st_mtime:
            raise DataError(
                f"{self._path} is older than {self._given}. Remove it, so that it is decompressed "
                "again, or open it by its own path, without the suffix."
            )
        self._verify()
        _check_header(self._path)
        self._schema = Schema()
        with self._reading("its tables") as connection:
            tables = connection.tables()
            self._format: FedJAXTable | TFFTables
            if "federated_data" in tables:
                self._format = FedJAXTable(connection, self._max_bytes)
            elif {"examples", "client_metadata"} <= set(tables):
                self._format = TFFTables(self._path, connection, split, features)
            else:
                raise DataError(
                    f"{where}: {self._path} has the tables [{first_ids(tables, 20)}], expected "
                    "federated_data (FedJAX) or examples and client_metadata (TensorFlow "
                    "Federated). To read other tables, pass pandas.read_sql(query, connection) to "
                    "fax.data.from_pandas."
                )
        if isinstance(self._format, FedJAXTable) and (split is not None or features is not None):
            raise DataError(
                f"{where}: {self._path} has FedJAX's format, which has neither splits nor a choice "
                "of features. Leave out split and features."
            )

    def _reset(self) -> None:
        self._connections = threading.local()
        self._lock = threading.RLock()
        self._verified: Any = None
        self._clients: tuple[tuple[str, ...], Mapping[str, tuple[Any, int]]] | None = None

    @staticmethod
    def write(path: str | os.PathLike[str], data: FederatedData) -> SQLite:
        """Writes federated data to an SQLite file in FedJAX's format.

        The write is atomic: the file appears under its name when all of it is on the disk. Features
        can be numbers, bools, and arrays of dtype object that hold byte strings. Client ids are
        strings or bytes.

        Args:
          path: the path of the file, which must not exist.
          data: the data to write.

        Returns:
          The file, opened.

        Raises:
          DataError: if the file exists, or a client cannot be written.
          OSError: if the disk is full. No part of the file is left behind.
        """
        check_federated("fax.data.SQLite.write", "data", data)
        _arguments.path("fax.data.SQLite.write", "path", path, error=DataError)
        path = Path(path).absolute()
        with atomic_write("fax.data.SQLite.write", path) as temporary:
            connection = sqlite3.connect(temporary)
            try:
                # Without a journal, because the file is removed if anything fails.
                connection.execute("PRAGMA journal_mode = OFF")
                connection.execute(
                    "CREATE TABLE federated_data (client_id BLOB NOT NULL PRIMARY KEY, "
                    "data BLOB NOT NULL, num_examples INTEGER NOT NULL)"
                )
                # With this index, the numbers of examples are read without reading the examples.
                connection.execute(
                    "CREATE INDEX client_sizes ON federated_data (client_id, num_examples)"
                )
                connection.executemany(
                    "INSERT INTO federated_data VALUES (?, ?, ?)", fedjax_rows(data)
                )
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
            examples = checked_examples(client_id, self._format.parse(client_id, found))
            length = len(next(iter(examples.values())))
            if length != count:
                raise DataError(
                    f"client {client_id!r} has {length} examples, but should have {count}. "
                    f"{DAMAGED}"
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
            raise unknown_client(client_id, self) from None

    def _index(self) -> tuple[tuple[str, ...], Mapping[str, tuple[Any, int]]]:
        """The ids in order, and by id, the key of the client and its number of examples."""
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
    def _reading(self, what: str) -> Iterator[ReadOnlyConnection]:
        """This thread's connection. Errors of SQLite become a `DataError` that explains them."""
        mine = self._connections
        try:
            # A connection must not be used in a process that was forked from its own.
            version = os.getpid(), self._verify()
            if getattr(mine, "version", None) != version:
                mine.connection = ReadOnlyConnection(self._path, alone=self._sha256 is not None)
                mine.version = version
            else:
                mine.connection.start()
            yield mine.connection
        except (sqlite3.Error, OSError, MemoryError, OverflowError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self._path}: cannot read {what}: {describe_error(error)}") from error

    def _verify(self) -> Any:
        """Compares the checksum, if there is one, whenever the file has changed."""
        if self._sha256 is None:
            return None
        with self._lock:
            version = self._version()
            if version != self._verified:
                self._check_sum()
                if self._path != self._given:
                    self._compare()
                self._verified = version
            return version

    def _version(self) -> tuple[int, ...]:
        state = self._path.stat()
        return state.st_ino, state.st_size, state.st_mtime_ns

    def _check_sum(self) -> None:
        if self._sha256 is None:
            return
        with self._given.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self._sha256.lower():
            raise DataError(
                f"{self._given} has the SHA-256 checksum {found}, expected {self._sha256}. "
                f"{DAMAGED}"
            )

    def _decompress(self) -> None:
        try:
            with (
                atomic_write("fax.data.SQLite", self._path) as temporary,
                self._decompressed() as source,
                temporary.open("wb") as target,
            ):
                shutil.copyfileobj(source, target, 1 << 20)
            self._verified = self._version()
        except DataError as error:
            # Another process may have decompressed it in the meantime.
            if not isinstance(error.__cause__, FileExistsError):
                raise

    def _compare(self) -> None:
        """Checks that the existing file is what the compressed file decompresses to."""
        with self._decompressed() as source, self._path.open("rb") as file:
            while content := source.read(1 << 20):
                if file.read(len(content)) != content:
                    break
            if content or file.read(1):
                raise DataError(
                    f"{self._path} is not what {self._given} decompresses to, which has the right "
                    "checksum. Remove it, so that it is decompressed again."
                )

    @contextlib.contextmanager
    def _decompressed(self) -> Iterator[LZMAReader]:
        import lzma  # some Pythons are built without it

        try:
            with LZMAReader(self._given, self._max_bytes) as source:
                yield source
        except (lzma.LZMAError, EOFError) as error:
            fix = DAMAGED
            if "limit" in str(error):  # lzma has no other way to say so
                fix = "If you trust the data, pass a larger max_bytes."
            raise DataError(f"{self._given} cannot be decompressed: {error}. {fix}") from error

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_connections", "_lock", "_clients", "_verified")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


def _check_header(path: Path) -> None:
    """Checks that a file is an SQLite file, and as long as its header says."""
    with path.open("rb") as file:
        header = file.read(100)
    if len(header) < 100 or not header.startswith(_MAGIC):
        raise DataError(
            f"fax.data.SQLite: {path} is not an SQLite file. If it should be one, it is damaged. "
            "Get it again."
        )
    page = int.from_bytes(header[16:18], "big")
    page = 65536 if page == 1 else page
    pages = int.from_bytes(header[28:32], "big")
    # Bytes 24 and 92 are equal if the number of pages is up to date.
    if header[24:28] == header[92:96] and path.stat().st_size < page * pages:
        raise DataError(
            f"fax.data.SQLite: {path} has {path.stat().st_size} bytes of {page * pages}. {DAMAGED}"
        )
