"""DiLoCo as one would write it without fax, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any


def make_round(
    loss: Callable,
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation,
    replicas: int,
    axis: str | None = None,
) -> tuple[Callable, Callable]:
    """Returns ``init(params) -> state`` and ``round(state, batches) -> (state, losses)``.

    Batches have leaves [outer steps, replicas, inner steps, batch, ...]. The state are the outer
    parameters, the state of the outer optimizer, and the replicas' parameters and optimizers, with
    leaves [replicas, ...]. With an axis, a round is that of one device in a `jax.shard_map`, with
    as many replicas, and the mean is over all devices.
    """

    def rows(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (replicas, *x.shape)), tree)

    def init(params: PyTree) -> PyTree:
        return params, outer.init(params), rows(params), rows(inner.init(params))

    def inner_step(own: PyTree, batch: PyTree) -> tuple[PyTree, jax.Array]:
        params, state = own
        value, gradient = jax.value_and_grad(lambda p: jnp.mean(loss(p, batch, None)))(params)
        updates, state = inner.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    def replica(_: None, own: PyTree) -> tuple[None, PyTree]:
        *start, batches = own
        trained, losses = jax.lax.scan(inner_step, tuple(start), batches)
        return None, (*trained, losses)

    def outer_step(state: PyTree, batches: PyTree) -> tuple[PyTree, jax.Array]:
        theta, memory, params, states = state
        _, (params, states, losses) = jax.lax.scan(replica, None, (params, states, batches))
        delta = jax.tree.map(lambda t, r: t - r.mean(0), theta, params)
        if axis is not None:
            delta = jax.lax.pmean(delta, axis)
        updates, memory = outer.update(delta, memory, theta)
        theta = optax.apply_updates(theta, updates)
        return (theta, memory, rows(theta), states), losses

    @jax.jit
    def round(state: PyTree, batches: PyTree) -> tuple[PyTree, jax.Array]:
        return jax.lax.scan(outer_step, state, batches)

    return init, round
