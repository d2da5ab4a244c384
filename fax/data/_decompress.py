"""Decompression with a limit: a small file cannot fill the memory or the disk.

Where the user sets none, what is compressed may grow to 256 MiB, or a hundred times its size if
that is more. Real data stay far below; made for the purpose, they grow a thousandfold.
"""

from __future__ import annotations

import operator
import zlib
from pathlib import Path
from typing import Any

from fax.data._protocol import DataError

_LEAST, _RATIO = 1 << 28, 100
_CHUNK = 1 << 16


def check_max_bytes(where: str, max_bytes: Any) -> int | None:
    """Checks the argument of that name."""
    if max_bytes is None:
        return None
    try:
        number = 0 if isinstance(max_bytes, bool) else operator.index(max_bytes)
    except TypeError:
        number = 0
    if number < 1:
        raise DataError(f"{where}: max_bytes is {max_bytes!r:.80}, expected a positive int.")
    return number


def limit(max_bytes: int | None, stored: int) -> int:
    """How many bytes something may become that has ``stored`` when it is compressed."""
    return max(_LEAST, _RATIO * stored) if max_bytes is None else max_bytes


def check_size(what: str, size: int, max_bytes: int | None, stored: int, more: str = "") -> None:
    """Checks what something grows to, or says that it does."""
    most = limit(max_bytes, stored)
    if size > most:
        rule = "256 MiB, or 100 times that if it is more" if max_bytes is None else "max_bytes"
        raise DataError(
            f"{what}: {stored} compressed bytes become {more}{size}. The limit is {most} bytes "
            f"({rule}). If the data can be trusted, pass a larger max_bytes."
        )


def inflated(what: str, data: bytes, max_bytes: int | None) -> bytes:
    """The content of a zlib stream. Raises `zlib.error` if there is not just one."""
    most, stream = limit(max_bytes, len(data)), zlib.decompressobj()
    content = stream.decompress(data, most + 1)
    check_size(what, len(content), max_bytes, len(data), "at least ")
    if not stream.eof or stream.unused_data:
        raise zlib.error("the compressed data are incomplete, or something follows them")
    return content


class LZMA:
    """Reads an ``.lzma`` or ``.xz`` file. Raises `lzma.LZMAError` or `EOFError` for damage."""

    def __init__(self, path: Path, max_bytes: int | None) -> None:
        import lzma  # some Pythons are built without it

        self._path, self._max_bytes = path, max_bytes
        self._stored, self._size = path.stat().st_size, 0
        # The header says how much memory decompression takes, and it is taken at once.
        self._memory = limit(max_bytes, self._stored) + (1 << 26)
        self._new = lambda: lzma.LZMADecompressor(memlimit=self._memory)
        self._stream = self._new()
        self._file = path.open("rb")

    def read(self, size: int = _CHUNK) -> bytes:
        """Up to ``size`` bytes; none at the end."""
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

    def __enter__(self) -> LZMA:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
