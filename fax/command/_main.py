"""The entry point: it parses the arguments, and imports what the command needs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fax._nearest import did_you_mean
from fax.command._errors import FAILED, INTERRUPTED, WRONG, CommandError, mistakes
from fax.command._parser import make_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command ``fax``.

    Args:
      argv: the arguments. Default: those of the process.

    Returns:
      The exit code: 0 if all went well, and otherwise one of those that ``fax --help`` lists.

    Raises:
      SystemExit: after ``--help``, or if the arguments are wrong.

    Example:

      >>> fax.command.main(["list", "tasks"])  # doctest: +ELLIPSIS
      digits ... divided over clients in Dirichlet proportions.
      ...
      0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, commands = make_parser()
    first = next(iter(arguments), "--help")
    if not first.startswith("-") and first not in commands:
        parser.error(f"there is no command {first!r}. {did_you_mean(first, commands)}")
    # The command's own parser names the nearest of its options.
    if first in commands:
        args = commands[first].parse_args(arguments[1:])
    else:
        args = parser.parse_args(arguments or ["--help"])
        import fax

        print(f"fax {fax.__version__}")
        return 0
    try:
        with mistakes(ModuleNotFoundError):  # an extra is not installed
            module = importlib.import_module(f"fax.command._{first}")
        return module.command(args)
    except CommandError as error:
        print(f"fax {first}: {error}", file=sys.stderr)
        jax = sys.modules.get("jax")  # without it, there are no other processes
        if jax and error.code in (FAILED, WRONG) and jax.distributed.is_initialized():
            raise  # an exception that nobody catches ends the other processes, too
        return error.code
    except KeyboardInterrupt:
        print(f"fax {first}: interrupted.", file=sys.stderr)
        return INTERRUPTED
