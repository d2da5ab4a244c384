"""Aggregators that a minority of clients cannot move far: medians and trimmed means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import fax._operators as operators
import fax._reductions as reductions
from fax import _arguments
from fax.aggregators._aggregator import Aggregator, Metrics, all_bits, each, present_rows
from fax.aggregators._norms import difference, l2_norm, wide

PyTree = Any

_GAIN = 2.0**24  # of all β_i, so that those of the largest updates are not denormal


def median() -> Aggregator:
    """The median of each coordinate, the mean of the two in the middle if clients are even.

    As long as attackers are fewer than half, every coordinate lies between two of honest clients'.
    NaN counts as more than any number. Every client's update is sent to the server as it is.

    Weights only tell who takes part: clients of weight zero are left out, and all others count the
    same, as one could lie about its weight. If none is left the update is zero.

    References:
      Yin et al., Byzantine-robust distributed learning: towards optimal statistical rates,
      arXiv:1803.01498.

    Returns:
      The aggregator. It has no state.

    Raises:
      PlacementError: when it is used outside of a program.

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

    return _of_coordinates(middle, lambda clients: None)


def trimmed_mean(
    fraction: float | jax.Array | None = None, *, count: int | None = None
) -> Aggregator:
    """The mean of each coordinate without its b largest and b smallest values.

    As long as at most b clients are attackers, every coordinate lies between two of honest
    clients'. NaN counts as more than any number. Every client's update is sent to the server as it
    is.

    Weights only tell who takes part: clients of weight zero are left out, and all others count the
    same. If that leaves 2 b clients or fewer, as many are trimmed as leave one or two; if it leaves
    none the update is zero.

    Args:
      fraction: of the m clients that take part: b is ``fraction`` times m, rounded down. From 0 to
        below 1/2. It may be traced.
      count: b. Give either of the two.

    References:
      Yin et al., Byzantine-robust distributed learning: towards optimal statistical rates,
      arXiv:1803.01498.

    Returns:
      The aggregator. It has no state.

    Raises:
      ValueError: if both or neither are given, one is out of range, or 2 b clients or fewer are
        in a round.

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
            f"{caller}: expected either fraction, of the clients that are trimmed on each side, or "
            f"count, their number, but fraction is {fraction!r} and count is {count!r}."
        )
    if count is None:
        _arguments.number(caller, "fraction", fraction, least=0, below=0.5)
    else:
        count = _arguments.count(caller, "count", count, least=0)

    def check(clients: int) -> None:
        if count is not None and 2 * count >= clients:
            raise ValueError(
                f"{caller}: count={count} on each side leaves none of the {clients} clients of a "
                f"round, expected at most {(clients - 1) // 2}."
            )

    def trimmed(ordered: jax.Array, present: jax.Array) -> jax.Array:
        # A fraction such as 0.29 of 100 is 29, and a little less in floating point.
        b: Any = count
        if fraction is not None:
            b = jnp.floor(fraction * present + 1e-4).astype(jnp.int32)
        b = jnp.minimum(b, jnp.maximum(present - 1, 0) // 2)
        position = lax.broadcasted_iota(jnp.int32, ordered.shape, 0)
        kept = (position >= b) & (position < present - b)
        total = jnp.sum(jnp.where(kept, ordered, 0), axis=0)
        return total / jnp.maximum(present - 2 * b, 1).astype(total.dtype)

    return _of_coordinates(trimmed, check)


def _of_coordinates(
    combine: Callable[[jax.Array, jax.Array], jax.Array], check: Callable[[int], None]
) -> Aggregator:
    """An aggregator of each coordinate's values in order.

    Args:
      combine: ``combine(ordered, count)``, an array [clients, ...] of which ``count`` rows count.
      check: is given the number of clients.
    """

    def aggregate(
        updates: PyTree, weights: jax.Array, state: PyTree, key: jax.Array
    ) -> tuple[PyTree, PyTree, Metrics]:
        check(len(weights))
        rows = operators.collect(present_rows(updates, weights))
        present = operators.collect(weights != 0)
        count = jnp.sum(present, dtype=jnp.int32)

        def one(rows: jax.Array) -> jax.Array:
            shape = (-1,) + (1,) * (rows.ndim - 1)
            # NaN comes last, that of clients which do not count and that of attackers.
            ordered = jnp.sort(jnp.where(present.reshape(shape), rows, jnp.nan), axis=0)
            return combine(ordered.astype(wide(rows)), count).astype(rows.dtype)

        metrics = {"clients/bits": all_bits(updates)}
        return jax.tree.map(one, rows), state, metrics

    return Aggregator(lambda params: (), aggregate)


def geometric_median(iterations: int = 3, *, smoothing: float | jax.Array = 1e-6) -> Aggregator:
    """The point whose distances to clients' updates have the least weighted sum (RFA).

        argmin_v sum_i w_i ‖v - u_i‖

    As long as attackers have less than half of the weight it stays near the honest clients'
    updates, whatever they send. It is computed by iterations of the smoothed Weiszfeld algorithm,
    from v = 0, where the server's model is:

        β_i = w_i / max(ν, ‖v - u_i‖),        v' = v + sum_i β_i (u_i - v) / sum_i β_i

    Each iteration is a mean, so that no client's update is seen at the server. Clients are sent v
    again each time, and keep their updates. An update that is not finite spoils the mean;
    put `non_finite` before.

    Weights count as in a mean; clients of weight zero are left out. Attackers can lie about
    theirs, so bound them if clients tell them themselves.

    Args:
      iterations: how many, a positive int. The paper finds three enough.
      smoothing: ν, positive.

    References:
      Pillutla et al., Robust aggregation for federated learning, arXiv:1912.13445.

    Returns:
      The aggregator. It has no state. A client sends β_i (u_i - v) and β_i in each iteration.

    Raises:
      ValueError: if an argument is out of range.

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

    def aggregate(
        updates: PyTree, weights: jax.Array, state: PyTree, key: jax.Array
    ) -> tuple[PyTree, PyTree, Metrics]:
        updates = present_rows(updates, weights)

        def step(update, weight, v):
            """β_i (u_i - v), which is of the size of w_i wherever the two are, and β_i."""
            away = jax.tree.map(difference, update, v)
            norm = l2_norm(away)
            share = _GAIN * weight / jnp.maximum(smoothing * norm.unit.inverse, norm.size)
            moves = jax.tree.map(lambda x: (x * norm.unit.inverse * share).astype(x.dtype), away)
            return moves, share * norm.unit.inverse

        def iterate(v, _):
            moves, beta = each(step, updates, weights, operators.broadcast(v))
            move, total = reductions.sum((moves, beta), where=weights != 0)
            total = jnp.where(total == 0, 1, total)
            return jax.tree.map(lambda x, m: x + m / total.astype(x.dtype), v, move), None

        start = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], wide(x)), updates)
        v, _ = lax.scan(iterate, start, length=iterations)
        v = jax.tree.map(lambda x, u: x.astype(u.dtype), v, updates)
        bits = all_bits(updates)
        return v, state, {"clients/bits": iterations * (bits + 32)}

    return Aggregator(lambda params: (), aggregate)
