"""Clipping: the norm of each update is at most a limit, which is fixed or follows a quantile."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import fax._operators as operators
import fax._reductions as reductions
from fax import _arguments
from fax.aggregators._aggregator import (
    Metrics,
    PyTree,
    Transformation,
    of_floats,
    stateless_transformation,
)
from fax.aggregators._norms import cast_toward_zero, l2_norm, scaled_down, wide
from fax.aggregators._per_client import each_present


def clip_by_norm(clip_norm: float | jax.Array) -> Transformation:
    """Scales down every update whose norm is above C: u_i min(1, C / ‖u_i‖).

    ‖u‖ is the L2 norm of all leaves together. For every finite update, the exact norm of the result
    is at most C: it is computed in at least float32 without overflow, and with a margin for
    rounding. Numbers that are subnormal in float32 count as zero. Weights stay as they are. An
    update that is not finite stays so; put `non_finite` before.

    Args:
      clip_norm: C, positive. It may be traced.

    Returns:
      The transformation. Its metrics are ``"clipped"``, the share of clients whose update was
      scaled down, among those whose weight is not zero, and ``"clip_norm"``, C.

    Raises:
      ValueError: if ``clip_norm`` is not a positive number.

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
    _arguments.number("fax.aggregators.clip_by_norm", "clip_norm", clip_norm, above=0)

    def update(
        updates: PyTree, weights: jax.Array, key: jax.Array
    ) -> tuple[PyTree, jax.Array, Metrics]:
        updates, above = _clip(updates, weights, clip_norm)
        clipped = reductions.mean(above, where=weights != 0)
        return updates, weights, {"clipped": clipped, "clip_norm": jnp.asarray(clip_norm)}

    return of_floats("clip_by_norm", stateless_transformation("clip_by_norm", update))


def adaptive_clip(
    quantile: float | jax.Array = 0.5,
    *,
    initial_clip_norm: float | jax.Array = 0.1,
    learning_rate: float | jax.Array = 0.2,
) -> Transformation:
    """Clips by a norm that follows a quantile γ of the norms of the updates.

    In each round, updates are clipped by C as in `clip_by_norm`. With b, the share of clients whose
    norm is at most C, the next round has

        C' = C exp(-η (b - γ))

    C converges to a norm that a share γ of the clients is below, even if it starts orders of
    magnitude away. Every client whose weight is not zero counts once. If there is none, C stays the
    same. Weights stay as they are. C stays a normal number of its dtype, even if all updates are
    zero for many rounds, so that it can grow again. Here b is exact. Differential privacy needs
    noise on it: see ``quantile`` of `gaussian`.

    Args:
      quantile: γ, between 0 and 1.
      initial_clip_norm: C of the first round, positive.
      learning_rate: η, positive.

    Returns:
      The transformation. Its state is C, a float scalar. Its metrics are those of `clip_by_norm`.

    Raises:
      ValueError: if an argument is out of range.

    References:
      Andrew et al., Differentially private learning with adaptive clipping, arXiv:1905.03871. The
      defaults are from there.

    Example:

      >>> clip = fax.aggregators.adaptive_clip(initial_clip_norm=8.0, learning_rate=0.5)
      >>> aggregator = fax.aggregators.chain(clip)
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
    _arguments.number(caller, "initial_clip_norm", initial_clip_norm, above=0)
    _arguments.number(caller, "learning_rate", learning_rate, above=0)

    def update(
        updates: PyTree, weights: jax.Array, state: jax.Array, key: jax.Array
    ) -> tuple[PyTree, jax.Array, jax.Array, Metrics]:
        updates, above = _clip(updates, weights, state)
        clipped = reductions.mean(above.astype(state.dtype), where=weights != 0)
        after = next_clip_norm(state, 1 - clipped, quantile, learning_rate)
        after = jnp.where(reductions.sum(weights != 0) > 0, after, state)
        return updates, weights, after, {"clipped": clipped, "clip_norm": state}

    def init(params: PyTree) -> jax.Array:
        return first_clip_norm(params, initial_clip_norm)

    return of_floats("adaptive_clip", Transformation(init, update))


def first_clip_norm(params: PyTree, initial: float | jax.Array) -> jax.Array:
    """An adaptive clip norm, in the widest dtype of the updates."""
    dtypes = [wide(x) for x in jax.tree.leaves(params)]
    return lax.convert_element_type(initial, jnp.result_type(jnp.float32, *dtypes))


def next_clip_norm(
    clip_norm: jax.Array, below: Any, quantile: Any, learning_rate: Any
) -> jax.Array:
    """The geometric step toward the quantile, from the share of clients below the clip norm."""
    info = jnp.finfo(clip_norm.dtype)
    new = clip_norm * jnp.exp(-learning_rate * (below - quantile))
    return jnp.clip(new, info.tiny, info.max).astype(clip_norm.dtype)


def _clip(updates: PyTree, weights: jax.Array, limit: Any) -> tuple[PyTree, jax.Array]:
    """The clipped updates, zeros for weights of zero, and whether their norms were above."""

    def own(update: PyTree, limit: jax.Array) -> tuple[PyTree, jax.Array]:
        norm = l2_norm(update)
        small = jax.tree.map(
            lambda x, like: cast_toward_zero(x, jnp.result_type(like)),
            scaled_down(update, norm, limit),
            update,
        )
        return small, ~(norm.size <= limit * norm.unit.inverse)

    return each_present(own, updates, weights, operators.broadcast(limit))
