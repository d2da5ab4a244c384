"""Aggregates what participants send: their updates, and the states of their models."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

import fax
from fax import _keys
from fax._reductions import wrapping_sum
from fax.aggregators import Aggregator
from fax.data import Cohort

PyTree = Any


def aggregate(
    aggregator: Aggregator | None,
    updates: PyTree,
    state: PyTree,
    cohort: Cohort,
    weights: jax.Array | None = None,
) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
    """The aggregator's update, state and metrics; without one, the mean. Call it in a program.

    The update has the dtypes of the clients' updates, although some aggregators return longer ones.

    Args:
      aggregator: the user's, or None.
      updates: placed.
      state: the aggregator's, with the rows of the cohort.
      cohort: the clients.
      weights: placed, [clients]. Default: the numbers of examples.
    """
    weights = cohort.num_examples if weights is None else weights
    if aggregator is None:
        return fax.mean(updates, weights=weights), None, {}
    update, state, metrics = aggregator.aggregate(updates, weights, state, server_key(cohort))
    structures: Any = [jax.tree.structure(x) for x in (update, updates)]
    if structures[0] == structures[1]:  # or there will be an error
        update = jax.tree.map(_as_short, update, updates)
    return update, state, metrics


def _as_short(x: Any, like: jax.Array) -> Any:
    """Floats in the dtype of others."""
    dtypes = (x.dtype, like.dtype) if isinstance(x, jax.Array) else ()
    floats = dtypes and all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes)
    return x.astype(like.dtype) if floats else x


def server_key(cohort: Cohort) -> jax.Array:
    """A random key for the server, different in each round and from the key of any client.

    It is derived from the sum of all clients' keys, which with one client is that client's key.
    """
    bits = jax.random.key_data(cohort.keys)
    total = jax.random.wrap_key_data(wrapping_sum(bits), impl=jax.random.key_impl(cohort.keys))
    return _keys.derive(total, _keys.Use.SERVER)


def strong(x: Any) -> jax.Array:
    """An array without a weak type, as after a round, so that the round is compiled only once."""
    x = jnp.asarray(x)
    return lax.convert_element_type(x, x.dtype)


def mean_state(rows: PyTree, before: PyTree, weights: jax.Array | None, where: jax.Array) -> PyTree:
    """The mean of the model states of some participants. Call it in a program.

    Args:
      rows: placed, or None.
      before: the server's state. It stays if the weights of those participants add up to zero.
      weights: placed; None for equal ones.
      where: placed bool, the participants.
    """
    if not jax.tree.leaves(rows):
        return before
    counts = fax.map(jnp.int32, where) if weights is None else weights
    total = fax.sum(counts, where=where)
    mean = fax.mean(rows, weights=weights, where=where)
    return optax.tree.where(total > 0, next_model_state(mean, before), before)


def averaged(model_state: PyTree) -> list[Any]:
    """The leaves of model states of which the server takes the mean: floats."""
    leaves = jax.tree.leaves(model_state)
    return [x for x in leaves if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]


def next_model_state(mean: PyTree, before: PyTree) -> PyTree:
    """The clients' mean; leaves that are not floats do not change."""

    def one(mean, before):
        return mean if jnp.issubdtype(jnp.result_type(before), jnp.inexact) else before

    return jax.tree.map(one, mean, before)
