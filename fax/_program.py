"""`fax.program`: a function over placements becomes an ordinary JAX function."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import eval_context
from jax.extend.core import ClosedJaxpr, take_current_trace
from jax.sharding import NamedSharding
from jax.tree_util import PyTreeDef, tree_flatten, tree_unflatten

from fax import lowering as _lowering  # noqa: F401  (says how maps are compiled)
from fax._checks import function, is_array
from fax._compat import has_sharding, is_jet
from fax._placement import PlacementError, Scope, declare, in_program, scope
from fax._reads import Reader, snapshot
from fax._rules import bind_scope
from fax.primitives import _fusion, _jaxpr
from fax.primitives._compile_key import Structure, context, execute
from fax.primitives._debug_nans import watch_program
from fax.sharding._mesh import laid_out, other_axes, split_axes

F = TypeVar("F", bound=Callable)


def program(*undecorated: Any, **placements: int) -> Callable[[F], F]:
    """Declares placements for a function that uses fax's operators.

    A placement is a named group of participants. A placed value is a pytree of arrays whose
    leading axis has one row for each participant. Every other value belongs to the server.

    The result is an ordinary JAX function that can be jitted, differentiated, vectorized, exported
    and called in other functions. A call traces the body, fuses its operators into rounds of
    communication, and evaluates these in place. If it is called with arrays outside any
    transformation, the whole program is compiled, once for each set of argument shapes and dtypes.
    Python scalars are then constants, and each new value compiles again: pass values that vary as
    arrays.

    Such a call does not trace the body again if an earlier call had the same kind of arguments and
    everything that the body reads is unchanged: the numbers, strings, arrays, containers and
    functions that it closes over or uses as globals. After a change, the next call traces again.
    If the body reads anything else, such as a module or an object of your own class, fax cannot
    detect changes, and every call traces. As with `jax.jit`, the body should have no side effects:
    printing, drawing from `numpy.random`, and reading a clock or a file happen when the body is
    traced, not at every call.

    Args:
      **placements: the name of each placement and its number of participants, a positive int.
        Several placements can be nested by nesting maps.

    Returns:
      A decorator. Arguments and results of the decorated function can be pytrees. Leaves that
      are not arrays (functions, strings, Python scalars, None) are passed and returned unchanged,
      so that ``range(steps)`` works with an argument.

    Raises:
      PlacementError: if there is no placement, or a size is not a positive int. The operators
        also raise it when the program is called; see each operator.

    Example:

      >>> @fax.program(clients=3)
      ... def step(model, data):
      ...     gradients = fax.map(jax.grad(lambda m, d: (m - d) ** 2), fax.broadcast(model), data)
      ...     return model - 0.5 * fax.mean(gradients)
      >>> step(jnp.array(0.0), jnp.array([1.0, 2.0, 3.0]))
      Array(2., dtype=float32)
      >>> jax.jit(jax.grad(step, argnums=1))(jnp.array(0.0), jnp.array([1.0, 2.0, 6.0]))
      Array([0.33333334, 0.33333334, 0.33333334], dtype=float32)
    """
    if undecorated:
        raise PlacementError(
            "fax.program takes placements as keyword arguments and returns a decorator: write "
            "@fax.program(clients=64), with parentheses and a number of participants."
        )
    declared = declare(placements)

    def decorate(fn: F) -> F:
        function("fax.program", fn)
        traces = _Traces(fn, declared)

        @functools.wraps(fn)
        def wrapped(*args, **kwargs):
            return _call(traces, args, kwargs)

        return wrapped  # type: ignore[return-value]

    return decorate


_TRACED = object()


def _call(traces: _Traces, args: Any, kwargs: Any) -> Any:
    leaves, treedef = tree_flatten((args, kwargs))
    declared = laid_out(traces.declared)
    operands = [leaf for leaf in leaves if _is_traced(leaf)]
    _warn_of_missing_mesh(declared, operands)
    avals = tuple(map(jax.typeof, operands))
    others = [_TRACED if _is_traced(leaf) else leaf for leaf in leaves]
    if evaluates_now():
        traced = traces.get(declared, treedef, others, avals)
        run = functools.partial(execute, traced.structure)
    else:
        traced = _trace(traces.fn, declared, treedef, others, avals)
        run = functools.partial(_jaxpr.evaluate, traced.jaxpr)
        with take_current_trace() as current:
            if is_jet(current):  # jet fails in custom derivative rules, which means have
                run = functools.partial(_jaxpr.evaluate_in_steps, traced.jaxpr, plain=True)
    _warn_of_idle_mesh(declared, operands, traced)
    outs = iter(watch_program(run, traced.jaxpr, [*traced.captured, *operands]))
    results = [next(outs) if leaf is _TRACED else leaf for leaf in traced.results]
    return tree_unflatten(traced.out_tree, results)


@dataclasses.dataclass
class _Trace:
    """A traced program.

    Attributes:
      jaxpr: the program, fused.
      captured: the arrays or tracers that it closes over, its leading operands.
      results: the leaves that it returned, with ``_TRACED`` for each result of the jaxpr.
      out_tree: the tree structure of ``results``.
    """

    jaxpr: ClosedJaxpr
    captured: list[Any]
    results: list[Any]
    out_tree: PyTreeDef

    @functools.cached_property
    def structure(self) -> Structure:
        return Structure(self.jaxpr)

    @functools.cached_property
    def has_shardings(self) -> bool:
        """Whether something in it says how it is to be sharded."""
        return _jaxpr.any_equation(self.jaxpr, has_sharding)


def _trace(
    fn: Callable, declared: Scope, treedef: PyTreeDef, leaves: Sequence[Any], avals: Sequence[Any]
) -> _Trace:
    """Traces and fuses a program. Leaves that are ``_TRACED`` stand for arrays of ``avals``."""
    results: list[Any] = []
    out_tree: Any = None

    def body(*tracers):
        nonlocal results, out_tree
        own = iter(tracers)
        seen = [next(own) if leaf is _TRACED else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(treedef, seen)
        with scope(declared):
            outs, out_tree = tree_flatten(fn(*args, **kwargs))
        # Tracers must not outlive their trace.
        results = [_TRACED if _is_traced(leaf) else leaf for leaf in outs]
        return [leaf for leaf in outs if _is_traced(leaf)]

    jaxpr, captured = _jaxpr.trace(body, avals, about=fn)
    jaxpr, constants = _fusion.fuse(bind_scope(jaxpr, declared))
    return _Trace(jaxpr, [*constants, *captured], results, out_tree)


class _Traces(Reader):
    """A program's traces, which are valid as long as everything that it reads is unchanged."""

    def __init__(self, fn: Callable, declared: Scope):
        self.fn = fn
        self.declared = declared
        self._known: tuple[Hashable, dict[Hashable, _Trace]] = None, {}  # what it read; by call

    def reads(self) -> tuple[Any, ...]:
        return self.fn, [(p.name, p.size) for p in self.declared]

    def get(
        self, declared: Scope, treedef: PyTreeDef, leaves: Sequence[Any], avals: Sequence[Any]
    ) -> _Trace:
        """The trace of an earlier call that is still valid, or a new one."""
        key = self._key(declared, treedef, leaves, avals)
        reads, traces = self._known
        if reads is None or reads != snapshot(self.fn):
            traces = {}
        if key in traces:
            return traces[key]
        trace = _trace(self.fn, declared, treedef, leaves, avals)
        # Other results, such as a function or a set, have to be those of this call.
        if key is not None and all(type(x) in _IMMUTABLE for x in _constants(trace.results)):
            # If tracing itself changes what the function reads, that must not trace it again.
            recent = list(traces.items())[1 - _MAX_TRACES :]
            self._known = snapshot(self.fn), dict([*recent, (key, trace)])
        return trace

    def _key(
        self, declared: Scope, treedef: PyTreeDef, leaves: Sequence[Any], avals: Sequence[Any]
    ) -> Hashable | None:
        """A key for this call, or None if it cannot be compared with other calls."""
        others = snapshot(_constants(leaves))
        if others is None or jax.config.jax_disable_jit:
            return None
        key = (context(), declared, treedef, others, avals)
        try:
            hash(key)
        except TypeError:  # the tree's structure holds something unhashable
            return None
        return key


def _constants(leaves: Sequence[Any]) -> list[Any]:
    """The leaves that are not arrays, with None in place of arrays."""
    return [None if leaf is _TRACED else leaf for leaf in leaves]


_MAX_TRACES = 64
_IMMUTABLE = (type(None), bool, int, float, complex, str, bytes)


def _is_traced(leaf: Any) -> bool:
    if isinstance(leaf, bool | int | float | complex) and not isinstance(leaf, np.generic):
        return False
    return is_array(leaf)


def evaluates_now() -> bool:
    """Whether operations are evaluated at once, because no transformation is in progress."""
    with take_current_trace() as current:
        pass
    with eval_context(), take_current_trace() as evaluation:
        pass
    return current is evaluation


def _warn_of_missing_mesh(declared: Scope, operands: Sequence[Any]) -> None:
    """Warns if data are sharded over an axis of a mesh that is not in scope: they are gathered."""
    in_scope = jax.sharding.get_abstract_mesh().axis_names
    of_axis = {axis: p.name for p in declared for axis in p.named_axes}
    names = set(of_axis).difference(in_scope)
    for x in operands:
        sharding = getattr(x, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            continue
        axes = [axis for entry in sharding.spec for axis in _as_tuple(entry)]
        for name in names.intersection(axes):
            warnings.warn(
                f"An argument of a program over {of_axis[name]} is sharded over a mesh axis "
                f"{name!r}, but no mesh with that axis is in scope, so the program will run on one "
                "device. Call it under jax.set_mesh(mesh).",
                stacklevel=4,
            )
            return


# The mesh axes and placements for which the following warning was already issued.
_idle: set[Any] = set()


def _warn_of_idle_mesh(declared: Scope, operands: Sequence[Any], traced: _Trace) -> None:
    """Warns if no axis belongs to a placement, so that all devices of a mesh do the same work.

    Does not warn if the client functions visibly use the axes, or if the program is called in a
    `jax.shard_map`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = other_axes((), mesh)
    if not free or mesh.manual_axes or in_program():
        return
    if any(p.axes is not None or split_axes(p) for p in declared):
        return
    names = [p.name for p in declared]
    key = (*mesh.shape.items(), *names)
    if key in _idle or any(map(_is_sharded, operands)) or traced.has_shardings:
        return
    _idle.add(key)
    axes = ", ".join(f"{axis}={mesh.shape[axis]}" for axis in free)
    one = names[0]
    warnings.warn(
        f"A program over {' and '.join(names)} runs under a mesh of {axes}, which has no axis "
        f"{one!r}, so that all of its devices do the same work. Name an axis {one!r}, or use "
        f"fax.sharding.layout({one}={free[0]!r}). If only the client functions should use the "
        f"mesh, use fax.sharding.layout({one}=()).",
        stacklevel=4,
    )


def _is_sharded(x: Any) -> bool:
    shardings = [getattr(source, "sharding", None) for source in (x, jax.typeof(x))]
    return any(
        isinstance(s, NamedSharding) and any(_as_tuple(entry) != (None,) for entry in s.spec)
        for s in shardings
    )


def _as_tuple(entry: Any) -> tuple:
    return entry if isinstance(entry, tuple) else (entry,)
