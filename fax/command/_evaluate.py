"""``fax evaluate``: the results of a run's model on all clients of a data set."""

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
    """Prints a line for each metric."""
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
            evaluate = evaluation(source.config, load(source.config), args.on)
        elif args.on in experiment.evaluate:
            evaluate = experiment.evaluate[args.on]
        else:
            known = ", ".join(experiment.evaluate) or "nothing"
            raise CommandError(f"{source.name} can be evaluated on {known}, and not on {args.on}.")
        results = evaluate(experiment.algorithm.params(checkpoint.state))
    print(f"{folder}, {args.on} data, after {checkpoint.round} rounds:")
    width = max(map(len, results))
    for name, value in results.items():
        number = np.asarray(value)
        print(
            f"  {name:{width}}  {number:.6g}" if number.ndim == 0 else f"  {name:{width}}  {number}"
        )
    return 0
