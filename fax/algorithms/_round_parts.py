"""Rounds in parts: what replicas do again and again in a round, each time on some of its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import fax
from fax import _keys
from fax.algorithms._averaging import server_key
from fax.algorithms._loss import Metrics
from fax.algorithms._metrics import report
from fax.data import Cohort
from fax.data._cohort import Gathered

PyTree = Any


class Part(NamedTuple):
    """A part of a round, of equally many steps as the others.

    Attributes:
      batches: the cohort of its steps.
      first: the number of its first step in the round.
      key: a random key of the server's, or None.
      cohort: that of the whole round.
    """

    batches: Cohort
    first: Any
    key: jax.Array | None
    cohort: Cohort


def rounds(
    where: str,
    replicas: int,
    steps: int | None,
    work: Callable[[Any, Part], tuple[Any, tuple]],
    *,
    keyed: bool,
) -> Callable[[Any, Cohort], tuple[Any, dict[str, jax.Array]]]:
    """The round of an algorithm that does ``work`` with one part of it after the other.

    Args:
      where: the algorithm, for messages.
      replicas: how many there are; the cohort has a row for each.
      steps: the steps of a part. None: all that the cohort has.
      work: ``work(state, part) -> (state, (metrics, total, sent))``, in a program; see
        `round_metrics`.
      keyed: whether parts have a key.
    """

    def round(state: Any, cohort: Cohort) -> tuple[Any, dict[str, jax.Array]]:
        count, size = _parts(where, cohort, replicas, steps)

        @fax.program(replicas=replicas)
        def run(state: Any, cohort: Cohort) -> tuple[Any, dict[str, jax.Array]]:
            key = server_key(cohort) if keyed else None

            def part(state: Any, own: tuple) -> tuple:
                number, rows, mask = own
                own_key = None if key is None else _keys.derive(key, _keys.Use.PART, number)
                batches = _with_batches(cohort, rows, mask)
                return work(state, Part(batches, number * size, own_key, cohort))

            def split(x: jax.Array) -> jax.Array:
                return jnp.moveaxis(x.reshape(len(x), count, size, *x.shape[2:]), 1, 0)

            batches = _rows(cohort), cohort.mask
            if count == 1:  # without a loop
                state, metrics = part(state, (0, *batches))
            else:
                numbers = jnp.arange(count, dtype=jnp.int32)
                state, metrics = lax.scan(part, state, (numbers, *jax.tree.map(split, batches)))
                metrics = jax.tree.map(lambda x: jnp.sum(x, 0), metrics)
            return state, round_metrics(*metrics)

        return run(state, cohort)

    return round


def _parts(where: str, cohort: Cohort, replicas: int, steps: int | None) -> tuple[int, int]:
    """How many parts a round has, and of how many steps each."""
    found, total = cohort.mask.shape[:2]
    if found != replicas:
        raise ValueError(
            f"{where}: the cohort has {found} clients, expected one for each of the "
            f"replicas={replicas}."
        )
    size = steps or total
    count, rest = divmod(total, size)
    if rest or not count:
        raise ValueError(
            f"{where}: the cohort has {total} batches for each replica, expected a multiple of "
            f"steps={size}, so that none is lost. Choose max_steps= of fax.data.cohorts "
            "accordingly."
        )
    return count, size


def _rows(cohort: Cohort) -> PyTree:
    """What has an axis of steps, besides the mask."""
    return cohort.batches.rows if isinstance(cohort.batches, Gathered) else cohort.batches


def _with_batches(cohort: Cohort, rows: PyTree, mask: jax.Array) -> Cohort:
    if isinstance(cohort.batches, Gathered):
        rows = dataclasses.replace(cohort.batches, rows=rows)
    return dataclasses.replace(cohort, batches=rows, mask=mask)


def between(cohort: Cohort, begin: int, end: int) -> Cohort:
    """The cohort of some of its steps."""
    return _with_batches(
        cohort, *jax.tree.map(lambda x: x[:, begin:end], (_rows(cohort), cohort.mask))
    )


def round_metrics(
    metrics: Metrics, total: Metrics | None, sent: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """The metrics of a round from the sums of those of its parts. To be called in a program.

    Args:
      metrics: of each replica, [replicas].
      total: of all replicas, if that is known.
      sent: the metrics of each time that something was sent. Bits add up, and so does
        ``"outer_steps"``, which is 1 where something was sent; of the rest, the mean.
    """
    adding = ("replicas/bits", "outer_steps")
    times = jnp.maximum(sent.get("outer_steps", 0), 1)
    sent = {name: x if name in adding else x / times for name, x in sent.items()}
    return {**report(metrics, total, "replicas"), **sent}
