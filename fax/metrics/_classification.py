"""Metrics of classification, with one label for each example."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fax import _arguments, _functions
from fax.metrics import _scores
from fax.metrics._statistics import Mean, Statistic, Sum

Batch = Mapping[str, jax.Array]
Metric = Callable[[Batch, jax.Array], Statistic]


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """The mean negative log-likelihood of the labels.

    Scores are [batch, classes], log-probabilities up to a constant.

    Attributes:
      label: the feature with the labels, int [batch].

    Example:

      >>> scores = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))
      >>> losses = fax.metrics.CrossEntropy()({"y": jnp.array([0, 1])}, scores)
      >>> print(f"{losses.sum().result():.4f}")
      1.4979
    """

    label: str = "y"

    def __post_init__(self) -> None:
        _feature(self, "label")

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        """The statistic of each example."""
        losses = _scores.losses_of(scores, batch[self.label])
        return Mean(losses, jnp.ones_like(losses, bool))

    def limits(self, num_classes: int | None) -> dict[str, int | None]:
        """The features that are indices, and how many values each can have."""
        return {self.label: num_classes}


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The share of labels that have the best score. Of equal scores the first is the best.

    An example with a score that is NaN counts as a mistake.

    Attributes:
      label: the feature with the labels, int [batch].

    Example:

      >>> scores = jnp.array([[0.2, 0.8], [0.6, 0.4]])
      >>> print(fax.metrics.Accuracy()({"y": jnp.array([1, 1])}, scores).sum().result())
      0.5
    """

    label: str = "y"

    def __post_init__(self) -> None:
        _feature(self, "label")

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        """The statistic of each example."""
        hits = _scores.hits(scores, batch[self.label])
        return Mean(hits, jnp.ones_like(hits))

    def limits(self, num_classes: int | None) -> dict[str, int | None]:
        """The features that are indices, and how many values each can have."""
        return {self.label: num_classes}


@dataclasses.dataclass(frozen=True)
class TopK:
    """The share of labels that are among the k best scores. Of equal scores the first is better.

    Attributes:
      k: the number of scores.
      label: the feature with the labels, int [batch].

    Example:

      >>> scores = jnp.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
      >>> print(fax.metrics.TopK(2)({"y": jnp.array([1, 2])}, scores).sum().result())
      0.5
    """

    k: int
    label: str = "y"

    def __post_init__(self) -> None:
        _arguments.count("TopK", "k", self.k)
        _feature(self, "label")

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        """The statistic of each example."""
        hits = _scores.among_best(scores, batch[self.label], self.k)
        return Mean(hits, jnp.ones_like(hits))

    def limits(self, num_classes: int | None) -> dict[str, int | None]:
        """The features that are indices, and how many values each can have."""
        return {self.label: num_classes}


@dataclasses.dataclass(frozen=True)
class ConfusionMatrix:
    """How many examples of each class (rows) are classified as each class (columns).

    An example with a score that is NaN is in no column. Evaluation counts such examples as
    ``"non_finite"``.

    Attributes:
      num_classes: the number of classes.
      label: the feature with the labels, int [batch].

    Example:

      >>> scores = jnp.array([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
      >>> matrix = fax.metrics.ConfusionMatrix(2)
      >>> matrix({"y": jnp.array([0, 1, 1])}, scores).sum().result().tolist()
      [[1, 0], [1, 1]]
    """

    num_classes: int
    label: str = "y"

    def __post_init__(self) -> None:
        _arguments.count("ConfusionMatrix", "num_classes", self.num_classes)
        _feature(self, "label")

    def __call__(self, batch: Batch, scores: jax.Array) -> Sum:
        """The statistic of each example."""
        labels = batch[self.label]
        _scores.check_vector("ConfusionMatrix", self.label, labels)
        _scores.check(scores, labels)
        if scores.shape[-1] != self.num_classes:
            raise ValueError(
                f"ConfusionMatrix: num_classes is {self.num_classes}, but there are scores of "
                f"{scores.shape[-1]} classes."
            )
        classes = jnp.arange(self.num_classes)
        row = labels[:, None] == classes
        column = jnp.argmax(scores, axis=-1)[:, None] == classes
        column &= ~jnp.isnan(scores).any(axis=-1, keepdims=True)
        return Sum(row[:, :, None] & column[:, None, :])

    def limits(self, num_classes: int | None) -> dict[str, int | None]:
        """The features that are indices, and how many values each can have."""
        return {self.label: self.num_classes}


@dataclasses.dataclass(frozen=True)
class PerDomain:
    """Another metric for each domain, such as a language or a kind of device.

    Its result has a leading axis [num_domains].

    Attributes:
      metric: the other metric.
      num_domains: the number of domains.
      domain: the feature with the domain of each example, int [batch].

    Example:

      >>> scores = jnp.array([[0.2, 0.8], [0.6, 0.4]])
      >>> batch = {"y": jnp.array([1, 1]), "domain": jnp.array([0, 1])}
      >>> of_each = fax.metrics.PerDomain(fax.metrics.Accuracy(), num_domains=2)(batch, scores)
      >>> of_each.sum().result().tolist()
      [1.0, 0.0]
    """

    metric: Metric
    num_domains: int
    domain: str = "domain"

    def __post_init__(self) -> None:
        _arguments.count("PerDomain", "num_domains", self.num_domains)
        _feature(self, "domain")
        form = {2: "metric(batch, scores)"}
        _functions.function("PerDomain", "metric", self.metric, form)

    def __call__(self, batch: Batch, scores: jax.Array) -> Statistic:
        """The statistic of each example."""
        own = batch[self.domain][:, None] == jnp.arange(self.num_domains)

        def by_domain(x: jax.Array) -> jax.Array:
            x = jnp.asarray(x)[:, None]
            return jnp.where(own.reshape(own.shape + (1,) * (x.ndim - 2)), x, jnp.zeros_like(x))

        return jax.tree.map(by_domain, self.metric(batch, scores))

    def limits(self, num_classes: int | None) -> dict[str, int | None]:
        """The features that are indices, and how many values each can have."""
        return {**limits_of(self.metric, num_classes), self.domain: self.num_domains}


def _feature(metric: Any, name: str) -> None:
    """Checks the attribute that names a feature."""
    value = getattr(metric, name)
    _arguments.text(type(metric).__name__, name, value, "the name of a feature")


def limits_of(metric: Any, num_classes: int | None) -> dict[str, int | None]:
    """The features that a metric uses as indices, and how many values each of them can have."""
    return metric.limits(num_classes) if hasattr(metric, "limits") else {}


def ignored_by(metric: Any, feature: str) -> tuple[int, ...]:
    """The values of a feature that a metric ignores, so that they have no limits."""
    if isinstance(metric, PerDomain):
        return () if feature == metric.domain else ignored_by(metric.metric, feature)
    own = getattr(metric, "ignore", ()) if getattr(metric, "label", None) == feature else ()
    return own if isinstance(own, tuple) else ()
