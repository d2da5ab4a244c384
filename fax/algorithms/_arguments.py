"""Hyperparameters may be traced; what is known when an algorithm is made is checked there."""

from __future__ import annotations

import operator
from typing import Any

import jax
import numpy as np


def check_number(caller: str, name: str, value: Any, *, above: float | None = None) -> None:
    """Checks that a hyperparameter is a number of at least 0, or larger than ``above``."""
    if isinstance(value, jax.core.Tracer):
        return
    expected = "a number of at least 0" if above is None else f"a number above {above:g}"
    try:
        number = float(value) if np.ndim(value) == 0 else None
    except (TypeError, ValueError):
        number = None
    if number is None or not (number >= 0 if above is None else number > above):
        raise ValueError(f"{caller}: {name} is {value!r:.80}, expected {expected}.")


def check_count(caller: str, name: str, value: Any, meaning: str) -> int:
    """The argument as an int of at least 1."""
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(
            f"{caller}: {name} is {value!r:.80}, expected an int of at least 1: {meaning}."
        )
    return count
