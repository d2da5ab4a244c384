"""The interface of aggregators: what happens to clients' updates on their way to the server."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

import fax._operators as operators
import fax._reductions as reductions
from fax import _keys
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
      private: whether the update is differentially private for clients. Algorithms that send more
        than updates refuse such an aggregator, and all others let it work in every round, even if
        nobody takes part.
    """

    init: Callable[[PyTree], PyTree]
    aggregate: Callable[..., tuple[PyTree, PyTree, Metrics]]
    encodes: bool = False
    private: bool = False


class Transformation(NamedTuple):
    """Changes clients' updates before they are aggregated, as pure functions.

    Attributes:
      init: ``init(params) -> state``.
      update: ``update(updates, weights, state, key) -> (updates, weights, state, metrics)``, to be
        called in a program, of placed updates and weights. A transformation that compresses says
        what a client sends by the metric ``"clients/bits"``.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[..., tuple[PyTree, jax.Array, PyTree, Metrics]]


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
    return operators.map(fn, *args, batch_size=OF_ITS_MAKER)


def all_bits(updates: PyTree) -> jax.Array:
    """What each client sends if it sends its row of the updates as it is, float [clients]."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(updates)]
    bits = sum(math.prod(x.shape[1:]) * x.dtype.itemsize * 8 for x in leaves)
    return jnp.full(len(leaves[0]), bits, jnp.float32)


def chain(*parts: Transformation | Aggregator) -> Aggregator:
    """An aggregator of updates that go through transformations first, in this order.

    Args:
      *parts: transformations, and one aggregator at the end; without one, `mean`.

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
    if not parts or isinstance(parts[-1], Transformation):
        parts = (*parts, mean())
    *before, last = parts
    for number, part in enumerate(parts):
        expected = Aggregator if number == len(before) else Transformation
        if not isinstance(part, expected):
            raise TypeError(
                f"fax.aggregators.chain: part {number} is {part!r:.80}, expected a "
                "fax.aggregators.Transformation. An Aggregator stands at the end."
            )
    transformations = cast("list[Transformation]", before)
    aggregator = cast(Aggregator, last)

    def init(params: PyTree) -> tuple:
        states = tuple(part.init(params) for part in parts)
        if aggregator.private:
            for number, state in enumerate(states[:-1]):
                _check_own(number, state)
        return states

    def aggregate(
        updates: PyTree, weights: jax.Array, state: tuple, key: jax.Array
    ) -> tuple[PyTree, tuple, Metrics]:
        keys = [_keys.derive(key, _keys.Use.LINK, number) for number in range(len(parts))]
        states: list[PyTree] = []
        metrics: Metrics = {}
        for part, own, own_key in zip(transformations, state, keys):
            updates, weights, own, more = part.update(updates, weights, own, own_key)
            states.append(own)
            metrics |= more
        update, own, more = aggregator.aggregate(updates, weights, state[-1], keys[-1])
        metrics = {**metrics, **more} if aggregator.encodes else {**more, **metrics}
        return update, (*states, own), metrics

    return Aggregator(init, aggregate, private=aggregator.private)


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
