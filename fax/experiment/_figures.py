"""The figures of a run, drawn from the files in its folder alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fax.experiment import _axes, _curves, _shown
from fax.experiment._curves import Curve


def draw(folder: str | os.PathLike[str]) -> list[Path]:
    """Draws the figures of a run, finished or not, into the folder ``figures`` of its folder.

    ``rounds.png`` has by round the loss, the accuracy and PSNR if there are any, and all metrics of
    evaluations that measure the model. ``bits.png`` has them by what has been sent. ``clients.png``
    has histograms of the clients' metrics, as they were last measured. ``epsilon.png`` has epsilon
    by round, and the accuracy, or else another of these metrics, by epsilon. Figures for which a
    run has no numbers are left out.

    Args:
      folder: the folder of the run.

    Returns:
      The paths of the figures.

    Raises:
      ValueError: if ``folder`` is not the folder of a run.

    Example:

      >>> import pathlib, tempfile
      >>> folder = tempfile.TemporaryDirectory()
      >>> lines = "round,loss,test/accuracy\\n1,2.5,0.3\\n2,1.5,0.6\\n"
      >>> _ = pathlib.Path(folder.name, "metrics.csv").write_text(lines)
      >>> [path.name for path in fax.experiment.draw(folder.name)]
      ['rounds.png']
      >>> folder.cleanup()
    """
    path = _curves.check_folder("fax.experiment.draw", "folder", folder)
    drawn = figures(_curves.read(path), _curves.read_clients(path))
    return [_axes.save(own, path / "figures" / f"{name}.png") for name, own in drawn.items()]


def figures(curves: Mapping[str, Curve], clients: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    """The figures, by name."""
    found: dict[str, Figure] = {}
    kinds, of_clients = _axes.by_kind(curves), _axes.by_kind(clients)
    if kinds:
        found["rounds"] = _lines("round", kinds)
    if kinds and "bits" in curves:
        found["bits"] = _lines("bits", _as_functions_of(curves["bits"], kinds))
    if of_clients:
        found["clients"] = _histograms(of_clients)
    if "epsilon" in curves:
        found["epsilon"] = _epsilon(curves["epsilon"], kinds)
    return found


def _lines(x: str, kinds: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """A panel with the losses, one with the accuracies, and so on."""
    figure, panels = _axes.grid(len(kinds))
    for axes, (kind, own) in zip(panels, kinds.items(), strict=True):
        for source, points in own.items():
            _axes.plot(axes, points, x, kind, label=source)
        axes.legend(frameon=False, fontsize="small")
    return figure


def _as_functions_of(
    other: Curve, kinds: Mapping[str, Mapping[str, Curve]]
) -> dict[str, dict[str, Curve]]:
    """All curves against another metric instead of rounds."""
    return {
        kind: {source: _curves.against(curve, other) for source, curve in own.items()}
        for kind, own in kinds.items()
    }


def _histograms(kinds: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """A row for each kind of metric, with a panel for each evaluation."""
    columns = max(map(len, kinds.values()))
    figure, panels = _axes.panels(columns, rows=len(kinds))
    for row, (kind, own) in enumerate(kinds.items()):
        at = panels[row * columns :][:columns]
        for axes, (source, values) in zip(at, own.items()):
            name = "last cohort" if source == "clients" else source
            _axes.histogram(axes, values, kind, name)
        for axes in at[len(own) :]:
            axes.remove()
    return figure


def _epsilon(curve: Curve, kinds: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """Epsilon by round, and what was reached at which epsilon."""
    figure, panels = _axes.panels(1 + bool(kinds))
    _axes.plot(panels[0], curve, "round", "epsilon")
    if kinds:
        kind = _shown.main(kinds)
        for source, points in kinds[kind].items():
            at = _curves.against(points, curve)
            _axes.plot(panels[1], at, "epsilon", kind, label=source)
        panels[1].legend(frameon=False, fontsize="small")
    return figure
