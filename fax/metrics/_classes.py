"""Metrics of classification: one label for each example."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fax import _arguments
from fax.metrics import _scores
from fax.metrics._statistics import Mean, Statistic, Sum

Batch = Mapping[str, jax.Array]
Metric = Callable[[Batch, jax.Array], Statistic]


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """The mean negative log-likelihood of the labels.

    Scores are [batch, classes], logarithms of probabilities up to a constant.

    Attributes:
      target: the feature with the labels, int [batch].
    """

    target: str = "y"

    def __post_init__(self) -> None:
        _feature(self, "target")

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        losses = _scores.losses_of(scores, batch[self.target])
        return Mean(losses, jnp.ones_like(losses, bool))

    def limits(self, num_classes: int) -> dict[str, int]:
        return {self.target: num_classes}


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The share of labels that have the best score. Of equal scores the first is the best.

    An example with a score that is NaN counts as a mistake.

    Attributes:
      target: the feature with the labels, int [batch].
    """

    target: str = "y"

    def __post_init__(self) -> None:
        _feature(self, "target")

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        hits = _scores.hits(scores, batch[self.target])
        return Mean(hits, jnp.ones_like(hits))

    def limits(self, num_classes: int) -> dict[str, int]:
        return {self.target: num_classes}


@dataclasses.dataclass(frozen=True)
class TopK:
    """The share of labels that are among the k best scores. Of equal scores the first is better.

    Attributes:
      k: how many.
      target: the feature with the labels, int [batch].
    """

    k: int
    target: str = "y"

    def __post_init__(self) -> None:
        _arguments.count("TopK", "k", self.k)
        _feature(self, "target")

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        hits = _scores.ranks(scores, batch[self.target]) < self.k
        return Mean(hits, jnp.ones_like(hits))

    def limits(self, num_classes: int) -> dict[str, int]:
        return {self.target: num_classes}


@dataclasses.dataclass(frozen=True)
class ConfusionMatrix:
    """How many examples of each class (rows) are taken for each class (columns).

    An example with a score that is NaN is taken for no class, and is in no column. Evaluation
    counts such examples as ``"non_finite"``.

    Attributes:
      num_classes: how many classes there are.
      target: the feature with the labels, int [batch].
    """

    num_classes: int
    target: str = "y"

    def __post_init__(self) -> None:
        _arguments.count("ConfusionMatrix", "num_classes", self.num_classes)
        _feature(self, "target")

    def __call__(self, batch: Batch, scores: jax.Array) -> Sum:
        labels = batch[self.target]
        _scores.check(scores, labels)
        if scores.shape[-1] != self.num_classes:
            raise ValueError(
                f"ConfusionMatrix has num_classes={self.num_classes}, but there are scores of "
                f"{scores.shape[-1]} classes."
            )
        classes = jnp.arange(self.num_classes)
        row = labels[:, None] == classes
        column = jnp.argmax(scores, axis=-1)[:, None] == classes
        column &= ~jnp.isnan(scores).any(axis=-1, keepdims=True)
        return Sum(row[:, :, None] & column[:, None, :])

    def limits(self, num_classes: int) -> dict[str, int]:
        return {self.target: self.num_classes}


@dataclasses.dataclass(frozen=True)
class PerDomain:
    """Another metric for each domain, such as a language or a device.

    Its result has a leading axis [num_domains].

    Attributes:
      metric: the other metric.
      num_domains: how many domains there are.
      domain: the feature with the numbers of examples' domains, int [batch].
    """

    metric: Metric
    num_domains: int
    domain: str = "domain"

    def __post_init__(self) -> None:
        _arguments.count("PerDomain", "num_domains", self.num_domains)
        _feature(self, "domain")
        form = {2: "metric(batch, scores)"}
        _arguments.function("PerDomain", "metric", self.metric, form)

    def __call__(self, batch: Batch, scores: jax.Array) -> Statistic:
        own = batch[self.domain][:, None] == jnp.arange(self.num_domains)

        def divide(x):
            x = jnp.asarray(x)[:, None]
            return jnp.where(own.reshape(own.shape + (1,) * (x.ndim - 2)), x, jnp.zeros_like(x))

        return jax.tree.map(divide, self.metric(batch, scores))

    def limits(self, num_classes: int) -> dict[str, int]:
        return {**limits_of(self.metric, num_classes), self.domain: self.num_domains}


def _feature(metric: Any, name: str) -> None:
    """Checks the attribute that names a feature."""
    value = getattr(metric, name)
    _arguments.text(type(metric).__name__, name, value, "the name of a feature")


def limits_of(metric: Any, num_classes: int) -> dict[str, int]:
    """Features that a metric takes for numbers of classes or the like, and how many there are."""
    return metric.limits(num_classes) if hasattr(metric, "limits") else {}
