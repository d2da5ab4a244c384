"""Clipping: no client moves the model by more than a norm, fixed or following a quantile."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import fax._operators as operators
import fax._reductions as reductions
from fax import _arguments
from fax.aggregators._aggregator import Metrics, Transformation, each_present
from fax.aggregators._norms import l2_norm, shrunk, toward_zero, wide

PyTree = Any


def clip_by_norm(norm: float | jax.Array) -> Transformation:
    """Scales down each client's update whose norm is above C: u_i min(1, C / ‖u_i‖).

    ‖u‖ is the L2 norm of all leaves together. The clipped update's exact norm is at most C for all
    finite updates: it is computed in at least float32 without overflow, and whatever rounding could
    add is taken off. Numbers that are denormal in float32 count as zero. Weights are left as they
    are. An update that is not finite stays so; put `non_finite` before.

    Args:
      norm: C, positive. It may be traced.

    Returns:
      The transformation. Its metrics are ``"clipped"``, the share of clients whose update was
      scaled down, of those whose weight is not zero, and ``"clip_norm"``, C.

    Raises:
      ValueError: if ``norm`` is not a positive number.

    Example:

      >>> clip = fax.aggregators.clip_by_norm(1.0)
      >>> @fax.program(clients=2)
      ... def average(updates):
      ...     aggregator = fax.aggregators.chain(clip)
      ...     state = aggregator.init(jnp.zeros(2))
      ...     return aggregator.aggregate(updates, jnp.ones(2), state, jax.random.key(0))[0]
      >>> [f"{x:.3f}" for x in average(jnp.array([[0.0, 40.0], [0.5, 0.5]]))]
      ['0.250', '0.750']
    """
    _arguments.number("fax.aggregators.clip_by_norm", "norm", norm, above=0)

    def update(
        updates: PyTree, weights: jax.Array, state: PyTree, key: jax.Array
    ) -> tuple[PyTree, jax.Array, PyTree, Metrics]:
        updates, outside = clip_all(updates, weights, norm)
        clipped = reductions.mean(outside, where=weights != 0)
        metrics = {"clipped": clipped, "clip_norm": jnp.asarray(norm)}
        return updates, weights, state, metrics

    return Transformation(lambda params: (), update)


def adaptive_clip(
    quantile: float | jax.Array = 0.5,
    *,
    initial: float | jax.Array = 0.1,
    rate: float | jax.Array = 0.2,
) -> Transformation:
    """Clips by a norm that follows a quantile γ of the norms of clients' updates.

    In a round updates are clipped by C as by `clip_by_norm`. b is the share of clients that were
    not above it, and

        C' = C exp(-η (b - γ)),

    so that C settles where a share γ of the clients is below it, even if it starts orders of
    magnitude away. Only clients whose weight is not zero are counted, each once, and if there is
    none C stays what it is; weights are left as they are. C stays a normal number of its dtype,
    however long all updates are zero, and so can grow again. This one sees b as it is. What is
    private needs noise on it: see ``quantile`` of `gaussian`.

    Args:
      quantile: γ, between 0 and 1.
      initial: C of the first round, positive.
      rate: η, positive.

    Returns:
      The transformation, whose state is C, a float scalar. Its metrics are those of
      `clip_by_norm`.

    Raises:
      ValueError: if an argument is out of range.

    References:
      Andrew et al., Differentially private learning with adaptive clipping, arXiv:1905.03871, of
      which the defaults are.

    Example:

      >>> aggregator = fax.aggregators.chain(fax.aggregators.adaptive_clip(initial=8.0, rate=0.5))
      >>> @fax.program(clients=3)
      ... def step(updates, state):
      ...     return aggregator.aggregate(updates, jnp.ones(3), state, jax.random.key(0))[1:]
      >>> state = aggregator.init(jnp.zeros(1))
      >>> for _ in range(30):
      ...     state, metrics = step(jnp.array([[1.0], [2.0], [3.0]]), state)
      >>> bool(1.5 < metrics["clip_norm"] < 2.5)
      True
    """
    caller = "fax.aggregators.adaptive_clip"
    _arguments.number(caller, "quantile", quantile, above=0, below=1)
    _arguments.number(caller, "initial", initial, above=0)
    _arguments.number(caller, "rate", rate, above=0)

    def update(
        updates: PyTree, weights: jax.Array, state: jax.Array, key: jax.Array
    ) -> tuple[PyTree, jax.Array, jax.Array, Metrics]:
        updates, outside = clip_all(updates, weights, state)
        clipped = reductions.mean(outside.astype(state.dtype), where=weights != 0)
        after = next_norm(state, 1 - clipped, quantile, rate)
        after = jnp.where(reductions.sum(weights != 0) > 0, after, state)
        return updates, weights, after, {"clipped": clipped, "clip_norm": state}

    return Transformation(lambda params: start_norm(params, initial), update)


def start_norm(params: PyTree, initial: float | jax.Array) -> jax.Array:
    """The state of a norm that adapts, of the widest dtype of the updates."""
    dtypes = [wide(x) for x in jax.tree.leaves(params)]
    return lax.convert_element_type(initial, jnp.result_type(jnp.float32, *dtypes))


def next_norm(norm: jax.Array, share: Any, quantile: Any, rate: Any) -> jax.Array:
    """The geometric step towards the quantile, to a number from which the next one can start."""
    info = jnp.finfo(norm.dtype)
    new = norm * jnp.exp(-rate * (share - quantile))
    return jnp.clip(new, info.tiny, info.max).astype(norm.dtype)


def clip_all(updates: PyTree, weights: jax.Array, limit: Any) -> tuple[PyTree, jax.Array]:
    """The clipped updates, zero for weights of zero, and whether they were outside of the limit."""

    def own(update, limit):
        norm = l2_norm(update)
        small = shrunk(update, norm, limit)
        small = jax.tree.map(lambda x, like: toward_zero(x, jnp.result_type(like)), small, update)
        return small, ~(norm.size <= limit * norm.unit.inverse)

    return each_present(own, updates, weights, operators.broadcast(limit))
