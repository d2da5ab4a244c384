"""Checks of arguments that are numbers. One that is traced has no value to check."""

from __future__ import annotations

import operator
from typing import Any

import jax
import numpy as np


def number(
    caller: str,
    name: str,
    value: Any,
    *,
    above: float = -np.inf,
    least: float = -np.inf,
    below: float = np.inf,
) -> Any:
    """Checks that a scalar is finite and in a range, and returns it as it is."""
    if isinstance(value, jax.core.Tracer):
        return value
    bounds = [
        text
        for bound, text in (
            (above, f"above {above:g}"),
            (least, f"of at least {least:g}"),
            (below, f"below {below:g}"),
        )
        if np.isfinite(bound)
    ]
    expected = " ".join(["a number", " and ".join(bounds)])
    try:
        found = float(value) if np.ndim(value) == 0 else np.nan
    except (TypeError, ValueError):
        found = np.nan
    if not (np.isfinite(found) and found > above and found >= least and found < below):
        raise ValueError(f"{caller}: {name} is {value!r:.80}, expected {expected.rstrip()}.")
    return value


def count(caller: str, name: str, value: Any, *, least: int = 1, most: int | None = None) -> int:
    """Checks a whole number, which has to be known when a program is traced."""
    try:
        found = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = least - 1
    if found < least or (most is not None and found > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{caller}: {name} is {value!r:.80}, expected an int {wanted}.")
    return found


def concrete(x: Any) -> bool:
    """Whether all numbers of a pytree are known, so that they can be checked."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x))
