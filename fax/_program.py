"""`fax.program`: a function over placements becomes an ordinary JAX function."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import eval_context
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxprs_in_params, take_current_trace
from jax.sharding import NamedSharding
from jax.tree_util import tree_flatten, tree_unflatten

from fax._checks import function, is_array
from fax._placement import PlacementError, Scope, declare, in_program, scope
from fax._rules import bind_scope
from fax.primitives import _fusion, _jaxpr
from fax.primitives._structure import Structure, execute
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

        @functools.wraps(fn)
        def wrapped(*args, **kwargs):
            return _call(fn, declared, args, kwargs)

        return wrapped  # type: ignore[return-value]

    return decorate


_TRACED = object()


def _call(fn: Callable, declared: Scope, args: Any, kwargs: Any) -> Any:
    leaves, treedef = tree_flatten((args, kwargs))
    declared = laid_out(declared)
    operands = [leaf for leaf in leaves if _is_traced(leaf)]
    _warn_of_missing_mesh(declared, operands)
    results: list[Any] = []
    out_tree: Any = None

    def body(*tracers):
        nonlocal results, out_tree
        own = iter(tracers)
        seen = [next(own) if _is_traced(leaf) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(treedef, seen)
        with scope(declared):
            outs, out_tree = tree_flatten(fn(*args, **kwargs))
        # What is traced must not outlive its trace.
        results = [_TRACED if _is_traced(leaf) else leaf for leaf in outs]
        return [leaf for leaf in outs if _is_traced(leaf)]

    jaxpr, captured = _jaxpr.trace(body, [jax.typeof(x) for x in operands], about=fn)
    _warn_of_idle_mesh(declared, operands, jaxpr)
    jaxpr, constants = _fusion.fuse(bind_scope(jaxpr, declared))
    operands = [*constants, *captured, *operands]
    if _evaluates_now():
        outs = iter(execute(Structure(jaxpr), *operands))
    else:
        outs = iter(_jaxpr.evaluate(jaxpr, *operands))
    return tree_unflatten(out_tree, [next(outs) if x is _TRACED else x for x in results])


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


def _warn_of_idle_mesh(declared: Scope, operands: Sequence[Any], jaxpr: ClosedJaxpr) -> None:
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
    if key in _idle or any(map(_is_sharded, operands)) or _has_shardings(jaxpr.jaxpr):
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


def _has_shardings(jaxpr: Jaxpr) -> bool:
    """Whether something in a jaxpr says how it is to be sharded."""
    return any(
        eqn.primitive.name in ("sharding_constraint", "shard_map", "reshard")
        or any(map(_has_shardings, jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def _as_tuple(entry: Any) -> tuple:
    return entry if isinstance(entry, tuple) else (entry,)
