"""The pass that rewrites convolutions so that they are also fast in loops.

A client function trains in a loop, and there XLA is slow at most convolutions. On CPU it has a fast
kernel for operands with the channels last. It rearranges other operands to fit, but only in the
outermost computation. In a loop the derivatives of a convolution, whose operands are transposed,
are 10 to 100 times slower. Grouped convolutions are slow, in loops or not. A vectorized convolution
becomes grouped if each participant has its own kernel.

The pass runs when a map is lowered, after all transformations of the client function, so it treats
the convolutions of gradients like any others. Each becomes a convolution with the channels last, or
slices and matrix products, or does not change.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.custom_batching import custom_vmap
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jax.extend.core.primitives import conv_general_dilated_p, select_and_scatter_add_p

from fax.lowering.convolutions._convolution import Convolution, best_way
from fax.lowering.convolutions._matmul import convolve
from fax.lowering.convolutions._max_pool import is_max_pool, max_pool_cotangent
from fax.primitives import _jaxpr
from fax.primitives._jaxpr import AnyJaxpr, Replacement
from fax.primitives._round import federated_map_p, has_convolutions, is_convolution

Convolve = Callable[[dict[str, Any], ShapedArray, jax.Array, jax.Array], jax.Array]

# The table of measurements: benchmarks/convolutions.py on 2 cores of an AMD EPYC processor, jax
# 0.12.0 and 0.10.2. The time in a loop, as a multiple of that of XLA's convolution without a loop.
#
#                               XLA in a loop   channels last   slices and products
#   1 or 2 dimensions             0.7 to 120      0.7 to 1.3         0.5 to 3
#     one tap or position         0.8 to 26       0.7 to 1.5         0.3 to 0.7
#   3 dimensions                  0.7 to 25       0.6 to 1.2         0.1 to 0.4
#   groups                        0.1 to 90       0.1 to 2           0.1 to 1.6
#   4 vectorized kernels          0.1 to 110      0.4 to 1.4         0.1 to 1.7


def rewrite(
    jaxpr: ClosedJaxpr, setting: str, platform: str, *, vectorized: bool, sharded: bool
) -> ClosedJaxpr:
    """Rewrites the convolutions of a jaxpr, and the derivatives of its max pools.

    Args:
      jaxpr: what a participant does.
      setting: ``auto``, ``xla`` or ``matmul``.
      platform: ``cpu``, ``tpu`` or ``gpu``. The table above is for CPUs. On TPUs XLA's own are
        faster by the compiler's estimate, also in loops and grouped, and ``auto`` rewrites nothing.
        GPUs have not been measured; there ``auto`` only rewrites convolutions that vectorization
        makes grouped.
      vectorized: whether `jax.vmap` will run it for several participants at once.
      sharded: whether values may be sharded over mesh axes that are left to the compiler. Then
        ``auto`` does not slice them.
    """
    stock = platform == "tpu" or (platform == "gpu" and not vectorized)
    if setting == "xla" or (setting == "auto" and stock) or not has_convolutions(jaxpr):
        return jaxpr

    def choose(eqn: JaxprEqn) -> Convolve | None:
        """What to write instead of an equation, None to leave it."""
        types: Any = [atom.aval for atom in (*eqn.invars, *eqn.outvars)]
        first, second, out = types
        if eqn.primitive is select_and_scatter_add_p:
            here = platform == "cpu" and not sharded and is_max_pool(eqn.params, out.dtype)
            return max_pool_cotangent if here else None
        conv = Convolution.of(first, second, out, eqn.params)
        if setting == "matmul":
            return _by_matmul
        if not jnp.issubdtype(conv.dtype, jnp.floating):
            return None
        if platform == "cpu" and _matmul_is_faster(conv) and not sharded:
            return _by_matmul
        written = _channels_last if platform == "cpu" else _stock
        return _unless_grouped(written) if vectorized and not sharded else written

    return _Rewriting(choose).jaxpr(jaxpr)


def _matmul_is_faster(conv: Convolution) -> bool:
    if conv.groups * conv.batch_groups > 1 or 1 in map(math.prod, (conv.window, conv.positions)):
        return True
    # XLA swaps the operands, and then their layout no longer fits.
    if math.prod(conv.window) > math.prod(conv.space):
        return True
    return len(conv.space) > 2


class _Rewriting:
    """Rewrites each jaxpr only once, so that functions called twice are compiled once."""

    def __init__(self, choose: Callable[[JaxprEqn], Convolve | None]):
        self._choose = choose
        self.jaxpr = functools.cache(self._jaxpr)

    def _jaxpr(self, jaxpr: AnyJaxpr) -> AnyJaxpr:
        return _jaxpr.rewrite(jaxpr, self._replace) if has_convolutions(jaxpr) else jaxpr

    def _replace(self, eqn: JaxprEqn) -> Replacement:
        if not is_convolution(eqn):
            return eqn if eqn.primitive is federated_map_p else _jaxpr.map_jaxprs(self.jaxpr, eqn)
        written = self._choose(eqn)
        if written is None:
            return eqn
        with eqn.ctx.manager:
            types = [atom.aval for atom in (*eqn.invars, *eqn.outvars)]
            new = _trace(written, tuple(eqn.params.items()), *types)
        own, results = _jaxpr.splice(new, eqn.invars)
        # Profiles show the line that the user has written.
        return [each.replace(source_info=eqn.source_info) for each in own], results


@_jaxpr.cached
def _trace(written: Convolve, params: Any, first: Any, second: Any, out: Any) -> ClosedJaxpr:
    return _jaxpr.trace(lambda x, y: [written(dict(params), out, x, y)], [first, second])[0]


# What replaces a convolution


def _stock(params: dict[str, Any], out: ShapedArray, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return conv_general_dilated_p.bind(lhs, rhs, **params)


def _by_matmul(
    params: dict[str, Any], out: ShapedArray, lhs: jax.Array, rhs: jax.Array
) -> jax.Array:
    way = best_way(Convolution.of(lhs, rhs, out, params))
    return convolve(way, params, out, lhs, rhs)


def _channels_last(
    params: dict[str, Any], out: ShapedArray, lhs: jax.Array, rhs: jax.Array
) -> jax.Array:
    """XLA's convolution of an input of shape [batch, *space, channels]."""
    numbers = params["dimension_numbers"]
    orders = [[spec[0], *spec[2:], spec[1]] for spec in numbers]
    orders[1] = [*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]]
    x, w = lax.transpose(lhs, orders[0]), lax.transpose(rhs, orders[1])
    count = params["batch_group_count"]
    if count > 1:  # groups of channels are equivalent, and there is a kernel for them
        x = x.reshape(count, -1, *x.shape[1:])
        x = lax.collapse(jnp.moveaxis(x, 0, -2), lhs.ndim - 1)
    first, last = (0, lhs.ndim - 1), (lhs.ndim - 1, lhs.ndim - 2)
    space, window = range(1, lhs.ndim - 1), range(lhs.ndim - 2)
    rearranged = lax.ConvDimensionNumbers((*first, *space), (*last, *window), (*first, *space))
    groups = dict(feature_group_count=params["feature_group_count"] * count, batch_group_count=1)
    params = params | groups | dict(dimension_numbers=rearranged)
    return lax.transpose(conv_general_dilated_p.bind(x, w, **params), np.argsort(orders[2]))


@functools.cache
def _unless_grouped(written: Convolve) -> Convolve:
    """Uses matrix products if vectorization would make a convolution grouped."""

    def write(params, out, lhs, rhs):
        @custom_vmap
        def one(lhs, rhs):
            return written(params, out, lhs, rhs)

        @one.def_vmap
        def several(_, batched, lhs, rhs):
            each = _by_matmul if all(batched) else written
            in_axes = [0 if b else None for b in batched]
            return jax.vmap(functools.partial(each, params, out), in_axes)(lhs, rhs), True

        return one(lhs, rhs)

    return write
