"""Errors that end the command with a message and an exit code instead of a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# Exit codes: an error while running, wrong arguments or configuration, Ctrl-C, and SIGTERM.
FAILED, WRONG, INTERRUPTED, TERMINATED = 1, 2, 130, 143


class CommandError(Exception):
    """Ends the command.

    Attributes:
      code: the exit code.
    """

    def __init__(self, message: str, code: int = WRONG) -> None:
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def mistakes(*kinds: type[Exception]) -> Iterator[None]:
    """In this context, errors are mistakes in the arguments or in the configuration."""
    caught = kinds or (ValueError, TypeError, OSError, ModuleNotFoundError)
    try:
        yield
    except caught as error:
        text = str(error)
        if isinstance(error, FileNotFoundError) and error.filename:
            text = f"there is no file {error.filename}."
        raise CommandError(text) from error
