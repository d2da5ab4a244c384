"""Metrics of regression: how far predictions are from targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fax import _arguments
from fax.metrics._statistics import Mean, Statistic

Batch = Mapping[str, jax.Array]


def _errors(where: str, scores: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Errors and targets as floats [batch, outputs]."""
    if scores.shape == (*targets.shape, 1):
        scores = scores[..., 0]
    if scores.shape != targets.shape:
        raise ValueError(
            f"{where}: predictions have shape {scores.shape} and targets {targets.shape}, expected "
            "a prediction for each target."
        )
    dtype = jnp.promote_types(jnp.promote_types(scores.dtype, targets.dtype), jnp.float32)
    rows = (len(targets), -1)
    targets = jnp.reshape(targets, rows).astype(dtype)
    return jnp.reshape(scores, rows).astype(dtype) - targets, targets


def _mean_of(errors: jax.Array, size: Callable[[jax.Array], jax.Array]) -> Mean:
    return Mean(jnp.sum(size(errors), -1), jnp.full(len(errors), errors.shape[-1]))


@dataclasses.dataclass(frozen=True)
class _Regression:
    """What metrics of regression have in common."""

    label: str = "y"

    def __post_init__(self) -> None:
        _arguments.text(type(self).__name__, "label", self.label, "the name of a feature")

    def limits(self, num_classes: int | None) -> dict[str, int | None]:
        """The feature that has to be there. Its values have no limits."""
        return {self.label: None}


class MSE(_Regression):
    """The mean squared error.

    Attributes:
      label: the feature with the targets, numbers [batch, ...]. Predictions have the same shape.

    Example:

      >>> batch = {"y": jnp.array([1.0, 2.0])}
      >>> print(fax.metrics.MSE()(batch, jnp.array([1.0, 5.0])).sum().result())
      4.5
    """

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        """The statistic of each example."""
        return _mean_of(_errors("MSE", scores, batch[self.label])[0], jnp.square)


class MAE(_Regression):
    """The mean absolute error.

    Attributes:
      label: the feature with the targets, numbers [batch, ...]. Predictions have the same shape.

    Example:

      >>> batch = {"y": jnp.array([1.0, 2.0])}
      >>> print(fax.metrics.MAE()(batch, jnp.array([1.0, 5.0])).sum().result())
      1.5
    """

    def __call__(self, batch: Batch, scores: jax.Array) -> Mean:
        """The statistic of each example."""
        return _mean_of(_errors("MAE", scores, batch[self.label])[0], jnp.abs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decibels(Statistic):
    """A mean of squared errors, as the ratio of the signal to it in decibels.

    Attributes:
      mean: the mean, where the signal is 1.

    Example:

      >>> print(f"{fax.metrics.Decibels(fax.metrics.Mean(0.03, 3)).result():.1f}")
      20.0
    """

    mean: Mean

    def result(self) -> Any:
        """-10 log₁₀ of the mean. Infinite if there is no error."""
        mean = self.mean.result()
        if isinstance(mean, jax.Array):
            return -10 * jnp.log10(mean)
        with np.errstate(divide="ignore"):
            return -10 * np.log10(mean)


@dataclasses.dataclass(frozen=True)
class PSNR(_Regression):
    """The peak signal-to-noise ratio in decibels: 10 log₁₀(peak² / MSE).

    MSE is the mean squared error of all that is evaluated together, such as all pixels of a client.

    Attributes:
      label: the feature with the targets, numbers [batch, ...]. Predictions have the same shape.
      peak: the largest value that there can be, such as 1, or 255 for bytes.

    Example:

      >>> batch = {"y": jnp.array([0.2, 0.5])}
      >>> statistic = fax.metrics.PSNR()(batch, jnp.array([0.3, 0.4])).sum()
      >>> print(f"{statistic.result():.1f}")
      20.0
    """

    peak: float = dataclasses.field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _arguments.number("PSNR", "peak", self.peak, above=0)

    def __call__(self, batch: Batch, scores: jax.Array) -> Decibels:
        """The statistic of each example."""
        errors = _errors("PSNR", scores, batch[self.label])[0] / self.peak
        return Decibels(_mean_of(errors, jnp.square))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExplainedVariance(Statistic):
    """Sums of targets and of squared errors, from which R² follows.

    Attributes:
      count: the number of examples.
      total: the sum of targets, less a constant each, [outputs].
      squares: the sum of squares of these differences, [outputs].
      errors: the sum of squared errors, [outputs].
      rounding: how large a share of ``squares`` may be a rounding error.

    Example:

      >>> batch = {"y": jnp.array([1.0, 3.0])}
      >>> statistic = fax.metrics.R2()(batch, jnp.array([1.0, 2.0])).sum()
      >>> print(statistic.count, statistic.errors)
      2 [1.]
    """

    count: Any
    total: Any
    squares: Any
    errors: Any
    rounding: float = dataclasses.field(default=2.0**-23, metadata={"static": True})

    def result(self) -> Any:
        """R², the mean over outputs.

        NaN if an output has the same target in all examples, as far as rounding lets one see.
        """
        xp: Any = jnp if isinstance(self.errors, jax.Array) else np
        count = xp.maximum(xp.asarray(self.count), 1)[..., None]
        spread = self.squares - self.total**2 / count
        differ = spread > self.rounding * self.squares
        share = self.errors / xp.where(differ, spread, 1)
        return xp.where(differ, 1 - share, xp.nan).mean(-1)


@dataclasses.dataclass(frozen=True)
class R2(_Regression):
    """The coefficient of determination: R² = 1 - Σ (y - ŷ)² / Σ (y - ȳ)².

    ȳ is the mean of all targets that are evaluated together.

    Attributes:
      label: the feature with the targets, numbers [batch, ...]. Predictions have the same shape.
        Over several outputs the mean is taken.
      center: a number that is subtracted from the targets first. It does not change R². Squares are
        rounded, so if targets are much larger than their differences, pass one of about their size.
        The result is NaN if all differences may be rounding errors.

    Example:

      >>> batch = {"y": jnp.array([1.0, 2.0, 3.0])}
      >>> print(fax.metrics.R2()(batch, jnp.array([1.0, 2.0, 4.0])).sum().result())
      0.5
    """

    center: float = dataclasses.field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _arguments.number("R2", "center", self.center)

    def __call__(self, batch: Batch, scores: jax.Array) -> ExplainedVariance:
        """The statistic of each example."""
        errors, targets = _errors("R2", scores, batch[self.label])
        targets -= self.center
        ones = jnp.ones(len(targets), bool)
        # 32 bits are added up almost exactly, so a square's rounding error is all; 64 bits are not.
        rounding = 2.0**-23 if jnp.finfo(targets.dtype).bits <= 32 else 2.0**-40
        return ExplainedVariance(ones, targets, jnp.square(targets), jnp.square(errors), rounding)
