"""What a user's module has, by ``module:name``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from fax import _functions
from fax.command._errors import CommandError, mistakes


def is_name(text: str) -> bool:
    """Whether a text is of the form ``module:name``."""
    module, colon, name = text.partition(":")
    return bool(colon) and name.isidentifier() and all(p.isidentifier() for p in module.split("."))


def load(where: str) -> Any:
    """The object ``module:name``, or what it returns if it is a function.

    The errors of a user's module keep their tracebacks.
    """
    module, _, name = where.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with mistakes(ModuleNotFoundError):
        home = importlib.import_module(module)
    if not hasattr(home, name):
        raise CommandError(f"{where}: the module {module} has no {name}.")
    found = getattr(home, name)
    if not callable(found):
        return found
    if not _functions.takes(found, 0):
        raise CommandError(f"{where} needs arguments, expected a function without any.")
    return found()
