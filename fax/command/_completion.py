"""``fax completion``: a script that completes the command in a shell, made by shtab."""

from __future__ import annotations

import argparse

from fax import _extras
from fax.command._errors import mistakes
from fax.command._parser import make_parser

# SOURCE is a task or a TOML file.
_SOURCES = {
    "bash": """\
_fax_source() { compgen -W "TASKS" -- "$1"; compgen -f -X "!*.toml" -- "$1"; }
""",
    "zsh": """\
_fax_source() { _alternative "tasks:task:(TASKS)" "files:file:_files -g '*.toml'"; }
""",
}


def command(args: argparse.Namespace) -> int:
    """Prints the script."""
    with mistakes():
        _extras.require("fax completion", "shtab", "experiment")
        import shtab

        from fax.experiment import _catalog

        names = {kind: tuple(_catalog.catalog(kind)) for kind in _catalog.KINDS}
    parser, commands = make_parser(names)
    preamble = _SOURCES[args.shell].replace("TASKS", " ".join(names["tasks"]))
    for each in commands.values():
        for action in each._actions:
            if action.dest == "source":
                action.complete = dict.fromkeys(_SOURCES, "_fax_source")
            elif action.dest in ("folder", "folders"):
                action.complete = shtab.DIRECTORY
    print(shtab.complete(parser, args.shell, preamble=preamble))
    return 0
