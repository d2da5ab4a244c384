"""Metrics of sequences, with a label for each position. Some labels are ignored, as padding is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fax import _arguments
from fax.metrics import _scores
from fax.metrics._statistics import Mean, Statistic, Sum

Batch = Mapping[str, jax.Array]
PADDING = _scores.PADDING


@dataclasses.dataclass(frozen=True)
class _Sequences:
    """What metrics of sequences have in common.

    Attributes:
      ignore: labels that do not count, whatever numbers they are. Default: 0, padding.
      label: the feature with the labels, int [batch, length].
    """

    ignore: tuple[int, ...] = dataclasses.field(default=(PADDING,), kw_only=True)
    label: str = dataclasses.field(default="y", kw_only=True)

    def __post_init__(self) -> None:
        self._ints("ignore")
        _arguments.text(type(self).__name__, "label", self.label, "the name of a feature")

    def _ints(self, name: str, example: str = "(0,)") -> None:
        values = getattr(self, name)
        own = _arguments.whole_numbers(type(self).__name__, name, values, example)
        object.__setattr__(self, name, own)

    def counts(self, batch: Batch) -> jax.Array:
        """Which positions count: bool [batch, length]."""
        labels = batch[self.label]
        if labels.ndim != 2 or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(
                f"feature {self.label!r} is {labels.dtype} of shape {labels.shape}, expected "
                "integers of shape ('batch', 'length'), the numbers of tokens."
            )
        return ~_is_one_of(labels, self.ignore)

    def limits(self, num_classes: int | None) -> dict[str, int | None]:
        """The features that are indices, and how many values each can have."""
        return {self.label: num_classes}


def _is_one_of(labels: jax.Array, values: tuple[int, ...]) -> jax.Array:
    least, most = jnp.iinfo(labels.dtype).min, jnp.iinfo(labels.dtype).max
    return jnp.isin(labels, np.array([v for v in values if least <= v <= most], labels.dtype))


def _of_tokens(values: jax.Array, counts: jax.Array) -> Mean:
    """A mean over tokens."""
    return Mean(jnp.sum(jnp.where(counts, values, 0), -1), jnp.sum(counts, -1))


def _of_sequences(values: jax.Array, counts: jax.Array) -> Mean:
    """A mean over the sequences that have any token."""
    some = counts.any(-1)
    return Mean(jnp.where(some, values, 0), some)


class TokenLoss(_Sequences):
    """The mean negative log-likelihood of a token.

    Scores are [batch, length, tokens], log-probabilities up to a constant.

    Attributes:
      ignore: labels that do not count, whatever numbers they are. Default: 0, padding.
      label: the feature with the labels, int [batch, length].

    Example:

      >>> batch = {"y": jnp.array([[1, 2, 0]])}
      >>> losses = fax.metrics.TokenLoss()(batch, jnp.zeros((1, 3, 4)))
      >>> print(f"{losses.sum().result():.4f}")
      1.3863
    """

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        """The statistic of each example."""
        return _of_tokens(_scores.losses_of(scores, batch[self.label]), self.counts(batch))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpMean(Statistic):
    """The exponential of a mean.

    Attributes:
      mean: the mean.

    Example:

      >>> print(f"{fax.metrics.ExpMean(fax.metrics.Mean(3.0, 3)).result():.4f}")
      2.7183
    """

    mean: Mean

    def result(self) -> Any:
        """The exponential of the mean."""
        mean = self.mean.result()
        return jnp.exp(mean) if isinstance(mean, jax.Array) else np.exp(mean)


class Perplexity(_Sequences):
    """The perplexity, exp of the mean negative log-likelihood of a token.

    Scores are [batch, length, tokens], log-probabilities up to a constant.

    Attributes:
      ignore: labels that do not count, whatever numbers they are. Default: 0, padding.
      label: the feature with the labels, int [batch, length].

    Example:

      >>> batch = {"y": jnp.array([[1, 2, 0]])}
      >>> statistic = fax.metrics.Perplexity()(batch, jnp.zeros((1, 3, 4)))
      >>> print(f"{statistic.sum().result():.4f}")
      4.0000
    """

    def __call__(self, batch: Batch, scores: jax.Array) -> ExpMean:
        """The statistic of each example."""
        loss = TokenLoss(ignore=self.ignore, label=self.label)
        return ExpMean(loss(batch, scores))


class SequenceLoss(_Sequences):
    """The mean negative log-likelihood of a sequence, which is the sum over its tokens.

    Attributes:
      ignore: labels that do not count. Default: 0, padding. Sequences that have no other labels do
        not count either.
      label: the feature with the labels, int [batch, length].

    Example:

      >>> batch = {"y": jnp.array([[1, 2, 0]])}
      >>> losses = fax.metrics.SequenceLoss()(batch, jnp.zeros((1, 3, 4)))
      >>> print(f"{losses.sum().result():.4f}")
      2.7726
    """

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        """The statistic of each example."""
        counts = self.counts(batch)
        losses = _scores.losses_of(scores, batch[self.label])
        return _of_sequences(jnp.sum(jnp.where(counts, losses, 0), -1), counts)


@dataclasses.dataclass(frozen=True)
class TokenAccuracy(_Sequences):
    """The share of tokens that have the best score.

    Attributes:
      exclude: tokens that are never predicted, such as "out of vocabulary". As labels they count
        as mistakes.
      ignore: labels that do not count, whatever numbers they are. Default: 0, padding.
      label: the feature with the labels, int [batch, length].

    Example:

      >>> batch = {"y": jnp.array([[1, 2, 0]])}
      >>> scores = jax.nn.one_hot(jnp.array([[1, 1, 1]]), 4)
      >>> print(fax.metrics.TokenAccuracy()(batch, scores).sum().result())
      0.5
    """

    exclude: tuple[int, ...] = dataclasses.field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._ints("exclude")

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        """The statistic of each example."""
        return _of_tokens(_correct(self, batch, scores, 1), self.counts(batch))


@dataclasses.dataclass(frozen=True)
class TokenTopK(_Sequences):
    """The share of tokens that are among the k best scores.

    Attributes:
      k: the number of scores.
      exclude: tokens that are never predicted, such as "out of vocabulary". As labels they count
        as mistakes.
      ignore: labels that do not count, whatever numbers they are. Default: 0, padding.
      label: the feature with the labels, int [batch, length].

    Example:

      >>> batch = {"y": jnp.array([[1, 2, 0]])}
      >>> scores = jnp.array([[[0.0, 3.0, 2.0, 1.0]] * 3])
      >>> print(fax.metrics.TokenTopK(2)(batch, scores).sum().result())
      1.0
    """

    k: int
    exclude: tuple[int, ...] = dataclasses.field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._ints("exclude")
        _arguments.count("TokenTopK", "k", self.k)

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        """The statistic of each example."""
        return _of_tokens(_correct(self, batch, scores, self.k), self.counts(batch))


def _correct(
    metric: TokenAccuracy | TokenTopK, batch: Batch, scores: jax.Array, k: int
) -> jax.Array:
    labels = batch[metric.label]
    if metric.exclude:
        never = _is_one_of(jnp.arange(scores.shape[-1]), metric.exclude)
        scores = jnp.where(never, -jnp.inf, scores)
    hits = _scores.hits(scores, labels) if k == 1 else _scores.among_best(scores, labels, k)
    return hits & ~_is_one_of(labels, metric.exclude)


@dataclasses.dataclass(frozen=True)
class OOVRate(_Sequences):
    """The share of tokens that are out of vocabulary.

    Attributes:
      oov: the tokens that stand for out-of-vocabulary words.
      ignore: labels that do not count, whatever numbers they are. Default: 0, padding.
      label: the feature with the labels, int [batch, length].

    Example:

      >>> batch = {"y": jnp.array([[1, 3, 0]])}
      >>> print(fax.metrics.OOVRate(oov=(3,))(batch, jnp.zeros((1, 3, 4))).sum().result())
      0.5
    """

    oov: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._ints("oov", "(99,)")

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        """The statistic of each example."""
        return _of_tokens(_is_one_of(batch[self.label], self.oov), self.counts(batch))


@dataclasses.dataclass(frozen=True)
class TruncationRate(_Sequences):
    """The share of sequences without an end token, because they were truncated.

    Attributes:
      eos: the token at the end of a sequence.
      ignore: labels that do not count. Default: 0, padding. Sequences that have no other labels do
        not count either.
      label: the feature with the labels, int [batch, length].

    Example:

      >>> batch = {"y": jnp.array([[1, 2, 0], [1, 3, 3]])}
      >>> print(fax.metrics.TruncationRate(eos=2)(batch, jnp.zeros((2, 3, 4))).sum().result())
      0.5
    """

    eos: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _arguments.count("TruncationRate", "eos", self.eos, least=0)

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        """The statistic of each example."""
        truncated = ~_is_one_of(batch[self.label], (self.eos,)).any(-1)
        return _of_sequences(truncated, self.counts(batch))


class TokenCount(_Sequences):
    """How many tokens there are.

    Attributes:
      ignore: labels that do not count, whatever numbers they are. Default: 0, padding.
      label: the feature with the labels, int [batch, length].

    Example:

      >>> batch = {"y": jnp.array([[1, 2, 0], [3, 0, 0]])}
      >>> print(fax.metrics.TokenCount()(batch, jnp.zeros((2, 3, 4))).sum().result())
      3
    """

    def __call__(self, batch: Batch, scores: jax.Array) -> Sum:
        """The statistic of each example."""
        return Sum(jnp.sum(self.counts(batch), -1))


class SequenceCount(_Sequences):
    """How many sequences have any token.

    Attributes:
      ignore: labels that do not count, whatever numbers they are. Default: 0, padding.
      label: the feature with the labels, int [batch, length].

    Example:

      >>> batch = {"y": jnp.array([[1, 2, 0], [0, 0, 0]])}
      >>> print(fax.metrics.SequenceCount()(batch, jnp.zeros((2, 3, 4))).sum().result())
      1
    """

    def __call__(self, batch: Batch, scores: jax.Array) -> Sum:
        """The statistic of each example."""
        return Sum(self.counts(batch).any(-1))


class SequenceLength(_Sequences):
    """The mean number of tokens of a sequence.

    Attributes:
      ignore: labels that do not count. Default: 0, padding. Sequences that have no other labels do
        not count either.
      label: the feature with the labels, int [batch, length].

    Example:

      >>> batch = {"y": jnp.array([[1, 2, 0], [3, 0, 0]])}
      >>> print(fax.metrics.SequenceLength()(batch, jnp.zeros((2, 3, 4))).sum().result())
      1.5
    """

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        """The statistic of each example."""
        counts = self.counts(batch)
        return _of_sequences(jnp.sum(counts, -1), counts)
