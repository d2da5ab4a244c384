"""Replicas: participants that keep their own parameters and optimizer state between rounds.

In a data center a participant is a copy of the model that trains on a shard of the data. It takes
many steps without communication before the replicas are averaged. Replica i trains on row i of the
cohort.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fax
from fax.aggregators import Aggregator, PerClient
from fax.aggregators._aggregator import all_bits, bits_of_a_row
from fax.aggregators._per_client import all_finite
from fax.algorithms._averaging import averaged, mean_state, strong
from fax.algorithms._checks import shown_types
from fax.algorithms._crossing import Specs, crossing, sharded
from fax.algorithms._local import local_steps
from fax.algorithms._loss import Metrics
from fax.algorithms._packed import mean_of_bytes, sent_in_bytes
from fax.data import Cohort

PyTree = Any


class Replica(NamedTuple):
    """The state of a replica.

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


def types_of_row(rows: PyTree) -> PyTree:
    """The shapes and dtypes of a row of each leaf."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), rows)


def check_goes_on(where: str, start: Callable, state: Any, replicas: int) -> None:
    """Checks that a state is one of this algorithm, and not of one with other arguments.

    Args:
      where: the algorithm, for messages.
      start: makes the algorithm's first state of the parameters, the model's state, and the
        aggregator's, which is not compared, because a private one draws a key for its first.
      state: has a `Replica` in each row of ``replicas``.
      replicas: their number.
    """

    def described(tree: PyTree) -> tuple:
        leaves, treedef = jax.tree.flatten(tree)
        return treedef, list(map(jnp.shape, leaves))

    for path, x in jax.tree_util.tree_leaves_with_path(state.replicas.rows):
        found = jnp.shape(x)
        if found[:1] != (replicas,):
            numbers = f"jnp.arange({replicas}) % {found[0]}" if found else "numbers"
            raise ValueError(
                f"{where}: round: state.replicas.rows{jax.tree_util.keystr(path)} has shape "
                f"{found}, expected a row for each of the replicas={replicas}. To go on with "
                "another number of replicas, give each of them an old row: state._replace("
                f"replicas=jax.tree.map(lambda x: x[{numbers}], state.replicas))."
            )
    rows = state.replicas.rows
    own = getattr(state, "aggregator", getattr(state, "aggregators", None))
    first = jax.eval_shape(start, *types_of_row((rows.params, rows.model_state)), own)
    for name, new, old in zip(state._fields, first, state):
        parts = {name: (new, old)}
        if name == "replicas":
            of_rows = zip(Replica._fields, new.rows, rows)
            parts = {f"replicas.rows.{of}": (one, other) for of, one, other in of_rows}
        for part, (expected, own) in parts.items():
            if described(expected) != described(own):
                raise ValueError(
                    f"{where}: round: state.{part} is {shown_types(own)}, expected "
                    f"{shown_types(expected)}, as init makes it. A state goes on with the "
                    "algorithm that made it. To go on with other arguments, such as another "
                    "optimizer, replace this part of it: state._replace("
                    f"{name}=algorithm.init(algorithm.params(state)).{name})."
                )


def models(state: Any) -> PyTree:
    """The replicas' parameters, leaves [replicas, ...]."""
    return state.replicas.rows.params


def soup(rows: PyTree, replicas: int, weights: jax.Array | None = None) -> PyTree:
    """The mean of rows [replicas, ...]. Call it outside a program."""

    @fax.program(replicas=replicas)
    def mean(rows: PyTree, weights: jax.Array | None) -> PyTree:
        return fax.mean(rows, weights=weights)

    return mean(rows, weights)


def inner_steps(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    state: Any,
    cohort: Cohort,
    first: Any,
    vectorize: int | None,
    specs: Specs | None = None,
) -> tuple[Any, Metrics]:
    """Trains each replica on its batches, without communication. Call it in a program.

    Args:
      loss: see `fax.algorithms.fedavg`.
      optimizer: the replicas' optimizer.
      state: the algorithm's state, with ``replicas``, whose rows are placed.
      cohort: the batches.
      first: the number of the first step in the round.
      vectorize: see `fax.map`.
      specs: how parameters are sharded over the devices of a replica, if that is given.

    Returns:
      The state with the trained replicas, and their metrics, placed.
    """

    def work(replica: Replica, client: Any) -> tuple[Replica, Metrics]:
        # With a branch, devices would wait for each other in every step.
        trained = local_steps(
            loss,
            optimizer,
            sharded(specs, replica.params),
            client,
            replica.model_state,
            optimizer_state=replica.optimizer,
            first=first,
            branch=False,
        )
        params = sharded(specs, trained.params)
        return Replica(params, trained.optimizer, trained.model_state), trained.metrics

    rows, metrics = fax.map(
        jax.checkpoint(work),  # so that gradients of a round do not store steps
        state.replicas.rows,
        cohort.clients(),
        vectorize=vectorize or cohort.vectorize,
    )
    return state._replace(replicas=PerClient(rows)), metrics


def taking_part(cohort: Cohort) -> jax.Array:
    """Which replicas have examples, here and in total, placed bool. Call it in a program."""
    if not cohort.padded:
        return fax.map(lambda n: n > 0, cohort.num_examples)
    return fax.map(lambda mask, n: jnp.any(mask) & (n > 0), cohort.mask, cohort.num_examples)


def mean_update(
    aggregator: Aggregator | None,
    updates: PyTree,
    taking_part: jax.Array,
    num_examples: jax.Array | None,
    state: PyTree,
    key: jax.Array | None,
    specs: Specs | None = None,
    by_leaf: bool = False,
    model_states: PyTree = None,
) -> tuple[PyTree, jax.Array, PyTree, dict[str, jax.Array]]:
    """The mean update of the replicas that take part, or the aggregator's. Call it in a program.

    Args:
      aggregator: the user's, or None.
      updates: placed.
      taking_part: placed bool.
      num_examples: placed weights; None for equal ones.
      state: the aggregator's. Row i belongs to replica i.
      key: for the aggregator.
      specs: how parameters are sharded over the devices of a replica, if that is known.
      by_leaf: whether the aggregator is known to treat leaves one by one, as the mean does. Others
        may not accept leaves that are sharded over different Explicit axes.
      model_states: placed, what `mean_of_states` averages at the same time, whose bits count, too.

    Returns:
      The update, with the dtypes of a replica's update; whether there is one, because a replica
      took part or the aggregator is private; the aggregator's state; and metrics, including
      ``"replicas/bits"`` and ``"outer_steps"``, which is 1 if there is an update.
    """
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(updates))
    here = fax.map(lambda on: on.astype(dtype), taking_part)
    zeros = fax.map(
        lambda on, update: optax.tree.where(on, update, optax.tree.zeros_like(update)),
        taking_part,
        updates,
    )
    once = crossing("fax.algorithms", specs, zeros, by_leaf or aggregator is None)
    zeros = once.split(zeros)
    weights = here
    if num_examples is not None:
        weights = fax.map(lambda on, n: jnp.where(on, n, 0), taking_part, num_examples)
    # A private aggregator adds noise even if no replica takes part, so as not to reveal that.
    heard = (fax.sum(here) > 0) | (aggregator is not None and aggregator.private)
    if aggregator is None:
        metrics = {"clients/bits": all_bits(updates)}
        mean = fax.mean(zeros, weights=weights)
    elif (rounding := sent_in_bytes(aggregator, zeros, once)) is not None:
        assert rounding.format is not None
        *before, last = state  # of the mean at the end of the chain
        zeros, weights, new, metrics = rounding.update(zeros, weights, tuple(before), key)
        if all(x.dtype.itemsize >= 4 for x in jax.tree.leaves(zeros)):
            mean, bits = mean_of_bytes(zeros, weights, rounding.format, once)
            metrics = {**metrics, "clients/bits": bits}
        else:  # `fax.mean` adds short floats up in float32
            mean = fax.mean(zeros, weights=weights, where=weights != 0)
        state = optax.tree.where(heard, (*new, last), state)
    else:
        mean, new, metrics = aggregator.aggregate(zeros, weights, state, key)
        state = optax.tree.where(heard, new, state)
    if "clients/bits" in metrics:  # those of the updates
        bits = metrics["clients/bits"] + bits_of_a_row(averaged(model_states))
        metrics = {**metrics, "clients/bits": bits}
    metrics = sent_metrics(metrics, here, heard)
    mean = once.join(jax.tree.map(lambda x, rows: x.astype(rows.dtype), mean, updates))
    return mean, heard, state, metrics


def sent_metrics(
    metrics: dict[str, jax.Array], here: jax.Array, heard: jax.Array
) -> dict[str, jax.Array]:
    """An aggregator's metrics, renamed from clients to replicas.

    Args:
      metrics: of one update.
      here: placed, 1 for the replicas that sent it.
      heard: whether there is an update.
    """
    metrics = {name.replace("clients/", "replicas/", 1): x for name, x in metrics.items()}
    if "replicas/bits" in metrics:
        metrics["replicas/bits"] = metrics["replicas/bits"] * here.astype(jnp.float32)
    metrics = {name: jnp.where(heard, x, jnp.zeros_like(x)) for name, x in metrics.items()}
    return {**metrics, "outer_steps": heard.astype(jnp.float32)}


def mean_of_states(
    rows: Replica, taking_part: jax.Array, num_examples: jax.Array | None, before: PyTree
) -> PyTree:
    """The mean model state of the replicas that take part, or the one before if none does.

    Replicas whose parameters are not finite are left out, as by `fax.aggregators.non_finite`.
    """
    counted = fax.map(lambda on, params: on & all_finite(params), taking_part, rows.params)
    return mean_state(rows.model_state, before, num_examples, counted)


def mixed(own: PyTree, other: PyTree, share: Any) -> PyTree:
    """``share own + (1 - share) other``; leaves that are not floats are those of ``own``."""

    def one(own: jax.Array, other: jax.Array) -> jax.Array:
        if not jnp.issubdtype(own.dtype, jnp.inexact):
            return own
        return (share * own + (1 - share) * other).astype(own.dtype)

    return jax.tree.map(one, own, other)


def pushed(own: PyTree, toward: PyTree, share: Any) -> PyTree:
    """`mixed`, after what is not finite in ``own`` has been replaced by ``toward``."""

    def usable(own: jax.Array, toward: jax.Array) -> jax.Array:
        inexact = jnp.issubdtype(own.dtype, jnp.inexact)
        return jnp.where(jnp.isfinite(own), own, toward) if inexact else own

    return mixed(jax.tree.map(usable, own, toward), toward, share)
