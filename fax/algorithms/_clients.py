"""State of single clients: the rows of a cohort's clients, of those of the whole population."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from fax.aggregators import PerClient
from fax.data import Cohort
from fax.sharding._types import without_explicit_axes

PyTree = Any


def gather_rows(state: PyTree, cohort: Cohort) -> PyTree:
    """A state with the rows of the cohort's clients, of those of all clients.

    Rows are in `fax.aggregators.PerClient`, anywhere in the state; the rest stays as it is. On a
    mesh they are spread like the cohort, however those of all clients are.

    Args:
      state: a pytree.
      cohort: the clients.

    Returns:
      The state, in which rows have a leading axis [clients] in place of [num_clients].

    Raises:
      ValueError: if the cohort has clients that the state has no row for. Where positions are
        traced, rows of such clients are NaN.

    Example:

      >>> data = fax.data.InMemory({name: {"x": jnp.ones(1)} for name in ("ann", "bob", "cy")})
      >>> cohort = next(fax.data.cohorts(data, clients=2, batch_size=1))
      >>> state = {"seen": fax.aggregators.PerClient(jnp.zeros(3)), "rounds": 0}
      >>> own = fax.algorithms.gather_rows(state, cohort)
      >>> own["seen"].rows.shape
      (2,)
      >>> own = {"seen": fax.aggregators.PerClient(own["seen"].rows + 1), "rounds": 1}
      >>> state = fax.algorithms.scatter_rows(state, own, cohort)
      >>> print(state["seen"].rows.sum(), state["rounds"])
      2.0 1
    """

    def take(x: jax.Array) -> jax.Array:
        ids = cohort.positions
        _check(x.shape[0], cohort)
        spread, _ = _spec(ids)
        _, rest = _spec(x)
        own = PartitionSpec(spread, *(None if _common(spread, axes) else axes for axes in rest))
        get = without_explicit_axes(lambda x, ids: [x.at[ids].get(mode="fill")], [own])
        return get(x, ids)[0]

    return map_rows(take, state)


def scatter_rows(state: PyTree, new: PyTree, cohort: Cohort) -> PyTree:
    """A state of all clients, with new rows for those of the cohort.

    The clients of a cohort are different ones; of two rows for one client either may be kept.

    Args:
      state: that `gather_rows` was given.
      new: what has become of what it returned.
      cohort: the clients.

    Returns:
      The new state, with rows for all clients.

    Raises:
      ValueError: if the states have different structures.

    Example:

      >>> data = fax.data.InMemory({name: {"x": jnp.ones(1)} for name in ("ann", "bob", "cy")})
      >>> cohort = next(fax.data.cohorts(data, clients=1, batch_size=1))
      >>> rows = fax.aggregators.PerClient(jnp.zeros(3))
      >>> new = fax.aggregators.PerClient(jnp.ones(1))
      >>> print(fax.algorithms.scatter_rows(rows, new, cohort).rows.sum())
      1.0
    """

    def put(x: jax.Array, rows: jax.Array) -> jax.Array:
        spread, rest = _spec(x)
        put_all = without_explicit_axes(
            lambda x, ids, rows: [x.at[ids].set(rows, mode="drop")], [PartitionSpec(spread, *rest)]
        )
        return put_all(x, cohort.positions, rows)[0]

    return map_rows(put, state, new)


def map_rows(fn: Callable, state: PyTree, *new: PyTree) -> PyTree:
    """``fn`` on the leaves of what is `PerClient`; the newest state's leaves elsewhere."""

    def one(x: PyTree, *others: PyTree) -> PyTree:
        if isinstance(x, PerClient):
            return jax.tree.map(fn, x, *others)
        return others[-1] if others else x

    return jax.tree.map(one, state, *new, is_leaf=is_per_client)


def repeated(tree: PyTree, num_clients: int) -> PyTree:
    """Rows of clients that all start with the same, leaves [num_clients, ...]."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_clients, *jnp.shape(x))), tree)


def without_rows(state: PyTree) -> PyTree:
    """A state with nothing for clients."""
    return jax.tree.map(
        lambda x: PerClient(None) if is_per_client(x) else x, state, is_leaf=is_per_client
    )


def is_per_client(x: Any) -> bool:
    return isinstance(x, PerClient)


def _spec(x: jax.Array) -> tuple[Any, tuple]:
    """The Explicit axes that the leading dimension is spread over, and those of the others."""
    first, *rest = jax.typeof(x).sharding.spec
    return first, tuple(rest)


def _common(one: Any, other: Any) -> bool:
    names = [set(x if isinstance(x, tuple) else (x,)) - {None} for x in (one, other)]
    return not names[0].isdisjoint(names[1])


def _check(rows: int, cohort: Cohort) -> None:
    ids, most = cohort.positions, cohort.size - 1
    if not isinstance(ids, jax.core.Tracer) and (
        not isinstance(ids, jax.Array) or ids.is_fully_addressable
    ):
        most = max(most, int(np.max(np.asarray(ids))))
    if most >= rows:
        raise ValueError(
            f"The algorithm was made for num_clients={rows}, but the cohort has a client at "
            f"position {most} of its data, or as many clients. Pass num_clients=len(data)."
        )
