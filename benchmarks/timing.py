"""Runs that take turns, so that a temporarily busy machine slows all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Times = dict[str, float]  # seconds by quantity


def take_turns(
    runs: dict[str, Callable[[int], Times]], turns: int, until: Callable[[], bool] = lambda: False
) -> dict[str, list[Times]]:
    """Runs all of them ``turns`` times, in reversed order every other time.

    No turn begins once ``until()`` is true.
    """
    times: dict[str, list[Times]] = {name: [] for name in runs}
    for turn in range(turns):
        if until():
            break
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            gc.collect()
            times[name].append(runs[name](turn))
    return times


def compare(
    times: dict[str, list[Times]], quantity: str, baseline: str = "fax", per: int = 1
) -> dict[str, float]:
    """Medians in milliseconds, and medians of the others' ratios to the baseline."""
    of = {name: np.array([t[quantity] for t in own]) for name, own in times.items()}
    medians = {name: float(1e3 * np.median(t) / per) for name, t in of.items()}
    others = [name for name in of if name != baseline]
    ratios = {name: float(np.median(of[name] / of[baseline])) for name in others}
    return medians | {f"{name} / {baseline}": ratio for name, ratio in ratios.items()}


def clock(fn: Callable, *args: Any) -> tuple[float, Any]:
    """Returns the seconds until the result is ready, and the result."""
    start = time.perf_counter()
    result = jax.block_until_ready(fn(*args))
    return time.perf_counter() - start, result
