"""Atomic writes of files and folders."""

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
def atomic_write(where: str, path: Path) -> Iterator[Path]:
    """Yields a temporary path for a file or folder, which is renamed to ``path`` if all goes well.

    The temporary path is in a hidden folder next to ``path``, and so on the same disk. It is
    removed if anything fails. A process that is killed leaves it behind, but nothing reads it. If
    several write to one path, the first to finish wins, and the others raise a `DataError`.
    """
    taken = (
        f"{where}: {path} exists already, and nothing is overwritten. Remove it, or choose another "
        "path."
    )
    if path.exists():
        raise DataError(taken)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield folder / path.name
        if (folder / path.name).is_file():
            sync_to_disk(folder / path.name)
        try:
            _rename(folder / path.name, path)
        except FileExistsError as error:
            raise DataError(f"{taken} Another process or thread wrote it meanwhile.") from error
        with contextlib.suppress(OSError):  # it is complete, whenever its name reaches the disk
            sync_to_disk(path.parent)
    except (OSError, sqlite3.Error) as error:
        full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        if full or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                errno.ENOSPC,
                f"{where}: no space is left on the disk. Nothing was written. Free some space, and "
                "try again",
                str(path),
            ) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _rename(temporary: Path, path: Path) -> None:
    """Renames a file or folder. Raises `FileExistsError` if the name is taken."""
    if temporary.is_file():
        try:
            os.link(temporary, path)  # os.rename would overwrite
            return
        except FileExistsError:
            raise
        except OSError:  # without hard links, a file that appears now would be overwritten
            if path.exists():
                raise FileExistsError(path) from None
    try:
        os.rename(temporary, path)
    except OSError as error:
        if path.exists():  # a folder is not overwritten, but the error differs between systems
            raise FileExistsError(path) from error
        raise


def sync_to_disk(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
