"""Checks of the arguments of operators, and their error messages."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr
from jax.tree_util import PyTreeDef, keystr, tree_flatten_with_path

from fax import _arguments, _functions
from fax._placement import Placement, PlacementError
from fax.primitives._round import CONVOLUTIONS, AtMost, Vectorize
from fax.sharding._types import as_placed


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array or a Python scalar, which counts as one."""
    try:
        known = not isinstance(leaf, jax.ShapeDtypeStruct)
        return known and isinstance(jax.typeof(leaf), ShapedArray)
    except (TypeError, OverflowError):  # a Python int may be too large for any array
        return False


def describe(value: Any) -> str:
    """Describes a value in an error message."""
    if is_array(value):
        aval = jax.typeof(value)
        return f"{aval.dtype}[{','.join(map(str, aval.shape))}]"
    return f"{type(value).__name__} {value!r}" if value is not None else "None"


def row(caller: str, name: str, leaf: Any, here: Placement) -> jax.Array:
    """Checks that an array has a row for each participant."""
    leaf = jnp.asarray(leaf)
    if leaf.ndim and leaf.shape[0] == here.size:
        return as_placed(leaf, here)
    found = (
        f"has {leaf.shape[0]} rows, in an array of shape {leaf.shape}"
        if leaf.ndim
        else "is a scalar"
    )
    raise PlacementError(
        f"{caller}: {name} {found}, but a value placed at {here.name} has one row for each of its "
        f"{here.size} participants, that is, a leading axis of size {here.size}. To send the same "
        "value to all of them, use fax.broadcast."
    )


@contextlib.contextmanager
def noting_lists(x: Any, here: Placement) -> Iterator[None]:
    """Adds a note to an error about rows if there is a list with an entry for each participant."""

    def of_entries(x: Any) -> bool:
        return isinstance(x, list) and len(x) == here.size

    try:
        yield
    except PlacementError as error:
        if any(map(of_entries, jax.tree.leaves(x, is_leaf=of_entries))):
            error.add_note(
                f"To place a list with an entry for each participant of {here.name}, stack its "
                "entries: jax.tree.map(lambda *rows: jnp.stack(rows), *entries)."
            )
        raise


def rows(
    caller: str, x: Any, here: Placement, *, numeric: bool = False, real: bool = False
) -> tuple[list[jax.Array], PyTreeDef]:
    """Checks that a pytree is placed, and flattens it."""
    flat, treedef = tree_flatten_with_path(x)
    leaves = []
    for path, leaf in flat:
        name = f"x{keystr(path)}"
        if not is_array(leaf):
            raise PlacementError(
                f"{caller}: {name} is {describe(leaf)}, expected an array with {here.size} rows. "
                "Only fax.broadcast and fax.map accept leaves that are not arrays."
            )
        with noting_lists(x, here):
            leaf = row(caller, name, leaf, here)
        ok = not numeric or jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool
        if not ok or (real and jnp.issubdtype(leaf.dtype, jnp.complexfloating)):
            wanted = "real numbers" if real else "numbers"
            raise PlacementError(
                f"{caller}: {name} is an array of {leaf.dtype}, expected {wanted}. "
                "To get every row, use fax.collect."
            )
        leaves.append(leaf)
    return leaves, treedef


def vector(caller: str, name: str, value: Any, here: Placement, *, bool_only: bool) -> jax.Array:
    """Checks ``where`` or ``weights``: one number for each participant."""
    if is_array(value):
        array = jnp.asarray(value)
        real = jnp.issubdtype(array.dtype, jnp.number)
        real = real and not jnp.issubdtype(array.dtype, jnp.complexfloating)
        if array.shape == (here.size,) and (array.dtype == bool if bool_only else real):
            return as_placed(array, here)
        if array.shape == (here.size,) and array.dtype == bool:
            raise PlacementError(
                f"{caller}: {name} is {describe(value)}, expected numbers. To leave participants "
                f"out, pass where= instead. To use ones and zeros, pass {name}.astype(int)."
            )
    wanted = "bool" if bool_only else "real"
    example = "x > 0" if bool_only else "each participant's number of examples"
    raise PlacementError(
        f"{caller}: {name} is {describe(value)}, expected one placed {wanted} array of shape "
        f"[{here.size}], one value for each participant of {here.name}, for example {example}. It "
        "is used for every leaf."
    )


def function(caller: str, value: Any) -> None:
    """Checks that a value is callable."""
    if not callable(value):
        raise PlacementError(f"{caller}: expected a function, got {describe(value)}.")


def note_arguments(fn: Any, args: Sequence[Any], here: Placement, error: TypeError) -> None:
    """Adds a note to the error of a mapped function that takes another number of arguments."""
    if _functions.takes(fn, len(args)):
        return
    fix = ""
    if len(args) == 1 and isinstance(args[0], tuple):
        fix = " Write fax.map(fn, a, b), not fax.map(fn, (a, b))."
    passed = "1 argument" if len(args) == 1 else f"{len(args)} arguments"
    error.add_note(
        f"The function mapped over {here.name} is {_arguments.shown(fn)}, which takes "
        f"{inspect.signature(fn)}. It was called with {passed}.{fix}"
    )


def initial(caller: str, value: Any, dtype: Any) -> None:
    """Checks the initial value of a maximum or minimum."""
    if is_array(value) and jnp.ndim(value) == 0 and jnp.result_type(value, dtype) == dtype:
        limits = jnp.iinfo(dtype) if jnp.issubdtype(dtype, jnp.integer) else None
        if limits is None or not isinstance(value, int) or limits.min <= value <= limits.max:
            return
    raise PlacementError(
        f"{caller}: initial is {_arguments.shown(value)}, expected a scalar that fits the dtype "
        f"{dtype}."
    )


def vectorize(value: Any, here: Placement) -> int | AtMost | Vectorize | None:
    """Checks the argument ``vectorize`` of a map. Only fax itself makes the other two types."""
    if value is None or isinstance(value, AtMost | Vectorize):
        return value
    what = "the participants that a device works on at once, or None to leave it to fax"
    count = _arguments.count("fax.map", "vectorize", value, what=what, error=PlacementError)
    return min(count, here.size)


def convolutions(value: Any) -> str:
    """Checks the argument ``convolutions`` of a map."""
    return _arguments.choice("fax.map", "convolutions", value, CONVOLUTIONS, error=PlacementError)


def no_collectives(caller: str, error: NameError, here: Placement) -> None:
    """Explains why a client function cannot use a collective over its own placement."""
    names = {here.name, *(here.axes or ())}
    if any(re.search(rf"axis name:? '?{re.escape(name)}\b", str(error)) for name in names):
        raise PlacementError(
            f"{caller}: the mapped function uses {here.name} as an axis name, as in "
            "jax.lax.axis_index or jax.lax.psum. A participant cannot see the others: pass its "
            "number from fax.index, and reduce its results with fax.sum, fax.mean, fax.max or "
            "fax.min after the map."
        ) from error


def no_refs(caller: str, jaxpr: ClosedJaxpr, consts: Sequence[Any]) -> None:
    """Checks that a client function neither shares nor creates mutable arrays."""
    shared = [c for c in consts if not is_array(c)]
    if shared:
        raise PlacementError(
            f"{caller}: the mapped function closes over {describe(shared[0])}. Participants share "
            "no memory: return what they compute instead of writing it to a ref."
        )
    if jaxpr.effects and not jaxpr.effects.isdisjoint(_effects_of_refs()):
        raise PlacementError(
            f"{caller}: the mapped function uses jax.new_ref, which fax does not differentiate. "
            "Carry values from step to step instead, as jax.lax.scan does."
        )


@functools.cache
def _effects_of_refs() -> Any:
    return jax.make_jaxpr(lambda: jax.new_ref(0.0)[...])().effects


def key(caller: str, value: Any) -> jax.Array:
    """Checks that a value is a single random key."""
    _arguments.key(caller, "key", value, error=PlacementError)
    return jnp.asarray(value)
