"""Compares runs: a table of their last numbers, and one figure."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fax.experiment import _axes, _curves, _shown
from fax.experiment._curves import Curve
from fax.experiment._folder import CONFIG, flat
from fax.experiment._tables import read

Curves = Mapping[str, Curve]
# The legend: lines in a column, and inches of a letter and of what is left of the names.
_LINES, _LETTER, _HANDLE = 16, 0.08, 0.6


class Comparison(NamedTuple):
    """What `compare` returns.

    Attributes:
      table: the table, as text.
      figure: a figure of matplotlib, for ``figure.savefig(path)``. None if no run has logged a
        metric that is drawn.

    Example:

      >>> print(fax.experiment.Comparison("a table", None).table)
      a table
    """

    table: str
    figure: Figure | None


def compare(folders: Sequence[str | os.PathLike[str]]) -> Comparison:
    """Compares runs by what is in their folders.

    The table has a line for each run: the settings in which the runs differ, the number of rounds,
    and the last value of the loss and accuracy, of all metrics of evaluations that measure the
    model, of the bits sent and of epsilon. A star marks the best value, if the metric is one of
    those that fax has, or its name ends in "loss" or "error", or contains "accuracy". The figure
    has a curve for each run: the same metrics by round and, if all runs count bits, one of them by
    what was sent. They are those of an evaluation if there is one, and else those of training.

    Args:
      folders: the folders of the runs.

    Returns:
      The table and the figure.

    Raises:
      ValueError: if there is no folder, one is there twice, or one is not the folder of a run.

    Example:

      >>> import pathlib, tempfile
      >>> root = tempfile.TemporaryDirectory()
      >>> folders = [pathlib.Path(root.name, name) for name in ("a", "b")]
      >>> for folder, accuracy in zip(folders, (0.5, 0.75)):
      ...     folder.mkdir()
      ...     _ = (folder / "metrics.csv").write_text(f"round,test/accuracy\\n8,{accuracy}\\n")
      >>> print(fax.experiment.compare(folders).table)
      run  rounds  test/accuracy
      a         8            0.5
      b         8          0.75*
      >>> root.cleanup()
    """
    where = "fax.experiment.compare"
    if isinstance(folders, str | os.PathLike) or not folders:
        raise ValueError(f"{where}: folders is {folders!r:.80}, expected the folders of runs.")
    paths = [
        _curves.check_folder(where, f"folders[{i}]", own).resolve() for i, own in enumerate(folders)
    ]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise ValueError(f"{where}: folders has {os.fspath(twice[0])!r} twice.")
    names = _names(paths)
    runs = {name: _curves.read(path) for name, path in zip(names, paths, strict=True)}
    settings = _differences(_settings(paths))
    return Comparison(_table(runs, settings), _figure(runs))


def _names(paths: Sequence[Path]) -> list[str]:
    """Short names of folders that differ."""
    if len(paths) == 1:
        return [paths[0].name]
    parent = os.path.commonpath([path.parent for path in paths])
    return [os.path.relpath(path, parent) for path in paths]


def _settings(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The users' settings by their paths; if no run has any, those that `run` was called with."""
    tables = [read(own / CONFIG) if (own / CONFIG).is_file() else {} for own in folders]
    called = [own.pop("run", {}) for own in tables]
    for own in tables:
        own.pop("environment", None)
    return [flat(own) for own in (tables if any(tables) else called)]


def _differences(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The settings in which runs differ, with their values."""
    names = list(dict.fromkeys(name for own in settings for name in own))
    values = {name: [str(own.get(name, "-")) for own in settings] for name in names}
    return {name: own for name, own in values.items() if len(set(own)) > 1}


def _table(runs: Mapping[str, Curves], settings: Mapping[str, Sequence[str]]) -> str:
    """A line for each run, with a star at the best value of each metric."""
    rounds = [max((own[0][-1] for own in curves.values()), default=0) for curves in runs.values()]
    # Pairs, because a setting and a metric may have the same name, such as "bits".
    columns = [
        ("run", list(runs)),
        *((name, own) for name, own in settings.items() if name != "rounds"),
        ("rounds", [str(own) for own in rounds]),
    ]
    names = dict.fromkeys(name for curves in runs.values() for name in curves)
    kinds = _shown.kinds(names)
    for name in names:
        kind = _shown.kind_of(name)
        if kind in kinds or name in ("bits", "epsilon"):
            last = [own[name][1][-1] if name in own else np.nan for own in runs.values()]
            columns.append((name, _starred(last, _shown.best(kind))))
    rows = list(zip(*([name, *cells] for name, cells in columns), strict=True))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths
    return "\n".join(
        "  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]).rstrip() for row in rows
    )


def _starred(values: Sequence[float], choose: Callable | None) -> list[str]:
    """Numbers as text; those that are as good as the best one have a star."""
    finite = [x for x in values if np.isfinite(x)]
    best = choose(finite) if choose and finite and len(values) > 1 else None
    shown = ["-" if np.isnan(x) else f"{x:.4g}" for x in values]
    if best is None:
        return shown
    return [text + ("*" if x == best else " ") for text, x in zip(shown, values, strict=True)]


def _figure(runs: Mapping[str, Curves]) -> Figure | None:
    """A curve for each run: each metric by round, and one of them by bits."""
    kinds = {name: _axes.by_kind(curves) for name, curves in runs.items()}
    chosen: dict[str, str] = {}  # what a kind was measured on, in most of the runs
    for kind in _shown.kinds(name for curves in runs.values() for name in curves):
        sources = [source for own in kinds.values() for source in own.get(kind, ())]
        if sources:
            chosen[kind] = max(sources, key=lambda s: (sources.count(s), s != "training"))
    if not chosen:
        return None
    drawn = [("round", kind) for kind in chosen]
    if all("bits" in curves for curves in runs.values()):
        drawn.append(("bits", _shown.main(chosen)))

    columns = -(-len(runs) // _LINES)
    width = columns * (_LETTER * max(map(len, runs)) + _HANDLE)
    figure, panels = _axes.grid(len(drawn), right=width)
    colors = _colors(len(runs))
    for axes, (x, kind) in zip(panels, drawn, strict=True):
        for (name, own), color in zip(kinds.items(), colors, strict=True):
            points = own.get(kind, {}).get(chosen[kind])
            if points is not None:
                if x == "bits":
                    points = _curves.against(points, runs[name]["bits"])
                _axes.plot(axes, points, x, kind, color=color)
        axes.set_ylabel(f"{chosen[kind]} {axes.get_ylabel()}")
    lines = [
        Line2D([], [], color=color, label=_axes.literal(name)) for name, color in zip(runs, colors)
    ]
    figure.legend(
        handles=lines, loc="outside right center", ncols=columns, frameon=False, fontsize="small"
    )
    return figure


def _colors(count: int) -> list[Any]:
    """Colors that differ as much as they can."""
    if count <= 20:
        return list(colormaps["tab10" if count <= 10 else "tab20"](np.arange(count)))
    return list(colormaps["turbo"](np.linspace(0.05, 0.95, count)))
