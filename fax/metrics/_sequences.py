"""Metrics of sequences: a label for each position, some of which are not looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fax import _arguments
from fax.metrics import _scores
from fax.metrics._statistics import Mean, Sum

Batch = Mapping[str, jax.Array]
PADDING = _scores.PADDING


@dataclasses.dataclass(frozen=True)
class _Sequences:
    """What metrics of sequences have in common.

    Attributes:
      ignore: labels that do not count. By default those of padding.
      target: the feature with the labels, int [batch, length].
    """

    ignore: tuple[int, ...] = dataclasses.field(default=(PADDING,), kw_only=True)
    target: str = dataclasses.field(default="y", kw_only=True)

    def __post_init__(self) -> None:
        self._ints("ignore")
        _arguments.text(type(self).__name__, "target", self.target, "the name of a feature")

    def _ints(self, name: str, example: str = "(0,)") -> None:
        values = getattr(self, name)
        own = _arguments.whole_numbers(type(self).__name__, name, values, example)
        object.__setattr__(self, name, own)

    def counts(self, batch: Batch) -> jax.Array:
        """Which positions count, bool [batch, length]."""
        labels = batch[self.target]
        if labels.ndim != 2 or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(
                f"feature {self.target!r} is {labels.dtype} of shape {labels.shape}, expected "
                "integers of shape ('batch', 'length'), the numbers of tokens."
            )
        return ~_among(labels, self.ignore)

    def limits(self, num_classes: int) -> dict[str, int]:
        return {self.target: num_classes}


def _among(labels: jax.Array, values: tuple[int, ...]) -> jax.Array:
    return jnp.isin(labels, jnp.array(values, labels.dtype))


def _of_tokens(values: jax.Array, counts: jax.Array) -> Mean:
    """A mean over tokens."""
    return Mean(jnp.sum(jnp.where(counts, values, 0), -1), jnp.sum(counts, -1))


def _of_sequences(values: jax.Array, counts: jax.Array) -> Mean:
    """A mean over the sequences that have a token."""
    some = counts.any(-1)
    return Mean(jnp.where(some, values, 0), some)


class TokenLoss(_Sequences):
    """The mean negative log-likelihood of a token.

    Scores are [batch, length, tokens], logarithms of probabilities up to a constant.

    Attributes:
      ignore: labels that do not count. Default: 0, padding.
      target: the feature with the labels, int [batch, length].
    """

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        return _of_tokens(_scores.losses_of(scores, batch[self.target]), self.counts(batch))


class SequenceLoss(_Sequences):
    """The mean negative log-likelihood of a sequence, which is the sum over its tokens.

    Attributes:
      ignore: labels that do not count. Default: 0, padding. Nor does a sequence without others.
      target: the feature with the labels, int [batch, length].
    """

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        counts = self.counts(batch)
        losses = _scores.losses_of(scores, batch[self.target])
        return _of_sequences(jnp.sum(jnp.where(counts, losses, 0), -1), counts)


@dataclasses.dataclass(frozen=True)
class TokenAccuracy(_Sequences):
    """The share of tokens that have the best score.

    Attributes:
      exclude: tokens that are never guessed, such as "out of vocabulary": as labels they are
        mistakes.
      ignore: labels that do not count. Default: 0, padding.
      target: the feature with the labels, int [batch, length].
    """

    exclude: tuple[int, ...] = dataclasses.field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._ints("exclude")

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        return _of_tokens(_right(self, batch, scores, 1), self.counts(batch))


@dataclasses.dataclass(frozen=True)
class TokenTopK(_Sequences):
    """The share of tokens that are among the k best scores.

    Attributes:
      k: how many.
      exclude: tokens that are never guessed, such as "out of vocabulary": as labels they are
        mistakes.
      ignore: labels that do not count. Default: 0, padding.
      target: the feature with the labels, int [batch, length].
    """

    k: int
    exclude: tuple[int, ...] = dataclasses.field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._ints("exclude")
        _arguments.count("TokenTopK", "k", self.k)

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        return _of_tokens(_right(self, batch, scores, self.k), self.counts(batch))


def _right(metric: TokenAccuracy | TokenTopK, batch: Batch, scores: jax.Array, k: int) -> jax.Array:
    labels = batch[metric.target]
    if metric.exclude:
        never = _among(jnp.arange(scores.shape[-1]), metric.exclude)
        scores = jnp.where(never, -jnp.inf, scores)
    hits = _scores.hits(scores, labels) if k == 1 else _scores.ranks(scores, labels) < k
    return hits & ~_among(labels, metric.exclude)


@dataclasses.dataclass(frozen=True)
class OOVRate(_Sequences):
    """The share of tokens that are out of vocabulary.

    Attributes:
      oov: the tokens that stand for words out of vocabulary.
      ignore: labels that do not count. Default: 0, padding.
      target: the feature with the labels, int [batch, length].
    """

    oov: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._ints("oov", "(99,)")

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        return _of_tokens(_among(batch[self.target], self.oov), self.counts(batch))


@dataclasses.dataclass(frozen=True)
class TruncationRate(_Sequences):
    """The share of sequences that have no end, because they were cut.

    Attributes:
      eos: the token at the end of a sequence.
      ignore: labels that do not count. Default: 0, padding. Nor does a sequence without others.
      target: the feature with the labels, int [batch, length].
    """

    eos: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _arguments.count("TruncationRate", "eos", self.eos, least=0)

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        cut = (batch[self.target] != self.eos).all(-1)
        return _of_sequences(cut, self.counts(batch))


class TokenCount(_Sequences):
    """How many tokens there are.

    Attributes:
      ignore: labels that do not count. Default: 0, padding.
      target: the feature with the labels, int [batch, length].
    """

    def __call__(self, batch: Batch, scores: jax.Array) -> Sum:
        return Sum(jnp.sum(self.counts(batch), -1))


class SequenceCount(_Sequences):
    """How many sequences have a token.

    Attributes:
      ignore: labels that do not count. Default: 0, padding.
      target: the feature with the labels, int [batch, length].
    """

    def __call__(self, batch: Batch, scores: jax.Array) -> Sum:
        return Sum(self.counts(batch).any(-1))


class SequenceLength(_Sequences):
    """The mean number of tokens of a sequence.

    Attributes:
      ignore: labels that do not count. Default: 0, padding. Nor does a sequence without others.
      target: the feature with the labels, int [batch, length].
    """

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        counts = self.counts(batch)
        return _of_sequences(jnp.sum(counts, -1), counts)
