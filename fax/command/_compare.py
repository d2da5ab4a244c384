"""``fax compare``: a table and a figure of several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

import fax.experiment
from fax.command._errors import mistakes


def command(args: argparse.Namespace) -> int:
    """Prints the table, and the path of the figure."""
    with mistakes():
        found = fax.experiment.compare(args.folders)
        print(found.table)
        if found.figure is not None:
            path = Path(args.figure)
            path.parent.mkdir(parents=True, exist_ok=True)
            found.figure.savefig(path, dpi=150)
            print(f"Figure: {path}")
    return 0
