"""PowerSGD: clients send two thin factors of their updates, from one step of power iteration."""

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
    PyTree,
    of_floats,
)
from fax.aggregators._encoding import bits_of
from fax.aggregators._error_feedback import memory_after, memory_of
from fax.aggregators._norms import unit_of, wide
from fax.aggregators._per_client import each, each_present, present_rows


class PowerSGDState(NamedTuple):
    """The state of `power_sgd`.

    Attributes:
      q: Q, an array [m, rank] for each compressed leaf, in order: the start of the next power
        iteration.
      memory: `PerClient`, what each client has not sent yet, for each compressed leaf. None
        without error feedback.

    Example:

      >>> state = fax.aggregators.power_sgd(rank=1, num_clients=2).init(jnp.zeros((4, 3)))
      >>> state.q[0].shape, state.memory.rows[0].shape
      ((3, 1), (2, 4, 3))
    """

    q: tuple[jax.Array, ...]
    memory: PerClient | None


def power_sgd(rank: int, num_clients: int | None = None) -> Aggregator:
    """PowerSGD: the mean of low-rank approximations, with error feedback.

    A leaf [..., m] is treated as a matrix M [n, m], as in the paper: rows are the inputs of a
    layer, and columns are its outputs. With M_i = U_i + E_i, the update and the memory of client i,
    and Q from the previous round:

        P = mean_i M_i Q,    P = orthogonalize(P)
        Q_i = M_i^T P,       Q = mean_i Q_i
        E_i' = M_i - P Q_i^T

    Means are weighted by ``weights``, and the update is P Q^T. As all clients share P, their Q_i
    can be averaged, and a round takes two all-reduces. The update is exact if the mean of the M_i
    has at most this rank. As Q is kept, successive rounds are steps of one power iteration. Columns
    of Q that are zero or not finite are replaced by random ones. Clients of weight zero are left
    out and keep their memory. Derivatives are those of this arithmetic. Where P does not have full
    rank, as for an update of zeros, they are undefined, and NaN.

    A client sends rank (n + m) numbers for each leaf. Leaves of fewer than two dimensions, and
    leaves for which this would not save anything, rank (n + m) >= n m, are sent as they are.

    Args:
      rank: of the approximation, an int of at least 1. The paper uses 1 to 4.
      num_clients: the number of clients in the data. The state has a memory for each of them, in at
        least float32. None means no error feedback.

    Returns:
      The aggregator. Its state is a `PowerSGDState`.

    Raises:
      ValueError: if ``rank`` or ``num_clients`` is out of range; when used, if a leaf does not hold
        real floats.

    References:
      Vogels et al., PowerSGD: Practical low-rank gradient compression for distributed optimization,
      arXiv:1905.13727, algorithms 1 and 2.

    Example:

      >>> aggregator = fax.aggregators.power_sgd(rank=1, num_clients=2)
      >>> @fax.program(clients=2)
      ... def average(updates, state):
      ...     return aggregator.aggregate(updates, jnp.ones(2), state, jax.random.key(0))
      >>> updates = jnp.stack([jnp.ones((4, 3)), jnp.zeros((4, 3))])  # a mean of rank 1
      >>> update, state, metrics = average(updates, aggregator.init(jnp.zeros((4, 3))))
      >>> bool(jnp.allclose(update, 0.5)), metrics["clients/bits"]
      (True, Array([224., 224.], dtype=float32))
    """
    caller = "fax.aggregators.power_sgd"
    rank = _arguments.count(caller, "rank", rank)
    if num_clients is not None:
        num_clients = _arguments.count(caller, "num_clients", num_clients)

    def is_compressed(shape: tuple[int, ...]) -> bool:
        rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 0
        return len(shape) > 1 and rank * (rows + columns) < rows * columns

    def init(params: PyTree) -> PowerSGDState:
        leaves = [x for x in jax.tree.leaves(params) if is_compressed(jnp.shape(x))]
        types = [(jnp.shape(x), wide(jnp.result_type(x))) for x in leaves]
        public = jax.random.key(0)  # the same start in every training
        keys = [_keys.derive(public, _keys.Use.START, number) for number in range(len(leaves))]
        q = (_random_columns(k, (shape[-1], rank), dtype) for k, (shape, dtype) in zip(keys, types))
        memory = None if num_clients is None else memory_of(num_clients, tuple(leaves))
        return PowerSGDState(tuple(q), memory)

    def aggregate(
        updates: PyTree, weights: jax.Array, state: PowerSGDState, key: jax.Array
    ) -> tuple[PyTree, PowerSGDState, Metrics]:
        leaves, treedef = jax.tree.flatten(updates)
        which = [is_compressed(x.shape[1:]) for x in leaves]
        compressed = [x for x, chosen in zip(leaves, which) if chosen]
        as_they_are = [x for x, chosen in zip(leaves, which) if not chosen]

        keys = [_keys.derive(key, _keys.Use.COLUMNS, number) for number in range(len(compressed))]
        start = [_unit_columns(_without_lost_columns(q, k)) for q, k in zip(state.q, keys)]
        memory = None if state.memory is None else state.memory.rows
        matrices, factors = each_present(
            _left_factors, compressed, weights, memory, operators.broadcast(start)
        )
        matrices = present_rows(matrices, weights)
        mean = functools.partial(reductions.mean, weights=weights, where=weights != 0)
        p, plain = mean((factors, as_they_are))
        p = [jnp.linalg.qr(_unit_columns(x))[0] for x in p]
        factors, left = each(_right_factors, matrices, operators.broadcast(p))
        q = mean(factors)

        products = [_product(a, b.T) for a, b in zip(p, q)]
        low_rank = iter(
            x.astype(u.dtype).reshape(u.shape[1:]) for x, u in zip(products, compressed)
        )
        rest = iter(plain)
        update = [next(low_rank if chosen else rest) for chosen in which]
        bits = sum(x.size * bits_of(x.dtype) for x in (*p, *q, *plain))
        if memory is not None:
            left = tuple(x.reshape(m.shape) for x, m in zip(left, memory))
            memory = PerClient(memory_after(weights, left, memory))
        return (
            jax.tree.unflatten(treedef, update),
            PowerSGDState(tuple(q), memory),
            {"clients/bits": jnp.full(weights.shape, bits, jnp.float32)},
        )

    return of_floats("power_sgd", Aggregator(init, aggregate, encodes=True))


def _left_factors(
    updates: list[jax.Array], memory: Any, start: list[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """A client's matrices M, and M Q."""
    total = updates if memory is None else [u + e for u, e in zip(updates, memory)]
    m = [x.astype(q.dtype).reshape(-1, x.shape[-1]) for x, q in zip(total, start)]
    return m, [_product(x, q) for x, q in zip(m, start)]


def _right_factors(
    matrices: list[jax.Array], p: list[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """A client's Q = M^T P, and M - P Q^T."""
    q = [_product(m.T, x) for m, x in zip(matrices, p)]
    return q, [m - _product(x, y.T) for m, x, y in zip(matrices, p, q)]


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def _random_columns(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


def _without_lost_columns(q: jax.Array, key: jax.Array) -> jax.Array:
    """Q with random columns in place of zeros and NaN, from which no iteration would recover."""
    usable = jnp.any(q != 0, axis=0) & jnp.all(jnp.isfinite(q), axis=0)
    return jnp.where(usable, q, _random_columns(key, q.shape, q.dtype))


def _unit_columns(x: jax.Array) -> jax.Array:
    """Each column in units of about its largest number, so that products do not overflow.

    P does not depend on these units.
    """
    largest = jnp.max(jnp.abs(x), axis=0)
    return x * unit_of(largest).inverse
