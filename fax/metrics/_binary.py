"""Yes-or-no labels and their logits: one for each example, or several at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fax import _arguments
from fax.metrics._statistics import Mean

Batch = Mapping[str, jax.Array]


def logits_of(where: str, scores: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits and labels, float and bool [batch, labels], of scores in one of three forms."""
    if not (jnp.issubdtype(labels.dtype, jnp.integer) or labels.dtype == bool):
        raise ValueError(
            f"{where}: labels are {labels.dtype}, expected bools or ints. Convert them, "
            "for example by .astype(int) in a function for fax.data.map."
        )
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))  # bytes would wrap around
    if scores.shape == (*labels.shape, 2) and labels.ndim == 1:
        scores = scores[:, 1] - scores[:, 0]
    if scores.shape == (*labels.shape, 1):
        scores = scores[..., 0]
    if scores.shape != labels.shape or labels.ndim not in (1, 2):
        raise ValueError(
            f"{where}: scores have shape {scores.shape} and labels {labels.shape}, expected a "
            "logit for each label, [batch] or [batch, labels], or the scores of two classes, "
            "[batch, 2] for labels [batch]."
        )
    rows = (len(labels), -1)
    return jnp.reshape(scores, rows), jnp.reshape(labels, rows) != 0


@dataclasses.dataclass(frozen=True)
class BinaryAccuracy:
    """The share of yes-or-no labels that are right, where a logit above 0 says yes.

    With several labels for each example, each of them counts. A logit that is NaN is a mistake.

    Attributes:
      label: the feature with the labels, bools or ints 0 and 1, [batch] or [batch, labels]. Scores
        have the same shape, or are those of two classes, [batch, 2] for labels [batch].
      threshold: the logit above which the prediction is yes.

    Example:

      >>> batch = {"y": jnp.array([[1, 0, 0], [1, 1, 0]])}
      >>> logits = jnp.array([[2.0, -1.0, 0.5], [3.0, 0.1, -4.0]])
      >>> print(f"{fax.metrics.BinaryAccuracy()(batch, logits).sum().result():.4f}")
      0.8333
    """

    label: str = "y"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        _arguments.text("BinaryAccuracy", "label", self.label, "the name of a feature")
        _arguments.number("BinaryAccuracy", "threshold", self.threshold)

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        """The statistic of each example."""
        logits, labels = logits_of("BinaryAccuracy", scores, batch[self.label])
        hits = ((logits > self.threshold) == labels) & ~jnp.isnan(logits)
        return Mean(jnp.sum(hits, -1), jnp.full(len(hits), hits.shape[-1]))

    def limits(self, num_classes: int | None) -> dict[str, int | None]:
        """The features that are indices, and how many values each can have."""
        return {self.label: 2}
