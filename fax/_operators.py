"""The operators: broadcast, distribute, collect, map, index and keys."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import keystr, tree_flatten_with_path, tree_map, tree_unflatten

from fax import _checks
from fax._checks import is_array
from fax._placement import PlacementError, resolve, scope, without
from fax._rules import bind_scope
from fax.primitives import _jaxpr
from fax.primitives._broadcast import broadcast_p
from fax.primitives._collect import collect_p, distribute_p
from fax.primitives._round import PLACED, SERVER, AtMost, Out, Round, map_elementwise, seen_avals
from fax.sharding._types import as_server, server_aval, spread_rows

PyTree = Any


def broadcast(x: PyTree, *, placement: str | None = None) -> PyTree:
    """Sends a server value to every participant.

    Args:
      x: a server pytree. Python scalars count as arrays; other leaves that are not arrays
        are returned unchanged.
      placement: which placement, if several are in scope.

    Returns:
      The placed pytree with ``y[i] = x``: a leaf of shape [...] becomes one of shape [n, ...] and
      of the same dtype. A map that takes it sees x itself; the n copies are never made.

    Raises:
      PlacementError: outside a program, or if the placement is ambiguous.

    Example:

      >>> @fax.program(clients=3)
      ... def send(x):
      ...     return fax.broadcast(x)
      >>> send(jnp.arange(2))
      Array([[0, 1],
             [0, 1],
             [0, 1]], dtype=int32)
    """
    here = resolve(placement, "fax.broadcast")

    def send(leaf):
        return (
            broadcast_p.bind(as_server(jnp.asarray(leaf), here), **here.params)
            if is_array(leaf)
            else leaf
        )

    return tree_map(send, x)


def distribute(x: PyTree, *, placement: str | None = None) -> PyTree:
    """Sends row i of a server value to participant i.

    Args:
      x: a server pytree of arrays of shape [n, ...].
      placement: which placement, if several are in scope.

    Returns:
      The placed pytree of the same shapes and dtypes. The transpose is `fax.collect`.

    Raises:
      PlacementError: if a leading axis is not n, or outside a program.

    Example:

      >>> @fax.program(clients=3)
      ... def deal(budget):
      ...     return fax.sum(fax.distribute(budget))
      >>> deal(jnp.arange(3.0))
      Array(3., dtype=float32)
    """
    here = resolve(placement, "fax.distribute")
    leaves, treedef = _checks.rows("fax.distribute", x, here)
    return tree_unflatten(treedef, [distribute_p.bind(leaf, **here.params) for leaf in leaves])


def collect(x: PyTree, *, placement: str | None = None) -> PyTree:
    """Sends every participant's row to the server, which costs n times what a sum does.

    Use it if you need every row: for robust aggregation, ensembles, or to inspect participants.

    Args:
      x: a placed pytree of arrays of shape [n, ...].
      placement: which placement, if several are in scope.

    Returns:
      The server pytree of the same shapes and dtypes. The transpose is `fax.distribute`.

    Raises:
      PlacementError: if a leading axis is not n, or outside a program.

    Example:

      >>> @fax.program(clients=3)
      ... def median(x):
      ...     return jnp.median(fax.collect(x))
      >>> median(jnp.array([1.0, 2.0, 900.0]))
      Array(2., dtype=float32)
    """
    here = resolve(placement, "fax.collect")
    leaves, treedef = _checks.rows("fax.collect", x, here)
    return tree_unflatten(treedef, [collect_p.bind(leaf, **here.params) for leaf in leaves])


def map(
    fn: Callable,
    *args: PyTree,
    vectorize: int | AtMost | None = None,
    convolutions: str = "auto",
    placement: str | None = None,
) -> PyTree:
    """Runs a function for every participant, on its own rows.

    Args:
      fn: takes each of ``args`` without its leading axis and returns a pytree of arrays. It
        may close over arrays, which are server values whatever their shape. It may contain
        loops, `jax.grad`, `jax.checkpoint`, randomness, and maps over other placements.
      *args: placed pytrees of arrays of shape [n, ...]. Leaves that are not arrays are passed
        to ``fn`` unchanged.
      vectorize: the number of participants that a device works on at once. These are vectorized
        with `jax.vmap`, and such batches follow one another in a loop. With 1, ``fn`` itself
        runs, so that a `jax.lax.cond` in it is a real branch. Results change only by rounding,
        except where `jax.vmap` changes them: keys of ``impl="rbg"`` or ``"unsafe_rbg"`` draw
        different numbers when vectorized. Default: on CPU 1. On TPU about as many as have room in
        the chip's fast memory for what they carry from step to step, at most 64, and 1 if that is
        more than four million numbers, as in a large model. On GPU likewise, but at most 16.
        `fax.data.Cohort.vectorize` is a bound on this default.
      convolutions: how convolutions in ``fn`` and its derivatives are computed. Results change
        only by rounding. ``"auto"`` chooses what was fastest in measurements. On CPU that is
        XLA's own fast convolution, rearranged to be fast in loops as well, or slices and matrix
        products. On TPU ``"auto"`` leaves all to the compiler. GPUs have not been measured; there,
        convolutions become matrix products only if participants are vectorized and their kernels
        differ. ``"xla"`` leaves all convolutions to the compiler, and ``"matmul"`` turns all into
        matrix products. Nested maps have their own settings.
      placement: which placement, if several are in scope.

    Returns:
      The placed pytree with ``y[i] = fn(*args[i])``, of leaves of shape [n, ...].

    Raises:
      PlacementError: if a leading axis is not n, if ``fn`` returns something other than
        arrays, if ``vectorize`` is not a positive int, if ``convolutions`` is not one of the
        three, or outside a program.

    Example:

      >>> @fax.program(clients=3)
      ... def train(params, data):
      ...     return fax.map(lambda p, d: p + d.sum(), fax.broadcast(params), data)
      >>> train(10.0, jnp.ones((3, 4)))
      Array([14., 14., 14.], dtype=float32)
    """
    here = resolve(placement, "fax.map")
    _checks.function("fax.map", fn)
    leaves, treedef = tree_flatten_with_path(args)
    arrays = [(keystr(path), x) for path, x in leaves if is_array(x)]
    with _checks.noting_lists(args, here):
        rows = [_checks.row("fax.map", f"args{path}", x, here) for path, x in arrays]
    at_once = _checks.vectorize(vectorize, here)
    convolutions = _checks.convolutions(convolutions)
    out_tree: Any = None

    def on_rows(*rows):
        nonlocal out_tree
        own = iter(rows)
        seen = [next(own) if is_array(leaf) else leaf for _, leaf in leaves]
        with scope(without(here)):
            try:
                out, out_tree = tree_flatten_with_path(fn(*tree_unflatten(treedef, seen)))
            except TypeError as error:
                _checks.note_arguments(fn, args, here, error)
                raise
        for path, leaf in out:
            if not is_array(leaf):
                raise PlacementError(
                    f"fax.map: the mapped function returned {_checks.describe(leaf)} at "
                    f"result{keystr(path)}, expected arrays. Return only what each participant "
                    "computes; values that are the same for all can stay outside fax.map."
                )
        return [jnp.asarray(leaf) for _, leaf in out]

    inputs = (PLACED,) * len(rows)
    try:
        jaxpr, consts = _jaxpr.trace(on_rows, seen_avals(rows, inputs), about=fn)
    except NameError as error:
        _checks.no_collectives("fax.map", error, here)
        raise
    jaxpr = bind_scope(jaxpr, without(here))
    _checks.no_refs("fax.map", jaxpr, consts)
    shared = [server_aval(jax.typeof(x), here) for x in consts]
    if shared != [jax.typeof(x) for x in consts]:
        avals = [*shared, *seen_avals(rows, inputs)]
        jaxpr, _ = _jaxpr.trace(functools.partial(_jaxpr.evaluate, jaxpr), avals)
        consts = [as_server(x, here) for x in consts]
    inputs = (SERVER,) * len(consts) + inputs
    outputs = (Out("placed"),) * len(jaxpr.out_avals)
    this = Round(here, at_once, inputs, outputs, jaxpr, convolutions)
    return tree_unflatten(out_tree, this.bind(*consts, *rows))


def index(*, placement: str | None = None) -> jax.Array:
    """Returns the index of each participant.

    Args:
      placement: which placement, if several are in scope.

    Returns:
      The placed int32 array [0, 1, ..., n - 1]. It needs no communication.

    Raises:
      PlacementError: outside a program, or if the placement is ambiguous.

    Example:

      >>> @fax.program(clients=3)
      ... def numbers():
      ...     return fax.index()
      >>> numbers()
      Array([0, 1, 2], dtype=int32)
    """
    here = resolve(placement, "fax.index")
    return spread_rows(lax.iota(np.int32, here.size), here)


def keys(key: jax.Array, *, placement: str | None = None) -> jax.Array:
    """Derives a random key for every participant from one key at the server.

    Participant i gets ``jax.random.fold_in(key, i)``. In nested maps the index of the outer
    participant is not folded in: pass the key that the outer participant received.

    Args:
      key: a server key, typed (`jax.random.key`) or raw (`jax.random.PRNGKey`).
      placement: which placement, if several are in scope.

    Returns:
      The placed keys: typed keys of shape [n], or raw keys of shape [n, ...].

    Raises:
      PlacementError: if ``key`` is not a single key, or outside a program.

    Example:

      >>> @fax.program(clients=3)
      ... def noise(key):
      ...     return fax.map(jax.random.uniform, fax.keys(key))
      >>> noise(jax.random.key(0)).shape
      (3,)
    """
    here = resolve(placement, "fax.keys")
    key = _checks.key("fax.keys", key)

    def own(key, number):
        return [jax.random.fold_in(key, number)]

    operands = (key, index(placement=here.name))
    return map_elementwise(own, operands, (SERVER, PLACED), [Out("placed")], here)[0]
