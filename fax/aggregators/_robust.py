"""Aggregators that a minority of clients cannot move far: medians and trimmed means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

import fax._operators as operators
import fax._reductions as reductions
from fax import _arguments
from fax.aggregators._aggregator import (
    Aggregator,
    Metrics,
    PyTree,
    all_bits,
    of_floats,
    stateless_aggregator,
)
from fax.aggregators._norms import difference, l2_norm, wide
from fax.aggregators._per_client import each, present_rows

_GAIN = 2.0**24  # A factor of all β_i, so that those of the largest updates are not subnormal.


def median() -> Aggregator:
    """The median of each coordinate: the mean of the two in the middle for an even number.

    If fewer than half of the clients are attackers, every coordinate lies between coordinates of
    two honest clients. NaN counts as greater than any number. Every update is sent to the server as
    it is.

    Weights only say which clients take part: those of weight zero are left out, others count the
    same, since an attacker could lie about its weight. If no client is left, the update is zero.

    Returns:
      The aggregator, without state.

    Raises:
      PlacementError: when used, outside a program.

    References:
      Yin et al., Byzantine-robust distributed learning: towards optimal statistical rates,
      arXiv:1803.01498.

    Example:

      >>> @fax.program(clients=3)
      ... def middle(updates):
      ...     median = fax.aggregators.median()
      ...     return median.aggregate(updates, jnp.ones(3), (), jax.random.key(0))[0]
      >>> middle(jnp.array([[1.0, 5.0], [2.0, 1e30], [-1e30, 6.0]]))
      Array([1., 6.], dtype=float32)
    """

    def middle(ordered: jax.Array, count: jax.Array) -> jax.Array:
        low, high = (
            lax.dynamic_index_in_dim(ordered, jnp.maximum(i, 0), keepdims=False)
            for i in ((count - 1) // 2, count // 2)
        )
        return jnp.where(count > 0, low / 2 + high / 2, 0)

    return _of_coordinates("median", middle, lambda clients: None)


def trimmed_mean(
    fraction: float | jax.Array | None = None, *, count: int | None = None
) -> Aggregator:
    """The mean of each coordinate without its b largest and b smallest values.

    If at most b clients are attackers, every coordinate lies between coordinates of two honest
    clients. NaN counts as greater than any number. Every update is sent to the server as it is.

    Weights only say which clients take part: those of weight zero are left out, others count the
    same. If that leaves 2 b clients or fewer, fewer are trimmed, so that one or two remain. If it
    leaves none, the update is zero.

    Args:
      fraction: b as a fraction of the clients that take part, rounded down. At least 0 and below
        1/2. It may be traced.
      count: b. Give either ``fraction`` or ``count``.

    Returns:
      The aggregator, without state.

    Raises:
      ValueError: if both or neither are given, or one is out of range; when used, if a round has
        2 b clients or fewer.

    References:
      Yin et al., Byzantine-robust distributed learning: towards optimal statistical rates,
      arXiv:1803.01498.

    Example:

      >>> @fax.program(clients=4)
      ... def middle(updates):
      ...     trimmed = fax.aggregators.trimmed_mean(count=1)
      ...     return trimmed.aggregate(updates, jnp.ones(4), (), jax.random.key(0))[0]
      >>> middle(jnp.array([1.0, 2.0, 1e30, -5.0]))
      Array(1.5, dtype=float32)
    """
    caller = "fax.aggregators.trimmed_mean"
    if (fraction is None) == (count is None):
        raise ValueError(
            f"{caller}: fraction is {fraction!r:.80} and count is {count!r:.80}, expected one of "
            "the two: the fraction of clients to trim on each side, or their number."
        )
    if count is None:
        _arguments.number(caller, "fraction", fraction, least=0, below=0.5)
    else:
        count = _arguments.count(caller, "count", count, least=0)

    def check(clients: int) -> None:
        if count is not None and 2 * count >= clients:
            raise ValueError(
                f"{caller}: count is {count}, which leaves none of the {clients} clients of a "
                f"round, expected at most {(clients - 1) // 2}."
            )

    def trimmed(ordered: jax.Array, present: jax.Array) -> jax.Array:
        # 0.29 of 100 is 29, and in floating point a little less.
        b: Any = count
        if fraction is not None:
            b = jnp.floor(fraction * present + 1e-4).astype(jnp.int32)
        b = jnp.minimum(b, jnp.maximum(present - 1, 0) // 2)
        position = lax.broadcasted_iota(jnp.int32, ordered.shape, 0)
        kept = (position >= b) & (position < present - b)
        total = jnp.sum(jnp.where(kept, ordered, 0), axis=0)
        return total / jnp.maximum(present - 2 * b, 1).astype(total.dtype)

    return _of_coordinates("trimmed_mean", trimmed, check)


def _of_coordinates(
    name: str,
    combine: Callable[[jax.Array, jax.Array], jax.Array],
    check: Callable[[int], None],
) -> Aggregator:
    """An aggregator of the ordered values of each coordinate.

    Args:
      name: of the function that makes it.
      combine: ``combine(ordered, count)``, of an array [clients, ...] whose first ``count`` rows
        count.
      check: checks the number of clients in a round.
    """

    def aggregate(updates: PyTree, weights: jax.Array, key: jax.Array) -> tuple[PyTree, Metrics]:
        check(len(weights))
        rows = operators.collect(present_rows(updates, weights))
        present = operators.collect(weights != 0)
        count = jnp.sum(present, dtype=jnp.int32)

        def one(rows: jax.Array) -> jax.Array:
            shape = (-1,) + (1,) * (rows.ndim - 1)
            # NaN comes last: clients that are left out, and attackers that send it.
            ordered = jnp.sort(jnp.where(present.reshape(shape), rows, jnp.nan), axis=0)
            return combine(ordered.astype(wide(rows)), count).astype(rows.dtype)

        return jax.tree.map(one, rows), {}

    return of_floats(name, stateless_aggregator(name, aggregate))


def geometric_median(iterations: int = 3, *, smoothing: float | jax.Array = 1e-6) -> Aggregator:
    """The geometric median: the point with the smallest weighted sum of distances to the updates.

        argmin_v sum_i w_i ‖v - u_i‖

    If attackers have less than half of the weight, it stays near the updates of honest clients,
    whatever the attackers send. It is computed as in RFA, by the smoothed Weiszfeld algorithm,
    starting from v = 0, the current model of the server:

        β_i = w_i / max(ν, ‖v - u_i‖),        v' = v + sum_i β_i (u_i - v) / sum_i β_i

    Each iteration is a mean, so the server does not see single updates. It sends v to the clients
    in each iteration, and they keep their updates. An update that is not finite makes the result
    NaN; put `non_finite` before.

    Weights count as in a mean, and clients of weight zero are left out. Attackers can lie about
    their weights, so bound the weights if clients report them.

    Args:
      iterations: the number of iterations, a positive int. In the paper three are enough.
      smoothing: ν, positive. It may be traced.

    Returns:
      The aggregator, without state. In each iteration, a client sends β_i (u_i - v) and β_i.

    Raises:
      ValueError: if an argument is out of range.

    References:
      Pillutla et al., Robust aggregation for federated learning, arXiv:1912.13445.

    Example:

      >>> @fax.program(clients=3)
      ... def middle(updates):
      ...     rfa = fax.aggregators.geometric_median(iterations=50)
      ...     return rfa.aggregate(updates, jnp.ones(3), (), jax.random.key(0))[0]
      >>> middle(jnp.array([[1.0, 0.0], [1.0, 0.0], [1e20, 1e20]])).round(3)
      Array([1., 0.], dtype=float32)
    """
    caller = "fax.aggregators.geometric_median"
    iterations = _arguments.count(caller, "iterations", iterations, least=1)
    _arguments.number(caller, "smoothing", smoothing, above=0)

    def aggregate(updates: PyTree, weights: jax.Array, key: jax.Array) -> tuple[PyTree, Metrics]:
        bits = iterations * (all_bits(updates) + 32)
        updates = present_rows(updates, weights)

        def step(update: PyTree, weight: jax.Array, v: PyTree) -> tuple[PyTree, jax.Array]:
            """β_i (u_i - v), whose size is about w_i wherever u_i and v are, and β_i."""
            away = difference(update, v)
            norm = l2_norm(away)
            weight = weight.astype(norm.size.dtype)  # a large one in float16 would be infinite
            share = _GAIN * weight / jnp.maximum(smoothing * norm.unit.inverse, norm.size)
            moves = jax.tree.map(lambda x: (x * norm.unit.inverse * share).astype(x.dtype), away)
            return moves, share * norm.unit.inverse

        def iterate(v: PyTree, _: None) -> tuple[PyTree, None]:
            moves, beta = each(step, updates, weights, operators.broadcast(v))
            move, total = reductions.sum((moves, beta), where=weights != 0)
            total = jnp.where(total == 0, 1, total)
            return jax.tree.map(lambda x, m: x + m / total.astype(x.dtype), v, move), None

        start = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], wide(x)), updates)
        v, _ = lax.scan(iterate, start, length=iterations)
        return optax.tree.cast_like(v, updates), {"clients/bits": bits}

    return of_floats("geometric_median", stateless_aggregator("geometric_median", aggregate))
