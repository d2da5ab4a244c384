"""`metrics.csv`: a line for each round, with the metrics of the algorithm and evaluations."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax.numpy as jnp
import numpy as np

from fax import _arguments
from fax.data._atomic_write import sync_to_disk

Row = Mapping[str, Any]


def plain(value: Any, name: str) -> float | int:
    """A scalar as a number of Python.

    A float of 32 bits or less is the shortest decimal that stands for it: 0.1, and not
    0.10000000149011612.

    Args:
      value: an int, a float, a bool, or an array of one of these without dimensions.
      name: of the metric, for messages.

    Raises:
      ValueError: if it is something else.
    """
    if not isinstance(name, str):
        raise ValueError(f"fax.experiment.run: a metric has the name {name!r}, expected a string.")
    number = np.asarray(value)
    if number.ndim == 0 and number.dtype.kind in "iub":
        return int(number)
    if number.ndim or not _is_float(number.dtype):
        raise ValueError(
            f"fax.experiment.run: the metric {name!r} is {_arguments.shown(value)}, expected a "
            "number."
        )
    return float(number) if number.dtype.itemsize > 4 else float(str(np.float32(number)))


def numeric(value: Any, name: str) -> np.ndarray:
    """What an evaluation returned for several clients: numbers, or their ids, which may be text.

    Raises:
      ValueError: if it is something else, which `read_clients` could not read again.
    """
    array = np.asarray(value)
    if not (is_id(name) or array.dtype.kind in "iub" or _is_float(array.dtype)):
        raise ValueError(
            f"fax.experiment.run: the metric {name!r} is {_arguments.shown(array)}, expected "
            "numbers. Only ids of clients may be text: give them the name 'id'."
        )
    return array


def is_id(name: str) -> bool:
    """Whether a column of ``clients.csv`` has the ids of clients."""
    return name.rpartition("/")[2] == "id"


def _is_float(dtype: np.dtype) -> bool:
    # NumPy's kind of the floats that it does not have is "V".
    return dtype.kind == "f" or bool(jnp.issubdtype(dtype, np.floating))


class Table:
    """A CSV file with a column for each metric, to which rows are appended.

    A line is in the file when `append` returns. Lines are only written whole; what a process that
    was killed has left of one, and lines of rounds that are repeated, are removed by `rewrite`. A
    metric that comes up later gets a new column, for which the whole file is written again.

    Args:
      path: of the file.
    """

    def __init__(self, path: Path):
        self._path = path
        self._columns: list[str] = ["round"]
        self._file: TextIO | None = None

    def rewrite(self, rows: Sequence[Row]) -> None:
        """Replaces the file by one with these rows, atomically."""
        self.close()
        self._columns = _columns(["round"], rows)
        replace(self._path, _text([self._columns, *(self._cells(row) for row in rows)]))
        with _written(self._path):
            self._file = open(self._path, "a", encoding="utf-8", newline="")  # noqa: SIM115

    def append(self, rows: Sequence[Row], before: Sequence[Row]) -> None:
        """Adds rows to the file, which has those ``before``."""
        if len(_columns(self._columns, rows)) > len(self._columns) or self._file is None:
            self.rewrite([*before, *rows])
            return
        with _written(self._path):
            self._file.write(_text([self._cells(row) for row in rows]))
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        file, self._file = self._file, None
        if file is not None:
            with _written(self._path):  # what could not be written before is tried again
                file.close()

    def _cells(self, row: Row) -> list[Any]:
        return [row.get(name, "") for name in self._columns]


def replace(path: Path, text: str, *, sync: bool = True) -> None:
    """Writes a file such that it has its old content or the new one.

    With ``sync`` this also holds if the machine crashes. It then waits for the disk, which may take
    long while a checkpoint is being written. Ids of clients that are not text, with lone surrogates
    for their bytes, are written with escapes.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with _written(path):
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
        if sync:
            sync_to_disk(temporary)
        os.replace(temporary, path)


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    """Raises an OSError that says which file of the run could not be written, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"fax.experiment.run: {path.name} could not be written ({error.strerror}). Free some "
            "space on the disk, or allow writing there, and start the run again, which continues "
            "from its newest checkpoint",
            os.fspath(path),
        ) from error


def _columns(known: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """The names of all metrics, in the order in which they came up."""
    return list(dict.fromkeys([*known, *(name for row in rows for name in row)]))


def _text(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def text_of(columns: Mapping[str, np.ndarray]) -> str:
    """Arrays [n] of numbers or text as CSV, a column each. Shorter ones end with empty cells."""
    own = {
        name: [x if isinstance(x, str) else plain(x, name) for x in array]
        for name, array in columns.items()
        if array.ndim == 1
    }
    rows = itertools.zip_longest(*own.values(), fillvalue="")
    return _text([list(own), *rows])
