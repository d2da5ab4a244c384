"""`fax.program`: a function over placements becomes an ordinary JAX function."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.api_util import debug_info
from jax.core import eval_context
from jax.extend import linear_util as lu
from jax.extend.core import ClosedJaxpr, take_current_trace
from jax.sharding import NamedSharding
from jax.tree_util import PyTreeDef, tree_flatten, tree_unflatten

from fax._checks import function, is_array
from fax._compat import has_sharding, is_jet
from fax._placement import PlacementError, Scope, declare, in_program, scope
from fax._reads import Reader, snapshot
from fax._rules import bind_scope
from fax.primitives import _fusion, _jaxpr
from fax.primitives._compile_key import Structure, execute
from fax.primitives._debug_nans import watch_program
from fax.sharding._mesh import laid_out, other_axes, split_axes

F = TypeVar("F", bound=Callable)


def program(*undecorated: Any, **placements: int) -> Callable[[F], F]:
    """Declares placements for a function that is written with fax's operators.

    A placement is a named group of participants. A value placed there is a pytree of arrays
    whose leading axis has one row for each of them; every other value is the server's.

    The result is an ordinary JAX function, to be jitted, differentiated, vectorised, exported
    and called in other functions. When called it traces the body, fuses what it finds into
    rounds of communication, and evaluates those where it was called. Called with arrays and
    outside of any transformation, it is compiled as a whole, once for arguments alike. Python
    scalars are constants then, and each value compiles anew: pass what varies as an array.

    Such a call does not trace the body again if an earlier call was alike, and if the body still
    reads the same: the numbers, strings, arrays, containers and functions that it closes over
    or names as globals. After a change of these the next call sees it. If the body reads something
    else, such as a module or an object of a class of yours, this cannot be told, and every call
    traces. As with `jax.jit`, the body should have no side effects: what it prints, draws from
    `numpy.random`, or reads from a clock or a file belongs to the trace, not to the call.

    Args:
      **placements: the number of participants, a positive int, by the name of the placement.
        Several placements can be nested by maps inside maps.

    Returns:
      A decorator. Arguments and results of the decorated function can be pytrees. Leaves that
      are not arrays (functions, strings, Python scalars, None) go in and come out as they are,
      so that ``range(steps)`` works on an argument.

    Raises:
      PlacementError: if there is no placement, or a size is not a positive int. The operators
        raise it, too, when the program is called; see each.

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
            "fax.program takes placements by name and returns a decorator: write "
            "@fax.program(clients=64), with brackets and a number of participants."
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
    if _evaluates_now():
        traced = traces.remembered(declared, treedef, others, avals)
        run = functools.partial(execute, traced.structure)
    else:
        traced = _trace(traces.fn, declared, treedef, others, avals)
        run = functools.partial(_jaxpr.evaluate, traced.jaxpr)
        with take_current_trace() as current:
            if is_jet(current):  # which fails in rules of custom derivatives, as means have them
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
      results: what it returned, with a mark for each of the jaxpr's results.
      out_tree: the structure of that.
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
    """Traces and fuses a program, called with the leaves and, where they are marked, arrays."""
    results: list[Any] = []
    out_tree: Any = None

    def body(*tracers):
        nonlocal results, out_tree
        own = iter(tracers)
        seen = [next(own) if leaf is _TRACED else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(treedef, seen)
        with scope(declared):
            outs, out_tree = tree_flatten(fn(*args, **kwargs))
        # What is traced must not outlive its trace.
        results = [_TRACED if _is_traced(leaf) else leaf for leaf in outs]
        return [leaf for leaf in outs if _is_traced(leaf)]

    jaxpr, captured = _jaxpr.trace(body, avals, about=fn)
    jaxpr, constants = _fusion.fuse(bind_scope(jaxpr, declared))
    return _Trace(jaxpr, [*constants, *captured], results, out_tree)


class _Traces(Reader):
    """The traces of a program, which hold as long as the function reads what it did before."""

    def __init__(self, fn: Callable, declared: Scope):
        self.fn = fn
        self.declared = declared
        self._known: tuple[Hashable, dict[Hashable, _Trace]] = None, {}  # what it read, by call

    def reads(self) -> tuple[Any, ...]:
        return self.fn, [(p.name, p.size) for p in self.declared]

    def remembered(
        self, declared: Scope, treedef: PyTreeDef, leaves: Sequence[Any], avals: Sequence[Any]
    ) -> _Trace:
        """The trace of a call alike, or a new one if there is none that still holds."""
        key = self._key(declared, treedef, leaves, avals)
        reads, traces = self._known
        if reads is None or reads != snapshot(self.fn):
            traces = {}
        if key in traces:
            return traces[key]
        trace = _trace(self.fn, declared, treedef, leaves, avals)
        if key is not None and snapshot(_constants(trace.results)) is not None:
            # What the function itself changes when it is traced is no reason to trace it again.
            recent = list(traces.items())[1 - _TRACES_KEPT :]
            self._known = snapshot(self.fn), dict([*recent, (key, trace)])
        return trace

    def _key(
        self, declared: Scope, treedef: PyTreeDef, leaves: Sequence[Any], avals: Sequence[Any]
    ) -> Hashable | None:
        """How the function is called, or None where calls cannot be compared."""
        others = snapshot(_constants(leaves))
        if others is None or jax.config.jax_disable_jit:
            return None
        key = (_context(_NOTHING), declared, treedef, others, avals)
        try:
            hash(key)
        except TypeError:  # the tree's structure holds something unhashable
            return None
        return key


def _constants(leaves: Sequence[Any]) -> list[Any]:
    """The leaves that are not arrays, at their places."""
    return [None if leaf is _TRACED else leaf for leaf in leaves]


_TRACES_KEPT = 64


@lu.cache
def _context(nothing: lu.WrappedFun) -> object:
    """An object for each context that JAX traces in: a mesh, settings, and the like."""
    del nothing
    return object()


_NOTHING = lu.wrap_init(lambda: None, debug_info=debug_info("fax", lambda: None, (), {}))


def _is_traced(leaf: Any) -> bool:
    if isinstance(leaf, bool | int | float | complex) and not isinstance(leaf, np.generic):
        return False
    return is_array(leaf)


def _evaluates_now() -> bool:
    """Whether no transformation is under way, so that operations are carried out at once."""
    with take_current_trace() as current:
        pass
    with eval_context(), take_current_trace() as evaluation:
        pass
    return current is evaluation


def _warn_of_missing_mesh(declared: Scope, operands: Sequence[Any]) -> None:
    """Data spread over an axis that the program does not know of would be gathered."""
    in_scope = jax.sharding.get_abstract_mesh().axis_names
    of_axis = {axis: p.name for p in declared for axis in p.axes or (p.name,)}
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


# What programs were warned of: the axes of a mesh, and the placements of the program.
_idle: set[Any] = set()


def _warn_of_idle_mesh(declared: Scope, operands: Sequence[Any], traced: _Trace) -> None:
    """Without an axis for its participants, all devices of a mesh do the same work.

    Unless the participants' functions use them, as far as that can be seen, or whoever calls the
    program in a `jax.shard_map`.
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
        f"fax.sharding.layout({one}={free[0]!r}). If the mesh is for the participants' own "
        f"functions, say so by fax.sharding.layout({one}=()).",
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
