"""The arguments of a plan: which of them clients hold, and whether they are of the plan's types."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax
from jax import export

from fax.data import Gathered
from fax.deploy._values import CutError, Held

PyTree = Any
# The fields of a `fax.data.Cohort` that are clients' data.
DATA = ("batches", "mask", "num_examples")


def refuse_resident(args: PyTree) -> None:
    def is_gathered(x: Any) -> bool:
        return isinstance(x, Gathered)

    if any(map(is_gathered, jax.tree.leaves(args, is_leaf=is_gathered))):
        raise CutError(
            "fax.deploy.cut: the cohort's batches are rows of examples that are all on the server. "
            "Make cohorts that clients can hold by fax.data.cohorts(..., resident=False)."
        )


def is_named(path: Any, names: Collection[str]) -> bool:
    return not {_name(key) for key in path}.isdisjoint(names)


def ragged_type(path: Any, x: Any, held: Collection[str], steps: Any) -> jax.ShapeDtypeStruct:
    name = jax.tree_util.keystr(path)
    if not is_named(path, held) or len(x.shape) < 2:
        raise CutError(
            f"fax.deploy.cut: ragged names {name}, expected what clients hold, with steps along "
            f"axis 1. Its shape is {x.shape}."
        )
    return jax.ShapeDtypeStruct((x.shape[0], *steps, *x.shape[2:]), x.dtype)


def names_of(argument: str, names: Collection[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ValueError(
            f"fax.deploy.cut: {argument} is {names!r:.80}, expected a list of names, as in "
            f"{argument}=['batches', 'mask']."
        )
    return tuple(names)


def check_names(argument: str, held: Collection[str], paths: Sequence[Any]) -> None:
    known = {_name(key) for path, _ in paths for key in path}
    missing = [name for name in held if name not in known]
    # A cohort of one's own may lack some of the default names, but not all.
    if missing and (set(held) != set(DATA) or len(missing) == len(DATA)):
        raise CutError(
            f"fax.deploy.cut: {argument} names {missing[0]!r}, which is in no path of the "
            f"arguments. Their names are {sorted(x for x in known if isinstance(x, str))}. Name "
            f"some of them, or pass {argument}=() for none."
        )


def _name(key: Any) -> Any:
    """The name of a field or the key of a dict in a path."""
    return getattr(key, "name", getattr(key, "key", None))


@functools.singledispatch
def type_of(x: Any) -> Any:
    aval = jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


@type_of.register
def _(x: Held) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@type_of.register
def _(x: jax.ShapeDtypeStruct) -> Any:
    return x


def check_type(name: str, x: Any, value: Any) -> None:
    own = x if isinstance(x, Held) else type_of(x)
    if own.dtype != value.aval.dtype or not _is_of(own.shape, value.aval.shape):
        shown = ", ".join(map(str, value.aval.shape))
        narrow = jax.dtypes.canonicalize_dtype(own.dtype, allow_extended_dtype=True)
        why = f" Without jax_enable_x64, JAX has {narrow} in place of {own.dtype}: put that there."
        raise ValueError(
            f"Plan.run: {name} is {own.dtype}{list(own.shape)}, expected "
            f"{value.aval.dtype}[{shown}], as when the plan was made.{why * (narrow != own.dtype)}"
        )
    if isinstance(x, Held) and not value.held:
        raise ValueError(
            f"Plan.run: {name} is held by clients, but the plan was made for a value of the "
            "server; add its name to held= of fax.deploy.cut."
        )
    if isinstance(x, Held) and x.axis != value.axis:
        raise ValueError(
            f"Plan.run: {name} has its rows along axis {x.axis}, expected axis {value.axis}. "
            "Return it transposed from the plan that made it."
        )


def _is_of(shape: Sequence[int | None], expected: Sequence[Any]) -> bool:
    """Whether a shape is the one that a plan was made for, which may have sizes that differ."""
    return len(shape) == len(expected) and all(
        own != 0 if export.is_symbolic_dim(n) else own == n for own, n in zip(shape, expected)
    )
