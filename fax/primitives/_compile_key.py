"""Compares jaxprs by what they compute, so that equal ones are compiled only once."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from types import FunctionType
from typing import Any

import jax
import numpy as np
from jax.api_util import debug_info
from jax.extend import linear_util as lu
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var
from jax.extend.core.primitives import custom_jvp_call_p, custom_vjp_call_p

from fax import _compat
from fax.primitives._jaxpr import Atom, evaluate, opened


class Structure:
    """A jaxpr that is equal to any other with the same equations.

    Jaxprs compare by identity, so a function traced twice would be compiled twice. Two jaxprs with
    the same equations compute the same. The comparison ignores only rules for differentiation,
    which forward evaluation does not use.
    """

    def __init__(self, jaxpr: ClosedJaxpr):
        self.jaxpr = jaxpr
        self._key = _key(jaxpr)
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and self._key == other._key


@functools.partial(jax.jit, static_argnums=0)
def execute(structure: Structure, *operands: Any) -> list[Any]:
    """Runs a jaxpr, compiled once for its structure."""
    return evaluate(structure.jaxpr, *operands)


def context() -> object:
    """A different object for each context in which JAX traces, such as its mesh and settings."""
    return _context(_NOTHING)


@lu.cache
def _context(nothing: lu.WrappedFun) -> object:
    del nothing
    return object()


_NOTHING = lu.wrap_init(lambda: None, debug_info=debug_info("fax", lambda: None, (), {}))


class _Identity:
    """Represents an object in a key that is equal only to itself, and keeps it alive."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value


def _key(jaxpr: ClosedJaxpr | Jaxpr) -> Hashable:
    inner = opened(jaxpr)
    consts = getattr(jaxpr, "consts", ())
    numbers: dict[Var, int] = {}

    def bind(var: Var) -> Hashable:
        numbers[var] = len(numbers)
        return var.aval

    def read(atom: Atom) -> Hashable:
        if isinstance(atom, Var):
            return numbers[atom]
        value = np.asarray(atom.val)
        return (atom.aval, type(atom.val), value.tobytes())

    inputs = tuple(bind(var) for var in [*inner.constvars, *inner.invars])
    eqns = tuple(
        (
            eqn.primitive,
            tuple(map(read, eqn.invars)),
            _params_key(eqn),
            _Identity(eqn.ctx),  # JAX has one for each setting
            tuple(map(bind, eqn.outvars)),
        )
        for eqn in inner.eqns
    )
    return inputs, eqns, tuple(map(read, inner.outvars)), tuple(map(_Identity, consts))


def _params_key(eqn: JaxprEqn) -> Hashable:
    if eqn.primitive in (custom_jvp_call_p, custom_vjp_call_p):
        return _value_key(eqn.params[_compat.CALLS[eqn.primitive]])
    return tuple((name, _value_key(value)) for name, value in sorted(eqn.params.items()))


def _is_of_jax(function: FunctionType) -> bool:
    module: str | None = function.__module__  # of a function from `exec` it can be None
    return module is not None and module.partition(".")[0] == "jax"


def _closure_key(function: FunctionType) -> Hashable:
    """A key for a function that JAX makes at every call around a user's callback."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    defaults = (function.__defaults__, tuple((function.__kwdefaults__ or {}).items()))
    return function.__code__, _value_key(cells), _value_key(defaults)


def _value_key(value: Any) -> Hashable:
    if isinstance(value, ClosedJaxpr | Jaxpr):
        return _key(value)
    if isinstance(value, tuple | list):
        return (type(value), tuple(map(_value_key, value)))
    if isinstance(value, dict):
        return (dict, tuple((name, _value_key(x)) for name, x in value.items()))
    if isinstance(value, FunctionType) and _is_of_jax(value):
        return _closure_key(value)
    try:
        hash(value)
    except TypeError:
        return _Identity(value)
    return (type(value), value)
