"""Precision, recall and F1, of classes or of yes-or-no labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fax import _arguments
from fax.metrics import _scores
from fax.metrics._binary import logits_of
from fax.metrics._statistics import Statistic

Batch = Mapping[str, jax.Array]
AVERAGES = ("macro", "micro", "none")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Detections(Statistic):
    """How often each class is there, is predicted, and both.

    Attributes:
      hits: true positives, int [classes].
      predicted: hits and false positives, int [classes].
      actual: hits and false negatives, int [classes].
      measure: ``"precision"``, ``"recall"`` or ``"f1"``, what the result is.
      average: ``"macro"``, ``"micro"`` or ``"none"``.

    Example:

      >>> counts = fax.metrics.F1().statistic(jnp.array([8]), jnp.array([10]), jnp.array([16]))
      >>> print(f"{counts.result():.4f}")
      0.6154
    """

    hits: Any
    predicted: Any
    actual: Any
    measure: str = dataclasses.field(metadata={"static": True})
    average: str = dataclasses.field(metadata={"static": True})

    def result(self) -> Any:
        """The measure. It is 0 where it would be 0 / 0, as for a class that is never predicted.

        For ``"macro"``, a class counts if it is there or is predicted.
        """
        xp: Any = jnp if isinstance(self.hits, jax.Array) else np
        hits, predicted, actual = self.hits, self.predicted, self.actual
        if self.average == "micro":
            hits, predicted, actual = (x.sum(-1) for x in (hits, predicted, actual))
        whole = {"precision": predicted, "recall": actual, "f1": (predicted + actual) / 2}
        of = whole[self.measure]
        share = xp.where(of == 0, 0.0, hits / xp.where(of == 0, 1, of))
        if self.average != "macro":
            return share[()]
        known = (predicted + actual) > 0
        count = known.sum(-1)
        mean = xp.where(known, share, 0).sum(-1) / xp.where(count == 0, 1, count)
        return xp.where(count == 0, xp.nan, mean)[()]


@dataclasses.dataclass(frozen=True)
class _PrecisionRecall:
    """What the three metrics have in common."""

    average: str = "macro"
    binary: bool = dataclasses.field(default=False, kw_only=True)
    label: str = dataclasses.field(default="y", kw_only=True)
    measure: ClassVar[str]

    def __post_init__(self) -> None:
        name = type(self).__name__
        _arguments.choice(name, "average", self.average, AVERAGES)
        _arguments.flag(name, "binary", self.binary)
        _arguments.text(name, "label", self.label, "the name of a feature")

    def statistic(self, hits: Any, predicted: Any, actual: Any) -> Detections:
        """The statistic of these counts."""
        return Detections(hits, predicted, actual, self.measure, self.average)

    def __call__(self, batch: Batch, scores: jax.Array) -> Detections:
        """The statistic of each example."""
        labels = batch[self.label]
        if self.binary:
            logits, actual = logits_of(type(self).__name__, scores, labels)
            predicted = logits > 0
        else:
            _scores.check(scores, labels, f"{type(self).__name__}(binary=True)")
            classes = jnp.arange(scores.shape[-1])
            actual = labels[..., None] == classes
            predicted = jnp.argmax(scores, axis=-1)[..., None] == classes
            predicted &= ~jnp.isnan(scores).any(axis=-1, keepdims=True)
        return self.statistic(actual & predicted, predicted, actual)

    def limits(self, num_classes: int | None) -> dict[str, int | None]:
        """The features that are indices, and how many values each can have."""
        return {self.label: 2 if self.binary else num_classes}


class Precision(_PrecisionRecall):
    """The share of predictions of a class that are right.

    Attributes:
      average: ``"macro"``, the mean over classes, of those that are there or are predicted;
        ``"micro"``, over all predictions; or ``"none"``, of each class, [classes].
      binary: whether labels are yes or no, with a logit for each: bools or ints 0 and 1, [batch] or
        [batch, labels]. The result is then about the label 1, and averages are over labels.
        Otherwise labels are ints [batch] and scores [batch, classes].
      label: the feature with the labels.

    Example:

      >>> batch = {"y": jnp.array([1, 1, 0, 0])}
      >>> logits = jnp.array([2.0, 1.0, 3.0, -1.0])
      >>> print(f"{fax.metrics.Precision(binary=True)(batch, logits).sum().result():.4f}")
      0.6667
    """

    measure = "precision"


class Recall(_PrecisionRecall):
    """The share of the examples of a class that are predicted to be of it.

    Attributes:
      average: see `Precision`.
      binary: see `Precision`.
      label: the feature with the labels.

    Example:

      >>> batch = {"y": jnp.array([1, 1, 0, 0])}
      >>> logits = jnp.array([2.0, -1.0, 3.0, -1.0])
      >>> print(fax.metrics.Recall(binary=True)(batch, logits).sum().result())
      0.5
    """

    measure = "recall"


class F1(_PrecisionRecall):
    """The harmonic mean of precision and recall: 2 hits / (predicted + actual).

    Attributes:
      average: see `Precision`. ``"macro"`` is the mean of the classes' F1.
      binary: see `Precision`.
      label: the feature with the labels.

    Example:

      >>> batch = {"y": jnp.array([0, 1, 2, 2])}
      >>> scores = jax.nn.one_hot(jnp.array([0, 2, 2, 2]), 3)
      >>> print(fax.metrics.F1(average="none")(batch, scores).sum().result())
      [1.  0.  0.8]
    """

    measure = "f1"
