"""Decompression with a limit, so that a small file cannot fill the memory or the disk.

By default, compressed data may grow to 256 MiB, or to 100 times their size if that is more. Real
data stay far below that, but malicious files can grow a thousandfold.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from fax import _arguments
from fax.data._protocol import DataError

_LEAST, _RATIO = 1 << 28, 100
_CHUNK = 1 << 16


def check_max_bytes(where: str, max_bytes: Any) -> int | None:
    """Checks the argument ``max_bytes``."""
    if max_bytes is None:
        return None
    return _arguments.count(where, "max_bytes", max_bytes, error=DataError)


def size_limit(max_bytes: int | None, stored: int) -> int:
    """The most bytes that ``stored`` compressed bytes may decompress to."""
    return max(_LEAST, _RATIO * stored) if max_bytes is None else max_bytes


def check_size(what: str, size: int, max_bytes: int | None, stored: int, more: str = "") -> None:
    """Checks the size that something has, or says it has, when it is decompressed."""
    most = size_limit(max_bytes, stored)
    if size > most:
        rule = "256 MiB, or 100 times as much if that is more" if max_bytes is None else "max_bytes"
        raise DataError(
            f"{what}: {stored} compressed bytes become {more}{size}. The limit is {most} bytes "
            f"({rule}). If you trust the data, pass a larger max_bytes."
        )


def decompress_zlib(what: str, data: bytes, max_bytes: int | None) -> bytes:
    """The content of a zlib stream. Raises `zlib.error` unless there is exactly one."""
    most, stream = size_limit(max_bytes, len(data)), zlib.decompressobj()
    content = stream.decompress(data, most + 1)
    check_size(what, len(content), max_bytes, len(data), "at least ")
    if not stream.eof or stream.unused_data:
        raise zlib.error("the compressed data are incomplete, or other data follow them")
    return content


class LZMAReader:
    """Reads an ``.lzma`` or ``.xz`` file. Raises `lzma.LZMAError` or `EOFError` for damage."""

    def __init__(self, path: Path, max_bytes: int | None) -> None:
        import lzma  # some Pythons are built without it

        self._path, self._max_bytes = path, max_bytes
        self._stored, self._size = path.stat().st_size, 0
        # The header says how much memory decompression needs, all of which is allocated at once.
        self._memory = size_limit(max_bytes, self._stored) + (1 << 26)
        self._new = lambda: lzma.LZMADecompressor(memlimit=self._memory)
        self._stream = self._new()
        self._file = path.open("rb")

    def read(self, size: int = _CHUNK) -> bytes:
        """Up to ``size`` bytes, or none at the end."""
        while True:
            data = b""
            if self._stream.eof:  # another stream may follow, after zeros
                data = self._stream.unused_data.lstrip(b"\0") or self._file.read(_CHUNK)
                if not data:
                    return b""
                if not data.strip(b"\0"):
                    continue
                data, self._stream = data.lstrip(b"\0"), self._new()
            elif self._stream.needs_input:
                data = self._file.read(_CHUNK)
                if not data:
                    raise EOFError("the end is missing")
            if content := self._stream.decompress(data, size):
                self._size += len(content)
                where = str(self._path)
                check_size(where, self._size, self._max_bytes, self._stored, "at least ")
                return content

    def __enter__(self) -> LZMAReader:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
