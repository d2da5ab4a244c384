"""Keeps placements in scope for custom derivative and batching rules.

JAX runs the rules of `jax.custom_jvp`, `jax.custom_vjp` and `custom_vmap` after the program has
been traced. Operators in such a rule refer to the placements of the program, or of the client
function, in which the rule is written. So the functions that JAX will run carry that scope.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jax.extend import linear_util as lu
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from fax._placement import Scope, scope
from fax.primitives import _jaxpr
from fax.primitives._fusion import has_operators
from fax.primitives._round import federated_map_p

# The parameters that are run later, by primitive.
_RULES = {
    "custom_jvp_call": ("jvp_jaxpr_fun",),
    "custom_vjp_call": ("fwd_jaxpr_thunk", "bwd"),
    "custom_vmap_call": ("rule",),
}


def bind_scope(jaxpr: ClosedJaxpr, placements: Scope) -> ClosedJaxpr:
    """Lets the rules in a jaxpr see the placements, if operators are involved."""
    if not has_operators(jaxpr):
        return jaxpr
    return ClosedJaxpr(_bind(jaxpr.jaxpr, placements), jaxpr.consts)


def _bind(jaxpr: Jaxpr, placements: Scope) -> Jaxpr:
    return jaxpr.replace(eqns=[_bind_equation(eqn, placements) for eqn in jaxpr.eqns])


def _bind_equation(eqn: JaxprEqn, placements: Scope) -> JaxprEqn:
    # The client function of a map has a scope of its own, which it already carries.
    if eqn.primitive is federated_map_p or not any(map(has_operators, _jaxpr.inner(eqn))):
        return eqn
    later = _RULES.get(eqn.primitive.name, ())
    params = {
        name: _within(placements, value) if name in later else _inside(value, placements)
        for name, value in eqn.params.items()
    }
    return eqn.replace(params=params)


def _inside(value: Any, placements: Scope) -> Any:
    if type(value) in (tuple, list):
        return type(value)(_inside(x, placements) for x in value)
    if isinstance(value, ClosedJaxpr):
        return bind_scope(value, placements)
    return _bind(value, placements) if isinstance(value, Jaxpr) else value


def _within(placements: Scope, rule: Any) -> Any:
    wrapped = isinstance(rule, lu.WrappedFun)
    call: Callable = rule.call_wrapped if wrapped else rule

    @functools.wraps(call)
    def run(*args, **kwargs):
        with scope(placements):
            return _inside(call(*args, **kwargs), placements)

    return lu.wrap_init(run, debug_info=rule.debug_info) if wrapped else run
