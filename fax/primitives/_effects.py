"""Effects and callbacks in client functions: refuses those that JAX does not support."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jax.extend.core import JaxprEqn
from jax.sharding import AbstractMesh

from fax import _compat
from fax._placement import PlacementError
from fax.primitives import _jaxpr
from fax.primitives._round import Round

_LEFT_TO_THE_COMPILER = (
    "The function mapped over {} has effects, such as jax.debug.print, or calls back into Python, "
    "as jax.pure_callback does. JAX does not support this if the mesh has axes that are left to "
    "the compiler ({}). Return the value instead, or use a mesh without these axes."
)
_ORDERED_ON_DEVICES = (
    "The function mapped over {} has ordered effects, such as jax.debug.print(ordered=True), but "
    "the mesh in scope has {} devices, and JAX does not order effects across devices. Use "
    "ordered=False, or a mesh of one device."
)
_ORDERED_AT_ONCE = (
    "The function mapped over {} has ordered effects, such as jax.debug.print(ordered=True), but "
    "vectorize={} participants run at once, in no order. Use vectorize=1, or ordered=False."
)


def has_effects(this: Round) -> bool:
    return not all(map(_compat.is_named_axis, this.jaxpr.effects))


def is_ordered(this: Round) -> bool:
    return any(map(_compat.is_ordered, this.jaxpr.effects))


def check_order(this: Round, mesh: AbstractMesh) -> None:
    """Refuses ordered effects on several devices, as JAX does before it lowers anything."""
    if is_ordered(this) and not mesh.empty and mesh.size > 1:
        raise PlacementError(_ORDERED_ON_DEVICES.format(this.group.name, mesh.size))


def check(
    this: Round, along: Sequence[str], others: Sequence[str], at_once: Callable[[int], int]
) -> None:
    """Refuses effects that JAX cannot run.

    Args:
      this: the round.
      along: the mesh axes that are manual.
      others: the axes with several devices that are not manual.
      at_once: given a number of participants, how many of them a device works on at once.
    """
    name = this.group.name
    if along and others and (has_effects(this) or _jaxpr.any_equation(this.jaxpr, _calls_back)):
        raise PlacementError(_LEFT_TO_THE_COMPILER.format(name, ", ".join(others)))
    if is_ordered(this) and at_once(this.group.size) > 1:
        raise PlacementError(_ORDERED_AT_ONCE.format(name, this.vectorize))


def _calls_back(eqn: JaxprEqn) -> bool:
    """Whether an equation calls Python without an effect."""
    return eqn.primitive.name == _compat.Named.PURE_CALLBACK
