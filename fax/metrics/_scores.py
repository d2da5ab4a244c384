"""Comparisons of scores with labels, for any axes before that of classes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# The token that pads sequences.
PADDING = 0


def check(scores: jax.Array, labels: jax.Array, binary: str = "") -> None:
    """Checks that there are scores for each label. ``binary`` is what takes logits instead."""
    if scores.ndim != labels.ndim + 1 or scores.shape[:-1] != labels.shape:
        raise ValueError(
            f"scores have shape {scores.shape} and labels {labels.shape}, expected scores of shape "
            f"{(*labels.shape, 'classes')}, one for each label and class."
            f"{_binary(scores, labels, binary)}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels are {labels.dtype}, expected integers, the numbers of classes. Convert them "
            "with fax.data.map."
        )


def check_vector(where: str, label: str, labels: jax.Array) -> None:
    """Checks that there is one label for each example, not one for each position of a sequence."""
    if labels.ndim != 1:
        raise ValueError(
            f"{where}: feature {label!r} has shape {labels.shape}, expected (batch,), a label for "
            "each example. Make each position an example of its own."
        )


def _binary(scores: jax.Array, labels: jax.Array, binary: str) -> str:
    """How to fix it if there is one score for each label, or for each place of one-hot labels."""
    if scores.shape not in (labels.shape, (*labels.shape, 1)):
        return ""
    if binary:
        return f" If they are logits of yes-or-no labels, use {binary}."
    if labels.ndim > 1 and jnp.issubdtype(labels.dtype, jnp.inexact):
        return " If the labels are one-hot, replace them by y.argmax(-1), with fax.data.map."
    return " If z are logits of class 1 of 2, return jnp.stack([jnp.zeros_like(z), z], -1)."


def losses_of(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """The negative log-likelihoods of labels; NaN for a label that is not a class."""
    check(scores, labels)
    scores, labels = scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), _wide(labels)
    known = (labels >= 0) & (labels < scores.shape[-1])
    index = jnp.where(known, labels, 0)[..., None]
    score = jnp.take_along_axis(scores, index, axis=-1)[..., 0]
    return jnp.where(known, jax.nn.logsumexp(scores, axis=-1) - score, jnp.nan)


def hits(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether labels have the best score. Of equal scores the first is the best.

    If a score is NaN, none is the best.
    """
    known, own, first = _compare(scores, labels)
    better = ~jnp.where(first, scores < own, scores <= own)  # NaN is better, too
    # XLA computes a sum of floats in the same pass over the scores as those of a loss and its
    # gradient. An argmax, or any, would take passes of its own.
    return known & (jnp.sum(better, axis=-1, dtype=jnp.float32) == 0)


def among_best(scores: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether labels have one of the k best scores. Of equal scores the first is better.

    If a score is NaN, or the label is not a class, it has not, however many classes there are.
    """
    known, own, first = _compare(scores, labels)
    better = jnp.sum((scores > own) | ((scores == own) & first), axis=-1)
    return known & ~jnp.isnan(scores).any(-1) & (better < min(k, scores.shape[-1]))


def _compare(scores: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether labels are classes, their scores [..., 1], and which classes come before them."""
    check(scores, labels)
    labels, classes = _wide(labels), scores.shape[-1]
    known = (labels >= 0) & (labels < classes)
    own = jnp.take_along_axis(scores, jnp.where(known, labels, 0)[..., None], axis=-1)
    return known, own, jnp.arange(classes) < labels[..., None]


def _wide(labels: jax.Array) -> jax.Array:
    """Labels in at least 32 bits, which hold the number of classes: 256 as uint8 would be 0."""
    return labels.astype(jnp.int32) if jnp.iinfo(labels.dtype).bits < 32 else labels
