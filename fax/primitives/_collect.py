"""The primitives `collect` and `distribute`: all rows go to the server, or each row to a client.

Both are the identity on arrays, because a placed value is an array of rows; they only change where
the rows are. Both are linear, and each is the transpose of the other.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from fax._placement import Placement
from fax.sharding._types import (
    as_before,
    gather_rows,
    placed_aval,
    row_aval,
    server_aval,
    spread_rows,
)

collect_p = Primitive("collect")
distribute_p = Primitive("distribute")


def _collect(x, **params):
    return gather_rows(x, Placement.of(params))


def _collect_abstract_eval(x, **params):
    return server_aval(x, Placement.of(params))


def _distribute(x, **params):
    return spread_rows(x, Placement.of(params))


def _distribute_abstract_eval(x, **params):
    return placed_aval(row_aval(x), Placement.of(params))


def _batch(primitive, operands, dims, **params):
    (x,), (dim,) = operands, dims
    return primitive.bind(jnp.moveaxis(x, dim, 1), **params), 1


def _transpose(primitive, cotangent, x, **params):
    return [as_before(primitive.bind(cotangent, **params), x.aval)]


for _primitive, _compute, _abstract_eval, _dual in (
    (collect_p, _collect, _collect_abstract_eval, distribute_p),
    (distribute_p, _distribute, _distribute_abstract_eval, collect_p),
):
    _primitive.def_impl(jax.jit(_compute, static_argnames=("placement", "size", "axes")))
    _primitive.def_abstract_eval(_abstract_eval)
    mlir.register_lowering(_primitive, mlir.lower_fun(_compute, multiple_results=False))
    batching.primitive_batchers[_primitive] = functools.partial(_batch, _primitive)
    ad.deflinear2(_primitive, functools.partial(_transpose, _dual))
