"""PowerSGD: clients send two thin factors of their updates, by one step of power iteration."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fax._operators as operators
import fax._reductions as reductions
from fax import _arguments, _keys
from fax.aggregators._aggregator import (
    Aggregator,
    Metrics,
    PerClient,
    each,
    each_present,
    present_rows,
)
from fax.aggregators._error_feedback import memory_of, remembered
from fax.aggregators._leaves import bits_of, check_floats
from fax.aggregators._norms import unit_of, wide

PyTree = Any


class PowerSGDState(NamedTuple):
    """The state of `power_sgd`.

    Attributes:
      q: Q, an array [m, rank] for each leaf that is compressed, in their order: where the next
        power iteration starts.
      memory: `PerClient`, what clients have not sent yet, for each of these leaves. None without
        error feedback.
    """

    q: tuple[jax.Array, ...]
    memory: PerClient | None


def power_sgd(rank: int, num_clients: int | None = None) -> Aggregator:
    """PowerSGD: the mean of low-rank approximations, with error feedback.

    A leaf [..., m] is a matrix M [n, m], as in the paper: its rows are all inputs of a layer, its
    columns the outputs. Of each client's update and memory, M_i = U_i + E_i, and Q of the round
    before:

        P = mean_i M_i Q,    P = orthogonalise(P)
        Q_i = M_i^T P,       Q = mean_i Q_i
        E_i' = M_i - P Q_i^T

    with means weighted by ``weights``; the update is P Q^T. As all clients share P, what is sent
    adds up, and costs two all-reduces. It is exact where the mean of the M_i has at most
    this rank. Warm starts, Q of the round before, make successive rounds one power iteration.
    Columns of Q that vanish, or are not finite, start anew, at random.
    Clients of weight zero are left out, and keep their memory. Derivatives are those of this
    arithmetic; where P has less than full rank, as for an update of
    zeros, they are not defined, and NaN.

    A client sends rank (n + m) numbers for each leaf; leaves of fewer than two dimensions, and
    those for which this is no gain, rank (n + m) >= n m, are sent as they are.

    Args:
      rank: of the approximation, an int of at least 1. The paper takes 1 to 4.
      num_clients: the size of the population, for its memories, in at least float32. None: no error
        feedback.

    Returns:
      The aggregator; its state is a `PowerSGDState`.

    Raises:
      ValueError: if ``rank`` or ``num_clients`` is out of range; when used, if a leaf does not hold
        floats.

    References:
      Vogels et al., PowerSGD: Practical low-rank gradient compression for distributed optimization,
      arXiv:1905.13727, algorithms 1 and 2.

    Example:

      >>> aggregator = fax.aggregators.power_sgd(rank=1, num_clients=2)
      >>> @fax.program(clients=2)
      ... def average(updates, state):
      ...     return aggregator.aggregate(updates, jnp.ones(2), state, jax.random.key(0))
      >>> updates = jnp.stack([jnp.ones((4, 3)), jnp.zeros((4, 3))])  # means of rank 1
      >>> update, state, metrics = average(updates, aggregator.init(jnp.zeros((4, 3))))
      >>> bool(jnp.allclose(update, 0.5)), metrics["clients/bits"]
      (True, Array([224., 224.], dtype=float32))
    """
    _arguments.count("fax.aggregators.power_sgd", "rank", rank)
    if num_clients is not None:
        _arguments.count("fax.aggregators.power_sgd", "num_clients", num_clients)

    def is_compressed(shape: tuple[int, ...]) -> bool:
        rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 0
        return len(shape) > 1 and rank * (rows + columns) < rows * columns

    def init(params: PyTree) -> PowerSGDState:
        check_floats("power_sgd", params)
        leaves = [x for x in jax.tree.leaves(params) if is_compressed(jnp.shape(x))]
        types = [(jnp.shape(x), wide(jnp.result_type(x))) for x in leaves]
        public = jax.random.key(0)  # the same start in every training
        keys = [_keys.derive(public, _keys.Use.START, number) for number in range(len(leaves))]
        start = (_start(k, (shape[-1], rank), dtype) for k, (shape, dtype) in zip(keys, types))
        memory = None if num_clients is None else memory_of(num_clients, tuple(leaves))
        return PowerSGDState(tuple(start), memory)

    def aggregate(
        updates: PyTree, weights: jax.Array, state: PowerSGDState, key: jax.Array
    ) -> tuple[PyTree, PowerSGDState, Metrics]:
        check_floats("power_sgd", updates)
        leaves, treedef = jax.tree.flatten(updates)
        which = [is_compressed(x.shape[1:]) for x in leaves]
        small = [x for x, chosen in zip(leaves, which) if chosen]
        as_they_are = [x for x, chosen in zip(leaves, which) if not chosen]

        keys = [_keys.derive(key, _keys.Use.COLUMNS, number) for number in range(len(small))]
        start = [_scaled(_restarted(q, own_key)) for q, own_key in zip(state.q, keys)]
        memory = None if state.memory is None else state.memory.rows
        matrices, factors = each_present(_first, small, weights, memory, operators.broadcast(start))
        matrices = present_rows(matrices, weights)
        mean = functools.partial(reductions.mean, weights=weights, where=weights != 0)
        p, plain = mean((factors, as_they_are))
        p = [jnp.linalg.qr(_scaled(x))[0] for x in p]
        factors, left = each(_second, matrices, operators.broadcast(p))
        q = mean(factors)

        products = [_product(a, b.T) for a, b in zip(p, q)]
        low_rank = iter(x.astype(u.dtype).reshape(u.shape[1:]) for x, u in zip(products, small))
        rest = iter(plain)
        update = [next(low_rank if chosen else rest) for chosen in which]
        bits = sum(x.size * bits_of(x.dtype) for x in (*p, *q, *plain))
        if memory is not None:
            left = tuple(x.reshape(m.shape) for x, m in zip(left, memory))
            memory = PerClient(remembered(weights, left, memory))
        return (
            jax.tree.unflatten(treedef, update),
            PowerSGDState(tuple(q), memory),
            {"clients/bits": jnp.full(weights.shape, bits, jnp.float32)},
        )

    return Aggregator(init, aggregate, encodes=True)


def _first(updates: list[jax.Array], memory: Any, start: list[jax.Array]) -> tuple[list, list]:
    """A client's matrices M, and M Q."""
    wanted = updates if memory is None else [u + e for u, e in zip(updates, memory)]
    m = [x.astype(q.dtype).reshape(-1, x.shape[-1]) for x, q in zip(wanted, start)]
    return m, [_product(x, q) for x, q in zip(m, start)]


def _second(matrices: list[jax.Array], p: list[jax.Array]) -> tuple[list, list]:
    """A client's Q = M^T P, and M - P Q^T."""
    q = [_product(m.T, x) for m, x in zip(matrices, p)]
    return q, [m - _product(x, y.T) for m, x, y in zip(matrices, p, q)]


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def _start(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


def _restarted(q: jax.Array, key: jax.Array) -> jax.Array:
    """Q with random columns for those that are zero or not finite, which would stay so for ever."""
    usable = jnp.any(q != 0, axis=0) & jnp.all(jnp.isfinite(q), axis=0)
    return jnp.where(usable, q, _start(key, q.shape, q.dtype))


def _scaled(x: jax.Array) -> jax.Array:
    """Columns in units of their own. P does not depend on them, and products do not overflow."""
    largest = jnp.max(jnp.abs(x), axis=0)
    return x * unit_of(largest).inverse
