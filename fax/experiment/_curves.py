"""The numbers of a run, read from the files in its folder."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from fax import _arguments
from fax.experiment._folder import CLIENTS, METRICS
from fax.experiment._history import is_id

Curve = tuple[np.ndarray, np.ndarray]


def check_folder(where: str, name: str, folder: Any) -> Path:
    """Checks that a folder is that of a run."""
    path = Path(_arguments.path(where, name, folder))
    if not (path / METRICS).is_file():
        raise ValueError(
            f"{where}: {name} is {os.fspath(folder)!r}, which has no {METRICS}, expected the "
            "folder of a run that has logged something."
        )
    return path


def read(folder: Path) -> dict[str, Curve]:
    """The metrics of a run by name, each as the rounds that have a value, and these values."""
    rows = _rows(folder / METRICS)
    curves = {}
    if rows and "round" not in rows[0]:
        raise ValueError(f"{folder / METRICS} has no column round, expected that of a run.")
    for name in rows[0] if rows else ():
        own = [(int(row["round"]), float(row[name])) for row in rows if row[name]]
        if own and name != "round":
            rounds, values = zip(*own)
            curves[name] = (np.array(rounds), np.array(values))
    return curves


def read_clients(folder: Path) -> dict[str, np.ndarray]:
    """The last values of the clients' metrics, by name, and their ids, which are text."""
    rows = _rows(folder / CLIENTS) if (folder / CLIENTS).is_file() else []
    found = {}
    for name in rows[0] if rows else ():
        cells = [row[name] for row in rows if row[name]]
        found[name] = np.array(cells if is_id(name) else [float(cell) for cell in cells])
    return found


def _rows(path: Path) -> list[dict[str, str]]:
    """The lines of a table, without a last one that is not whole: a run may be writing it.

    All cells are numbers or empty, except for ids.
    """
    text = path.read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
    for number, row in enumerate(rows, 1):
        for name, cell in row.items():
            if name is None:  # of cells beyond the last column
                raise ValueError(f"{path}: row {number} has more cells than there are columns.")
            if not is_id(name) and not _is_number(cell, name == "round"):
                raise ValueError(
                    f"{path}: row {number} has {cell!r} in the column {name!r}, expected a number."
                )
    return rows


def _is_number(cell: str | None, whole: bool) -> bool:
    try:
        int(cell or "") if whole else float(cell or 0)
    except ValueError:
        return False
    return True


def against(curve: Curve, other: Curve) -> Curve:
    """A curve as a function of another one instead of rounds, where both have a value."""
    _, here, there = np.intersect1d(curve[0], other[0], return_indices=True)
    return other[1][there], curve[1][here]
