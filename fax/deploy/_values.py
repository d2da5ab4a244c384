"""Values of a plan: while it is made, where a value is; while it runs, references to rows."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Hashable, Iterable
from typing import Any, Self

import jax
import numpy as np
from jax import export
from jax.core import ShapedArray
from jax.extend.core import JaxprEqn

import fax
from fax import _compat


class CutError(ValueError):
    """A program cannot be divided into what the server does and what each client does."""


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A value of a plan. Equal only to itself.

    Attributes:
      aval: its type.
      axis: None if the server has it. Otherwise each client has a row of it, and this is the axis
        of the rows.
    """

    aval: ShapedArray
    axis: int | None = None

    @property
    def held(self) -> bool:
        return self.axis is not None


class OfThisProcess:
    """What is of no use in another process, and does not change, so that it is its own copy."""

    _instead: str  # how to do it in another process

    def __reduce__(self) -> Any:
        raise TypeError(f"fax.deploy: a {type(self).__name__} cannot be pickled. {self._instead}")

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self


@dataclasses.dataclass(frozen=True, eq=False)
class Row(OfThisProcess):
    """A row that a client holds.

    Attributes:
      client: whose row it is.
      slot: its name at the client.
    """

    client: Hashable
    slot: str

    # A copy would not keep it from being freed.
    _instead = (
        "It refers to a row that a client holds for as long as this process refers to it. Bring "
        "rows to the server by Plan.fetch."
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """A placed value that stays with the clients. The server only knows where its rows are.

    Attributes:
      rows: a `Row` for each participant, None for one that failed.
      clients: whose rows they are.
      shape: of the whole value. None for a size that differs between clients.
      dtype: of the whole value.
      axis: the axis of the rows.
    """

    rows: tuple[Row | None, ...]
    clients: tuple[Hashable, ...]
    shape: tuple[int | None, ...]
    dtype: Any
    axis: int = 0

    @property
    def present(self) -> tuple[Hashable, ...]:
        """The clients that have a row: in a result, those that took part."""
        pairs = zip(self.clients, self.rows, strict=True)
        return tuple(client for client, row in pairs if row is not None)

    def __repr__(self) -> str:
        size = ",".join("?" if n is None else str(n) for n in self.shape)
        return f"Held({self.dtype}[{size}], {len(self.rows)} rows along axis {self.axis})"


def named(clients: Iterable[Hashable]) -> list[Hashable]:
    """The names of clients. NumPy's numbers, as in a cohort's positions, become Python's."""
    return [x.item() if isinstance(x, np.generic | jax.Array) else x for x in clients]


def aval_of(var: Any) -> ShapedArray:
    """The type of a variable of a jaxpr."""
    return var.aval


def differs(aval: ShapedArray) -> bool:
    """Whether a value has a size that differs between clients."""
    return any(map(export.is_symbolic_dim, aval.shape))


def row_of(aval: ShapedArray, axis: int) -> ShapedArray:
    """The type of one row."""
    shape = (*aval.shape[:axis], *aval.shape[axis + 1 :])
    return ShapedArray(shape, aval.dtype, weak_type=aval.weak_type)


def of_rows(aval: ShapedArray, size: int, axis: int) -> ShapedArray:
    """The type of a value with such rows."""
    shape = (*aval.shape[:axis], size, *aval.shape[axis:])
    return ShapedArray(shape, aval.dtype, weak_type=aval.weak_type)


_OPERATORS = pathlib.Path(fax.__file__).parent


def line_of(eqn: JaxprEqn) -> str:
    """The line that called an operator: a user's, or that of an algorithm or aggregator."""
    for file, line in _compat.frames_of(eqn):
        path = pathlib.Path(file)
        if path.parent not in (_OPERATORS, _OPERATORS / "primitives") and not _of_jax(path):
            return f"{file}:{line}"
    return "an unknown line"


def _of_jax(path: pathlib.Path) -> bool:
    return path.is_relative_to(pathlib.Path(jax.__file__).parent)
