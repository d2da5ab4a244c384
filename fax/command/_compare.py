"""``fax compare``: a table and a figure of several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

import fax.experiment
from fax.command._errors import mistakes
from fax.experiment._folder import METRICS


def command(args: argparse.Namespace) -> int:
    """Prints the table, and the path of the figure."""
    # runs/* also has the figure of the last comparison, and folders of sweeps.
    others = [f for f in args.folders if Path(f).exists() and not Path(f, METRICS).exists()]
    folders = [folder for folder in args.folders if folder not in others]
    if others and folders:
        print(f"Left out, because no run is there: {', '.join(others)}")
    with mistakes():
        found = fax.experiment.compare(folders or others)
        print(found.table)
        if found.figure is not None:
            path = Path(args.figure)
            path.parent.mkdir(parents=True, exist_ok=True)
            found.figure.savefig(path, dpi=150)
            print(f"Figure: {path}")
    return 0
