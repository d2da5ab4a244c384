"""``fax run``: trains, and prints the results and where they are."""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

import fax.experiment
from fax.aggregators import PrivacyBudgetError
from fax.command import _devices, _processes, _source
from fax.command._errors import FAILED, INTERRUPTED, TERMINATED, CommandError
from fax.command._source import Source
from fax.experiment import _shown
from fax.experiment._config import Config
from fax.experiment._outputs import Process0Error

_SAVED = "the run was interrupted, and has saved a checkpoint. To continue:"


def command(args: argparse.Namespace) -> int:
    """Trains the experiment of SOURCE."""
    source = _source.of_arguments(args)
    if args.folder:
        folder = Path(args.folder)
        result = train(source, folder, quiet=args.quiet, force=args.force)
    else:
        folder, result = _in_new_folder(source, quiet=args.quiet, force=args.force)
    show(source, folder, result)
    if source.config is not None:  # the settings of a module cannot be changed from the shell
        print("Try next:")
        changes = [text for text in args.set if not text.startswith(("algorithm", "server"))]
        same = again(args, changes, ("aggregator", "seed", "rounds"))
        for line in _next(args.source, folder, source.config, same):
            print(f"  {line}")
    return 0


def _in_new_folder(source: Source, *, quiet: bool, force: bool) -> tuple[Path, Any]:
    """Runs an experiment in a folder that no other run has, also if several start at once."""
    _devices.connected(source.mesh, source.axis)  # before processes agree on anything
    while True:
        folder = new_folder(Path("runs", source.name))
        try:
            return folder, train(source, folder, quiet=quiet, force=force)
        except CommandError as error:
            taken = isinstance(error.__cause__, fax.experiment.FolderInUseError)
            if not taken or jax.process_count() > 1:
                raise
            print(f"Another run has just begun in {folder}.")


def again(args: argparse.Namespace, changes: Sequence[str], names: Iterable[str]) -> str:
    """The arguments of a command like the present one: what is in ``--set``, and others by name."""
    others = {name: getattr(args, name, None) for name in names}
    words = [f"--{name} {shlex.quote(str(own))}" for name, own in others.items() if own is not None]
    return " ".join(["", *words, *(["--set"] if changes else []), *map(shlex.quote, changes)])


def new_folder(first: Path) -> Path:
    """The first of runs/name, runs/name-2, runs/name-3, ... that does not exist in process 0."""

    def named(number: int) -> Path:
        return first.with_name(f"{first.name}-{number}") if number > 1 else first

    free = next(number for number in itertools.count(1) if not named(number).exists())
    return named(_processes.agreed(free))


def train(source: Source, folder: Path, resume: str = "", *, quiet: bool, force: bool) -> Any:
    """Runs an experiment in a folder, from the last checkpoint there if it has one.

    Args:
      source: the experiment.
      folder: of the run.
      resume: how to continue after an interruption. Default: ``fax resume``.
      quiet: whether there is no progress bar.
      force: whether settings may differ from those in the folder.
    """
    saved = f"{_SAVED} {resume or f'fax resume {quoted(folder)}'}"
    mesh = _devices.connected(source.mesh, source.axis)
    with jax.set_mesh(mesh):
        experiment = source.build()
        axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
        kind = mesh.devices.flat[0].platform
        devices = _counted(mesh.size, f"{kind} device")
        print(f"{_title(source, experiment)}, on {devices} ({axes}), in {folder}")
        try:
            with experiment.cohorts:
                return experiment.run(folder, progress=not quiet, force=force)
        except (fax.experiment.FolderInUseError, Process0Error) as error:
            raise CommandError(_text(error)) from error
        except ValueError as error:
            if not str(error).startswith("fax."):  # a mistake that fax has not found itself
                raise
            raise CommandError(_text(error)) from error
        except (fax.experiment.NotFiniteError, PrivacyBudgetError, OSError) as error:
            raise CommandError(_text(error), FAILED) from error
        except KeyboardInterrupt as interrupt:
            if not interrupt.args:  # the second Ctrl-C, or one before the run began
                raise
            raise CommandError(saved, INTERRUPTED) from None
        except SystemExit as left:
            if left.code != TERMINATED:
                raise
            raise CommandError(saved, TERMINATED) from None


def _text(error: Exception) -> str:
    """A message with the command's names of arguments."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = text.removeprefix("fax.experiment.run: ").replace("force=True", "--force")
    return text.replace("pass on_nan='restore'", "use --set on_nan=restore")


def _title(source: Source, experiment: fax.experiment.Experiment) -> str:
    name = f"{source.name}: {experiment.algorithm!r}".replace("Algorithm(", "").replace(")", "")
    return f"{name}, {_counted(experiment.rounds, 'round')}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def show(source: Source, folder: Path, result: Any) -> None:
    """Prints the last results, and the figures."""
    last: dict[str, Any] = {}
    for row in result.history:
        last |= row
    kinds = [*_shown.kinds(last), "epsilon"]
    numbers = [
        f"{_name(key)} {_number(key, value)}"
        for key, value in last.items()
        if _shown.kind_of(key) in kinds
    ]
    print(f"After {_counted(last.get('round', 0), 'round')}: {', '.join(numbers)}")
    if result.reason:
        print(f"Stopped early: {result.reason}")
    for figure in sorted(Path(folder, "figures").glob("*.png")):
        print(f"Figure: {figure}")


def _name(key: str) -> str:
    return f"training {key}" if key in ("loss", "accuracy") else key.replace("/", " ")


def _number(key: str, value: float) -> str:
    return f"{value:.1%}" if key.endswith("accuracy") else f"{value:.4g}"


def quoted(folder: Path) -> str:
    """A path as an argument of a shell."""
    return shlex.quote(os.fspath(folder))


def _next(source: str, folder: Path, config: Config, same: str = "") -> list[str]:
    """Three commands to try next. SCAFFOLD refuses private aggregators."""
    private = any(part["name"] in ("gaussian", "laplace", "dp_ftrl") for part in config.aggregator)
    name, options = ("fedprox", " --set algorithm.mu=0.1") if private else ("scaffold", "")
    if config.algorithm["name"] == name:
        name, options = "fedavg", ""
    other = quoted(new_folder(folder.with_name(f"{folder.name}-{name}")))
    return [
        f"fax evaluate {quoted(folder)} --on train",
        f"fax run {shlex.quote(source)} --algorithm {name}{options}{same} --folder {other}",
        f"fax compare {quoted(folder)} {other}",
    ]
