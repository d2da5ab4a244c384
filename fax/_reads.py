"""Snapshots of what a function reads besides its arguments, to decide if a trace is still valid.

A Python function reads what it closes over and the globals that it names. Numbers, strings, arrays,
containers of these, and functions can be compared with their earlier values. If a function reads
other objects, its snapshot is None, and it has to be traced again.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import os
import sys
import sysconfig
from collections.abc import Hashable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import jax
import numpy as np
from jax.custom_batching import custom_vmap

# Beyond these limits, a comparison would take as long as a trace.
_MAX_OBJECTS, _MAX_BYTES = 10_000, 2**20
# With a separator at the end: a script beside the folder may have a name that begins like it.
_INSTALLED = tuple(
    os.path.join(folder, "")
    for folder in (
        *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")},
        os.path.dirname(__file__),
    )
)


def snapshot(*values: Any) -> Hashable | None:
    """A key that is equal to an earlier one if the values, and all that they read, are unchanged.

    Numbers, strings, containers and NumPy arrays are compared by value, and JAX arrays, which are
    immutable, by identity. Functions are compared by their code and by what they close over and
    name. Installed modules, their classes and functions are assumed not to change.

    Returns None if anything cannot be compared.
    """
    try:
        return _Snapshot().of(values)
    except (_NotComparableError, RecursionError):
        return None


class Reader:
    """An object that lists what it reads."""

    def reads(self) -> tuple[Any, ...]:
        raise NotImplementedError


class _NotComparableError(Exception):
    pass


class _ById:
    """Wraps an object for comparison by identity, and keeps it alive."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.value is other.value


class _Snapshot:
    def __init__(self) -> None:
        self._seen: dict[int, int] = {}  # by id, because references may be circular
        self._alive: list[Any] = []

    def of(self, value: Any) -> Hashable:
        kind = type(value)
        if value is None or kind in (bool, int, str, bytes):
            return kind, value
        if kind in (float, complex):
            return kind, repr(value)  # distinguishes 0.0 from -0.0, and NaN equals itself
        if isinstance(value, np.dtype):
            return np.dtype, value
        if isinstance(value, np.generic):
            return kind, value.dtype, value.tobytes()
        if _compared_by_id(value):
            return _ById(value)
        number = self._seen.setdefault(id(value), len(self._seen))
        if number < len(self._alive):
            return "seen", number
        if number == _MAX_OBJECTS:
            raise _NotComparableError
        self._alive.append(value)
        return kind, *self._parts(value)

    def _parts(self, value: Any) -> Iterator[Hashable]:
        if type(value) is np.ndarray:
            if value.dtype.hasobject or value.nbytes > _MAX_BYTES:
                raise _NotComparableError
            yield from (value.dtype, value.shape, hashlib.blake2b(value.tobytes()).digest())
        elif type(value) in (tuple, list) or _is_namedtuple(value):
            yield from map(self.of, value)
        elif type(value) is dict:
            yield from map(self.of, value.items())
        elif type(value) is functools.partial:
            yield from map(self.of, (value.func, value.args, value.keywords))
        elif isinstance(value, MethodType):
            yield from map(self.of, (value.__func__, value.__self__))
        elif isinstance(value, BuiltinFunctionType):
            yield from map(self.of, (value.__name__, value.__self__))
        elif isinstance(value, FunctionType):
            yield from self._of_function(value)
        elif isinstance(value, Reader):
            yield from map(self.of, value.reads())
        elif isinstance(value, _WITH_RULES):
            yield self.of(vars(value))
        else:
            raise _NotComparableError

    def _of_function(self, function: FunctionType) -> Iterator[Hashable]:
        yield from (function.__code__, _ById(function.__globals__))
        yield self.of((function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                contents = cell.cell_contents
            except ValueError:  # nothing has been assigned yet
                yield None
            else:
                yield self.of(contents)
        if not _is_of_installed(function):
            names, imported = _mentioned(function.__code__)
            if not all(map(_is_installed, imported)):
                raise _NotComparableError
            yield self.of(vars(function))
            for name in names:
                if name in function.__globals__:
                    yield name, self.of(function.__globals__[name])


def _compared_by_id(value: Any) -> bool:
    if isinstance(value, ModuleType):
        return _is_installed(value.__name__)
    if isinstance(value, type):
        return _is_installed(value.__module__)
    if isinstance(value, jax.Array):
        return not isinstance(value, jax.core.Tracer)
    if isinstance(value, np.ufunc):
        return getattr(np, value.__name__, None) is value
    return isinstance(value, _JITTED)  # JAX traces these only once, whatever they read


_JITTED = type(jax.jit(lambda: None))
_WITH_RULES = (jax.custom_jvp, jax.custom_vjp, custom_vmap)


def _is_namedtuple(value: Any) -> bool:
    """Whether a value is a named tuple of an installed class."""
    kind = type(value)
    named = issubclass(kind, tuple) and hasattr(kind, "_fields")
    return named and _is_installed(kind.__module__)


def _is_of_installed(function: FunctionType) -> bool:
    """Whether a function's globals are those of an installed module.

    Its ``__module__`` does not say so, which `functools.wraps` copies from another function.
    """
    name = function.__globals__.get("__name__")
    module = sys.modules.get(name) if isinstance(name, str) else None
    return getattr(module, "__dict__", None) is function.__globals__ and _is_installed(name)


def _is_installed(name: str | None) -> bool:
    """Whether a module belongs to Python, to fax or to an installed package, and is loaded."""
    return name in sys.modules and _is_in_folders(name)


@functools.cache
def _is_in_folders(name: str) -> bool:
    if name == "__main__":  # of a script, but under `python -m cProfile` its file is the profiler's
        return False
    file = getattr(sys.modules[name], "__file__", None)
    return name in sys.builtin_module_names if file is None else file.startswith(_INSTALLED)


def _with_nested(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of its nested functions."""
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _with_nested(const)


@functools.lru_cache(maxsize=4096)
def _mentioned(code: CodeType) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a function and its nested functions name, and the modules that they import.

    Names are those of globals, attributes and imports. A relative import is "".
    """
    names: set[str] = set()
    modules: set[str] = set()
    for own in _with_nested(code):
        names.update(own.co_names)
        steps = [step for step in dis.get_instructions(own) if step.opname != "EXTENDED_ARG"]
        for level, _, step in zip(steps, steps[1:], steps[2:], strict=False):
            if step.opname == "IMPORT_NAME":
                modules.add("" if level.argval else step.argval)
    return tuple(sorted(names)), tuple(modules)
