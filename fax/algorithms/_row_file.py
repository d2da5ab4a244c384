"""Clients' rows in an SQLite database, which holds all of a round or none of it."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from fax.data._atomic_write import atomic_write

WHERE = "fax.algorithms.ClientStore"
START = -1  # the row of clients that have not taken part
_TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE clients (position INTEGER PRIMARY KEY, checksum INTEGER NOT NULL, row BLOB NOT NULL);
"""
_PUT = "INSERT OR REPLACE INTO {}.clients"


class RowFile:
    """Rows of bytes by the positions of clients, in memory or in a file.

    The file changes only at a `flush`, in one transaction. Newer rows are in a temporary SQLite
    database, which is deleted when the process ends. So a write that fails leaves the rows as they
    were before that round, and a flush that fails leaves the file and all newer rows as they were.

    Args:
      path: the path of a file that `create` has made. None: in memory.
      facts: the description of the rows in memory; a file has its own.
      start: the initial row of all clients in memory; a file has its own.

    Attributes:
      facts: the description of the rows that was passed to `create`.
      rounds: the number of rounds that have been written.
    """

    def __init__(self, path: str | None, facts: dict[str, str], start: bytes):
        self._path, self._pid = path, os.getpid()
        self._file = _connect(path or ":memory:")
        try:
            if path is None:
                _fill(self._file, facts, start)
            else:
                with _refused(path):
                    _lock(self._file)
            # The newest rows are in the first of these.
            self._schemas = ("main",) if path is None else ("newest", "main")
            self.facts = dict(self._file.execute("SELECT name, value FROM main.facts"))
            self.rounds = int(self.facts.pop("rounds", 0))
        except BaseException as error:
            self._file.close()
            if isinstance(error, sqlite3.Error):
                raise ValueError(f"{WHERE}: {path!r} is not a store's file ({error}).") from error
            raise

    @property
    def is_own(self) -> bool:
        """Whether this process may use it. One that was forked has the file, but not its lock."""
        return self._path is None or os.getpid() == self._pid

    def read(self, position: int) -> bytes:
        """Returns a client's row, or the initial row if the client has not taken part.

        Raises:
          ValueError: if the row is damaged.
        """
        with self._damaged(f"the row of client {position}"):
            for schema, key in [*((x, position) for x in self._schemas), ("main", START)]:
                query = f"SELECT checksum, row FROM {schema}.clients WHERE position = ?"
                found = self._file.execute(query, [key]).fetchone()
                if found is not None:
                    break
        if found is None or zlib.crc32(found[1]) != found[0]:
            raise ValueError(
                f"{WHERE}: the row of client {position} in {self._path!r} is damaged. Restore the "
                "file from a backup."
            )
        return found[1]

    def write(self, rows: Iterable[tuple[int, bytes]]) -> None:
        """Writes the rows of one more round.

        Raises:
          OSError: if there is no space for them. The rows are then as they were before the round.
        """
        consequence = (
            "All rows are as before that round. They go to SQLite's temporary folder until flush() "
            "moves them into the file: free some space, flush more often, or set the environment "
            "variable SQLITE_TMPDIR to another folder"
        )
        checked = ((position, zlib.crc32(row), row) for position, row in rows)
        what = "a round's rows"
        with _written(self._path, what, consequence), _transaction(self._file):
            self._file.executemany(f"{_PUT.format(self._schemas[0])} VALUES (?, ?, ?)", checked)
        self.rounds += 1

    def flush(self) -> None:
        """Writes all rounds so far to the file.

        Raises:
          OSError: if the disk is full. Nothing has changed then, in the file or here.
        """
        consequence = (
            "The file is as it was at the last flush, and the store has all rounds since: free "
            "some space, and flush again"
        )
        what = f"the rows of {self.rounds} rounds"
        with _written(self._path, what, consequence), _transaction(self._file):
            if self._path is not None:
                self._file.execute(f"{_PUT.format('main')} SELECT * FROM newest.clients")
            update = "UPDATE main.facts SET value = ? WHERE name = 'rounds'"
            self._file.execute(update, [str(self.rounds)])
        # If this fails, the rows are stored twice until they are written again.
        with contextlib.suppress(sqlite3.Error), _transaction(self._file):
            if self._path is not None:
                self._file.execute("DELETE FROM newest.clients")

    def save(self, path: str) -> None:
        """Writes all rows, flushed or not, to a new file as `create` makes them.

        Raises:
          OSError: if there is no space for them. No file is left behind then.
        """
        start = self.read(START)
        create(path, self.facts, start)
        try:
            consequence = "No file is left behind, and the store has all of them"
            with _written(path, f"the rows of {self.rounds} rounds", consequence):
                self._copy_to(path)
        except OSError:
            os.remove(path)
            raise

    def _copy_to(self, path: str) -> None:
        self._file.execute("ATTACH ? AS copy", [path])
        try:
            with _transaction(self._file):
                for schema in reversed(self._schemas):
                    self._file.execute(f"{_PUT.format('copy')} SELECT * FROM {schema}.clients")
                update = "UPDATE copy.facts SET value = ? WHERE name = 'rounds'"
                self._file.execute(update, [str(self.rounds)])
        finally:
            self._file.execute("DETACH copy")

    def load(self, path: str) -> None:
        """Replaces all rows by those of a file that `save` has written.

        Raises:
          ValueError: if it is not such a file, or is damaged.
          OSError: if there is no space for the rows. Nothing has changed then.
        """
        verify(path)
        self._file.execute("ATTACH ? AS copy", [path])
        try:
            with _refused(path):
                found = dict(self._file.execute("SELECT name, value FROM copy.facts"))
            if {**found, "rounds": ""} != {**self.facts, "rounds": ""}:
                raise ValueError(f"{WHERE}: {path!r} has the rows of other clients or parameters.")
            consequence = "All rows are as before"
            with _written(self._path, "the rows", consequence), _transaction(self._file):
                for schema in self._schemas:
                    self._file.execute(f"DELETE FROM {schema}.clients")
                self._file.execute(f"{_PUT.format('main')} SELECT * FROM copy.clients")
                update = "UPDATE main.facts SET value = ? WHERE name = 'rounds'"
                self._file.execute(update, [found["rounds"]])
        finally:
            self._file.execute("DETACH copy")
        self.rounds = int(found["rounds"])

    def close(self) -> None:
        """Closes the database, and discards what was not flushed."""
        self._file.close()

    @contextlib.contextmanager
    def _damaged(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.ProgrammingError:  # such as use in another thread; the file is fine
            raise
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{WHERE}: {what} in {self._path!r} cannot be read ({error}). Restore the file "
                "from a backup."
            ) from error


def create(path: str, facts: dict[str, str], start: bytes) -> None:
    """Makes a file with no rounds, atomically.

    Args:
      path: where there is no file yet.
      facts: the description of the rows.
      start: the initial row of all clients.

    Raises:
      OSError: if the disk is full. No file is left behind then.
    """
    consequence = "No file is left behind: free some space, and call init again"
    target = Path(path).absolute()
    with atomic_write(WHERE, target) as temporary, _written(path, "the file", consequence):
        file = _connect(os.fspath(temporary))
        try:
            _fill(file, facts, start)
        finally:
            file.close()


def verify(path: str) -> None:
    """Checks all rows of a file that `RowFile.save` has written.

    Raises:
      ValueError: if it is damaged, or something else.
    """
    uri = f"{Path(path).absolute().as_uri()}?mode=ro&immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as file:
            dict(file.execute("SELECT name, value FROM facts"))
            for position, checksum, row in file.execute("SELECT * FROM clients"):
                if zlib.crc32(row) != checksum:
                    raise ValueError(
                        f"{WHERE}: the row of client {position} in {path!r} is damaged."
                    )
    except (sqlite3.Error, TypeError) as error:
        raise ValueError(
            f"{WHERE}: {path!r} is damaged, or not a file that a store has saved ({error})."
        ) from error


def _connect(path: str) -> sqlite3.Connection:
    # Transactions are explicit: the module does not begin any. A locked file is an error at once.
    return sqlite3.connect(path, isolation_level=None, timeout=0)


def _fill(file: sqlite3.Connection, facts: dict[str, str], start: bytes) -> None:
    with _transaction(file):
        for statement in _TABLES.split(";"):
            file.execute(statement)
        pairs = {**facts, "rounds": "0"}.items()
        file.executemany("INSERT INTO facts VALUES (?, ?)", pairs)
        file.execute(f"{_PUT.format('main')} VALUES (?, ?, ?)", [START, zlib.crc32(start), start])


def _lock(file: sqlite3.Connection) -> None:
    """Locks the file while it is open, and makes a temporary database for new rows."""
    file.execute("PRAGMA locking_mode = EXCLUSIVE")
    file.execute("BEGIN EXCLUSIVE")
    file.execute("COMMIT")
    # A temporary database in a file that SQLite removes, even if the process is killed.
    file.execute("ATTACH '' AS newest")
    file.execute("PRAGMA newest.journal_mode = MEMORY")
    file.execute(_TABLES.split(";")[1].replace("clients", "newest.clients"))


@contextlib.contextmanager
def _transaction(file: sqlite3.Connection) -> Iterator[None]:
    """Commits everything or, after any exception, nothing."""
    _roll_back(file)  # if that was not possible when the last one failed
    file.execute("BEGIN IMMEDIATE")
    try:
        yield
        file.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            _roll_back(file)
        raise


def _roll_back(file: sqlite3.Connection) -> None:
    if file.in_transaction:  # after some errors SQLite has rolled back already
        file.execute("ROLLBACK")


@contextlib.contextmanager
def _written(path: str | None, what: str, consequence: str) -> Iterator[None]:
    """Raises an OSError that says what could not be written, and what follows from it."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except sqlite3.Error as error:
        number = errno.ENOSPC if _is(error, sqlite3.SQLITE_FULL) else errno.EIO
        raise OSError(
            number, f"{WHERE}: {what} could not be written ({error}). {consequence}", path
        ) from error


@contextlib.contextmanager
def _refused(path: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        busy = _is(error, sqlite3.SQLITE_BUSY)
        what = "is open in another store" if busy else f"cannot be opened ({error})"
        raise ValueError(f"{WHERE}: {path!r} {what}.") from error


def _is(error: sqlite3.Error, code: int) -> bool:
    """Whether an error has a primary code; the upper bits of its code have more details."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == code
