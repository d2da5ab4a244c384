"""Rows of clients in an SQLite database, which holds all of a round or none of it."""

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

    The file changes at a `flush` only, in one transaction. Rows written since are in a temporary
    database of SQLite, which goes with the process. So a write that fails leaves the rows from
    before that round, and a flush that fails leaves the file as it was and all newer rows.

    Args:
      path: of a file that `create` has made. None: in memory.
      facts: what the rows in memory are of; a file has its own.
      start: the row in memory that all clients have at first; a file has its own.

    Attributes:
      facts: what `create` was told.
      rounds: how many rounds have been written.
    """

    def __init__(self, path: str | None, facts: dict[str, str], start: bytes):
        self._path = path
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

    def read(self, position: int) -> bytes:
        """A client's row, or that of clients that have not taken part.

        Raises:
          ValueError: if the row is not what was written.
        """
        with self._damaged(f"the row of client {position}"):
            for schema, key in [*((x, position) for x in self._schemas), ("main", START)]:
                query = f"SELECT checksum, row FROM {schema}.clients WHERE position = ?"
                found = self._file.execute(query, [key]).fetchone()
                if found is not None:
                    break
        if found is None or zlib.crc32(found[1]) != found[0]:
            raise ValueError(
                f"{WHERE}: the row of client {position} in {self._path!r} is damaged. Go on with a "
                "copy of the file."
            )
        return found[1]

    def write(self, rows: Iterable[tuple[int, bytes]]) -> None:
        """Takes the rows of one more round.

        Raises:
          OSError: if there is no room for them. The rows are those from before the round then.
        """
        consequence = (
            "All rows are as before that round. They go to SQLite's temporary folder until flush() "
            "moves them into the file: make room, flush more often, or let the environment "
            "variable SQLITE_TMPDIR name another folder"
        )
        checked = ((position, zlib.crc32(row), row) for position, row in rows)
        what = "a round's rows"
        with _written(self._path, what, consequence), _transaction(self._file):
            self._file.executemany(f"{_PUT.format(self._schemas[0])} VALUES (?, ?, ?)", checked)
        self.rounds += 1

    def flush(self) -> None:
        """Makes the file hold all rounds so far.

        Raises:
          OSError: if the disk is full. Nothing has changed then, in the file or here.
        """
        consequence = (
            "The file is as it was at the last flush, and the store has all rounds since: make "
            "room, and flush again"
        )
        what = f"the rows of {self.rounds} rounds"
        with _written(self._path, what, consequence), _transaction(self._file):
            if self._path is not None:
                self._file.execute(f"{_PUT.format('main')} SELECT * FROM newest.clients")
            update = "UPDATE main.facts SET value = ? WHERE name = 'rounds'"
            self._file.execute(update, [str(self.rounds)])
        # If this fails, the same rows are there twice, until they are written again.
        with contextlib.suppress(sqlite3.Error), _transaction(self._file):
            if self._path is not None:
                self._file.execute("DELETE FROM newest.clients")

    def close(self) -> None:
        """Forgets what was not flushed."""
        self._file.close()

    @contextlib.contextmanager
    def _damaged(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.ProgrammingError:  # as from another thread: nothing is wrong with the file
            raise
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{WHERE}: {what} in {self._path!r} cannot be read ({error}). Go on with a copy of "
                "the file."
            ) from error


def create(path: str, facts: dict[str, str], start: bytes) -> None:
    """Makes a file of no rounds, which has its name when it is whole.

    Args:
      path: where there is no file yet.
      facts: what the rows are of.
      start: the row that all clients have at first.

    Raises:
      OSError: if the disk is full. Nothing is left behind then.
    """
    consequence = "Nothing is left behind: make room, and call init again"
    target = Path(path).absolute()
    with atomic_write(WHERE, target) as temporary, _written(path, "the file", consequence):
        file = _connect(os.fspath(temporary))
        try:
            _fill(file, facts, start)
        finally:
            file.close()


def _connect(path: str) -> sqlite3.Connection:
    # Transactions are begun and ended here, not by the module. Nobody is waited for.
    return sqlite3.connect(path, isolation_level=None, timeout=0)


def _fill(file: sqlite3.Connection, facts: dict[str, str], start: bytes) -> None:
    with _transaction(file):
        for statement in _TABLES.split(";"):
            file.execute(statement)
        pairs = {**facts, "rounds": "0"}.items()
        file.executemany("INSERT INTO facts VALUES (?, ?)", pairs)
        file.execute(f"{_PUT.format('main')} VALUES (?, ?, ?)", [START, zlib.crc32(start), start])


def _lock(file: sqlite3.Connection) -> None:
    """Keeps other processes out for as long as the file is open, and makes place for new rows."""
    file.execute("PRAGMA locking_mode = EXCLUSIVE")
    file.execute("BEGIN EXCLUSIVE")
    file.execute("COMMIT")
    # A temporary database in a file that SQLite removes, also if the process is killed.
    file.execute("ATTACH '' AS newest")
    file.execute("PRAGMA newest.journal_mode = MEMORY")
    file.execute(_TABLES.split(";")[1].replace("clients", "newest.clients"))


@contextlib.contextmanager
def _transaction(file: sqlite3.Connection) -> Iterator[None]:
    """All of it or, after any exception, nothing."""
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
    """Says what could not be written, and what follows from it."""
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
    """Whether an error is of a kind; the upper bits of its code say more about it."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == code
