"""Where an experiment comes from: a task's name, a TOML file, or an object in a module."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fax.command import _modules, _values
from fax.command._errors import CommandError, mistakes
from fax.experiment import Config, Experiment, build, configure
from fax.experiment._build import placement
from fax.experiment._tables import read


@dataclasses.dataclass(frozen=True)
class Source:
    """An experiment that has not been built yet.

    Attributes:
      name: a short name, for folders and titles.
      config: its configuration, or None if it comes from a module.
      make: builds it. On a mesh, it is called under `jax.set_mesh`.
      mesh: the size of each mesh axis, or empty for all devices along ``axis``.
      axis: the placement of the participants.
    """

    name: str
    config: Config | None
    make: Callable[[], Experiment]
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    axis: str = "clients"

    def build(self) -> Experiment:
        """Builds the experiment. The errors of a user's module keep their tracebacks."""
        with contextlib.nullcontext() if self.config is None else mistakes():
            return self.make()


def of_arguments(args: argparse.Namespace) -> Source:
    """The experiment of SOURCE with the changes of the other arguments."""
    with mistakes():
        changes = changes_of(args)
        if _modules.is_name(args.source):
            if changes:
                raise ValueError(
                    f"{args.source} is made by a program. Change {', '.join(changes)} there."
                )
            return of_module(args.source)
        return of_tables(read(args.source), args.source, changes)


def changes_of(args: argparse.Namespace) -> dict[str, Any]:
    """The tables of ``--set``, ``--rounds`` and so on."""
    changes = _values.tables(args.set)
    for key in ("rounds", "seed"):
        if getattr(args, key) is not None:
            changes[key] = getattr(args, key)
    for key in ("algorithm", "aggregator"):
        if (name := getattr(args, key)) is not None:
            own = changes.get(key, {})
            if not isinstance(own, dict) or "name" in own:
                other = own["name"] if isinstance(own, dict) else own
                raise ValueError(f"--{key} {name} and --set {key}={other} are both given.")
            changes[key] = {"name": name, **own}
    return changes


def of_tables(found: Mapping[str, Any], where: str, changes: Mapping[str, Any]) -> Source:
    """The experiment of a configuration."""
    with mistakes():
        config = configure(found, changes, where=where)
    stem = Path(where).stem
    return Source(stem, config, lambda: build(config), config.mesh, placement(config))


def of_module(where: str) -> Source:
    """The experiment ``module:name``, an `Experiment` or a function that returns one."""

    def make() -> Experiment:
        found = _modules.load(where)
        if not isinstance(found, Experiment):
            raise CommandError(
                f"{where} is {found!r:.80}, expected a fax.experiment.Experiment, or a function "
                "that returns one."
            )
        config = {**(found.config or {}), "experiment": where}
        return dataclasses.replace(found, config=config)

    return Source(where.partition(":")[2], None, make)
