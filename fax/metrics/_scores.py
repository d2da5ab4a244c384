"""What scores say about labels, whatever axes come before the classes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# The token that fills sequences up.
PADDING = 0


def check(scores: jax.Array, labels: jax.Array) -> None:
    """Checks that there is a row of scores for each label."""
    if scores.ndim != labels.ndim + 1 or scores.shape[:-1] != labels.shape:
        raise ValueError(
            f"scores have shape {scores.shape} and the labels {labels.shape}, expected scores of "
            f"shape {(*labels.shape, 'classes')}: a row of them for each label."
            f"{_binary(scores, labels)}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels are {labels.dtype}, expected integers, the numbers of classes. Make them so "
            "by fax.data.map."
        )


def _binary(scores: jax.Array, labels: jax.Array) -> str:
    """How to fix it, where there is one score for each label."""
    if scores.shape not in (labels.shape, (*labels.shape, 1)):
        return ""
    return " If z are the logits of class 1 of two, return jnp.stack([jnp.zeros_like(z), z], -1)."


def losses_of(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """The negative log-likelihoods of labels; NaN for a label that is no class."""
    check(scores, labels)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    known = (labels >= 0) & (labels < scores.shape[-1])
    index = jnp.where(known, labels, 0)[..., None]
    score = jnp.take_along_axis(scores, index, axis=-1)[..., 0]
    return jnp.where(known, jax.nn.logsumexp(scores, axis=-1) - score, jnp.nan)


def hits(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether labels have the best score. Of equal ones the first is the best.

    Where a score is NaN there is no best one.
    """
    check(scores, labels)
    return (jnp.argmax(scores, axis=-1) == labels) & ~jnp.isnan(scores).any(-1)


def ranks(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """How many classes are better than the label, or as good and come first.

    No class has a rank if the label is none, or the scores are not numbers: it counts as the last.
    """
    check(scores, labels)
    classes = scores.shape[-1]
    known = (labels >= 0) & (labels < classes)
    own = jnp.take_along_axis(scores, jnp.where(known, labels, 0)[..., None], axis=-1)
    first = jnp.arange(classes) < labels[..., None]
    better = jnp.sum((scores > own) | ((scores == own) & first), axis=-1)
    return jnp.where(known & ~jnp.isnan(scores).any(-1), better, classes)
