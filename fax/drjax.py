"""DrJAX's names on fax's operators, for programs that were written for DrJAX.

    import fax.drjax as drjax

replaces ``import drjax``. Results are those of DrJAX 0.2.1. Under `jax.jit`, a broadcast, a map and
the reductions after it become one round, whose memory does not grow with the number of
participants. The functions here also work in a `fax.program` with one placement, and fax's own
operators work in a program of this module, so code can move from one to the other in steps.

What differs from DrJAX:

- A leading axis that is not the size of the placement is an error. DrJAX maps and reduces it.
- The mesh is the one of `jax.set_mesh`. A ``mesh=`` argument has to be the same, and
  ``with mesh:``, which JAX has deprecated, has no effect.
- A mapped function can neither use these operators for its own placement nor use the placement's
  name as an axis name. Both are errors.
- Sums and means of integers and bools have the dtypes of `jnp.sum` and `jnp.mean` under `jax.jit`,
  too. Meshes with Auto and Explicit axes side by side work, and so do Explicit ones without an axis
  for the placement. DrJAX fails in all of these cases.
- A program that is called in another function's trace, such as one of `jax.jit` or `jax.grad`,
  works on copies of the containers that it is passed. Changes that it makes to them in place, for
  example to the variables of an `nnx.Module`, are lost unless it returns them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.tree_util import keystr, tree_leaves_with_path

from fax import _arguments, _checks, _operators, _reductions
from fax._placement import PlacementError, declare, in_program, resolve, scope
from fax._program import evaluates_now
from fax._program import program as _program
from fax.sharding._mesh import laid_out

_F = TypeVar("_F", bound=Callable)
PyTree = Any


class OperatorUndefinedError(PlacementError):
    """An operator of DrJAX was called outside a program."""


def program(**kwargs: Any) -> Callable[[_F], _F]:
    """Declares the placement of a function that uses DrJAX's operators.

    Outside of JAX's transformations, a call runs the function as ordinary Python, one operator
    after the other, as in DrJAX. Within `jax.jit` or any other transformation the function is
    traced, as in `fax.program`, and its operators become rounds.

    Args:
      **kwargs: the name and size of the placement, as in ``program(clients=8)`` or
        ``program(placements={"clients": 8})``. ``use_abstract_mesh`` is accepted and has no
        effect: fax always uses the mesh in scope.

    Returns:
      A decorator. The decorated function is an ordinary JAX function.

    Raises:
      PlacementError: if there is not exactly one placement, or its size is not a positive int.

    Example:

      >>> import fax.drjax as drjax
      >>> @drjax.program(placements={"clients": 3})
      ... def share_above(threshold, readings):
      ...     above = drjax.map_fn(lambda t, r: r > t, (drjax.broadcast(threshold), readings))
      ...     return drjax.reduce_mean(above)
      >>> jax.jit(share_above)(20.0, jnp.array([18.0, 21.5, 26.0]))
      Array(0.6666667, dtype=float32)
    """
    sizes: Any = {name: size for name, size in kwargs.items() if name != "use_abstract_mesh"}
    if list(sizes) == ["placements"]:
        sizes = sizes["placements"]
        if not isinstance(sizes, Mapping):
            raise PlacementError(
                f"fax.drjax.program: placements is {_arguments.shown(sizes)}, expected a mapping "
                'from the name of the placement to its size, as in placements={"clients": 8}. No '
                "placement can be called placements."
            )
    if len(sizes) != 1:
        raise PlacementError(
            f"fax.drjax.program: got {len(sizes)} placements, {dict(sizes)}, expected one, as in "
            '@drjax.program(placements={"clients": 8}). For several placements, use fax.program.'
        )
    declared = declare(sizes)

    def decorate(fn: _F) -> _F:
        traced = _program(**sizes)(fn)

        @functools.wraps(fn)
        def wrapped(*args, **kwargs):
            if not evaluates_now():
                return traced(*args, **kwargs)
            with scope(laid_out(declared)):
                return fn(*args, **kwargs)

        return wrapped  # type: ignore[return-value]

    return decorate


def broadcast(x: PyTree, *, mesh: Mesh | AbstractMesh | None = None) -> PyTree:
    """Sends a server value to every participant: `fax.broadcast`.

    Args:
      x: a pytree of arrays of shape [...].
      mesh: the mesh in scope, or None.

    Returns:
      The pytree of the same dtypes and of shape [n, ...], whose rows are all equal to ``x``.

    Raises:
      OperatorUndefinedError: outside a program.
      PlacementError: if ``mesh`` spreads the participants over several devices and is not the mesh
        in scope.

    Example:

      >>> import fax.drjax as drjax
      >>> drjax.program(clients=3)(drjax.broadcast)(jnp.arange(2))
      Array([[0, 1],
             [0, 1],
             [0, 1]], dtype=int32)
    """
    _check("broadcast", mesh)
    return _operators.broadcast(x)


def map_fn(
    fn: Callable[..., PyTree],
    arg: PyTree,
    *,
    mesh: Mesh | AbstractMesh | None = None,
) -> PyTree:
    """Runs a function for every participant, on its own rows: `fax.map`.

    Args:
      fn: takes ``arg`` without its leading axis, or the elements of ``arg`` if that is a tuple.
      arg: a pytree of arrays of shape [n, ...].
      mesh: the mesh in scope, or None.

    Returns:
      The pytree of arrays of shape [n, ...] that has the results of ``fn`` as its rows.

    Raises:
      OperatorUndefinedError: outside a program.
      PlacementError: if a leading axis is not n, if ``fn`` returns something other than arrays, or
        if ``mesh`` spreads the participants over several devices and is not the mesh in scope.

    Example:

      >>> import fax.drjax as drjax
      >>> @drjax.program(clients=3)
      ... def products(x, y):
      ...     return drjax.map_fn(lambda a, b: a * b, (x, y))
      >>> products(jnp.arange(3.0), jnp.arange(3.0))
      Array([0., 1., 4.], dtype=float32)
    """
    _check("map_fn", mesh)
    return _operators.map(fn, *(arg if isinstance(arg, tuple) else (arg,)))


def reduce_sum(x: PyTree) -> PyTree:
    """Sums the rows of a placed value: `fax.sum`.

    Args:
      x: a pytree of numeric arrays of shape [n, ...].

    Returns:
      The pytree of the sums, of shape [...] and of the dtypes of `jnp.sum`.

    Raises:
      OperatorUndefinedError: outside a program.
      PlacementError: if a leading axis is not n, or a leaf is not numeric.

    Example:

      >>> import fax.drjax as drjax
      >>> drjax.program(clients=3)(drjax.reduce_sum)(jnp.array([1.0, 2.0, 6.0]))
      Array(9., dtype=float32)
    """
    _check("reduce_sum")
    return _reductions.sum(x)


def reduce_mean(x: PyTree) -> PyTree:
    """Averages the rows of a placed value: `fax.mean`.

    Args:
      x: a pytree of numeric arrays of shape [n, ...].

    Returns:
      The pytree of the means, of shape [...] and of the dtypes of `jnp.mean`.

    Raises:
      OperatorUndefinedError: outside a program.
      PlacementError: if a leading axis is not n, or a leaf is not numeric.

    Example:

      >>> import fax.drjax as drjax
      >>> drjax.program(clients=3)(drjax.reduce_mean)(jnp.array([1.0, 2.0, 6.0]))
      Array(3., dtype=float32)
    """
    _check("reduce_mean")
    return _reductions.mean(x)


def reduce_weighted_mean(x: PyTree, w: PyTree) -> PyTree:
    """Averages the rows of a placed value by weights, which each leaf has of its own.

        sum_i w_i x_i / sum_i w_i

    `fax.mean` with ``weights=`` takes one array of weights for all leaves, and returns zero instead
    of NaN if they add up to zero.

    Args:
      x: a pytree of numeric arrays of shape [n, ...].
      w: a pytree of the same structure, of numeric arrays of shape [n] or of another shape
        [n, ...]. Each participant's weight is multiplied by its row with NumPy's broadcasting.

    Returns:
      The pytree of the weighted means. If weights add up to zero, the mean is NaN, or infinite.

    Raises:
      OperatorUndefinedError: outside a program.
      PlacementError: if a leading axis is not n, a leaf is not numeric, or ``w`` has another
        structure than ``x``.

    Example:

      >>> import fax.drjax as drjax
      >>> average = drjax.program(clients=3)(drjax.reduce_weighted_mean)
      >>> average(jnp.array([1.0, 2.0, 6.0]), jnp.array([1.0, 1.0, 2.0]))
      Array(3.75, dtype=float32)
    """
    _check("reduce_weighted_mean")
    caller = "fax.drjax.reduce_weighted_mean"
    of_x: Any = jax.tree.structure(x)
    of_w: Any = jax.tree.structure(w)
    if of_x != of_w:
        raise PlacementError(
            f"{caller}: w has the structure {of_w}, expected that of x, {of_x}. To use the same "
            "weights for all leaves, use fax.mean(x, weights=w)."
        )
    here = resolve(None, caller)
    for name, tree in (("x", x), ("w", w)):
        for path, leaf in tree_leaves_with_path(tree):
            _checks.row(caller, f"{name}{keystr(path)}", leaf, here)

    def weighted(row, weight):
        return jax.tree.map(operator.mul, row, weight), weight

    totals, weights = _reductions.sum(_operators.map(weighted, x, w))
    return jax.tree.map(operator.truediv, totals, weights)


def _check(name: str, mesh: Mesh | AbstractMesh | None = None) -> None:
    """Checks that an operator is called in a program, with no other mesh than the one in scope."""
    caller = f"fax.drjax.{name}"
    if not in_program():
        raise OperatorUndefinedError(
            f"{caller} was called outside a program. Call it in a function decorated with "
            'drjax.program, as in @drjax.program(placements={"clients": 8}).'
        )
    if mesh is None:
        return
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise PlacementError(
            f"{caller}: mesh is {_arguments.shown(mesh)}, expected a mesh or None."
        )
    here, known = resolve(None, caller), jax.sharding.get_abstract_mesh()
    if mesh.shape.get(here.name, 1) > 1 and mesh.shape != known.shape:
        found = f"the mesh in scope is {dict(known.shape)}" if known.shape else "none is in scope"
        raise PlacementError(
            f"{caller}: mesh is {dict(mesh.shape)}, but {found}. fax spreads participants over the "
            "mesh in scope: call the program under jax.set_mesh(mesh)."
        )
