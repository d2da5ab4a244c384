"""Algorithms whose server takes the clients' mean update for a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import fax
from fax import _keys
from fax.aggregators import Aggregator
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._checks import guarded
from fax.algorithms._clients import gather_rows as rows_of
from fax.algorithms._clients import scatter_rows as with_rows
from fax.algorithms._local_old import Local, metrics_of
from fax.data import Client, Cohort

PyTree = Any


class FedAvgState(NamedTuple):
    """The server's state.

    Attributes:
      params: the server's model.
      optimizer: the state of the server's optimizer.
      model_state: what the model has besides parameters, such as batch statistics, or None.
      aggregator: the state of the aggregator, or None.
    """

    params: PyTree
    optimizer: PyTree
    model_state: PyTree
    aggregator: PyTree = None


def averaging(
    caller: str,
    loss: Callable,
    local: Callable[[PyTree, PyTree, Client], Local],
    server_optimizer: optax.GradientTransformation,
    aggregator: Aggregator | None,
    vectorize: int | None,
    weights: Callable[[Local, Cohort], jax.Array] = lambda sent, cohort: cohort.num_examples,
) -> Algorithm:
    """The algorithm ``caller`` whose clients do ``local(params, model_state, client)``.

    ``weights(sent, cohort)`` are those of the updates, placed. The rest of the arguments are those
    of `fax.algorithms.fedavg`, checked.
    """

    def init(params: PyTree, model_state: PyTree = None) -> FedAvgState:
        check_model_state("init", aggregator, model_state)
        params, model_state = jax.tree.map(strong, (params, model_state))
        own = None if aggregator is None else aggregator.init(params)
        return FedAvgState(params, server_optimizer.init(params), model_state, own)

    def round(state: FedAvgState, cohort: Cohort) -> tuple[FedAvgState, dict[str, jax.Array]]:
        @fax.program(clients=cohort.size)
        def mean_update(
            params: PyTree, model_state: PyTree, aggregator_state: PyTree, cohort: Cohort
        ) -> tuple:
            sent = fax.map(
                jax.checkpoint(local),  # so that gradients of a round do not store steps
                fax.broadcast(params),
                fax.broadcast(model_state),
                cohort.clients(),
                vectorize=vectorize or cohort.vectorize,
            )
            update, aggregator_state, more = aggregate(
                aggregator, sent.update, aggregator_state, cohort, weights(sent, cohort)
            )
            mean_state = fax.mean(sent.model_state, weights=cohort.num_examples)
            return update, mean_state, aggregator_state, {**metrics_of(sent.tally), **more}

        update, mean_state, aggregator_state, metrics = mean_update(
            state.params, state.model_state, rows_of(state.aggregator, cohort), cohort
        )
        params, optimizer = server_step(server_optimizer, update, state.optimizer, state.params)
        model_state = next_model_state(mean_state, state.model_state)
        aggregator_state = with_rows(state.aggregator, aggregator_state, cohort)
        return FedAvgState(params, optimizer, model_state, aggregator_state), metrics

    return (guarded(caller, loss, FedAvgState, init, round, lambda state: state.params))


def aggregate(
    aggregator: Aggregator | None,
    updates: PyTree,
    state: PyTree,
    cohort: Cohort,
    weights: jax.Array | None = None,
    cluster: int | None = None,
) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
    """The aggregator's update, state and metrics; without one, the mean. To be called in a program.

    Args:
      aggregator: the user's, or None.
      updates: placed.
      state: the aggregator's, with the rows of the cohort; see `rows_of`.
      cohort: whose clients these are.
      weights: placed, [clients]. Default: the numbers of examples.
      cluster: which of several updates this is, so that each has a key of its own.
    """
    weights = cohort.num_examples if weights is None else weights
    if aggregator is None:
        return fax.mean(updates, weights=weights), None, {}
    key = server_key(cohort)
    if cluster is not None:
        key = _keys.derive(key, _keys.Use.CLUSTER, cluster)
    return aggregator.aggregate(updates, weights, state, key)


def server_key(cohort: Cohort) -> jax.Array:
    """A random key of the server's, different in each round and not that of any client.

    It is derived from the sum of all clients' keys, which is a client's own if there is one only.
    """
    bits = jax.random.key_data(cohort.keys)
    total = fax.sum(bits).astype(bits.dtype)  # with x64, sums of integers are wider
    total = jax.random.wrap_key_data(total, impl=jax.random.key_impl(cohort.keys))
    return _keys.derive(total, _keys.Use.SERVER)


def check_private(
    caller: str,
    aggregator: Any,
    sent: str,
    instead: str = "another algorithm, such as fax.algorithms.fedavg",
) -> None:
    """Refuses a private aggregator where the server gets more from clients than their updates."""
    if getattr(aggregator, "private", False):
        raise ValueError(
            f"{caller}: aggregator is private, but {sent} without it, so that its epsilon would "
            f"not hold. Use an aggregator that is not private, or {instead}."
        )


def check_model_state(caller: str, aggregator: Any, model_state: PyTree) -> None:
    """Refuses a private aggregator for a model with state, which is averaged without noise."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(model_state):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            name = f"model_state{jax.tree_util.keystr(path)}"
            instead = "a model without such state, with GroupNorm in place of BatchNorm"
            check_private(caller, aggregator, f"{name} is averaged over clients", instead)


def server_step(
    optimizer: optax.GradientTransformation, update: PyTree, state: PyTree, params: PyTree
) -> tuple[PyTree, PyTree]:
    """The server's parameters and optimizer's state after a step along the clients' update."""
    gradient = jax.tree.map(jnp.negative, update)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def moved(params: PyTree, update: PyTree, rate: Any) -> PyTree:
    """Parameters and ``rate`` times the update."""
    return optax.apply_updates(params, jax.tree.map(lambda u: rate * u, update))


def strong(x: Any) -> jax.Array:
    """An array of the type that it has after a round, so that this is compiled once."""
    x = jnp.asarray(x)
    return lax.convert_element_type(x, x.dtype)


def next_model_state(mean: PyTree, before: PyTree) -> PyTree:
    """The clients' mean; leaves that are not floats stay what they were."""

    def one(mean, before):
        return mean if jnp.issubdtype(jnp.result_type(before), jnp.inexact) else before

    return jax.tree.map(one, mean, before)
