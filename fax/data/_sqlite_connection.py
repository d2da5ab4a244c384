"""Read-only connections to SQLite files, which may be damaged or malicious.

Everything is bounded by the size of the file: no value is longer, and no query takes many more
steps than the file has bytes.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

DAMAGED = "The file is damaged or incomplete. Get it again."

_LOCK_SECONDS = 5.0  # how long to wait for a process that writes
_STEPS = 100_000  # of SQLite's virtual machine, between two checks of their number
_STEPS_PER_BYTE = 10  # reading a row takes about ten steps, and a row has several bytes

_LOCKED = (
    "it is locked by another process that writes to it. Wait until that process has finished, or "
    "read a copy of the file"
)
_EXPLANATIONS = {
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_READONLY: "the last process that wrote to it was interrupted, and left a "
    "journal next to it. Open it once with an SQLite program that can write, to roll back the "
    "unfinished transaction",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened. Check that it still exists, and that you have "
    "permission to read it and its folder",
    sqlite3.SQLITE_IOERR: "the disk cannot be read",
    sqlite3.SQLITE_NOMEM: "there is not enough memory",
}


class ReadOnlyConnection(sqlite3.Connection):
    """A connection for reading, closed when its thread ends or the source is freed.

    Args:
      path: of the file.
      alone: whether to read only that file, without a journal next to it and without locks.

    Attributes:
      size: the number of bytes of the file and its journal.
    """

    size: int

    def __init__(self, path: Path, alone: bool) -> None:
        uri = f"{path.as_uri()}?mode=ro" + ("&immutable=1" if alone else "")
        super().__init__(uri, uri=True, timeout=_LOCK_SECONDS, check_same_thread=False)
        self._paths = [path] if alone else [path, path.with_name(path.name + "-wal")]
        self.start()
        self.set_progress_handler(self._too_long, _STEPS)
        self.execute("PRAGMA cell_size_check = ON")  # find damage early
        self.execute("PRAGMA trusted_schema = OFF")

    def start(self) -> None:
        """Starts to count steps again, for a file that may have grown."""
        self._checks = 0
        self.size = sum(path.stat().st_size for path in self._paths if path.exists())
        self.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, max(self.size, 1 << 20))

    def _too_long(self) -> bool:
        self._checks += 1
        return self._checks > 100 + self.size * _STEPS_PER_BYTE // _STEPS

    def tables(self) -> list[str]:
        """The names of the tables that are stored in the file, and not computed like views."""
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND rootpage > 0"
        return sorted({str(name) for (name,) in self.execute(query)})

    def check_stored(self, *tables: str) -> None:
        """Checks that tables have no generated columns, which can have any size."""
        for table in tables:
            for _, column, *_, hidden in self.execute(f"PRAGMA table_xinfo({table})"):
                if hidden:
                    raise sqlite3.DatabaseError(
                        f"{table}.{column} is a generated column, not a stored one"
                    )

    def __del__(self) -> None:
        with contextlib.suppress(sqlite3.ProgrammingError):  # it was never opened
            self.close()


def describe_error(error: Exception) -> str:
    """What went wrong and how to fix it, in words."""
    if isinstance(error, OSError):
        return f"{error}."
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the extended error code
    if code in _EXPLANATIONS:
        return f"{_EXPLANATIONS[code]} ({error})."
    if code == sqlite3.SQLITE_TOOBIG:
        return f"a value would be longer than the file. {DAMAGED}"
    if code == sqlite3.SQLITE_INTERRUPT:
        return f"it takes too many steps for the size of the file. {DAMAGED}"
    return f"{error}. {DAMAGED}"
