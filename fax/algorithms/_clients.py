"""Per-client state: gathers the rows of a cohort's clients, and scatters new ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from fax import _arguments
from fax.aggregators import PerClient
from fax.data import Cohort
from fax.sharding._types import without_explicit_axes

PyTree = Any


def gather_rows(state: PyTree, cohort: Cohort) -> PyTree:
    """Gathers the rows of a cohort's clients from a state with rows for all clients.

    Rows are in `fax.aggregators.PerClient`, anywhere in the state; the rest does not change. On a
    mesh they are sharded like the cohort, whatever the sharding of the rows of all clients.

    Args:
      state: a pytree.
      cohort: the clients.

    Returns:
      The state, whose rows have a leading axis [clients] instead of [num_clients].

    Raises:
      ValueError: if the cohort has clients for which the state has no row. If positions are traced,
        the rows of such clients are NaN.

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

    _check_cohort("gather_rows", cohort)

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
    """Puts new rows for a cohort's clients into a state with rows for all clients.

    The clients of a cohort should differ: of two rows for one client, either may be kept.

    Args:
      state: the state that was passed to `gather_rows`.
      new: the new version of the state that it returned.
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

    _check_cohort("scatter_rows", cohort)

    def put(x: jax.Array, rows: jax.Array) -> jax.Array:
        spread, rest = _spec(x)
        put_all = without_explicit_axes(
            lambda x, ids, rows: [x.at[ids].set(rows, mode="drop")], [PartitionSpec(spread, *rest)]
        )
        return put_all(x, cohort.positions, rows)[0]

    return map_rows(put, state, new)


def map_rows(fn: Callable, state: PyTree, *new: PyTree) -> PyTree:
    """Applies ``fn`` to the leaves in `PerClient`; other leaves are the newest state's."""

    def one(x: PyTree, *others: PyTree) -> PyTree:
        if isinstance(x, PerClient):
            return jax.tree.map(fn, x, *others)
        return others[-1] if others else x

    return jax.tree.map(one, state, *new, is_leaf=is_per_client)


def repeated(tree: PyTree, num_clients: int) -> PyTree:
    """Rows of clients that all start with the same, leaves [num_clients, ...]."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_clients, *jnp.shape(x))), tree)


def without_rows(state: PyTree) -> PyTree:
    """A state without the rows of clients."""
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


def _check_cohort(name: str, cohort: Any) -> None:
    if not isinstance(cohort, Cohort):
        raise ValueError(
            f"fax.algorithms.{name}: cohort is {_arguments.shown(cohort)}, expected a "
            "fax.data.Cohort, from the iterator that fax.data.cohorts returns."
        )


def _check(rows: int, cohort: Cohort) -> None:
    ids, most = cohort.positions, cohort.size - 1
    if not isinstance(ids, jax.core.Tracer) and (
        not isinstance(ids, jax.Array) or ids.is_fully_addressable
    ):
        most = max(most, int(np.max(np.asarray(ids))))
    if most >= rows:
        raise ValueError(
            f"The algorithm was made for num_clients={rows}, but the cohort has a client at "
            f"position {most} of its data, or more than {rows} clients. Pass "
            "num_clients=len(data)."
        )
