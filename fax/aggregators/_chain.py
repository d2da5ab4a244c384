"""Chains: updates go through transformations, one after another, and then to an aggregator."""

from __future__ import annotations

from typing import Any, cast

import jax

import fax._reductions as reductions
from fax import _keys
from fax.aggregators._aggregator import (
    Aggregator,
    Metrics,
    PerClient,
    PyTree,
    Transformation,
    fix,
    shown,
    stateless_aggregator,
)


def mean() -> Aggregator:
    """The mean weighted by ``weights``: sum_i w_i u_i / sum_i w_i.

    A client sends all bits of its update. A client of weight zero is left out, whatever it holds,
    as if it were masked. This is how `non_finite` drops clients.

    Returns:
      The aggregator, without state.

    Raises:
      PlacementError: when used, if updates or weights are not placed, or outside a program.

    Example:

      >>> @fax.program(clients=2)
      ... def average(updates, weights):
      ...     update, _, metrics = fax.aggregators.mean().aggregate(
      ...         updates, weights, (), jax.random.key(0)
      ...     )
      ...     return update, metrics
      >>> average(jnp.array([[1.0, 2.0], [5.0, 2.0]]), jnp.array([3, 1]))
      (Array([2., 2.], dtype=float32), {'clients/bits': Array([64., 64.], dtype=float32)})
    """

    def aggregate(updates: PyTree, weights: jax.Array, key: jax.Array) -> tuple[PyTree, Metrics]:
        return reductions.mean(updates, weights=weights, where=weights != 0), {}

    return stateless_aggregator("mean", aggregate)


def chain(*parts: Transformation | Aggregator) -> Aggregator:
    """An aggregator of updates that first go through transformations, in this order.

    Args:
      *parts: transformations, then one aggregator. Without an aggregator at the end, the chain ends
        with `mean`, and can be used as a transformation, too.

    Returns:
      The aggregator. Its metrics are those of all parts. ``"clients/bits"`` is what the last part
      that changes what is sent says.

    Raises:
      ValueError: if a part is neither, or if an aggregator is not the last part. In ``init``, if a
        transformation before a private aggregator has a state that is not `PerClient`.

    Example:

      >>> fax.aggregators.chain(fax.aggregators.clip_by_norm(1.0), fax.aggregators.median())
      Aggregator(chain)
    """
    alone = not parts or isinstance(parts[-1], Transformation)
    if alone:
        parts = (*parts, mean())
    *before, last = parts
    before = [getattr(part, "transformation", None) or part for part in before]
    parts = (*before, last)
    for number, part in enumerate(parts):
        expected = Aggregator if number == len(before) else Transformation
        if not isinstance(part, expected):
            raise ValueError(
                f"fax.aggregators.chain: part {number} is {shown(part)}, expected a "
                "fax.aggregators.Transformation. Only the last part may be an Aggregator."
                f"{fix(part)}"
            )
    transformations = cast("list[Transformation]", before)
    aggregator = cast(Aggregator, last)

    def init(params: PyTree) -> tuple[PyTree, ...]:
        states = tuple(part.init(params) for part in parts)
        if aggregator.private:
            for number, state in enumerate(states[:-1]):
                _check_per_client(number, state)
        return states

    def transform(
        updates: PyTree, weights: jax.Array, state: tuple[PyTree, ...], key: jax.Array
    ) -> tuple[PyTree, jax.Array, tuple[PyTree, ...], Metrics]:
        states: list[PyTree] = []
        metrics: Metrics = {}
        for number, (part, own) in enumerate(zip(transformations, state)):
            own_key = _keys.derive(key, _keys.Use.LINK, number)
            updates, weights, own, more = part.update(updates, weights, own, own_key)
            states.append(own)
            metrics |= more
        return updates, weights, tuple(states), metrics

    def aggregate(
        updates: PyTree, weights: jax.Array, state: tuple[PyTree, ...], key: jax.Array
    ) -> tuple[PyTree, tuple[PyTree, ...], Metrics]:
        updates, weights, states, metrics = transform(updates, weights, state, key)
        own_key = _keys.derive(key, _keys.Use.LINK, len(transformations))
        update, own, more = aggregator.aggregate(updates, weights, state[-1], own_key)
        metrics = {**metrics, **more} if aggregator.encodes else {**more, **metrics}
        return update, (*states, own), metrics

    def init_alone(params: PyTree) -> tuple[PyTree, ...]:
        return tuple(part.init(params) for part in transformations)

    format = transformations[-1].format if transformations else None
    transformation = Transformation(init_alone, transform, format) if alone else None
    return Aggregator(
        init,
        aggregate,
        encodes=aggregator.encodes,
        private=aggregator.private,
        transformation=transformation,
    )


def _check_per_client(number: int, state: PyTree) -> None:
    """Checks that what one client sends cannot change, through a state, what others send later."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, PerClient))
    if any(not isinstance(leaf, PerClient) for leaf in leaves):
        raise ValueError(
            f"fax.aggregators.chain: part {number} has a state that all clients share, but the "
            "aggregator is private. Through this state one client could change what others send, "
            "and the noise only covers what it sends itself. Instead of adaptive_clip, use "
            "gaussian(..., quantile=), which adds noise for it."
        )


def aggregator_of(caller: str, value: Any) -> Aggregator | None:
    """The aggregator that a user passes to an algorithm, or None. A transformation is a chain."""
    if value is None or isinstance(value, Aggregator):
        return value
    if isinstance(value, Transformation):
        return chain(value)
    how = fix(value)
    if isinstance(value, list | tuple):
        how = " To combine several, use fax.aggregators.chain(*parts)."
    raise ValueError(
        f"{caller}: aggregator is {shown(value)}, expected one of fax.aggregators, such as "
        f"fax.aggregators.mean().{how}"
    )
