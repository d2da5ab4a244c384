"""The primitive `broadcast`: a server value as seen by every participant.

    y_i = x,        x' = sum_i y_i'

It is linear, and `sum` is its transpose (registered beside it in `_reduce`).
"""

from __future__ import annotations

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from fax._placement import Placement
from fax.sharding._types import placed_aval, spread_rows

broadcast_p = Primitive("broadcast")


def _compute(x, **params):
    return spread_rows(lax.broadcast(x, (params["size"],)), Placement.of(params))


def _abstract_eval(x, **params):
    return placed_aval(x, Placement.of(params))


def _batch(operands, dims, **params):
    (x,), (dim,) = operands, dims
    return broadcast_p.bind(x, **params), dim + 1


broadcast_p.def_impl(jax.jit(_compute, static_argnames=("placement", "size", "axes")))
broadcast_p.def_abstract_eval(_abstract_eval)
mlir.register_lowering(broadcast_p, mlir.lower_fun(_compute, multiple_results=False))
batching.primitive_batchers[broadcast_p] = _batch
