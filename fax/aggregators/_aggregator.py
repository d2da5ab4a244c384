"""The interface of aggregators: what happens to clients' updates on their way to the server."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

import fax._operators as operators
import fax._reductions as reductions
from fax import _arguments, _keys
from fax._checks import OF_ITS_MAKER

PyTree = Any
Metrics = dict[str, jax.Array]


class Aggregator(NamedTuple):
    """Makes one update of all clients', as pure functions.

    Attributes:
      init: ``init(params) -> state``, from the model's parameters, of which updates have the
        structure, shapes and dtypes.
      aggregate: ``aggregate(updates, weights, state, key) -> (update, state, metrics)``, to be
        called in a program. ``updates`` are placed, leaves [clients, ...], and so are ``weights``
        [clients]. ``key`` is a random key of the server's. The update is a server value. Among the
        metrics is ``"clients/bits"``, float [clients], what each client sends.
      encodes: whether clients send an encoding that the aggregator makes of their updates, so that
        ``"clients/bits"`` is what it says, whatever transformations before it say.
      transformation: of a `chain` of transformations alone, what it is without the mean at its end;
        so it can be a part of something else. Else None.
      private: whether the update is differentially private for clients. Algorithms that send more
        than updates refuse such an aggregator, and all others let it work in every round, even if
        nobody takes part.
    """

    init: Callable[[PyTree], PyTree]
    aggregate: Callable[..., tuple[PyTree, PyTree, Metrics]]
    encodes: bool = False
    transformation: Transformation | None = None
    private: bool = False

    def __repr__(self) -> str:
        return f"Aggregator({made_by(self.aggregate)})"


class Transformation(NamedTuple):
    """Changes clients' updates before they are aggregated, as pure functions.

    Attributes:
      init: ``init(params) -> state``.
      update: ``update(updates, weights, state, key) -> (updates, weights, state, metrics)``, to be
        called in a program, of placed updates and weights. A transformation that compresses says
        what a client sends by the metric ``"clients/bits"``. Clients of weight zero are left out:
        what they hold reaches nothing, and their rows of the state stay as they are.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[..., tuple[PyTree, jax.Array, PyTree, Metrics]]

    def __repr__(self) -> str:
        return f"Transformation({made_by(self.update)})"


def made_by(fn: Any) -> str:
    """The function that made a function, for a repr."""
    return getattr(fn, "__qualname__", type(fn).__name__).partition(".<locals>")[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerClient:
    """A part of a state that has a row for each client.

    Between rounds there are rows for all clients of the population. In a round of a cohort, the
    algorithm gives the aggregator those of the cohort's clients, as a placed value, and puts back
    what comes out.

    Attributes:
      rows: leaves [clients, ...].
    """

    rows: PyTree


def mean() -> Aggregator:
    """The mean weighted by ``weights``: sum_i w_i u_i / sum_i w_i.

    A client sends all bits of its update. One of weight zero is left out, whatever it holds, as if
    it were masked; so `non_finite` can drop clients.

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

    def aggregate(
        updates: PyTree, weights: jax.Array, state: PyTree, key: jax.Array
    ) -> tuple[PyTree, PyTree, Metrics]:
        update = reductions.mean(updates, weights=weights, where=weights != 0)
        return update, state, {"clients/bits": all_bits(updates)}

    return Aggregator(lambda params: (), aggregate)


def each(fn: Callable, *args: PyTree) -> Any:
    """`fax.map` at the batch size of the map that makes the arguments, so that the two fuse.

    So updates are encoded as clients finish, and where a mean follows they never exist together.
    In gradients they are made again if the clients' function is under `jax.checkpoint`.
    """
    return operators.map(fn, *args, vectorize=OF_ITS_MAKER)


def each_present(fn: Callable, updates: PyTree, weights: jax.Array, *args: PyTree) -> Any:
    """`each`, where ``fn(update, *args)`` sees zeros in place of updates whose weight is zero.

    This is for values. Derivatives stop where a reduction leaves these clients out.
    """

    def own(update: PyTree, weight: jax.Array, *args: PyTree) -> Any:
        return fn(where(weight != 0, update), *args)

    return each(own, updates, weights, *args)


def where(flag: jax.Array, values: PyTree) -> PyTree:
    """The values, or zeros."""
    return jax.tree.map(lambda x: jnp.where(flag, x, jnp.zeros_like(x)), values)


def present_rows(rows: PyTree, weights: jax.Array) -> PyTree:
    """The rows of clients whose weight is not zero, and zeros for the others.

    Neither what those hold nor its derivatives, be they NaN, get any further. In gradients these
    rows are kept, and not made again; see `each_present`.
    """
    return reductions.masked(rows, weights != 0)


def all_bits(updates: PyTree) -> jax.Array:
    """What each client sends if it sends its row of the updates as it is, float [clients]."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(updates)]
    bits = sum(math.prod(x.shape[1:]) * x.dtype.itemsize * 8 for x in leaves)
    return jnp.full(len(leaves[0]), bits, jnp.float32)


def rows_after(weights: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """The new rows of clients whose weight is not zero, and the old ones of others, to the bit.

    Derivatives do not reach what makes new rows of clients that are left out, even if they are
    singular: the mask is on what a map returns. The barrier keeps the selection out of that map.
    """
    new = lax.optimization_barrier(present_rows(new, weights))
    return each(
        lambda weight, new, old: jax.tree.map(lambda a, b: jnp.where(weight != 0, a, b), new, old),
        *(weights, new, old),
    )


def as_transformation(caller: str, part: Any) -> Transformation:
    """A transformation, also of a chain of transformations."""
    if isinstance(part, Aggregator) and part.transformation is not None:
        return part.transformation
    if not isinstance(part, Transformation):
        raise TypeError(
            f"fax.aggregators.{caller}: transformation is {_shown(part)}, expected a "
            f"fax.aggregators.Transformation, or a chain of them alone.{_call(part)}"
        )
    return part


def chain(*parts: Transformation | Aggregator) -> Aggregator:
    """An aggregator of updates that go through transformations first, in this order.

    Args:
      *parts: transformations, and one aggregator at the end; without one, `mean`. A chain of
        transformations alone is a transformation, too.

    Returns:
      The aggregator. Its metrics are those of all parts; ``"clients/bits"`` is what the last part
      says that changes what is sent.

    Raises:
      TypeError: if a part is neither, or an aggregator stands before the end.
      ValueError: in ``init``, if a transformation before a private aggregator has a state other
        than the rows of single clients, `PerClient`.

    Example:

      >>> aggregator = fax.aggregators.chain(fax.aggregators.mean())
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
            raise TypeError(
                f"fax.aggregators.chain: part {number} is {_shown(part)}, expected a "
                "fax.aggregators.Transformation. An Aggregator stands at the end."
                f"{_call(part)}"
            )
    transformations = cast("list[Transformation]", before)
    aggregator = cast(Aggregator, last)

    def init(params: PyTree) -> tuple:
        states = tuple(part.init(params) for part in parts)
        if aggregator.private:
            for number, state in enumerate(states[:-1]):
                _check_own(number, state)
        return states

    def through(
        updates: PyTree, weights: jax.Array, state: tuple, key: jax.Array
    ) -> tuple[PyTree, jax.Array, tuple, Metrics]:
        states: list[PyTree] = []
        metrics: Metrics = {}
        for number, (part, own) in enumerate(zip(transformations, state)):
            own_key = _keys.derive(key, _keys.Use.LINK, number)
            updates, weights, own, more = part.update(updates, weights, own, own_key)
            states.append(own)
            metrics |= more
        return updates, weights, tuple(states), metrics

    def aggregate(
        updates: PyTree, weights: jax.Array, state: tuple, key: jax.Array
    ) -> tuple[PyTree, tuple, Metrics]:
        updates, weights, states, metrics = through(updates, weights, state, key)
        own_key = _keys.derive(key, _keys.Use.LINK, len(transformations))
        update, own, more = aggregator.aggregate(updates, weights, state[-1], own_key)
        metrics = {**metrics, **more} if aggregator.encodes else {**more, **metrics}
        return update, (*states, own), metrics

    def update(updates: PyTree, weights: jax.Array, state: tuple, key: jax.Array) -> tuple:
        return through(updates, weights, state, key)

    def init_alone(params: PyTree) -> tuple:
        return tuple(part.init(params) for part in transformations)

    transformation = Transformation(init_alone, update) if alone else None
    return Aggregator(init, aggregate, private=aggregator.private, transformation=transformation)


def _check_own(number: int, state: PyTree) -> None:
    """That what a client sent does not change, through a state, what others send later."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, PerClient))
    if any(not isinstance(leaf, PerClient) for leaf in leaves):
        raise ValueError(
            f"fax.aggregators.chain: part {number} has a state that all clients share, but the "
            "aggregator is private. One client could change, through this state, what others send, "
            "and noise is only for what it sends itself. In place of adaptive_clip use "
            "gaussian(..., quantile=), which has noise for it."
        )


def aggregator_of(caller: str, value: Any) -> Aggregator | None:
    """The aggregator that a user passes to an algorithm, or None. A transformation is a chain."""
    if value is None or isinstance(value, Aggregator):
        return value
    if isinstance(value, Transformation):
        return chain(value)
    fix = _call(value)
    if isinstance(value, list | tuple):
        fix = " For several in a row: fax.aggregators.chain(*parts)."
    raise ValueError(
        f"{caller}: aggregator is {_shown(value)}, expected one of fax.aggregators, such as "
        f"fax.aggregators.mean().{fix}"
    )


def _shown(part: Any) -> str:
    known = isinstance(part, Aggregator | Transformation)
    return repr(part) if known else _arguments.shown(part)


def _call(part: Any) -> str:
    """How to fix it, where the function came and not what it returns."""
    name = _arguments.shown(part).removeprefix("the function ")
    return f" Call it: {name}(...)." if name.startswith("fax.aggregators.") else ""
