"""The nearest known name, for messages about names that do not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A sentence that names the nearest known name, or else all of them."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    if near:
        return f"Did you mean {near[0]!r}?"
    return f"Choose from {', '.join(known)}." if known else "There is none."
