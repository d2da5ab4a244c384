"""Placements: named groups of participants, and which of them are in scope."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from fax import _arguments


class PlacementError(ValueError):
    """A value or an operator does not fit the placements in scope."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """A group of participants.

    Attributes:
      name: its name.
      size: the number of participants.
      axes: the mesh axes over which they are spread, or None for the axis with the placement's
        name. Axes that the mesh does not have are ignored.
    """

    name: str
    size: int
    axes: tuple[str, ...] | None = None

    @staticmethod
    def of(params: Mapping[str, Any]) -> Placement:
        """The placement in the parameters of a primitive."""
        return Placement(params["placement"], params["size"], params.get("axes"))

    @property
    def params(self) -> dict[str, Any]:
        """The parameters for a primitive, without ``axes`` if it is None."""
        params = {"placement": self.name, "size": self.size}
        return params if self.axes is None else params | {"axes": self.axes}

    @property
    def named_axes(self) -> tuple[str, ...]:
        """The names of these axes."""
        return (self.name,) if self.axes is None else self.axes

    def __str__(self) -> str:
        return f"{self.name}={self.size}"


Scope = tuple[Placement, ...]

_scope: contextvars.ContextVar[Scope | None] = contextvars.ContextVar("fax_scope", default=None)

# JAX caches traces of jitted functions. A trace that contains an operator must not be
# reused under placements of other sizes, so the scope is part of JAX's cache key.
_jit_cache_key = jax.make_user_context(None)


def declare(sizes: Mapping[str, int]) -> Scope:
    """Checks the keyword arguments of `fax.program`."""
    if not sizes:
        raise PlacementError(
            "fax.program needs at least one placement, with a name and a number of "
            "participants, as in @fax.program(clients=64)."
        )
    return tuple(Placement(name, _size(name, size)) for name, size in sizes.items())


def _size(name: str, size: Any) -> int:
    what = f"the number of participants, known before tracing, as in @fax.program({name}=64)"
    return _arguments.count("fax.program", name, size, what=what, error=PlacementError)


@contextlib.contextmanager
def scope(placements: Scope) -> Iterator[None]:
    """Makes exactly these placements visible to operators."""
    token = _scope.set(placements)
    try:
        with _jit_cache_key(placements):
            yield
    finally:
        _scope.reset(token)


def placements() -> dict[str, int]:
    """Returns the placements in scope, as a dict from name to size.

    Inside a program these are its placements. Inside a `fax.map` they are the same without the
    mapped one. Outside any program there are none.

    Example:

      >>> import fax
      >>> @fax.program(regions=2, clients=3)
      ... def show():
      ...     return str(fax.placements())
      >>> show()
      "{'regions': 2, 'clients': 3}"
      >>> fax.placements()
      {}
    """
    return {p.name: p.size for p in _scope.get() or ()}


def resolve(name: str | None, caller: str) -> Placement:
    """The placement that an operator works on: the named one, or the only one in scope."""
    visible = _scope.get()
    if visible is None:
        raise PlacementError(
            f"{caller} was called outside a program. Call it in a function decorated "
            "with fax.program, as in @fax.program(clients=64)."
        )
    known = ", ".join(map(str, visible))
    if name is None:
        if not visible:
            raise PlacementError(
                f"{caller} was called where no placement is in scope: inside a fax.map, the "
                "mapped placement is not. Move the call out of the mapped function, or declare "
                "another placement for it."
            )
        if len(visible) > 1:
            raise PlacementError(
                f"{caller} needs placement=, because several placements are in scope: {known}."
            )
        return visible[0]
    for placement in visible:
        if placement.name == name:
            return placement
    raise PlacementError(
        f"{caller}: placement is {name!r}, which is not in scope. "
        f"In scope here: {known or 'none'}. A placement is in scope in the program that "
        "declares it, except inside a fax.map over it."
    )


def in_program() -> bool:
    """Whether a program is being traced."""
    return _scope.get() is not None


def without(placement: Placement) -> Scope:
    """The scope inside a map over ``placement``."""
    return tuple(p for p in _scope.get() or () if p != placement)
