"""Statistics: sums over examples that can be merged in any order, and their final results."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = Any
S = TypeVar("S", bound="Statistic")


class Statistic:
    """A pytree whose leaves are sums over some examples.

    Two statistics are merged by addition, which is associative and commutative, so everything that
    adds up pytrees, such as `fax.sum`, merges statistics. To define a statistic, write a subclass
    that is a frozen dataclass, registered with `jax.tree_util.register_dataclass`, and that
    implements ``result``.

    Example:

      >>> import dataclasses
      >>> @jax.tree_util.register_dataclass
      ... @dataclasses.dataclass(frozen=True)
      ... class RootMeanSquare(fax.metrics.Statistic):
      ...     squares: jax.Array
      ...     count: jax.Array
      ...
      ...     def result(self):
      ...         return (self.squares / self.count) ** 0.5
      >>> of_each = RootMeanSquare(jnp.array([9.0, 16.0, 0.0]), jnp.ones(3))
      >>> print(of_each.sum(where=jnp.array([True, True, False])).result())
      3.535534
    """

    def result(self) -> Any:
        """The value of the metric."""
        raise NotImplementedError

    def merge(self: S, other: S) -> S:
        """The statistic of the examples of both. If one of them is on the host, so is the result.

        Raises:
          TypeError: if they differ in type or shapes.
        """
        mine, others = ((jax.tree.structure(x), _shapes(x)) for x in (self, other))
        if mine != others:
            raise TypeError(
                f"cannot merge a {type(other).__name__} of shapes {_shapes(other)} with a "
                f"{type(self).__name__} of shapes {_shapes(self)}. Merge statistics of the same "
                "metric only."
            )
        return jax.tree.map(_added, self, other)

    def zero(self: S) -> S:
        """The statistic of no examples. Merging it changes nothing."""
        return jax.tree.map(lambda x: np.zeros(np.shape(x), _widened(x).dtype), self)

    def sum(self: S, where: Array | None = None) -> S:
        """The statistic of all examples, from statistics with a row for each example.

        Args:
          where: bool [batch], which examples count. The values of the others have no effect.

        Returns:
          Leaves without their leading axis. Bools are counted. Dtypes of less than 32 bits are
          added up in 32 bits, and so is the result. `fax.metrics.evaluate` adds up more precisely.
        """

        def add(x: Array) -> Array:
            if where is not None:
                x = jnp.where(jnp.reshape(where, (-1,) + (1,) * (jnp.ndim(x) - 1)), x, 0)
            return jnp.sum(_widened(x), axis=0)

        return jax.tree.map(add, self)


def _shapes(x: Any) -> list[tuple[int, ...]]:
    return [np.shape(leaf) for leaf in jax.tree.leaves(x)]


# Kinds of numbers, and the shortest dtypes that they are added up in, on the host and on devices.
_WIDE: tuple[tuple[Any, Any, Any], ...] = (
    (np.bool_, np.int64, np.int32),
    (np.signedinteger, np.int64, np.int32),
    (np.unsignedinteger, np.uint64, np.uint32),
    (np.floating, np.float64, np.float32),
)


def _added(a: Array, b: Array) -> Array:
    """The sum of two arrays, in 64 bits if one of them is on the host."""
    on_host = [not isinstance(x, jax.Array) for x in (a, b)]
    if any(on_host) and not any(isinstance(x, jax.core.Tracer) for x in (a, b)):
        a, b = np.asarray(a), np.asarray(b)  # JAX would cut the one on the host to 32 bits
    return _widened(a) + _widened(b)


def _widened(x: Array) -> Array:
    """An array in the dtype in which it is added up: bools become ints, short numbers longer."""
    on_host = not isinstance(x, jax.Array)
    x = np.asarray(x) if on_host else x
    for kind, host, device in _WIDE:
        if jnp.issubdtype(x.dtype, kind):
            return x.astype(host)[()] if on_host else x.astype(jnp.promote_types(x.dtype, device))
    return x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean(Statistic):
    """A weighted mean.

    The mean of no examples, with the weight 0, is NaN, because any number could be mistaken for a
    measurement.

    Attributes:
      total: the sum of the values, each times its weight.
      weight: the sum of the weights, of the same shape.

    Example:

      >>> one, other = fax.metrics.Mean(3.0, 4), fax.metrics.Mean(1.0, 1)
      >>> print(one.merge(other).result())
      0.8
    """

    total: Array
    weight: Array

    def result(self) -> Array:
        """The mean, ``total / weight``."""
        # Numbers on the host have 64 bits, which JAX would truncate.
        xp: Any = jnp if isinstance(self.weight, jax.Array) else np
        nothing = self.weight == 0
        return xp.where(nothing, np.nan, self.total / xp.where(nothing, 1, self.weight))[()]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum(Statistic):
    """A sum, or a count.

    Attributes:
      total: the sum.

    Example:

      >>> print(fax.metrics.Sum(3).merge(fax.metrics.Sum(4)).result())
      7
    """

    total: Array

    def result(self) -> Array:
        """The sum."""
        return self.total
