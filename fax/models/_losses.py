"""Losses of scores, one for each example of a batch."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fax import _arguments
from fax.metrics._scores import PADDING, hits, losses_of

Batch = Mapping[str, jax.Array]
Losses = tuple[jax.Array, dict[str, jax.Array]]


def _labels(name: str, batch: Batch) -> jax.Array:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"fax.models.{name}: batch is {_arguments.shown(batch)}, expected a mapping with the "
            f"labels 'y'. Call {name}(scores, batch)."
        )
    if "y" not in batch:
        raise ValueError(
            f"fax.models.{name}: batch has the features {sorted(batch)}, expected the labels as "
            "'y'. Rename a feature with fax.data.map."
        )
    return batch["y"]


def cross_entropy(scores: jax.Array, batch: Batch) -> Losses:
    """The negative log-likelihood of each example's label, and whether it has the best score.

    Args:
      scores: [batch, classes], log-probabilities up to a constant.
      batch: ``"y"`` is int [batch], the labels. For a label that is not a class the loss is NaN.

    Returns:
      The losses [batch], and ``{"accuracy": ...}``, 0 or 1 for each example.

    Raises:
      ValueError: if the shapes do not match.

    Example:

      >>> scores = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
      >>> losses, metrics = fax.models.cross_entropy(scores, {"y": jnp.array([1])})
      >>> print(f"{losses[0]:.4f}, {metrics['accuracy'][0]:.0f}")
      1.3863, 0
    """
    labels = _labels("cross_entropy", batch)
    if labels.ndim > 1 and labels.shape == scores.shape[:-1]:
        raise ValueError(
            f"fax.models.cross_entropy: labels have shape {labels.shape}, expected [batch], a "
            "class for each example. For sequences of tokens use "
            "fax.models.sequence_cross_entropy, for example "
            "fax.models.functional(build, fax.models.sequence_cross_entropy)."
        )
    return losses_of(scores, labels), {"accuracy": hits(scores, labels).astype(scores.dtype)}


def squared_error(predictions: jax.Array, batch: Batch) -> Losses:
    """The mean squared error of each example, such as of an image's pixels.

    Args:
      predictions: [batch, ...].
      batch: ``"y"`` has the targets, numbers of the same shape.

    Returns:
      The losses [batch], and an empty dict.

    Raises:
      ValueError: if the shapes do not match.

    Example:

      >>> losses, _ = fax.models.squared_error(jnp.zeros((1, 2)), {"y": jnp.array([[1.0, 3.0]])})
      >>> print(losses)
      [5.]
    """
    targets = _labels("squared_error", batch)
    if predictions.shape != targets.shape:
        raise ValueError(
            f"fax.models.squared_error: predictions have shape {predictions.shape} and targets "
            f"{targets.shape}, expected a prediction for each target."
        )
    if predictions.ndim == 0:
        raise ValueError(
            "fax.models.squared_error: predictions are a scalar, expected [batch, ...]."
        )
    dtype = jnp.result_type(predictions, targets)
    if not jnp.issubdtype(dtype, jnp.inexact):  # differences of ints, such as uint8, may overflow
        predictions, targets = predictions.astype(jnp.float32), targets.astype(jnp.float32)
    squares = jnp.square(predictions - targets)
    return jnp.mean(squares, axis=tuple(range(1, squares.ndim))), {}


def sequence_cross_entropy(
    scores: jax.Array, batch: Batch, *, length: float | None = None
) -> Losses:
    """The mean negative log-likelihood of a sequence's tokens, and the share with the best score.

    Token 0 is padding and does not count. The loss of a sequence of padding alone is 0.

    FedJAX divides the sum over a sequence's tokens by a constant: for Shakespeare by the length
    with padding, ``length=80``, and for Stack Overflow by an expected length, ``length=13.3``. Then
    all tokens have the same weight, whatever sequence they are in. Pass that ``length`` to use
    learning rates that were tuned with FedJAX.

    Args:
      scores: [batch, length, tokens], log-probabilities up to a constant.
      batch: ``"y"`` is int [batch, length], the next tokens. For a number that is not a token the
        loss is NaN.
      length: the number by which a sequence's sum of losses is divided. Default: its number of
        tokens.

    Returns:
      The losses [batch], and ``{"accuracy": ...}``, the share of correct tokens in each sequence.

    Raises:
      ValueError: if the shapes do not match.

    Example:

      >>> scores = jnp.zeros((2, 4, 8)).at[..., 5].set(jnp.log(9.0))
      >>> batch = {"y": jnp.array([[5, 5, 1, 0], [0, 0, 0, 0]])}
      >>> losses, metrics = fax.models.sequence_cross_entropy(scores, batch)
      >>> print(f"{losses[0]:.3f} {losses[1]:.3f}, {metrics['accuracy'][0]:.3f}")
      1.308 0.000, 0.667
    """
    labels = _labels("sequence_cross_entropy", batch)
    if length is not None:
        _arguments.number("fax.models.sequence_cross_entropy", "length", length, above=0)
    real = labels != PADDING
    total = jnp.sum(jnp.where(real, losses_of(scores, labels), 0), axis=-1)
    correct = jnp.sum(real & hits(scores, labels), axis=-1)
    tokens = jnp.maximum(jnp.sum(real, axis=-1), 1).astype(total.dtype)
    return total / (tokens if length is None else length), {"accuracy": correct / tokens}
