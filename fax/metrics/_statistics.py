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
        return jax.tree.map(lambda x: 0 * _counted(np.zeros_like(x)), self)

    def sum(self: S, where: Array | None = None) -> S:
        """The statistic of all examples together, of one of each.

        Args:
          where: bool [batch], which of them count. What the others hold is not looked at.

        Returns:
          Leaves without their leading axis; those that were bool count.
        """

        def add(x):
            if where is not None:
                x = jnp.where(jnp.reshape(where, (-1,) + (1,) * (jnp.ndim(x) - 1)), x, 0)
            return jnp.sum(x, axis=0)

        return jax.tree.map(add, self)


def _shapes(x: Any) -> list[tuple[int, ...]]:
    return [np.shape(leaf) for leaf in jax.tree.leaves(x)]


def _counted(x: Array) -> Array:
    """Bools add up to a number."""
    return x.astype(np.int32) if jnp.result_type(x).kind == "b" else x


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
