"""What is compiled: statistics of rows of examples, or of clients that have models of their own."""

from __future__ import annotations

import contextlib
import functools
import types
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_leaves_with_path

import fax._operators as operators
import fax._reductions as reductions
from fax import _arguments
from fax._program import program
from fax.data._cohort import Client, Cohort
from fax.metrics._classes import Metric
from fax.metrics._statistics import Statistic

PyTree = Any
Apply = Callable[[PyTree, Any], jax.Array]
Named = tuple[tuple[str, Metric], ...]


# The last function that each piece of code made, and what there was a warning about.
_last: weakref.WeakKeyDictionary[types.CodeType, weakref.ref] = weakref.WeakKeyDictionary()
_noticed: weakref.WeakSet[types.CodeType] = weakref.WeakSet()


def notice(where: str, apply: Any, metrics: Any) -> None:
    """Warns, once, of a function that is made anew in every call, for it is compiled each time.

    Two functions of the same code and the same values are not taken for one: what they look up
    elsewhere may have changed in between.
    """
    named = metrics.items() if isinstance(metrics, Mapping) else ()
    for name, fn in (("apply", apply), *((f"metric {name!r}", fn) for name, fn in named)):
        code, values = _made_of(fn)
        if code is None:
            continue
        before = _last.get(code, lambda: None)()
        _last[code] = weakref.ref(fn)
        if before is None or before is fn or code in _noticed:
            continue
        if not _alike(values, _made_of(before)[1]):
            continue
        _noticed.add(code)
        place = f", at {code.co_filename}:{code.co_firstlineno}," if hasattr(fn, "__code__") else ""
        warnings.warn(
            f"{where}: {name} is {_arguments.shown(fn)} that is made anew for every call{place} "
            "and so is compiled in every call. Define it once, outside of the loop.",
            stacklevel=3,
        )


def _made_of(fn: Any) -> tuple[types.CodeType | None, list[Any]]:
    """The code of a function, and the values that make it another one than the next."""
    values: list[Any] = [type(fn)]
    while isinstance(fn, functools.partial):
        values += [*fn.args, *fn.keywords, *fn.keywords.values()]
        fn = fn.func
    if not isinstance(fn, types.FunctionType):
        return None, values
    values += [fn.__code__, *(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]
    with contextlib.suppress(ValueError):  # what is not defined yet
        values += [cell.cell_contents for cell in fn.__closure__ or ()]
    return fn.__code__, values


def _alike(values: list[Any], others: list[Any]) -> bool:
    """Whether these are the same objects, or equal numbers and strings."""
    plain = bool | int | float | str | bytes
    return len(values) == len(others) and all(
        a is b or (isinstance(a, plain) and type(a) is type(b) and a == b)
        for a, b in zip(values, others)
    )


@functools.partial(jax.jit, static_argnums=0)
def scores_of(apply, params, batch):
    """The scores of a batch. It is traced for their shape alone."""
    return apply(params, batch)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def stats_of_rows(apply, metrics, slots, placement, params, rows):
    """Statistics of rows together, or if there are slots, of each slot of each row."""

    def of_row(params, batch, mask, owners):
        stats = _of_batch(apply, metrics, params, batch)
        if slots is None:
            return {name: stat.sum(mask) for name, stat in stats.items()}
        return jax.tree.map(lambda x: _by_owner(x, mask, owners, slots), stats)

    @program(**{placement: len(rows.mask)})
    def of_rows(params, *rows):
        placed = operators.map(of_row, operators.broadcast(params), *rows)
        return reductions.sum(placed) if slots is None else operators.collect(placed)

    return of_rows(params, *rows)


def _by_owner(x: jax.Array, mask: jax.Array, owners: jax.Array, slots: int) -> jax.Array:
    x = jnp.where(mask.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)
    x = x.astype(jnp.int32) if x.dtype == bool else x
    return jax.ops.segment_sum(x, owners, slots)


def _of_batch(apply: Apply, metrics: Named, params: PyTree, batch: Any) -> dict[str, Statistic]:
    """Every example's statistics."""
    scores = apply(params, batch)
    count = len(next(iter(batch.values())))
    stats = {}
    for name, metric in metrics:
        stats[name] = stat = metric(batch, scores)
        if not isinstance(stat, Statistic):
            raise ValueError(
                f"metric {name!r} returned {type(stat).__name__} {stat!r:.80}, expected a "
                "statistic, such as fax.metrics.Mean(values, jnp.ones_like(values))."
            )
        for path, leaf in tree_leaves_with_path(stat):
            if jnp.ndim(leaf) < 1 or len(leaf) != count:
                raise ValueError(
                    f"metric {name!r} returned {keystr(path)} of shape {jnp.shape(leaf)}, expected "
                    f"({count}, ...): a statistic of each example of the batch. fax adds them up, "
                    "without padding."
                )
    return stats


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def stats_of_clients(apply, metrics, placement, params, cohort):
    """Statistics of a cohort's clients, each of its own row of params."""

    def of_client(params: PyTree, client: Client) -> dict[str, Statistic]:
        def of_step(batch, mask):
            stats = _of_batch(apply, metrics, params, batch)
            return {name: stat.sum(mask) for name, stat in stats.items()}

        def step(totals, batch, mask, key):
            return jax.tree.map(jnp.add, totals, of_step(batch, mask))

        shapes = jax.eval_shape(of_step, client.batch(0), client.mask[0])
        return client.scan(step, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))

    @program(**{placement: cohort.size})
    def of_cohort(params: PyTree, cohort: Cohort) -> dict[str, Statistic]:
        placed = operators.map(
            of_client, params, cohort.clients(), batch_size=cohort.clients_at_once
        )
        return operators.collect(placed)

    return of_cohort(jax.tree.map(lambda x: x[cohort.client_ids], params), cohort)
