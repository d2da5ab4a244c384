"""Rounds in parts: replicas repeat the same work in a round, each time on some of its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import fax
from fax import _keys
from fax._placement import resolve
from fax.algorithms._averaging import server_key
from fax.algorithms._clients import is_per_client
from fax.algorithms._loss import Metrics
from fax.algorithms._metrics import report
from fax.algorithms._replicas import check_goes_on
from fax.data import Cohort
from fax.data._batches import with_batches
from fax.data._cohort import Gathered
from fax.sharding._types import as_placed

PyTree = Any


class Part(NamedTuple):
    """A part of a round. All parts have the same number of steps.

    Attributes:
      batches: the cohort with only these steps.
      first: the number of its first step in the round.
      key: a random key for the server, or None.
      cohort: the cohort of the whole round.
    """

    batches: Cohort
    first: Any
    key: jax.Array | None
    cohort: Cohort


def rounds(
    where: str,
    start: Callable[..., Any],
    replicas: int,
    steps: int | None,
    work: Callable[[Any, Part], tuple[Any, tuple]],
    *,
    keyed: bool,
) -> Callable[[Any, Cohort], tuple[Any, dict[str, jax.Array]]]:
    """The round of an algorithm that runs ``work`` on each part of it in order.

    Args:
      where: the algorithm, for messages.
      start: makes its first state; see `check_goes_on`.
      replicas: their number; the cohort has a row for each.
      steps: the number of steps in a part. None: all of the cohort's.
      work: ``work(state, part) -> (state, (metrics, total, sent))``, in a program; see
        `round_metrics`.
      keyed: whether parts have keys.
    """

    def round(state: Any, cohort: Cohort) -> tuple[Any, dict[str, jax.Array]]:
        check_goes_on(where, start, state, replicas)
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
                state = _placed(state)
                state, metrics = lax.scan(part, state, (numbers, *jax.tree.map(split, batches)))
                metrics = jax.tree.map(lambda x: jnp.sum(x, 0), metrics)
            return state, round_metrics(*metrics)

        return run(state, cohort)

    return round


def _placed(state: Any) -> Any:
    """The state with the types that it has after a part, so that a loop can carry it.

    Replicas may come from anywhere, for example from a checkpoint, and along Explicit mesh axes
    their sharding is part of their type.
    """
    group = resolve("replicas", "fax.algorithms")

    def placed(x: Any) -> Any:
        return jax.tree.map(lambda rows: as_placed(rows, group), x) if is_per_client(x) else x

    return jax.tree.map(placed, state, is_leaf=is_per_client)


def _parts(where: str, cohort: Cohort, replicas: int, steps: int | None) -> tuple[int, int]:
    """The number of parts in a round, and the number of steps in each."""
    found, total = cohort.mask.shape[:2]
    if found != replicas:
        raise ValueError(
            f"{where}: the cohort has {found} clients, expected one for each replica: "
            f"replicas={replicas}."
        )
    size = steps or total
    count, rest = divmod(total, size)
    if rest or not count:
        raise ValueError(
            f"{where}: the cohort has {total} batches for each replica, expected a multiple of "
            f"steps={size}. Choose max_steps= of fax.data.cohorts accordingly."
        )
    return count, size


def _rows(cohort: Cohort) -> PyTree:
    """The arrays of a cohort that have an axis of steps, except the mask."""
    return cohort.batches.rows if isinstance(cohort.batches, Gathered) else cohort.batches


def _with_batches(cohort: Cohort, rows: PyTree, mask: jax.Array) -> Cohort:
    if isinstance(cohort.batches, Gathered):
        rows = dataclasses.replace(cohort.batches, rows=rows)
    return with_batches(cohort, rows, mask)


def between(cohort: Cohort, begin: int, end: int) -> Cohort:
    """The cohort with only some of its steps."""
    return _with_batches(
        cohort, *jax.tree.map(lambda x: x[:, begin:end], (_rows(cohort), cohort.mask))
    )


def step_of(cohort: Cohort, number: Any) -> Cohort:
    """The cohort with only one of its steps, whose number may be traced."""

    def one(x: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, number, 1, axis=1)

    return _with_batches(cohort, *jax.tree.map(one, (_rows(cohort), cohort.mask)))


def round_metrics(
    metrics: Metrics, total: Metrics | None, sent: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """The metrics of a round, from the summed metrics of its parts. Call it in a program.

    Args:
      metrics: of each replica, [replicas].
      total: of all replicas, if known.
      sent: the summed metrics of the updates. ``"replicas/bits"`` and ``"outer_steps"`` are
        reported as sums, the others as means.
    """
    adding = ("replicas/bits", "outer_steps")
    times = jnp.maximum(sent.get("outer_steps", 0), 1)
    sent = {name: x if name in adding else x / times for name, x in sent.items()}
    return {**report(metrics, total, "replicas"), **sent}
