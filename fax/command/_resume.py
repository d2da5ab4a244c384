"""``fax resume``: continues a run."""

from __future__ import annotations

import argparse
import dataclasses
import tomllib
from pathlib import Path

from fax.command import _run, _source
from fax.command._errors import CommandError, mistakes
from fax.command._source import Source


def command(args: argparse.Namespace) -> int:
    """Trains from the last checkpoint in the folder to the end."""
    folder = Path(args.folder)
    source = saved(folder, {} if args.rounds is None else {"rounds": args.rounds})
    result = _run.train(source, folder, quiet=args.quiet, force=args.force)
    _run.show(source, folder, result)
    return 0


def saved(folder: Path, changes: dict | None = None) -> Source:
    """The experiment of a folder, as its ``config.toml`` describes it."""
    path = folder / "config.toml"
    if not path.is_file():
        raise CommandError(f"{folder} is not the folder of a run: it has no config.toml.")
    with mistakes():
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    for own in ("run", "environment"):  # what fax.experiment.run writes there
        found.pop(own, None)
    if "experiment" in found:
        if changes:
            raise CommandError(f"{found['experiment']} is made by a program. Change rounds there.")
        return _source.of_module(found["experiment"])
    if "grid" in found:
        raise CommandError(f"{folder} is a part of a sweep. Run the same fax sweep again.")
    if "task" not in found:
        raise CommandError(
            f"{folder} has a run that was started by a program, not by this command. Run the "
            "program again: fax.experiment.run continues from the last checkpoint in the folder."
        )
    source = _source.of_tables(found, str(path), changes or {})
    return dataclasses.replace(source, name=found["task"]["name"])
