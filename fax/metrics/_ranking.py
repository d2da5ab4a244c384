"""How well logits rank yes above no: exactly for one set of examples, by histograms for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fax import _arguments
from fax.data._check_examples import is_numeric
from fax.metrics._binary import logits_of
from fax.metrics._statistics import Statistic

Batch = Mapping[str, jax.Array]


def roc_auc(scores: Any, labels: Any) -> float:
    """The area under the ROC curve, exactly: P(s⁺ > s⁻) + P(s⁺ = s⁻) / 2.

    s⁺ and s⁻ are the scores of a random example of label 1 and of label 0. This sorts all scores,
    so they have to be in one place, as those of one client are; `AUC` merges histograms instead.

    Args:
      scores: numbers [examples]. Higher ones stand for the label 1.
      labels: bools, or ints 0 and 1, [examples].

    Returns:
      The area, from 0 to 1. NaN if all labels are the same.

    Raises:
      ValueError: if the shapes differ, a score is NaN, or a label is neither 0 nor 1.

    Example:

      >>> print(fax.metrics.roc_auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]))
      0.75
    """
    scores, positive = _ranked("fax.metrics.roc_auc", scores, labels)
    yes, no = scores[positive], np.sort(scores[~positive])
    if not len(yes) or not len(no):
        return float("nan")
    below = np.searchsorted(no, yes, "left") + np.searchsorted(no, yes, "right")
    return float(below.sum(dtype=np.int64) / (2 * len(yes) * len(no)))


def average_precision(scores: Any, labels: Any) -> float:
    """The average precision, exactly: Σₜ (R(t) - R(t')) P(t) over the thresholds t of scores.

    P and R are the precision and the recall if scores of at least t mean yes, and t' is the next
    higher threshold. This sorts all scores, so they have to be in one place, as those of one client
    are; `AveragePrecision` merges histograms instead.

    Args:
      scores: numbers [examples]. Higher ones stand for the label 1.
      labels: bools, or ints 0 and 1, [examples].

    Returns:
      The average precision, from 0 to 1. NaN if no label is 1.

    Raises:
      ValueError: if the shapes differ, a score is NaN, or a label is neither 0 nor 1.

    Example:

      >>> print(f"{fax.metrics.average_precision([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]):.4f}")
      0.8333
    """
    scores, positive = _ranked("fax.metrics.average_precision", scores, labels)
    if not positive.any():
        return float("nan")
    _, place = np.unique(scores, return_inverse=True)  # -scores would wrap around for bytes
    counts = (np.bincount(place, labels)[::-1] for labels in (positive, ~positive))
    return float(_average_precision(*counts))


def _ranked(where: str, scores: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    _arguments.unmasked(where, "scores", scores)
    _arguments.unmasked(where, "labels", labels)
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            f"{where}: scores have shape {scores.shape} and labels {labels.shape}, expected two "
            "vectors of the same length."
        )
    if not is_numeric(scores.dtype) or scores.dtype.kind == "c":
        raise ValueError(f"{where}: scores are {scores.dtype}, expected real numbers.")
    if np.isnan(scores).any():
        raise ValueError(f"{where}: scores[{np.isnan(scores).argmax()}] is NaN.")
    if (bad := (labels != 0) & (labels != 1)).any():
        raise ValueError(f"{where}: labels[{bad.argmax()}] is {labels[bad][0]!r}, expected 0 or 1.")
    return scores, labels == 1


def _average_precision(positive: Any, negative: Any) -> Any:
    """Average precision of counts by threshold, the highest first, along the last axis."""
    hits, all_yes = positive.cumsum(-1), (positive + negative).cumsum(-1)
    precision = hits / np.maximum(all_yes, 1)
    total = hits[..., -1]
    return np.where(total == 0, np.nan, (precision * positive).sum(-1) / np.maximum(total, 1))[()]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitHistogram(Statistic):
    """How many examples of each label have a logit in each bin, the highest bin first.

    Attributes:
      positive: of label 1, int [labels, bins].
      negative: of label 0, int [labels, bins].
      measure: ``"auc"`` or ``"average_precision"``, what the result is.

    Example:

      >>> batch = {"y": jnp.array([0, 0, 1, 1])}
      >>> histogram = fax.metrics.AUC()(batch, jnp.array([-2.0, -0.4, -0.6, 1.4])).sum()
      >>> print(histogram.result(), histogram.bound())
      0.75 0.0
    """

    positive: Any
    negative: Any
    measure: str = dataclasses.field(metadata={"static": True})

    def result(self) -> Any:
        """The measure, the mean over labels. Logits in the same bin count as equal.

        A label counts if the measure exists: for the AUC if some examples have it and some do not,
        for average precision if some examples have it. If there is none, the result is NaN.
        """
        positive, negative = self._counts()
        if self.measure == "average_precision":
            return _mean(_average_precision(positive, negative))
        # Pairs of an example of label 1 and one of label 0, which is in a lower or in the same bin.
        below = negative.sum(-1, keepdims=True) - negative.cumsum(-1)
        pairs = positive.sum(-1) * negative.sum(-1)
        ordered = (positive * (below + negative / 2)).sum(-1)
        return _mean(np.where(pairs == 0, np.nan, ordered / np.maximum(pairs, 1)))

    def bound(self) -> Any:
        """How far the result can be from that of the logits themselves, at most.

        For the AUC this is half of the share of pairs that are in the same bin. For average
        precision it is the mean over positive examples of how much their precision can vary with
        the order inside of their bin. Logits beyond the limit of the metric count as equal.
        """
        positive, negative = self._counts()
        if self.measure == "auc":
            pairs = positive.sum(-1) * negative.sum(-1)
            same = (positive * negative).sum(-1) / 2
            return _mean(np.where(pairs == 0, np.nan, same / np.maximum(pairs, 1)))
        hits, misses = positive.cumsum(-1), negative.cumsum(-1)
        most = hits / np.maximum(hits + misses - negative, 1)
        first = hits - positive + 1
        least = first / (first + misses)
        total = hits[..., -1]
        varies = (positive * (most - least)).sum(-1)
        return _mean(np.where(total == 0, np.nan, varies / np.maximum(total, 1)))

    def _counts(self) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self.positive, np.float64), np.asarray(self.negative, np.float64)


def _mean(values: np.ndarray) -> Any:
    """The mean over labels, without those for which there is no value."""
    known = ~np.isnan(values)
    count = known.sum(-1)
    mean = np.where(known, values, 0).sum(-1) / np.maximum(count, 1)
    return np.where(count == 0, np.nan, mean)[()]


@dataclasses.dataclass(frozen=True)
class _Ranking:
    """What the two metrics have in common."""

    bins: int = dataclasses.field(default=1024, kw_only=True)
    limit: float = dataclasses.field(default=16.0, kw_only=True)
    label: str = dataclasses.field(default="y", kw_only=True)

    def __post_init__(self) -> None:
        name = type(self).__name__
        _arguments.count(name, "bins", self.bins, least=2)
        _arguments.number(name, "limit", self.limit, above=0)
        _arguments.text(name, "label", self.label, "the name of a feature")

    def _histogram(self, batch: Batch, scores: jax.Array, measure: str) -> LogitHistogram:
        logits, labels = logits_of(type(self).__name__, scores, batch[self.label])
        share = (self.limit - jnp.clip(logits, -self.limit, self.limit)) / (2 * self.limit)
        # NaN is in no bin: the comparison below is false for it.
        bin_of = jnp.minimum(jnp.floor(share * self.bins), self.bins - 1)
        inside = bin_of[..., None] == jnp.arange(self.bins, dtype=bin_of.dtype)
        return LogitHistogram(inside & labels[..., None], inside & ~labels[..., None], measure)

    def limits(self, num_classes: int | None) -> dict[str, int | None]:
        """The features that are indices, and how many values each can have."""
        return {self.label: 2}


class AUC(_Ranking):
    """The area under the ROC curve, from histograms of logits that are merged over all clients.

    Logits in the same bin count as equal, so the result differs from the exact area by at most half
    of the share of pairs of a positive and a negative example in the same bin. The statistic's
    ``bound()`` is that number. For one client's scores, `roc_auc` is exact.

    Attributes:
      bins: how many bins of equal width there are. A batch takes about 16 bytes of memory for each
        example, label and bin, so choose fewer bins, or smaller batches, for hundreds of labels.
      limit: the bins are between -limit and limit. Logits beyond count as these.
      label: the feature with the labels, bools or ints 0 and 1, [batch] or [batch, labels], whose
        areas are averaged. Scores have the same shape, or are those of two classes, [batch, 2] for
        labels [batch]. A logit that is NaN does not count.

    Example:

      >>> batch = {"y": jnp.array([0, 0, 1, 1])}
      >>> print(fax.metrics.AUC()(batch, jnp.array([-2.0, -0.4, -0.6, 1.4])).sum().result())
      0.75
    """

    def __call__(self, batch: Batch, scores: jax.Array) -> LogitHistogram:
        """The statistic of each example."""
        return self._histogram(batch, scores, "auc")


class AveragePrecision(_Ranking):
    """The average precision, from histograms of logits that are merged over all clients.

    Logits in the same bin count as equal. The statistic's ``bound()`` says how far the result can
    be from the exact one. For one client's scores, `average_precision` is exact.

    Attributes:
      bins: how many bins of equal width there are. A batch takes about 16 bytes of memory for each
        example, label and bin, so choose fewer bins, or smaller batches, for hundreds of labels.
      limit: the bins are between -limit and limit. Logits beyond count as these.
      label: the feature with the labels; see `AUC`.

    Example:

      >>> batch = {"y": jnp.array([0, 0, 1, 1])}
      >>> metric = fax.metrics.AveragePrecision()
      >>> print(f"{metric(batch, jnp.array([-2.0, -0.4, -0.6, 1.4])).sum().result():.4f}")
      0.8333
    """

    def __call__(self, batch: Batch, scores: jax.Array) -> LogitHistogram:
        """The statistic of each example."""
        return self._histogram(batch, scores, "average_precision")
