"""``fax list``: what a configuration can name."""

from __future__ import annotations

import argparse

from fax.experiment import _catalog


def command(args: argparse.Namespace) -> int:
    """Prints a line for each name, and one for its options."""
    known = _catalog.catalog(args.kind)
    width = max(map(len, known)) + 2
    for name in known:
        print(f"{name:{width}}{_catalog.summary(args.kind, name)}")
        own = ", ".join(_options(args.kind, name))
        if own:
            print(f"{'':{width}}  {own}")
    return 0


def _options(kind: str, name: str) -> list[str]:
    """The options; those that have to be given are marked."""
    needed = _catalog.required(kind, name)
    return [f"{key} (required)" if key in needed else key for key in _catalog.options(kind, name)]
