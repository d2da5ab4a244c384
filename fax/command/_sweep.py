"""``fax sweep``: trains with every combination of some settings, and finds the best."""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from fax._nearest import did_you_mean
from fax.command import _modules, _processes, _run, _source
from fax.command._errors import FAILED, WRONG, CommandError, mistakes
from fax.command._source import Source
from fax.command._sweep_figure import figure
from fax.command._values import assignment, grid, put
from fax.experiment import _axes, _shown
from fax.experiment._build import placement
from fax.experiment._config import Config, configure
from fax.experiment._folder import CONFIG
from fax.experiment._sweep import Setting, label, sweep, traceable
from fax.experiment._tables import merged, read


def command(args: argparse.Namespace) -> int:
    """Trains all combinations, and prints a table."""
    if _modules.is_name(args.source):
        raise CommandError(
            f"{args.source} is made by a program. Sweep over its settings there, with a folder for "
            "each run, and then use fax compare."
        )
    with mistakes():
        # Without the grid, the configuration may be incomplete.
        tables = merged(read(args.source), _source.changes_of(args))
        plan = _plan(tables, grid(args.grid), args.source)
    source = Path(args.source).stem
    _processes.connect()
    root = Path(args.folder) if args.folder else Path("runs", f"{source}-sweep")
    results: list[tuple[Setting, dict[str, float]]] = []
    for number, (fixed, config, settings) in enumerate(plan, 1):
        name = label(fixed) or "all"
        print(f"Part {number} of {len(plan)}: {name}, {len(settings)} at once")
        part = Source(
            source,
            config,
            functools.partial(sweep, config, settings),
            config.mesh,
            placement(config),
        )
        again = "run the same fax sweep again"
        _same_grid(root / name, settings)
        try:
            result = _run.train(part, root / name, again, quiet=args.quiet, force=args.force)
        except CommandError as error:
            if error.code not in (FAILED, WRONG) or len(plan) == 1:
                raise
            if results:  # the parts before this one are done
                _save(root / "sweep.csv", results)
                _show(args, root, results)
            raise CommandError(f"part {number}, {name}: {error}", error.code) from error
        results += _last(result.history, fixed, settings)
    _save(root / "sweep.csv", results)
    return _show(args, root, results)


def _same_grid(folder: Path, settings: Sequence[Setting]) -> None:
    """Refuses other values than those in the folder. Their models are in one array."""
    path = folder / CONFIG
    before = read(path).get("grid", {}) if path.is_file() else {}
    now = {key: [setting[key] for setting in settings] for key in settings[0]}
    if isinstance(before, Mapping) and before and before != now:
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        raise CommandError(
            f"{folder} has a sweep with another grid: "
            + "; ".join(f"{key} was {before.get(key)}, and is {now.get(key)}" for key in changed)
            + ". Pass another --folder, with the new values alone if you have results for the rest."
        )


def _plan(
    tables: Mapping[str, Any], values: Mapping[str, list[Any]], where: str
) -> list[tuple[Setting, Config, list[Setting]]]:
    """The parts of a sweep: a fixed setting, its configuration, and the settings trained at once.

    All configurations are checked before anything is run.
    """

    def configured(setting: Setting) -> Config:
        changes: dict[str, Any] = {}
        for key, value in setting.items():
            changes = put(changes, key, value)
        return configure(tables, changes, where=where)

    parts = []
    # Which numbers may be traced depends on the algorithm, which may be in the grid, too.
    numbers = {k: own for k, own in values.items() if k.split(".")[0] in ("client", "server")}
    numbers |= {k: own for k, own in values.items() if k.startswith("algorithm.")}
    for outer in _product({k: own for k, own in values.items() if k not in numbers}):
        config = configured({**outer, **{k: own[0] for k, own in numbers.items()}})
        traced = {k: own for k, own in numbers.items() if traceable(config, k, own)}
        for inner in _product({k: own for k, own in numbers.items() if k not in traced}):
            fixed = {**outer, **inner}
            settings = _product(traced)
            first, *_ = [configured({**fixed, **setting}) for setting in settings]
            parts.append((fixed, first, settings))
    return parts


def _product(values: Mapping[str, Sequence[Any]]) -> list[Setting]:
    return [dict(zip(values, each)) for each in itertools.product(*values.values())]


def _last(
    history: Sequence[Mapping[str, Any]], fixed: Setting, settings: Sequence[Setting]
) -> list[tuple[Setting, dict[str, float]]]:
    """The last metrics of each setting in the history of a part."""
    last: dict[str, Any] = {}
    for row in history:
        last |= row
    found = []
    for setting in settings:
        own = label(setting)
        mine = {
            "/".join(part for part in name.split("/") if part != own): value
            for name, value in last.items()
            if not own or own in name.split("/")
        }
        found.append(({**fixed, **setting}, mine))
    return found


def _save(path: Path, results: list[tuple[Setting, dict[str, float]]]) -> None:
    if jax.process_index():
        return
    rows = [{**setting, **metrics} for setting, metrics in results]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _show(
    args: argparse.Namespace, root: Path, results: list[tuple[Setting, dict[str, float]]]
) -> int:
    """Prints the table with the best setting, and how to train with it."""
    names = list(dict.fromkeys(name for _, metrics in results for name in metrics))
    if args.by not in names:
        raise CommandError(f"there is no metric {args.by!r}. {did_you_mean(args.by, names)}")
    sign = 1 if _shown.best(_shown.kind_of(args.by)) is min else -1
    finite = [own for own in results if math.isfinite(own[1].get(args.by, math.nan))]
    best = min(finite, key=lambda own: sign * own[1][args.by], default=None)
    kinds = _shown.kinds(names)
    shown = [name for name in names if _shown.kind_of(name) in kinds or name == args.by]
    keys = list(results[0][0])
    rows = [["", *keys, *shown]]
    for own in results:
        numbers = [own[1].get(name, math.nan) for name in shown]
        rows.append(
            [
                "*" if own is best else "",
                *(str(own[0][key]) for key in keys),
                *(f"{x:.4g}" if math.isfinite(x) else "diverged" for x in numbers),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip())
    print(f"Table: {root / 'sweep.csv'}")
    drawn = None if jax.process_index() else figure(results, args.by)
    if drawn is not None:
        print(f"Figure: {_axes.save(drawn, root / 'sweep.png')}")
    if best is None:
        print("All of them have diverged. Try smaller learning rates.")
        return 0
    # With more rounds than a sweep, as a rule.
    changes = [text for text in args.set if assignment(text)[0] not in best[0]]
    changes += [f"{key}={_as_given(value)}" for key, value in best[0].items()]
    names = [name for name in ("algorithm", "aggregator", "seed") if name not in best[0]]
    again = f"fax run {shlex.quote(args.source)}{_run.again(args, changes, names)}"
    print(f"Best by {args.by}, marked *. To train with it: {again}")
    return 0


def _as_given(value: Any) -> str:
    """A value as ``--set`` takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
