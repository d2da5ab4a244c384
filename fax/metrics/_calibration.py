"""Calibration: whether the probabilities that a model states are the shares that come true."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fax import _arguments
from fax.metrics import _scores
from fax.metrics._statistics import Statistic

Batch = Mapping[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reliability(Statistic):
    """Predictions by how confident they are.

    Attributes:
      count: the number of predictions in each bin, int [bins].
      hits: how many of them are right, int [bins].
      confidence: the sum of their probabilities, [bins].

    Example:

      >>> batch = {"y": jnp.array([0, 1])}
      >>> scores = jnp.log(jnp.array([[0.9, 0.1], [0.9, 0.1]]))
      >>> statistic = fax.metrics.CalibrationError(bins=5)(batch, scores).sum()
      >>> statistic.count.tolist(), statistic.hits.tolist()
      ([0, 0, 0, 0, 2], [0, 0, 0, 0, 1])
    """

    count: Any
    hits: Any
    confidence: Any

    def result(self) -> Any:
        """The expected calibration error. NaN without predictions."""
        xp: Any = jnp if isinstance(self.confidence, jax.Array) else np
        total = self.count.sum(-1)
        gaps = xp.abs(self.hits - self.confidence).sum(-1)
        return xp.where(total == 0, xp.nan, gaps / xp.maximum(total, 1))[()]


@dataclasses.dataclass(frozen=True)
class CalibrationError:
    """The expected calibration error: Σ_b n_b / n · abs(accuracy_b - confidence_b).

    Predictions are divided into bins of equal width by their confidence, which is the probability
    of the class with the best score. See Guo et al., arXiv:1706.04599. Scores are
    [batch, classes], log-probabilities up to a constant. Those with a NaN do not count.

    Attributes:
      bins: the number of bins.
      label: the feature with the labels, int [batch].

    Example:

      >>> batch = {"y": jnp.array([0, 1])}
      >>> scores = jnp.log(jnp.array([[0.9, 0.1], [0.9, 0.1]]))
      >>> print(f"{fax.metrics.CalibrationError()(batch, scores).sum().result():.4f}")
      0.4000
    """

    bins: int = 15
    label: str = dataclasses.field(default="y", kw_only=True)

    def __post_init__(self) -> None:
        _arguments.count("CalibrationError", "bins", self.bins)
        _arguments.text("CalibrationError", "label", self.label, "the name of a feature")

    def __call__(self, batch: Batch, scores: jax.Array) -> Reliability:
        """The statistic of each example."""
        _scores.check_vector("CalibrationError", self.label, batch[self.label])
        hits = _scores.hits(scores, batch[self.label])
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        confidence = jax.nn.softmax(scores, axis=-1).max(-1)
        # Bins include their upper end, as in the paper.
        bin_of = jnp.clip(jnp.ceil(confidence * self.bins) - 1, 0, self.bins - 1)
        inside = bin_of[:, None] == jnp.arange(self.bins, dtype=bin_of.dtype)
        of_bins = jnp.where(inside, confidence[:, None], 0)
        return Reliability(inside, inside & hits[:, None], of_bins)

    def limits(self, num_classes: int | None) -> dict[str, int | None]:
        """The features that are indices, and how many values each can have."""
        return {self.label: num_classes}
