"""Writing so that what has its name is whole."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fax.data._protocol import DataError


@contextlib.contextmanager
def whole(where: str, path: Path) -> Iterator[Path]:
    """Gives a temporary path, for a file or folder that takes its own name when all went well.

    The temporary path is in a hidden folder beside, and so on the same disk. It is removed if
    anything goes wrong; a process that is killed leaves it behind, but nothing reads it. Of several
    that write to one path the first to finish wins, and the others get a `DataError`.
    """
    taken = (
        f"{where}: {path} exists already. Remove it, or choose another path: nothing is "
        "overwritten."
    )
    if path.exists():
        raise DataError(taken)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield folder / path.name
        if (folder / path.name).is_file():
            synchronize(folder / path.name)
        try:
            _name(folder / path.name, path)
        except FileExistsError as error:
            raise DataError(f"{taken} Another process or thread wrote it meanwhile.") from error
        with contextlib.suppress(OSError):  # it is whole, whenever its name gets to the disk
            synchronize(path.parent)
    except (OSError, sqlite3.Error) as error:
        full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        if full or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                errno.ENOSPC,
                f"{where}: no space is left on the disk. Nothing was written; make room, and "
                "write again",
                str(path),
            ) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _name(temporary: Path, path: Path) -> None:
    """Gives a file or folder its name, or raises `FileExistsError` if that is taken."""
    if temporary.is_file():
        try:
            os.link(temporary, path)  # renaming would overwrite
            return
        except FileExistsError:
            raise
        except OSError:  # on a disk without hard links a moment remains
            if path.exists():
                raise FileExistsError(path) from None
    try:
        os.rename(temporary, path)
    except OSError as error:
        if path.exists():  # a folder is not overwritten, but the error has many names
            raise FileExistsError(path) from error
        raise


def synchronize(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
