"""Published files: downloaded once, resumed after an interruption, and checked every time.

Downloads are atomic: a file gets its name when all of it is on the disk and its checksum is right.
Until then it is a ``.part`` file, next to a record of the version of the server's file. A download
is resumed only from the same version. If no checksum is published, that of the first download is
recorded next to the file, and the file must have it from then on. The same holds for decompressed
files.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fax._lock import locked
from fax.data._atomic_write import sync_to_disk

_TIMEOUT = 30.0  # seconds without a byte
_ATTEMPTS = 5  # in a row without any progress
_PAUSE = 1.0  # seconds before the second attempt; doubled each time
_CHUNK = 1 << 18
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FINAL = (*_FULL, errno.EACCES, errno.EROFS, errno.ENETUNREACH)


class DownloadError(OSError):
    """A published file that cannot be downloaded, or is not the published version.

    The message says where to get the file, where to put it, and its checksum.
    """


@dataclass(frozen=True)
class Source:
    """A published file: its address, and its SHA-256 checksum if one is published."""

    url: str
    sha256: str | None = None

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """The folder for files: ``cache``, or else ``FAX_CACHE``, or else the user's cache folder."""
    if cache is None:
        cache = os.environ.get("FAX_CACHE")
    if cache:
        return Path(cache).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fax"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "fax/Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fax"


def files(folder: Path, *sources: Source) -> list[Path]:
    """The paths of published files, downloaded if necessary, with the right checksums."""
    paths = []
    for number, source in enumerate(sources):
        path = folder / source.name
        if not path.exists():
            missing = [s for s in sources[number:] if not (folder / s.name).exists()]
            _download(source, path, missing)
        fix = (
            "Remove it and the decompressed file, and load the task again, or download "
            f"{source.url} to that path."
        )
        check(path, source.sha256, fix)
        paths.append(path)
    return paths


def check(path: Path, published: str | None, fix: str) -> None:
    """Compares a file with the published checksum, or else with the recorded one."""
    record = record_of(path)
    expected, known = published, "published"
    if expected is None and record.exists():
        expected, known = (record.read_text().split() or [""])[0], f"in {record}"
    found = _sha256(path)
    if expected is None:
        # This is atomic, because another process may be reading it.
        new = record.with_name(f"{record.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            new.write_text(f"{found}  {path.name}\n")
            sync_to_disk(new)
            new.replace(record)
        finally:
            new.unlink(missing_ok=True)
    elif found != expected:
        raise DownloadError(
            f"{path} has the SHA-256 checksum {found}, but {expected} is {known}. The file is "
            f"damaged, or another version. {fix}"
        )


def record_of(path: Path) -> Path:
    """The file in which the checksum of a file is recorded."""
    return path.with_name(path.name + ".sha256")


def _download(source: Source, path: Path, missing: list[Source]) -> None:
    """Downloads a file to its path, or leaves no file there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(path):
            if path.exists():  # another process has downloaded it in the meantime
                return
            part = _Part(path, source.url)
            _receive(source, part)
            found = _sha256(part.path)
            if source.sha256 not in (None, found) and part.resumed:
                part.clear()  # its parts may be of different versions
                _receive(source, part)
                found = _sha256(part.path)
            if source.sha256 not in (None, found):
                part.clear()
                raise DownloadError(
                    f"the file from {source.url} has the SHA-256 checksum {found}, but "
                    f"{source.sha256} is published. It was removed.{_by_hand(path, missing)}"
                )
            part.finish()
    except DownloadError:
        raise
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "errno", None) in _FULL:
            raise OSError(
                errno.ENOSPC,
                f"fax.tasks: no space is left on the disk for {source.url}. Free some space, and "
                "load the task again, which resumes the download from the .part file",
                str(path),
            ) from error
        raise DownloadError(
            f"{source.name} cannot be downloaded from {source.url}: {_reason(error)}."
            f"{_by_hand(path, missing)}"
        ) from error


def _reason(error: Exception) -> str:
    reason = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
    return f"{reason}" or type(reason).__name__


def _by_hand(path: Path, missing: list[Source]) -> str:
    """How to fix it: which files to download by hand, and where to put them."""
    each = (
        f"\n  {path.parent / s.name}\n    from {s.url}\n"
        f"    SHA-256 {s.sha256 or 'not published; it is recorded when the file is first used'}"
        for s in missing
    )
    return (
        " Try again when there is a connection, or download by hand:"
        + "".join(each)
        + "\nTo use another folder, pass cache= or set the environment variable FAX_CACHE."
    )


class _Part:
    """The part of a file that has been received so far, and its version."""

    def __init__(self, path: Path, url: str) -> None:
        self.target, self.url = path, url
        self.path = path.with_name(path.name + ".part")
        self._origin = path.with_name(path.name + ".part.json")
        self.version: str | None = None
        self.total: int | None = None
        try:
            origin = json.loads(self._origin.read_text())
            if origin["url"] == url:
                self.version, self.total = origin["version"], origin["total"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self.resumed = self.size > 0
        if self.version is None or (self.total is not None and self.size > self.total):
            self.clear()

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def start(self, version: str | None, total: int | None) -> None:
        """Starts again, with another version of the file."""
        self.clear()
        self.version, self.total = version, total
        self._origin.write_text(json.dumps({"url": self.url, "version": version, "total": total}))

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)
        self._origin.unlink(missing_ok=True)
        self.version, self.total, self.resumed = None, None, False

    def finish(self) -> None:
        """Renames the complete file to its name."""
        sync_to_disk(self.path)
        record_of(self.target).unlink(missing_ok=True)
        self.path.replace(self.target)
        self._origin.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            sync_to_disk(self.target.parent)


def _receive(source: Source, part: _Part) -> None:
    """Receives a whole file, over as many connections as necessary."""
    best, failures = part.size, 0
    while part.total is None or part.size < part.total:
        try:
            _connect(source, part)
            if part.total is None:  # chunked, and complete
                return
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            offline = isinstance(reason, socket.gaierror) and not best
            if offline or getattr(reason, "errno", None) in _FINAL:
                raise
            if isinstance(error, urllib.error.HTTPError):
                error.close()
                if error.code == 416:  # the server's file has changed
                    part.clear()
                elif error.code < 500 and error.code not in (408, 429):
                    raise
            # Only bytes beyond the most so far count, because some servers start over each time.
            failures = 0 if part.size > best else failures + 1
            best = max(best, part.size)
            if failures >= _ATTEMPTS:
                raise
            time.sleep(_PAUSE * 2 ** max(failures - 1, 0))


def _connect(source: Source, part: _Part) -> None:
    """Receives as much as one connection sends."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "fax"}
    if part.size and part.version:
        headers |= {"Range": f"bytes={part.size}-", "If-Range": part.version}
    request = urllib.request.Request(source.url, headers=headers)
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        if response.status == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers["Content-Range"] or "")
            if span and part.total is None:
                part.total = int(span[2])
            if not span or (int(span[1]), int(span[2])) != (part.size, part.total):
                part.clear()
                raise http.client.HTTPException("the server sent another range than asked for")
            part.resumed = True
        else:
            # A weak ETag may stand for files that differ in their bytes.
            tag = response.headers["ETag"] or ""
            version = response.headers["Last-Modified"] if tag[:2] in ("", "W/") else tag
            length = response.headers["Content-Length"]
            chunked = getattr(response, "chunked", False)
            if length is None and not chunked and source.sha256 is None:
                raise http.client.HTTPException("the server does not say how long the file is")
            part.start(version, int(length) if length is not None else None)
        with part.path.open("ab") as file, _progress(source.name, part) as progress:
            while chunk := response.read1(_CHUNK):
                file.write(chunk)
                file.flush()
                progress(len(chunk))
    if part.total is not None and part.size != part.total:
        raise http.client.IncompleteRead(b"", part.total - part.size)


@contextlib.contextmanager
def _progress(name: str, part: _Part) -> Iterator[Any]:
    """Yields a function to call with numbers of received bytes. With tqdm it shows a bar."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda count: None
        return
    with tqdm(
        desc=name, total=part.total, initial=part.size, unit="B", unit_scale=True, disable=None
    ) as bar:
        yield bar.update


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Waits until no other process or thread downloads the file, and locks them out.

    The lock ends with the process that holds it, whether or not the lock file exists.
    """
    with path.with_name(f".{path.name}.lock").open("a+b") as file:
        while not locked(file):
            time.sleep(0.1)
        yield
