"""Checks of the arguments that constructors of algorithms take."""

from __future__ import annotations

import operator
from typing import Any

import jax


def positive(where: str, name: str, value: Any) -> int:
    """Checks an argument that counts something."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{where}: {name} is {value!r}, expected a positive int.")
    return number


def concrete(x: Any) -> bool:
    """Whether all numbers of a pytree are known, so that they can be checked."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x))
