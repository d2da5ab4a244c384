"""Read-only connections to SQLite files, which may be damaged or made to do harm.

What is read is bounded by the size of the file: no value is longer, and no query takes many more
steps than the file has bytes.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

DAMAGED = "The file is damaged or incomplete: get it once more."

_PATIENCE = 5.0  # seconds to wait for a process that writes
_STEPS = 100_000  # of SQLite's virtual machine, from one look at their number to the next
_STEPS_PER_BYTE = 10  # to read a row takes about ten steps, and it has several bytes

_LOCKED = (
    "it is locked by another process that writes to it. Wait until that process has finished, or "
    "read a copy of the file"
)
_WORDS = {
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_READONLY: "the last process that wrote to it was interrupted, and left a "
    "journal beside it. Open it once with another SQLite program that may write, to undo what is "
    "half written",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened. See whether it is still there, and whether you "
    "may read it and the folder that it is in",
    sqlite3.SQLITE_IOERR: "the disk cannot be read",
    sqlite3.SQLITE_NOMEM: "there is not enough memory",
}


class Connection(sqlite3.Connection):
    """A connection for reading, closed when its thread ends or the source is gone.

    Args:
      path: of the file.
      alone: whether to read that file and nothing else: no journal beside it, and no locks.

    Attributes:
      size: the bytes of the file and its journal.
    """

    def __init__(self, path: Path, alone: bool) -> None:
        uri = f"{path.as_uri()}?mode=ro" + ("&immutable=1" if alone else "")
        super().__init__(uri, uri=True, timeout=_PATIENCE, check_same_thread=False)
        self._paths = [path] if alone else [path, path.with_name(path.name + "-wal")]
        self.start()
        self.set_progress_handler(self._too_long, _STEPS)
        self.execute("PRAGMA cell_size_check = ON")  # find damage early
        self.execute("PRAGMA trusted_schema = OFF")

    def start(self) -> None:
        """Begins to count steps, for a file that may have grown since."""
        self._looks = 0
        self.size = sum(path.stat().st_size for path in self._paths if path.exists())
        self.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, max(self.size, 1 << 20))

    def _too_long(self) -> bool:
        self._looks += 1
        return self._looks > 100 + self.size * _STEPS_PER_BYTE // _STEPS

    def tables(self) -> list[str]:
        """The names of all tables that are stored in the file."""
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND rootpage > 0"
        return sorted({str(name) for (name,) in self.execute(query)})

    def check_stored(self, *tables: str) -> None:
        """Checks that no column of these tables is computed when it is read, to any size."""
        for table in tables:
            for _, column, *_, hidden in self.execute(f"PRAGMA table_xinfo({table})"):
                if hidden:
                    raise sqlite3.DatabaseError(
                        f"{table}.{column} is a generated column, not one that is stored"
                    )

    def __del__(self) -> None:
        with contextlib.suppress(sqlite3.ProgrammingError):  # it has never been opened
            self.close()


def in_words(error: Exception) -> str:
    """What went wrong, and how to fix it."""
    if isinstance(error, OSError):
        return f"{error}."
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest says more than is needed
    if code in _WORDS:
        return f"{_WORDS[code]} ({error})."
    if code == sqlite3.SQLITE_TOOBIG:
        return f"a value would be longer than the file. {DAMAGED}"
    if code == sqlite3.SQLITE_INTERRUPT:
        return f"it takes too many steps for the size of the file. {DAMAGED}"
    return f"{error}. {DAMAGED}"
