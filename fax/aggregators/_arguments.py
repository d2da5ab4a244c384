"""Checks of what aggregators are given; hyperparameters that are traced have no value to check."""

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
    """Checks a finite number in a range; one that is traced is returned as it is."""
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
    expected = " and ".join(bounds)
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = np.nan
    if not (np.isfinite(found) and found > above and found >= least and found < below):
        raise ValueError(f"{caller}: {name} is {value!r}, expected a number {expected}.")
    return value


def count(caller: str, name: str, value: Any, *, least: int = 0) -> int:
    """Checks a whole number, which has to be known before tracing."""
    try:
        found = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = least - 1
    if found < least:
        raise ValueError(f"{caller}: {name} is {value!r}, expected an int of at least {least}.")
    return found
