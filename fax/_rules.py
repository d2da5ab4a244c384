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

from fax import _compat
from fax._placement import Scope, scope
from fax.primitives import _jaxpr
from fax.primitives._fusion import has_operators, is_operator
from fax.primitives._jaxpr import AnyJaxpr
from fax.primitives._round import federated_map_p


def bind_scope(jaxpr: AnyJaxpr, placements: Scope) -> AnyJaxpr:
    """Makes the placements visible to the rules in a jaxpr, if it contains operators."""
    if not has_operators(jaxpr):
        return jaxpr
    return _jaxpr.rewrite(jaxpr, functools.partial(_bind_equation, placements))


def _bind_equation(placements: Scope, eqn: JaxprEqn) -> JaxprEqn:
    # The client function of a map already carries its own scope.
    if eqn.primitive is federated_map_p or not _jaxpr.any_inside(eqn, is_operator):
        return eqn
    later = _compat.RULES.get(eqn.primitive.name, ())
    rules = {name: _within(placements, eqn.params[name]) for name in later}
    eqn = _jaxpr.map_jaxprs(lambda jaxpr: bind_scope(jaxpr, placements), eqn)
    return eqn.replace(params=dict(eqn.params, **rules))


def _within(placements: Scope, rule: Any) -> Any:
    wrapped = isinstance(rule, lu.WrappedFun)
    call: Callable = rule.call_wrapped if wrapped else rule

    def bind(leaf: Any) -> Any:
        return bind_scope(leaf, placements) if isinstance(leaf, ClosedJaxpr | Jaxpr) else leaf

    @functools.wraps(call)
    def run(*args, **kwargs):
        with scope(placements):
            return _jaxpr.map_leaves(bind, call(*args, **kwargs))

    return lu.wrap_init(run, debug_info=rule.debug_info) if wrapped else run
