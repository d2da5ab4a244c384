"""Statistics: sums that add up in any order, and what is made of them in the end."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = Any
S = TypeVar("S", bound="Statistic")


class Statistic:
    """What is known of some examples: a pytree whose leaves are sums over them.

    So two are merged by addition, which is associative and commutative, and everything that adds
    up pytrees, such as `fax.sum`, merges statistics. A statistic of its own is a subclass, a
    frozen dataclass with `jax.tree_util.register_dataclass`, that says what its ``result`` is.
    """

    def result(self) -> Any:
        """The value of the metric."""
        raise NotImplementedError

    def merge(self: S, other: S) -> S:
        """The statistic of the examples of both.

        Raises:
          TypeError: if the other is of another kind or shape.
        """
        mine, others = (jax.tree.map(np.shape, x) for x in (self, other))
        if type(self) is not type(other) or mine != others:
            raise TypeError(
                f"cannot merge a {type(other).__name__} of shapes {_shapes(other)} with a "
                f"{type(self).__name__} of shapes {_shapes(self)}. Both have to come from the same "
                "metric."
            )
        return jax.tree.map(lambda a, b: _counted(a) + _counted(b), self, other)

    def zero(self: S) -> S:
        """The statistic of no examples: merging it changes nothing."""
        return jax.tree.map(lambda x: np.zeros(np.shape(x), _counted(x).dtype), self)

    def sum(self: S, where: Array | None = None) -> S:
        """The statistic of all examples together, of one of each.

        Args:
          where: bool [batch], which of them count. What the others hold is not looked at.

        Returns:
          Leaves without their leading axis; those that were bool count. What is shorter than 32
          bits is added up in 32 bits and stays so. Evaluation loses less: see
          `fax.metrics.evaluate`.
        """

        def add(x):
            if where is not None:
                x = jnp.where(jnp.reshape(where, (-1,) + (1,) * (jnp.ndim(x) - 1)), x, 0)
            return jnp.sum(_counted(x), axis=0)

        return jax.tree.map(add, self)


def _shapes(x: Any) -> list[tuple[int, ...]]:
    return [np.shape(leaf) for leaf in jax.tree.leaves(x)]


# What adds up: a kind of numbers, and what it takes at least, on the host and on devices.
_WIDE: tuple[tuple[Any, Any, Any], ...] = (
    (np.bool_, np.int64, np.int32),
    (np.signedinteger, np.int64, np.int32),
    (np.unsignedinteger, np.uint64, np.uint32),
    (np.floating, np.float64, np.float32),
)


def _counted(x: Array) -> Array:
    """An array as it is added up: bools count, and short numbers are made longer."""
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

    The mean of nothing, of weight 0, is NaN: whatever number stood there could be taken for a
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
        # NumPy's own numbers have 64 bits, which JAX would cut.
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
