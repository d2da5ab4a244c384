"""The primitives `collect` and `distribute`: every row goes up, or a row goes to each.

Both are the identity on arrays, for a placed value is an array of rows; what they say is
where the rows are. Each is linear and the other one's transpose.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from fax.sharding._mesh import placed_aval, row_aval

collect_p = Primitive("collect")
distribute_p = Primitive("distribute")


def _compute(x, *, placement, size):
    del placement, size
    return x


_impl = functools.partial(jax.jit, static_argnames=("placement", "size"))(_compute)


def _collect_abstract_eval(x, *, placement, size):
    del placement, size
    return x


def _distribute_abstract_eval(x, *, placement, size):
    return placed_aval(row_aval(x), placement, size)


def _batch(primitive, operands, dims, **params):
    (x,), (dim,) = operands, dims
    return primitive.bind(jnp.moveaxis(x, dim, 1), **params), 1


def _transpose(primitive, cotangent, x, **params):
    del x
    return [primitive.bind(cotangent, **params)]


for _primitive, _abstract_eval, _dual in (
    (collect_p, _collect_abstract_eval, distribute_p),
    (distribute_p, _distribute_abstract_eval, collect_p),
):
    _primitive.def_impl(_impl)
    _primitive.def_abstract_eval(_abstract_eval)
    mlir.register_lowering(_primitive, mlir.lower_fun(_compute, multiple_results=False))
    batching.primitive_batchers[_primitive] = functools.partial(_batch, _primitive)
    ad.deflinear2(_primitive, functools.partial(_transpose, _dual))
