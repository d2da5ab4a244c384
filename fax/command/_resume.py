"""``fax resume``: continues a run."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from fax.command import _modules, _run, _source
from fax.command._errors import CommandError, mistakes
from fax.command._source import Source
from fax.experiment._outputs import logged
from fax.experiment._tables import read


def command(args: argparse.Namespace) -> int:
    """Trains from the last checkpoint in the folder to the end."""
    folder = Path(args.folder)
    source = saved(folder, {} if args.rounds is None else {"rounds": args.rounds})
    with mistakes():
        done = logged(folder)
    if args.rounds is not None and args.rounds < done:
        raise CommandError(
            f"--rounds is {args.rounds}, but the run in {folder} has {done} already. Pass a larger "
            "number to continue it, or leave out --rounds."
        )
    result = _run.train(source, folder, quiet=args.quiet, force=args.force)
    _run.show(source, folder, result)
    return 0


def saved(folder: Path, changes: dict | None = None) -> Source:
    """The experiment of a folder, as its ``config.toml`` describes it."""
    path = folder / "config.toml"
    if not path.is_file():
        if (folder / "sweep.csv").is_file():
            raise CommandError(f"{folder} has a sweep. Run the same fax sweep again.")
        raise CommandError(f"{folder} is not the folder of a run: it has no config.toml.")
    with mistakes():
        found = read(path)
    for own in ("run", "environment"):  # what fax.experiment.run writes there
        found.pop(own, None)
    if isinstance(module := found.get("experiment"), str):
        if not _modules.is_name(module):
            raise CommandError(f"{path}: experiment is {module!r}, which is not module:name.")
        if changes:
            raise CommandError(f"{module} is made by a program. Change rounds there.")
        return _source.of_module(module)
    if "grid" in found:
        raise CommandError(f"{folder} is a part of a sweep. Run the same fax sweep again.")
    if "task" not in found:
        raise CommandError(
            f"{folder} has a run that was started by a program, not by this command. Run the "
            "program again: fax.experiment.run continues from the last checkpoint in the folder, "
            "and fax.experiment.restore reads it."
        )
    source = _source.of_tables(found, str(path), changes or {})
    assert source.config is not None
    return dataclasses.replace(source, name=source.config.task["name"])
