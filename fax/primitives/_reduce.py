"""The primitives `sum`, `mean`, `max` and `min` of a placed value's rows.

    sum   y = sum_i x_i         x_i' = y'
    mean  y = sum_i x_i / n     x_i' = y' / n
    max   y = max_i x_i         dy = the mean of dx_i over the i that attain it

Floats shorter than float32 are summed and divided in float32, and cast at the end. Sum and mean are
linear; the transpose of sum is `broadcast`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from fax._arithmetic import accumulator_dtype, from_ordered, ordered, reduce_rows
from fax._placement import Placement
from fax.primitives._broadcast import broadcast_p
from fax.primitives._map import reduce_late
from fax.sharding._types import row_aval

sum_p = Primitive("sum")
mean_p = Primitive("mean")
max_p = Primitive("max")
min_p = Primitive("min")


def _compute(x, *, mode, platform=None, **params):
    if mode == "mean":
        return (reduce_rows("sum", x) / params["size"]).astype(x.dtype)
    if mode == "sum" or platform == "tpu":  # which cannot read the bits of float64
        return reduce_rows(mode, x).astype(x.dtype)
    # The rows may be on several devices.
    wide = x.astype(accumulator_dtype(x.dtype))
    found = reduce_rows(mode, ordered(mode, wide))
    return from_ordered(found, wide.dtype).astype(x.dtype)


def _evaluate(reduce, x, **params):
    return reduce(x, platform=jax.default_backend(), **params)


def _abstract_eval(x, **params):
    del params
    return row_aval(x)


def _batch(primitive, operands, dims, **params):
    (x,), (dim,) = operands, dims
    x = jnp.moveaxis(x, dim, 1)
    return primitive.bind(x, **params), 0


def _jvp(mode, primals, tangents, **params):
    (x,), (dx,) = primals, tangents
    return reduce_late([mode], [x], [dx], [None], Placement.of(params))[0]


def _transpose_sum(cotangent, x, **params):
    del x
    return [broadcast_p.bind(cotangent, **params)]


def _transpose_mean(cotangent, x, **params):
    del x
    wide = cotangent.astype(accumulator_dtype(cotangent.dtype))
    return [broadcast_p.bind((wide / params["size"]).astype(cotangent.dtype), **params)]


def _transpose_broadcast(cotangent, x, **params):
    del x
    return [sum_p.bind(cotangent, **params)]


for _primitive in (sum_p, mean_p, max_p, min_p):
    _reduce = functools.partial(_compute, mode=_primitive.name)
    _jitted = jax.jit(_reduce, static_argnames=("placement", "size", "axes", "platform"))
    _primitive.def_impl(functools.partial(_evaluate, _jitted))
    _primitive.def_abstract_eval(_abstract_eval)
    for _platform in (None, "tpu"):
        _rule = functools.partial(_reduce, platform=_platform)
        _lowered = mlir.lower_fun(_rule, multiple_results=False)
        mlir.register_lowering(_primitive, _lowered, platform=_platform)
    batching.primitive_batchers[_primitive] = functools.partial(_batch, _primitive)
ad.deflinear2(sum_p, _transpose_sum)
ad.deflinear2(mean_p, _transpose_mean)
ad.primitive_jvps[max_p] = functools.partial(_jvp, "max")
ad.primitive_jvps[min_p] = functools.partial(_jvp, "min")
ad.deflinear2(broadcast_p, _transpose_broadcast)
