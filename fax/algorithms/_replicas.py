"""Replicas: participants that keep their own parameters and optimizer from round to round.

In a data centre a participant is a copy of the model that trains on a shard of the data. It takes
many steps on its own between the few times at which replicas are brought together. Row i of
a cohort is what replica i trains on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import fax
from fax.aggregators import Aggregator, PerClient
from fax.aggregators._aggregator import all_bits
from fax.algorithms._averaging import next_model_state, strong
from fax.algorithms._local_old import Tally, metrics_of, train
from fax.data import Cohort
from fax.data._cohort import Gathered

PyTree = Any


class Replica(NamedTuple):
    """What a replica keeps.

    Attributes:
      params: its model.
      optimizer: the state of its optimizer, which is never averaged.
      model_state: what the model has besides parameters, or None.
    """

    params: PyTree
    optimizer: PyTree
    model_state: PyTree


def identical(params: PyTree, optimizer: PyTree, model_state: PyTree, replicas: int) -> PerClient:
    """Replicas that start from the same parameters."""

    @fax.program(replicas=replicas)
    def start(one: Replica) -> Replica:
        return fax.broadcast(one)

    return PerClient(start(Replica(params, optimizer, model_state)))


def population(
    where: str,
    params: PyTree,
    optimizer: optax.GradientTransformation,
    model_state: PyTree,
    replicas: int,
) -> PerClient:
    """Replicas that start from the same parameters, or from rows of a `PerClient`."""
    if not isinstance(params, PerClient):
        params, model_state = jax.tree.map(strong, (params, model_state))
        return identical(params, optimizer.init(params), model_state, replicas)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params.rows):
        if jnp.shape(leaf)[:1] != (replicas,):
            raise ValueError(
                f"{where}: params.rows{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, "
                f"expected a row for each of the replicas={replicas}."
            )

    @fax.program(replicas=replicas)
    def start(rows: PyTree, model_state: PyTree) -> Replica:
        def one(params: PyTree, model_state: PyTree) -> Replica:
            return Replica(params, optimizer.init(params), model_state)

        return fax.map(one, rows, fax.broadcast(model_state))

    return PerClient(start(*jax.tree.map(strong, (params.rows, model_state))))


def soup(rows: PyTree, replicas: int, weights: jax.Array | None = None) -> PyTree:
    """The mean of rows [replicas, ...], outside of a program."""

    @fax.program(replicas=replicas)
    def mean(rows: PyTree, weights: jax.Array | None) -> PyTree:
        return fax.mean(rows, weights=weights)

    return mean(rows, weights)


class Parts:
    """A cohort's batches in parts of equally many steps, to be scanned over.

    Args:
      where: the algorithm, for messages.
      cohort: one row for each replica.
      replicas: how many there should be.
      steps: the steps of a part. Default: all that the cohort has.
      name: of the argument that ``steps`` comes from.

    Attributes:
      count: the number of parts.
      steps: the steps of each.
      arrays: what to scan over, leaves [count, ...].
    """

    def __init__(
        self, where: str, cohort: Cohort, replicas: int, steps: int | None, name: str = "steps"
    ):
        size, total = cohort.mask.shape[:2]
        if size != replicas:
            raise ValueError(
                f"{where}: the cohort has {size} clients, expected one for each of the "
                f"replicas={replicas}."
            )
        self.cohort, self.steps = cohort, steps or total
        self.count, rest = divmod(total, self.steps)
        if rest or not self.count:
            raise ValueError(
                f"{where}: the cohort has {total} batches for each replica, expected a multiple of "
                f"{name}={self.steps}, so that none is lost. Choose max_steps= of "
                "fax.data.cohorts accordingly."
            )
        batches = cohort.batches
        rows = batches.rows if isinstance(batches, Gathered) else batches
        split = jax.tree.map(self._split, (rows, cohort.mask))
        self.arrays = (jnp.arange(self.count, dtype=jnp.int32), *split)

    def _split(self, x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), self.count, self.steps, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    def cohort_of(
        self, rows: PyTree, mask: jax.Array, begin: int = 0, end: int | None = None
    ) -> Cohort:
        """The cohort of a part, or of some of its steps."""
        rows, mask = jax.tree.map(lambda x: x[:, begin:end], (rows, mask))
        batches = self.cohort.batches
        if isinstance(batches, Gathered):
            rows = dataclasses.replace(batches, rows=rows)
        return dataclasses.replace(self.cohort, batches=rows, mask=mask)

    def scan(self, fn: Callable, carry: PyTree) -> tuple[PyTree, PyTree]:
        """``lax.scan``, without a loop around a single part."""
        if self.count > 1:
            return lax.scan(fn, carry, self.arrays)
        carry, out = fn(carry, jax.tree.map(lambda x: x[0], self.arrays))
        return carry, jax.tree.map(lambda x: x[None], out)


def inner_steps(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    replicas: Replica,
    cohort: Cohort,
    first: Any,
    vectorize: int | None,
) -> tuple[Replica, Tally]:
    """Trains each replica on its batches. Nothing is sent. To be called in a program.

    Args:
      loss: see `fax.algorithms.fedavg`.
      optimizer: the replicas'.
      replicas: placed.
      cohort: the batches.
      first: the number of the first step in the round.
      vectorize: see `fax.map`.

    Returns:
      The replicas and their tallies, placed.
    """

    def work(replica: Replica, client: Any) -> tuple[Replica, Tally]:
        # A branch would make devices wait for each other in every step.
        params, model_state, tally, state = train(
            loss,
            optimizer,
            replica.params,
            replica.model_state,
            client,
            optimizer_state=replica.optimizer,
            first=first,
            branch=False,
        )
        return Replica(params, state, model_state), tally

    return fax.map(
        jax.checkpoint(work),  # so that gradients of a round do not store steps
        replicas,
        cohort.clients(),
        vectorize=vectorize or cohort.vectorize,
    )


def taking_part(cohort: Cohort) -> jax.Array:
    """Who has examples, in the batches and in all, placed bool. To be called in a program."""
    return fax.map(lambda mask, n: jnp.any(mask) & (n > 0), cohort.mask, cohort.num_examples)


def mean_update(
    aggregator: Aggregator | None,
    updates: PyTree,
    taking_part: jax.Array,
    num_examples: jax.Array | None,
    state: PyTree,
    key: jax.Array | None,
) -> tuple[PyTree, jax.Array, PyTree, dict[str, jax.Array]]:
    """The mean of those who take part, or what the aggregator makes of it. Called in a program.

    Args:
      aggregator: the user's, or None.
      updates: placed.
      taking_part: placed bool.
      num_examples: placed weights; None for equal ones.
      state: the aggregator's. Row i is replica i's.
      key: for the aggregator.

    Returns:
      The update in the dtypes of a replica's, whether there is one, as anybody took part or the
      aggregator is private, the aggregator's state and metrics. Among these are ``"replicas/bits"``
      and ``"outer_steps"``, 1 if there is an update.
    """
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(updates))
    here = fax.map(lambda on: on.astype(dtype), taking_part)
    zeros = fax.map(
        lambda on, update: jax.tree.map(lambda x: jnp.where(on, x, jnp.zeros_like(x)), update),
        taking_part,
        updates,
    )
    weights = here
    if num_examples is not None:
        weights = fax.map(lambda on, n: jnp.where(on, n, 0), taking_part, num_examples)
    # That nobody takes part is nobody's business if there is noise to hide it.
    heard = (fax.sum(here) > 0) | (aggregator is not None and aggregator.private)
    if aggregator is None:
        metrics = {"clients/bits": all_bits(updates)}
        mean = fax.mean(zeros, weights=weights)
    else:
        mean, new, metrics = aggregator.aggregate(zeros, weights, state, key)
        state = choose(heard, new, state)
    metrics = sent_metrics(metrics, here, heard)
    mean = jax.tree.map(lambda x, rows: x.astype(rows.dtype), mean, updates)
    return mean, heard, state, metrics


def sent_metrics(
    metrics: dict[str, jax.Array], here: jax.Array, heard: jax.Array
) -> dict[str, jax.Array]:
    """An aggregator's metrics by the names that they have with replicas.

    Args:
      metrics: of one time that something was sent.
      here: placed, 1 for those who sent it.
      heard: whether anything came of it.
    """
    metrics = {name.replace("clients/", "replicas/", 1): x for name, x in metrics.items()}
    if "replicas/bits" in metrics:
        metrics["replicas/bits"] = metrics["replicas/bits"] * here.astype(jnp.float32)
    metrics = {name: jnp.where(heard, x, jnp.zeros_like(x)) for name, x in metrics.items()}
    return {**metrics, "outer_steps": heard.astype(jnp.float32)}


def difference(own: PyTree, other: PyTree) -> PyTree:
    """``own - other``."""
    return jax.tree.map(jnp.subtract, own, other)


def choose(flag: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """One pytree or the other."""
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), new, old)


def mean_state(
    rows: PyTree,
    taking_part: jax.Array,
    num_examples: jax.Array | None,
    heard: jax.Array,
    before: PyTree,
) -> PyTree:
    """The mean of the model states of those who take part. To be called in a program."""
    mean = fax.mean(rows, weights=num_examples, where=taking_part)
    return choose(heard, next_model_state(mean, before), before)


def mixed(own: PyTree, other: PyTree, share: Any) -> PyTree:
    """``share own + (1 - share) other``; leaves that are not floats stay one's own."""

    def one(own: jax.Array, other: jax.Array) -> jax.Array:
        if not jnp.issubdtype(own.dtype, jnp.inexact):
            return own
        return (share * own + (1 - share) * other).astype(own.dtype)

    return jax.tree.map(one, own, other)


def round_metrics(
    tally: Tally, total: Tally | None, sent: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """The metrics of a round from those of its parts. To be called in a program.

    Args:
      tally: of each replica in each part, [parts, replicas].
      total: of all replicas, [parts], if that is known.
      sent: the metrics of each time that something was sent, [parts, ...]. Bits add up, and
        so does ``"outer_steps"``, which is 1 where something was sent; of the rest, the mean.
    """
    tally, total, sent = jax.tree.map(lambda x: jnp.sum(x, 0), (tally, total, sent))
    times = jnp.maximum(sent["outer_steps"], 1)
    sent = {
        name: x if name in ("replicas/bits", "outer_steps") else x / times
        for name, x in sent.items()
    }
    return {**metrics_of(tally, total, "replicas"), **sent}
