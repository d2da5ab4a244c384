"""Clipping: no client moves the model by more than a norm, fixed or following a quantile."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import fax._operators as operators
import fax._reductions as reductions
from fax import _arguments
from fax.aggregators._aggregator import Metrics, Transformation, each

PyTree = Any


def clip_by_norm(norm: float | jax.Array) -> Transformation:
    """Scales down each client's update whose norm is above C: u_i min(1, C / ‖u_i‖).

    ‖u‖ is the L2 norm of all leaves together. Weights are left as they are. An update that is not
    finite stays so; put `non_finite` before.

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
      >>> average(jnp.array([[0.0, 40.0], [0.5, 0.5]]))
      Array([0.25, 0.75], dtype=float32)
    """
    _arguments.number("fax.aggregators.clip_by_norm", "norm", norm, above=0)

    def update(
        updates: PyTree, weights: jax.Array, state: PyTree, key: jax.Array
    ) -> tuple[PyTree, jax.Array, PyTree, Metrics]:
        updates, inside = clip_all(updates, norm)
        metrics = {"clipped": 1 - _share(inside, weights), "clip_norm": jnp.asarray(norm)}
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

    so that C settles where a share γ of the clients is below it, be it orders of magnitude away
    at first. Only clients whose weight is not zero are counted, each once; weights are left as
    they are. This one sees b as it is. What is private needs noise on it: see ``quantile`` of
    `gaussian`.

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
        updates, inside = clip_all(updates, state)
        share = _share(inside.astype(state.dtype), weights)
        metrics = {"clipped": 1 - share, "clip_norm": state}
        return updates, weights, next_norm(state, share, quantile, rate), metrics

    return Transformation(lambda params: start_norm(params, initial), update)


def start_norm(params: PyTree, initial: float | jax.Array) -> jax.Array:
    """The state of a norm that adapts, of the widest dtype of the updates."""
    dtypes = [wide(x) for x in jax.tree.leaves(params)]
    return lax.convert_element_type(initial, jnp.result_type(jnp.float32, *dtypes))


def next_norm(norm: jax.Array, share: Any, quantile: Any, rate: Any) -> jax.Array:
    """The geometric step towards the quantile."""
    return (norm * jnp.exp(-rate * (share - quantile))).astype(norm.dtype)


def clip_all(updates: PyTree, limit: Any) -> tuple[PyTree, jax.Array]:
    """The clipped updates, and whether they were inside of the limit, bool [clients]."""

    def own(update, limit):
        norm = l2_norm(update)
        return shrunk(update, norm, limit), norm <= limit

    return each(own, updates, operators.broadcast(limit))


def _share(inside: jax.Array, weights: jax.Array) -> jax.Array:
    return reductions.mean(inside, where=weights != 0)


def wide(x: Any) -> Any:
    """The dtype in which numbers like these are added up."""
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def l2_norm(update: PyTree) -> jax.Array:
    """The L2 norm of all leaves together; NaN if one of them is not finite.

    It is computed in units of the largest element, as squares of an attacker's numbers
    overflow long before the numbers do, and then nothing would be left of a direction.
    """
    leaves = [jnp.asarray(x, wide(x)) for x in jax.tree.leaves(update)]
    largest: Any = 0.0
    for x in leaves:
        largest = jnp.maximum(largest, lax.stop_gradient(jnp.max(jnp.abs(x), initial=0)))
    unit = jnp.where(largest == 0, 1, largest)
    total: Any = sum(jnp.sum((x / unit.astype(x.dtype)) ** 2) for x in leaves)
    # The root has no derivative at zero.
    return jnp.where(total == 0, 0, unit * jnp.sqrt(jnp.where(total == 0, 1, total)))


def shrunk(update: PyTree, norm: jax.Array, limit: Any) -> PyTree:
    """An update of this norm, scaled down to the limit if it is above it."""
    over = norm > limit
    scale = jnp.where(over, limit / jnp.where(over, norm, 1), 1)
    return jax.tree.map(lambda x: (x * scale).astype(jnp.result_type(x)), update)
