"""``fax report``: what a round will cost."""

from __future__ import annotations

import argparse
from typing import Any

import jax

import fax
from fax.command import _devices, _source
from fax.command._errors import CommandError, mistakes


def command(args: argparse.Namespace) -> int:
    """Prints the report of a round, on the devices here or on described ones."""
    source = _source.of_arguments(args)
    if args.on is None and args.slices is not None:
        raise CommandError("--slices is about TPUs. Pass --on, as in --on v5e:4x4.")
    with mistakes():
        if args.on is None:
            mesh = _devices.mesh_of(source.mesh, source.axis)
        else:
            # Data and parameters have to be real, and so they are made here, before the mesh of
            # described devices is in scope.
            devices = fax.sharding.topology(
                args.on, slices=1 if args.slices is None else args.slices
            )
            axes: dict[str, Any] = dict(source.mesh) or {source.axis: -1}
            mesh = fax.sharding.make_mesh(devices=devices, **axes)
    experiment = source.build()
    with mistakes():
        with experiment.cohorts:
            cohort = next(experiment.cohorts)
        with jax.set_mesh(mesh):
            state = fax.sharding.eval_shape(experiment.algorithm.init, *experiment.start)
            # Like run, which keeps the state: it may still be written to a checkpoint.
            found = fax.inspect.report(experiment.algorithm.round, state, cohort)
    print(found)
    return 0
