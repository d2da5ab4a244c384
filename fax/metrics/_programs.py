"""The compiled part of evaluation: statistics of batches, or of clients with their own models."""

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
from fax._notes import called
from fax._program import program
from fax.data._cohort import Client, Cohort
from fax.metrics._classification import Metric
from fax.metrics._exact_sums import Parts, into_parts
from fax.metrics._packing import PackedBatches
from fax.metrics._statistics import Statistic, Sum

PyTree = Any
Apply = Callable[[PyTree, Any], jax.Array]
Named = tuple[tuple[str, Metric], ...]

# The name of the statistic that counts examples whose scores are NaN or infinite.
NON_FINITE = "non_finite"


# The last function that each piece of code defined, and code that there was a warning about.
_last: weakref.WeakKeyDictionary[types.CodeType, weakref.ref] = weakref.WeakKeyDictionary()
_noticed: weakref.WeakSet[types.CodeType] = weakref.WeakSet()


def warn_if_recompiled(where: str, apply: Any, metrics: Any) -> None:
    """Warns once about a function that is redefined for every call, and so compiled each time.

    Two functions with the same code and values cannot be treated as one, because what they look up
    elsewhere may have changed in between.
    """
    named = metrics.items() if isinstance(metrics, Mapping) else ()
    for name, fn in (("apply", apply), *((f"metric {name!r}", fn) for name, fn in named)):
        code, values = _code_and_values(fn)
        if code is None:
            continue
        before = _last.get(code, lambda: None)()
        _last[code] = weakref.ref(fn)
        if before is None or before is fn or code in _noticed:
            continue
        if not _same_values(values, _code_and_values(before)[1]):
            continue
        _noticed.add(code)
        place = f", at {code.co_filename}:{code.co_firstlineno}," if hasattr(fn, "__code__") else ""
        warnings.warn(
            f"{where}: {name} is {_arguments.shown(fn)} that is redefined for every call{place} "
            "and so is compiled in every call. Define it once, outside of the loop.",
            stacklevel=3,
        )


def _code_and_values(fn: Any) -> tuple[types.CodeType | None, list[Any]]:
    """The code of a function, and the values that distinguish functions with the same code."""
    values: list[Any] = [type(fn)]
    while isinstance(fn, functools.partial):
        values += [*fn.args, *fn.keywords, *fn.keywords.values()]
        fn = fn.func
    if not isinstance(fn, types.FunctionType):
        return None, values
    values += [fn.__code__, *(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]
    with contextlib.suppress(ValueError):  # a variable that is not defined yet
        values += [cell.cell_contents for cell in fn.__closure__ or ()]
    return fn.__code__, values


def _same_values(values: list[Any], others: list[Any]) -> bool:
    """Whether they are the same objects, or equal numbers and strings."""
    plain = bool | int | float | str | bytes
    return len(values) == len(others) and all(
        a is b or (isinstance(a, plain) and type(a) is type(b) and a == b)
        for a, b in zip(values, others)
    )


@functools.partial(jax.jit, static_argnums=0)
def scores_of(apply: Apply, params: PyTree, batch: Any) -> Any:
    """The scores of a batch. It is only traced, for their shape."""
    return called("apply", "apply", apply, params=params, batch=batch)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def stats_of_batches(
    apply: Apply,
    metrics: Named,
    slots: int | None,
    placement: str,
    params: PyTree,
    packed: PackedBatches,
) -> dict[str, Statistic]:
    """Statistics of all batches together or, if there are slots, of each slot of each batch.

    Their leaves are `Parts`.
    """

    def of_batch(params: PyTree, batch: Any, mask: jax.Array, owners: jax.Array) -> Any:
        parts = _of_examples(apply, metrics, params, batch, mask, packed.mask.size)
        if slots is None:
            return jax.tree.map(lambda x: jnp.sum(x, axis=0), parts)
        return jax.tree.map(lambda x: jax.ops.segment_sum(x, owners, slots), parts)

    @program(**{placement: len(packed.mask)})
    def of_batches(params: PyTree, *packed: Any) -> Any:
        placed = operators.map(of_batch, operators.broadcast(params), *packed)
        return reductions.sum(placed) if slots is None else operators.collect(placed)

    return of_batches(params, *packed)


def _of_examples(
    apply: Apply, metrics: Named, params: PyTree, batch: Any, mask: jax.Array, most: int
) -> dict[str, Statistic]:
    """The statistics of each example, zero where ``mask`` is False.

    Their leaves are `Parts`, of which the devices may add up ``most``.
    """
    scores = called("apply", "apply", apply, params=params, batch=batch)
    count = len(mask)
    stats: dict[str, Statistic] = {NON_FINITE: Sum(_non_finite(scores, count))}
    for name, metric in metrics:
        stat = called(f"metric {name!r}", "metric", metric, batch=batch, scores=scores)
        stats[name] = stat
        if not isinstance(stat, Statistic):
            raise ValueError(
                f"metric {name!r} returned {_arguments.shown(stat)}, expected a statistic, such "
                "as fax.metrics.Mean(values, jnp.ones_like(values))."
            )
        for path, leaf in tree_leaves_with_path(stat):
            if jnp.ndim(leaf) < 1 or len(leaf) != count:
                raise ValueError(
                    f"metric {name!r} returned {keystr(path)} of shape {jnp.shape(leaf)}, expected "
                    f"({count}, ...), a statistic of each example of the batch. fax adds them up, "
                    "without padding."
                )

    def parts(x: Any) -> Parts:
        x = jnp.asarray(x)
        return into_parts(
            jnp.where(mask.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros_like(x)), most
        )

    return jax.tree.map(parts, stats)


def _non_finite(scores: PyTree, count: int) -> jax.Array:
    """Which examples have scores that are NaN or +inf. -inf is the score of the impossible."""
    bad = jnp.zeros(count, bool)
    for x in jax.tree.leaves(scores):
        if jnp.shape(x)[:1] == (count,) and jnp.issubdtype(x.dtype, jnp.inexact):
            bad |= (jnp.isnan(x) | (x == jnp.inf)).reshape(count, -1).any(axis=1)
    return bad


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def stats_of_clients(
    apply: Apply, metrics: Named, placement: str, params: PyTree, cohort: Cohort
) -> dict[str, Statistic]:
    """Statistics of a cohort's clients, each with its own row of ``params``.

    Their leaves are `Parts`.
    """

    def of_client(params: PyTree, client: Client) -> dict[str, Statistic]:
        def of_step(batch: Any, mask: jax.Array) -> Any:
            parts = _of_examples(apply, metrics, params, batch, mask, client.mask.size)
            return jax.tree.map(lambda x: jnp.sum(x, axis=0), parts)

        def step(totals: Any, batch: Any, mask: jax.Array, key: jax.Array) -> Any:
            return jax.tree.map(Parts.add, totals, of_step(batch, mask), is_leaf=_is_parts)

        shapes = jax.eval_shape(of_step, client.batch(0), client.mask[0])
        return client.scan(step, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))

    @program(**{placement: cohort.size})
    def of_cohort(params: PyTree, cohort: Cohort) -> dict[str, Statistic]:
        placed = operators.map(of_client, params, cohort.clients(), vectorize=cohort.vectorize)
        return operators.collect(placed)

    return of_cohort(jax.tree.map(lambda x: x[cohort.positions], params), cohort)


def _is_parts(x: Any) -> bool:
    return isinstance(x, Parts)


def to_host(stats: dict[str, Statistic]) -> dict[str, Statistic]:
    """Turns leaves that are `Parts` into NumPy arrays of 64 bits."""
    return jax.tree.map(Parts.value, stats, is_leaf=_is_parts)
