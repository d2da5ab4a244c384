"""``fax evaluate``: the results of a run's model on the clients of a data set."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fax.experiment
from fax.command import _devices
from fax.command._errors import CommandError, mistakes
from fax.command._resume import saved
from fax.experiment._build import evaluation, load


def command(args: argparse.Namespace) -> int:
    """Prints a line for each metric, or for each client."""
    folder = Path(args.folder)
    source = saved(folder)
    mesh = _devices.connected(source.mesh, source.axis)
    with jax.set_mesh(mesh):
        experiment = source.build()
        experiment.cohorts.close()
        state = experiment.algorithm.init(*experiment.start)
        with mistakes():
            checkpoint = fax.experiment.restore(folder, state, round=args.round)
        evaluate: Callable[[Any], Mapping[str, Any]]
        if source.config is not None:
            evaluate = evaluation(source.config, load(source.config), args.on, each=args.each)
        elif args.each:
            raise CommandError(
                f"{source.name} is evaluated by functions of its own, and --each needs a task. "
                "A function may return arrays with a number for each client."
            )
        elif args.on in experiment.evaluate:
            evaluate = experiment.evaluate[args.on]
        else:
            if not experiment.evaluate:
                raise CommandError(f"{source.name} has no evaluation. Pass evaluate=.")
            known = ", ".join(experiment.evaluate)
            raise CommandError(f"{source.name} can be evaluated on {known}, and not on {args.on}.")
        results = evaluate(experiment.algorithm.params(checkpoint.state))
    print(f"{folder}, {args.on} data, after {checkpoint.round} rounds:")
    if args.each:
        names, *numbers = [list(map(_text, np.asarray(results[name]))) for name in results]
        rows = [list(results), *map(list, zip(names, *numbers, strict=True))]
    else:
        rows = [[name, _text(value)] for name, value in results.items()]
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        # Numbers of clients are in columns.
        own = map(str.rjust, cells, others) if args.each else cells
        print("  ".join([f"  {name:{first}}", *own]))
    return 0


def _text(value: Any) -> str:
    """A result as text: a number with six digits, and everything else as it is."""
    own = np.asarray(value)
    return f"{own:.6g}" if own.ndim == 0 and own.dtype.kind in "iuf" else f"{own}"
