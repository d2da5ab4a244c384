"""Compares jaxprs by what they compute, so that equal ones are compiled only once."""

from __future__ import annotations

import contextlib
import dis
import functools
from collections.abc import Callable, Hashable
from types import CellType, CodeType, FunctionType
from typing import Any

import jax
import numpy as np
from jax.api_util import debug_info
from jax.extend import linear_util as lu
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var
from jax.extend.core.primitives import custom_jvp_call_p, custom_vjp_call_p, remat_p

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

Functions = tuple[FunctionType, ...]


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
    return inputs, eqns, tuple(map(read, inner.outvars)), tuple(map(_const_key, consts))


def _const_key(value: Any) -> Hashable:
    """A small array of NumPy is compared by value: each trace can make a new one."""
    if isinstance(value, np.ndarray) and value.nbytes <= _MAX_BYTES:
        return jax.typeof(value), np.asarray(value).tobytes()
    return _Identity(value)


_MAX_BYTES = 2**20  # beyond this, a comparison would take long


def _params_key(eqn: JaxprEqn) -> Hashable:
    if eqn.primitive in (custom_jvp_call_p, custom_vjp_call_p):
        return _value_key(eqn.params[_compat.CALLS[eqn.primitive]])
    params = dict(eqn.params)
    if eqn.primitive is remat_p:
        del params["policy"]  # for differentiation
    return tuple((name, _value_key(value)) for name, value in sorted(params.items()))


def _function_key(function: FunctionType, within: Functions) -> Hashable:
    """A key for a function that a trace may have made anew, such as a callback.

    It does the same as another one if it has the same code and holds the same objects.
    """
    if function in within:
        return within.index(function)  # it calls itself
    if _assigns(function.__code__) or _has_attributes(function):
        return _Identity(function)
    within = (*within, function)
    key = _value_key if _is_of_jax(function) else _held_key
    cells = tuple(_Cell(cell, key, within) for cell in function.__closure__ or ())
    held = tuple(key(value, within) for value in _defaults(function))
    return function.__code__, _Identity(function.__globals__), cells, held


class _Cell:
    """A variable from outside of a function, equal to another one that now has an equal value.

    The value is looked up in every comparison, as it may have been assigned since.
    """

    def __init__(self, cell: CellType, key: Callable, within: Functions):
        self.cell, self.key, self.within = cell, key, within

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Cell) and (self.cell is other.cell or self.now() == other.now())

    def now(self) -> Hashable:
        try:
            return self.key(self.cell.cell_contents, self.within)
        except ValueError:  # nothing has been assigned yet
            return _Identity(self.cell)


def _defaults(function: FunctionType) -> tuple[Any, ...]:
    return *(function.__defaults__ or ()), *sorted((function.__kwdefaults__ or {}).items())


def _has_attributes(function: FunctionType) -> bool:
    """Whether a function has attributes, or assigns to those of a function that it holds."""
    if vars(function).keys() - {"__wrapped__"}:
        return True
    held = list(_defaults(function))
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # nothing has been assigned yet
            held.append(cell.cell_contents)
    functions = any(isinstance(value, FunctionType) for value in held)
    return functions and _assigns(function.__code__, to_attributes=True)


@functools.lru_cache
def _assigns(code: CodeType, to_attributes: bool = False) -> bool:
    """Whether a function, or one within it, assigns to a `nonlocal` variable, or to attributes."""
    for instruction in dis.get_instructions(code):
        kind = instruction.opname.removeprefix("STORE_").removeprefix("DELETE_")
        if to_attributes and kind == "ATTR":
            return True
        if not to_attributes and kind == "DEREF" and instruction.argval in code.co_freevars:
            return True
    return any(isinstance(x, CodeType) and _assigns(x, to_attributes) for x in code.co_consts)


def _is_of_jax(function: FunctionType) -> bool:
    # Not by its __module__, which `functools.wraps` copies from another function.
    module = function.__globals__.get("__name__")
    return isinstance(module, str) and module.partition(".")[0] == "jax"


# What cannot change, and functions, whose keys say what they hold.
_COMPARED = (type(None), bool, int, float, complex, str, bytes, FunctionType)


def _held_key(value: Any, within: Functions) -> Hashable:
    """A key for what a user's function holds. What can change is equal only to itself."""
    if type(value) is tuple:
        return tuple(_held_key(x, within) for x in value)
    return _value_key(value, within) if type(value) in _COMPARED else _Identity(value)


def _value_key(value: Any, within: Functions = ()) -> Hashable:
    if isinstance(value, ClosedJaxpr | Jaxpr):
        return _key(value)
    if isinstance(value, tuple | list):
        return (type(value), tuple(_value_key(x, within) for x in value))
    if isinstance(value, dict):
        return (dict, tuple((name, _value_key(x, within)) for name, x in value.items()))
    if isinstance(value, FunctionType):
        return _function_key(value, within)
    if type(value) in (float, complex) or isinstance(value, np.generic):
        return type(value), repr(value)  # distinguishes 0.0 from -0.0, and NaN equals itself
    wrapped = _compat.wrapped_function(value)
    if wrapped is not None:
        return (type(value), _value_key(wrapped, within))
    try:
        hash(value)
    except TypeError:
        return _Identity(value)
    return (type(value), value)
