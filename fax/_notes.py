"""Notes under the errors of functions that users pass: how fax calls them, and with what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from fax import _arguments

PyTree = Any

_SHOWN = 8  # leaves of each argument


def called(what: str, name: str, fn: Callable, **arguments: PyTree) -> Any:
    """What a user's function returns. A note under its errors says how it was called.

    Args:
      what: describes the function, as in "the loss".
      name: its name in the call that the note shows.
      fn: the function.
      **arguments: what it is called with, in order, by the names that the note shows.
    """
    try:
        return fn(*arguments.values())
    except Exception as error:
        note = f"This came from {what}, which fax calls as {name}({', '.join(arguments)})."
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
            for argument, value in arguments.items():
                error.add_note(f"  {argument}: {_in_short(value)}")
        raise


def _in_short(tree: PyTree) -> str:
    """Describes the leaves of a pytree, as far as there is room in a line."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    shown = [f"{jax.tree_util.keystr(path)} {_arguments.shown(x)}".strip() for path, x in leaves]
    rest = f", and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + rest
