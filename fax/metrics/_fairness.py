"""How evenly a metric is spread over clients."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fax import _arguments
from fax.data._check_examples import is_numeric


@dataclasses.dataclass(frozen=True)
class Fairness:
    """What `fairness` returns.

    Attributes:
      mean: over clients, with equal weights.
      variance: over clients.
      percentiles: by percent.
      worst_tenth: the mean over the tenth of the clients with the worst values, at least one.
      best_tenth: the mean over the tenth with the best values.
      gap: how much worse the worst tenth is than the mean, a number of at least 0.

    Example:

      >>> fax.metrics.fairness([0.5, 0.9, 1.0]).worst_tenth
      0.5
    """

    mean: float
    variance: float
    percentiles: dict[float, float]
    worst_tenth: float
    best_tenth: float
    gap: float


def fairness(
    values: Any,
    *,
    higher_is_better: bool = True,
    percentiles: Sequence[float] = (5, 25, 50, 75, 95),
) -> Fairness:
    """Summarizes a metric of each client: percentiles, and how far the worst clients are behind.

    The means over the worst and the best tenth, and the variance, are what Li et al.,
    arXiv:1905.10497, compare.

    Args:
      values: numbers [clients], such as a result of `fax.metrics.evaluate_clients`.
      higher_is_better: False for losses and errors.
      percentiles: in percent, from 0 to 100. They are interpolated linearly.

    Returns:
      A `Fairness`.

    Raises:
      ValueError: if values are not numbers [clients], or a value is not finite.

    Example:

      >>> accuracies = [0.62, 0.71, 0.75, 0.78, 0.8, 0.81, 0.83, 0.85, 0.9, 0.95]
      >>> spread = fax.metrics.fairness(accuracies)
      >>> print(f"{spread.mean:.2f} {spread.worst_tenth:.2f} {spread.gap:.2f}")
      0.80 0.62 0.18
      >>> print(f"{spread.percentiles[50]:.3f}")
      0.805
    """
    where = "fax.metrics.fairness"
    _arguments.unmasked(where, "values", values)
    array = np.asarray(values)
    if array.ndim != 1 or not array.size or not is_numeric(array.dtype) or array.dtype.kind == "c":
        raise ValueError(
            f"{where}: values is {_arguments.shown(values)}, expected a number for each client."
        )
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        bad = int(np.argmin(np.isfinite(array)))
        raise ValueError(
            f"{where}: values[{bad}] is {array[bad]:g}. Leave clients without a value out: "
            "values[np.isfinite(values)]."
        )
    _arguments.flag(where, "higher_is_better", higher_is_better)
    if not isinstance(percentiles, Iterable):
        raise ValueError(
            f"{where}: percentiles is {_arguments.shown(percentiles)}, expected a list of numbers, "
            "as in [50]."
        )
    percentiles = tuple(percentiles)
    for percent in percentiles:
        _arguments.number(where, "percentiles", percent, least=0, most=100)
    best_first = np.sort(array)[::-1] if higher_is_better else np.sort(array)
    tenth = max(1, round(len(array) / 10))
    mean, worst = float(array.mean()), float(best_first[-tenth:].mean())
    return Fairness(
        mean=mean,
        variance=float(array.var()),
        percentiles={p: float(np.percentile(array, p)) for p in percentiles},
        worst_tenth=worst,
        best_tenth=float(best_first[:tenth].mean()),
        gap=abs(mean - worst),
    )
