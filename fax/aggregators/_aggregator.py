"""The interface of aggregators: what happens to clients' updates on their way to the server."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from fax import _arguments

PyTree = Any
Metrics = dict[str, jax.Array]


class Aggregator(NamedTuple):
    """Makes one update from the updates of all clients, as pure functions.

    Attributes:
      init: ``init(params) -> state``, from the parameters of the model. Updates have their
        structure, shapes and dtypes.
      aggregate: ``aggregate(updates, weights, state, key) -> (update, state, metrics)``, which is
        called in a program. ``updates`` and ``weights`` are placed, with leaves [clients, ...] and
        [clients]. ``key`` is a random key of the server. The update is a server value. The metrics
        include ``"clients/bits"``, float [clients], the number of bits that each client sends.
      encodes: whether the aggregator encodes the updates itself. Then ``"clients/bits"`` is what
        the aggregator says, and not what the transformations before it say.
      transformation: of a `chain` that consists of transformations alone, the chain without the
        mean at its end, so that it can be part of something else. None otherwise.
      private: whether the update is differentially private for clients. Algorithms whose clients
        send more than updates refuse such an aggregator. All others call it in every round, even
        if no client takes part.

    Example:

      >>> aggregator = fax.aggregators.median()
      >>> aggregator
      Aggregator(median)
      >>> aggregator.init(jnp.zeros(3))
      ()
    """

    init: Callable[[PyTree], PyTree]
    aggregate: Callable[..., tuple[PyTree, PyTree, Metrics]]
    encodes: bool = False
    transformation: Transformation | None = None
    private: bool = False

    def __repr__(self) -> str:
        return f"Aggregator({made_by(self.aggregate)})"


class Format(NamedTuple):
    """How numbers that a transformation has rounded fit in few bits, leaf by leaf, without loss.

    Attributes:
      bits: how many bits a number takes: 2, 4 or 8.
      encode: ``encode(x) -> (codes, scale)``, of a leaf as the transformation returns it for one
        client. ``codes`` are uint8, less than 2^bits, in the shape of x, and ``scale`` is one
        float of its dtype, or a vector of a few. It looks at all numbers alike, so that x may be
        sharded.
      decode: ``decode(codes, scale) -> x``, the same numbers as before.

    Example:

      >>> part = fax.aggregators.e3m0()
      >>> codes, scale = part.format.encode(jnp.array([8.0, -4.0, 0.0]))
      >>> codes, scale
      (Array([ 7, 14,  0], dtype=uint8), Array(8., dtype=float32))
      >>> part.format.decode(codes, scale)
      Array([ 8., -4.,  0.], dtype=float32)
    """

    bits: int
    encode: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    decode: Callable[[jax.Array, jax.Array], jax.Array]


class Transformation(NamedTuple):
    """Changes the updates of clients before they are aggregated, as pure functions.

    Attributes:
      init: ``init(params) -> state``.
      update: ``update(updates, weights, state, key) -> (updates, weights, state, metrics)``, which
        is called in a program, with placed updates and weights. A transformation that compresses
        updates reports what a client sends in the metric ``"clients/bits"``. Clients of weight zero
        do not take part: nothing that they hold reaches any result, and their rows of the state
        stay as they are.
      format: the `Format` in which the updates that it returns fit in few bits, or None. Replicas
        in a data center then send each other these bits; see `fax.algorithms.diloco`.

    Example:

      >>> transformation = fax.aggregators.clip_by_norm(1.0)
      >>> transformation
      Transformation(clip_by_norm)
      >>> fax.aggregators.chain(transformation, fax.aggregators.median())
      Aggregator(chain)
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[..., tuple[PyTree, jax.Array, PyTree, Metrics]]
    format: Format | None = None

    def __repr__(self) -> str:
        return f"Transformation({made_by(self.update)})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerClient:
    """A part of a state that has one row for each client.

    Between rounds it has rows for all clients of the data. In a round, the algorithm passes the
    rows of the cohort's clients to the aggregator, as a placed value, and writes back the rows that
    come out.

    Attributes:
      rows: leaves [clients, ...].

    Example:

      >>> part = fax.aggregators.error_feedback(fax.aggregators.top_k(1), num_clients=100)
      >>> state = part.init({"w": jnp.zeros(3)})
      >>> state.memory.rows["w"].shape
      (100, 3)
    """

    rows: PyTree


def made_by(fn: Any) -> str:
    """The public function that made a function, for a repr."""
    return getattr(fn, "__qualname__", type(fn).__name__).partition(".<locals>")[0]


def stateless_aggregator(
    name: str,
    aggregate: Callable[[PyTree, jax.Array, jax.Array], tuple[PyTree, Metrics]],
    *,
    encodes: bool = False,
) -> Aggregator:
    """An aggregator without state.

    Args:
      name: of the function that makes it.
      aggregate: ``aggregate(updates, weights, key) -> (update, metrics)``. Without
        ``"clients/bits"`` among the metrics, clients send all bits of their updates.
      encodes: as in `Aggregator`.
    """

    def whole(
        updates: PyTree, weights: jax.Array, state: PyTree, key: jax.Array
    ) -> tuple[PyTree, PyTree, Metrics]:
        update, metrics = aggregate(updates, weights, key)
        if "clients/bits" not in metrics:
            metrics = {"clients/bits": all_bits(updates), **metrics}
        return update, state, metrics

    return Aggregator(_no_state, _named(name, whole), encodes=encodes)


def stateless_transformation(
    name: str,
    update: Callable[[PyTree, jax.Array, jax.Array], tuple[PyTree, jax.Array, Metrics]],
    format: Format | None = None,
) -> Transformation:
    """A transformation without state.

    Args:
      name: of the function that makes it.
      update: ``update(updates, weights, key) -> (updates, weights, metrics)``.
      format: as in `Transformation`.
    """

    def whole(
        updates: PyTree, weights: jax.Array, state: PyTree, key: jax.Array
    ) -> tuple[PyTree, jax.Array, PyTree, Metrics]:
        updates, weights, metrics = update(updates, weights, key)
        return updates, weights, state, metrics

    return Transformation(_no_state, _named(name, whole), format)


Part = TypeVar("Part", Aggregator, Transformation)


def of_floats(name: str, part: Part) -> Part:
    """The same aggregator or transformation, which refuses updates that are not real floats.

    Args:
      name: of the function that makes it.
      part: the aggregator or transformation.
    """

    def checked(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def call(tree: PyTree, *args: Any) -> Any:
            _arguments.floats(f"fax.aggregators.{name}: updates", tree)
            return fn(tree, *args)

        return _named(name, call)

    if isinstance(part, Aggregator):
        return part._replace(init=checked(part.init), aggregate=checked(part.aggregate))
    return part._replace(init=checked(part.init), update=checked(part.update))


def _no_state(params: PyTree) -> tuple[()]:
    return ()


def _named(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function under the name of what made it; see `made_by`."""
    fn.__qualname__ = name
    return fn


def all_bits(updates: PyTree) -> jax.Array:
    """What each client sends if it sends its row of the updates as it is, float [clients]."""
    return jnp.full(len(jax.tree.leaves(updates)[0]), bits_of_a_row(updates), jnp.float32)


def bits_of_a_row(tree: PyTree) -> int:
    """The bits of one client's row of a placed pytree."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
    return sum(math.prod(x.shape[1:]) * x.dtype.itemsize * 8 for x in leaves)


def as_transformation(name: str, part: Any, argument: str = "transformation") -> Transformation:
    """Checks that a part is a transformation, or a chain of transformations alone."""
    if isinstance(part, Aggregator) and part.transformation is not None:
        return part.transformation
    if not isinstance(part, Transformation):
        raise ValueError(
            f"fax.aggregators.{name}: {argument} is {shown(part)}, expected a "
            f"fax.aggregators.Transformation, or a chain of transformations alone.{fix(part)}"
        )
    return part


def shown(part: Any) -> str:
    """What came in place of an aggregator or a transformation, in a message."""
    known = isinstance(part, Aggregator | Transformation)
    return repr(part) if known else _arguments.shown(part)


def fix(part: Any) -> str:
    """How to fix it, if a function was passed and not what it returns."""
    name = _arguments.shown(part).removeprefix("the function ")
    return f" Call it: {name}(...)." if name.startswith("fax.aggregators.") else ""
