"""``fax audit``: what a program would send if it ran where the clients' data are."""

from __future__ import annotations

import argparse

from fax import deploy
from fax.command import _modules
from fax.command._errors import CommandError, mistakes


def command(args: argparse.Namespace) -> int:
    """Prints the audit of the plan that ``module:name`` is, or of the program."""
    if not _modules.is_name(args.program):
        raise CommandError(f"{args.program!r} is not of the form module:name.")
    with mistakes(deploy.CutError):
        found = _modules.load(args.program)
        if isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], tuple | list):
            fn, arguments = found
            found = deploy.cut(fn, *arguments)
    if not isinstance(found, deploy.Plan):
        raise CommandError(
            f"{args.program} is {found!r:.80}, expected a function that returns a program and its "
            "arguments, as in (algorithm.round, (state, cohort)), or what fax.deploy.cut returns."
        )
    print(found.audit())
    return 0
