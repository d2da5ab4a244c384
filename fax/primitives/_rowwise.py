"""Turns equations on placed values between operators into maps.

A program may use `jax.numpy` on placed values, which are arrays of rows. An equation that treats
every row alike, without using other rows, is a map. Written as one, it can fuse with the maps
before and after it. The rules here turn such an equation into an equation on one row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import lax
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var
from jax.extend.core import primitives as p
from jax.sharding import NamedSharding

from fax._compat import Named
from fax.primitives import _jaxpr
from fax.primitives._jaxpr import Atom
from fax.primitives._map_builder import Find, MapBuilder
from fax.primitives._round import SERVER, Contribution, In, Vectorize
from fax.sharding._types import row_aval

Equation = Any  # a JaxprEqn, whose atoms are arrays
# The equation has a placed operand, and its results have as many rows.
Rule = Callable[[Equation], dict[str, Any] | None]

# Element-wise operations whose result is zero where all operands are zero, or where any of them is.
_LINEAR = {p.add_jaxvals_p, p.add_p, p.convert_element_type_p, p.copy_p, p.neg_p, p.sub_p}
_BILINEAR = {p.mul_p}

# Each element of the result depends on one of each operand. Scalars and single rows are repeated.
_ELEMENTWISE = {
    *(p.abs_p, p.acos_p, p.acosh_p, p.and_p, p.asin_p, p.asinh_p, p.atan2_p, p.atan_p, p.atanh_p),
    *(p.cbrt_p, p.ceil_p, p.clamp_p, p.cos_p, p.cosh_p, p.eq_p, p.erf_inv_p, p.erf_p, p.erfc_p),
    *(p.exp2_p, p.exp_p, p.expm1_p, p.floor_p, p.ge_p, p.gt_p, p.imag_p, p.integer_pow_p),
    *(p.is_finite_p, p.le_p, p.lgamma_p, p.log1p_p, p.log_p, p.logistic_p, p.lt_p, p.max_p),
    *(p.min_p, p.ne_p, p.not_p, p.or_p, p.pow_p, p.rem_p, p.round_p, p.rsqrt_p, p.select_n_p),
    *(p.sign_p, p.sin_p, p.sinh_p, p.sqrt_p, p.square_p, p.stop_gradient_p, p.tan_p, p.tanh_p),
    *(p.div_p, p.real_p, p.xor_p, *_LINEAR, *_BILINEAR),
}


def _reduction(eqn: Equation) -> dict[str, Any] | None:
    axes = eqn.params["axes"]
    return None if 0 in axes else dict(eqn.params, axes=tuple(axis - 1 for axis in axes))


def _broadcast(eqn: Equation) -> dict[str, Any] | None:
    first, *others = eqn.params["broadcast_dimensions"]
    dims = tuple(dim - 1 for dim in others)
    shape = eqn.params["shape"][1:]
    return None if first else dict(eqn.params, shape=shape, broadcast_dimensions=dims)


def _reshape(eqn: Equation) -> dict[str, Any] | None:
    if eqn.params["dimensions"] is not None:
        return None
    return dict(eqn.params, new_sizes=eqn.params["new_sizes"][1:])


def _squeeze(eqn: Equation) -> dict[str, Any] | None:
    dims = eqn.params["dimensions"]
    return None if 0 in dims else dict(eqn.params, dimensions=tuple(dim - 1 for dim in dims))


def _transpose(eqn: Equation) -> dict[str, Any] | None:
    first, *others = eqn.params["permutation"]
    return None if first else dict(eqn.params, permutation=tuple(axis - 1 for axis in others))


def _slice(eqn: Equation) -> dict[str, Any]:
    """All rows, for the result has as many of them."""
    return {name: value and value[1:] for name, value in eqn.params.items()}


def _concatenate(eqn: Equation) -> dict[str, Any] | None:
    along = eqn.params["dimension"]
    return dict(eqn.params, dimension=along - 1) if along else None


def _along_axis(eqn: Equation) -> dict[str, Any] | None:
    axis = eqn.params["axis"]
    return dict(eqn.params, axis=axis - 1) if axis else None


def _pad(eqn: Equation) -> dict[str, Any] | None:
    first, *others = eqn.params["padding_config"]
    return None if any(first) else dict(eqn.params, padding_config=tuple(others))


_LINEAR_RULES: dict[Any, Rule] = {
    p.broadcast_in_dim_p: _broadcast,
    p.concatenate_p: _concatenate,
    p.pad_p: _pad,
    p.reduce_sum_p: _reduction,
    p.reshape_p: _reshape,
    p.slice_p: _slice,
    p.squeeze_p: _squeeze,
    p.transpose_p: _transpose,
}
_RULES: dict[Any, Rule] = {
    **_LINEAR_RULES,
    p.reduce_max_p: _reduction,
    p.reduce_min_p: _reduction,
    p.reduce_prod_p: _reduction,
    p.reduce_and_p: _reduction,
    p.reduce_or_p: _reduction,
    **dict.fromkeys(_ELEMENTWISE, lambda eqn: eqn.params),
}
_NAMED_RULES: dict[str, Rule] = dict.fromkeys(
    (Named.SPLIT, Named.STACK, Named.UNSTACK), _along_axis
)


def _rule(eqn: Equation) -> Rule | None:
    return _RULES.get(eqn.primitive) or _NAMED_RULES.get(eqn.primitive.name)


def is_elementwise(eqn: JaxprEqn) -> bool:
    return eqn.primitive in _ELEMENTWISE


def may_be_rowwise(eqn: JaxprEqn) -> bool:
    """Whether there is a rule for the equation, or for everything in a call of `jax.jit`."""
    if eqn.primitive is p.jit_p:
        inner = eqn.params["jaxpr"]
        return not inner.consts and all(map(may_be_rowwise, inner.jaxpr.eqns))
    return bool(eqn.outvars) and _rule(eqn) is not None  # unstacking no rows has no results


def as_map(
    eqn: Equation, like: MapBuilder, find: Find, is_masked: Callable[[Atom], bool]
) -> MapBuilder | None:
    """An equation on placed values as a map, or None if it is not a map.

    Args:
      eqn: the equation. At least one of its operands is a placed value.
      like: a map over the same participants.
      find: finds the map's operand, and its mode, for an operand of the equation.
      is_masked: whether an operand is zero for the participants that a mask leaves out.
    """
    size, rule = like.like.group.size, _rule(eqn)
    of_rows = all(result.aval.shape[:1] == (size,) for result in eqn.outvars)
    params = rule(eqn) if rule and of_rows else None
    if params is None or any(isinstance(x, NamedSharding) for x in params.values()):
        return None
    vanishing = _vanishing(eqn, is_masked)
    this = MapBuilder(like.like.replace(vectorize=Vectorize.ALL), like.eqn)
    invars: list[Atom] = []
    for atom in eqn.invars:
        if not isinstance(atom, Var):
            invars.append(atom)
            continue
        aval: Any = atom.aval
        placed = aval.shape[:1] == (size,)
        aval = row_aval(aval) if placed else aval
        mode = In("placed", atom in vanishing) if placed else SERVER
        row = this.see(*find(atom, mode), Var(aval))
        if not placed and aval.shape:
            extra, (row,) = _jaxpr.splice(_without_leading_axis(aval), [row])
            this.eqns += extra
        invars.append(row)
    outvars = [Var(row_aval(result.aval)) for result in eqn.outvars]
    this.eqns.append(eqn.replace(invars=invars, outvars=outvars, params=params))
    rows = [Contribution(var, "placed") for var in outvars]
    this.outputs.update(zip(eqn.outvars, rows, strict=True))
    return this


def _vanishing(eqn: JaxprEqn, is_masked: Callable[[Atom], bool]) -> set[Atom]:
    """Those of the masked operands for which the result is zero where they are zero."""
    zero = {v for v in _jaxpr.variables(eqn.invars) if is_masked(v)}
    if eqn.primitive in _BILINEAR:
        return zero
    if eqn.primitive is p.div_p:
        return zero.intersection(_jaxpr.variables(eqn.invars[:1]))
    linear = eqn.primitive in {*_LINEAR, *_LINEAR_RULES} or eqn.primitive.name in _NAMED_RULES
    vanish = all(atom in zero if isinstance(atom, Var) else not atom.val for atom in eqn.invars)
    return zero if linear and vanish else set()


@_jaxpr.cached
def _without_leading_axis(aval: ShapedArray) -> ClosedJaxpr:
    return _jaxpr.trace(lambda x: [lax.squeeze(x, (0,))], [aval])[0]
