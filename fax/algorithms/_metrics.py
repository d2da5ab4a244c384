"""The metrics of a round, from the statistics of its participants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

import fax._operators as operators
import fax._reductions as reductions
from fax.metrics import Mean, Statistic


def report(
    metrics: Mapping[str, Statistic | jax.Array],
    total: Mapping[str, Statistic] | None = None,
    each: str = "clients",
) -> dict[str, jax.Array]:
    """The results for all participants and, as ``clients/...``, for each. Call it in a program.

    A mean over nothing is 0, not NaN as in evaluation: clients without examples are common in
    training, and `jax.debug_nans` should not stop at them.

    Args:
      metrics: placed. What is not a statistic is reported only for each participant.
      total: the sums of the statistics, if they are known.
      each: the name of the participants.
    """
    if total is None:
        total = reductions.sum({k: own for k, own in metrics.items() if isinstance(own, Statistic)})
    pooled = {name: _result(own) for name, own in total.items()}

    def alone(own: Any) -> jax.Array:
        by_row = isinstance(own, Mean) or not isinstance(own, Statistic)
        return _result(own) if by_row else operators.map(_result, own)

    return {**pooled, **{f"{each}/{name}": alone(own) for name, own in metrics.items()}}


def with_personal(
    algorithm: str, metrics: Mapping[str, Any], personal: Mapping[str, Any], *taken: str
) -> dict[str, Any]:
    """The metrics of a loss for the global model and, as ``personal/...``, for clients' own.

    Args:
      algorithm: its name, for the message.
      metrics: by the global model.
      personal: by the clients' own models.
      *taken: other names that the algorithm uses itself.
    """
    own = {f"personal/{name}": value for name, value in personal.items()}
    if clash := ({*own, *taken} & metrics.keys()):
        raise ValueError(
            f"{algorithm}: loss returned a metric {min(clash)!r}, but {algorithm} has a metric of "
            "that name. Rename it."
        )
    return {**metrics, **own}


def _result(value: Any) -> jax.Array:
    if isinstance(value, Mean):  # of nothing it is 0
        return value.total / (value.weight + (value.weight == 0))
    return value.result() if isinstance(value, Statistic) else value
