"""What the figures of runs have in common. They do without pyplot, which has global state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from fax.experiment import _shown
from fax.experiment._curves import Curve

_COLUMNS = 3  # the most panels of curves in a row
_LABELS = {"psnr": "PSNR (dB)"} | {kind: kind.upper() for kind in ("auc", "f1", "mae", "mse", "r2")}
X_LABELS = {"round": "round", "bits": "sent so far (bits)", "epsilon": "epsilon"}
_FEW = 60  # points, up to which each has a marker


def by_kind(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The metrics that figures show, by kind and by what they were measured on."""
    found: dict[str, dict[str, Any]] = {}
    for kind in _shown.kinds(values):
        for name, own in values.items():
            source, _, last = name.rpartition("/")
            if last == kind:
                found.setdefault(kind, {})[source or "training"] = own
    return found


def panels(columns: int, rows: int = 1, right: float = 0) -> tuple[Figure, list[Axes]]:
    """A figure of panels, row by row, and so many inches for a legend to the right of them."""
    figure = Figure(figsize=(4.5 * columns + right, 3.4 * rows))
    figure.set_layout_engine("constrained", wspace=0.08)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for own in axes:
        own.grid(alpha=0.3)
        own.set_axisbelow(True)
        own.spines[["top", "right"]].set_visible(False)
    return figure, axes


def grid(count: int, right: float = 0) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, at most three in a row, and inches for a legend."""
    rows = -(-count // _COLUMNS)
    figure, axes = panels(-(-count // rows), rows, right)
    for own in axes[count:]:
        own.remove()
    return figure, axes[:count]


def label(kind: str) -> tuple[str, int]:
    """What is written at the axis of a kind of metric, and its scale: accuracies are in percent."""
    if kind.endswith("accuracy"):
        return f"{kind.replace('_', ' ')} (%)", 100
    return _LABELS.get(kind, kind.replace("_", " ")), 1


def literal(text: str) -> str:
    """A text for a figure, in which matplotlib would take what is between dollars for math."""
    return text.replace("$", r"\$")


def plot(axes: Axes, points: Curve, x: str, kind: str, **style: Any) -> None:
    """Draws a metric, or epsilon, by rounds, bits or epsilon."""
    name, scale = label(kind)
    marker = "." if len(points[0]) <= _FEW else ""
    axes.plot(points[0], scale * points[1], marker=marker, linewidth=1.2, **style)
    axes.set(xlabel=X_LABELS[x], ylabel=name)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=x == "round"))
    if x == "bits":
        axes.xaxis.set_major_formatter(EngFormatter())


def histogram(axes: Axes, values: np.ndarray, kind: str, source: str) -> None:
    """Draws how many clients have which value. Clients without a finite value are left out."""
    name, scale = label(kind)
    finite = scale * values[np.isfinite(values)]
    axes.hist(finite, bins=int(np.clip(np.sqrt(len(finite)), 5, 40)), alpha=0.8)
    title = f"{source}: {len(finite)} clients"
    if len(finite):
        axes.axvline(finite.mean(), color="black", linestyle="--")
        title += f", mean {finite.mean():.4g} (dashed)"
    if missing := len(values) - len(finite):
        title += f"\n{missing} more without a finite value"
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel=name, ylabel="clients")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def save(figure: Figure, path: Path) -> Path:
    """Saves a figure as a whole: a reader never sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    figure.savefig(partial, dpi=150)
    os.replace(partial, path)
    return path
