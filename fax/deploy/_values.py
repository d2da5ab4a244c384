"""Values of a plan: while it is made, where a value is; while it runs, references to rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

from jax.core import ShapedArray


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


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A row that a client holds.

    Attributes:
      client: whose row it is.
      slot: its name at the client.
    """

    client: Hashable
    slot: str


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """A placed value that stays with the clients. The server only knows where its rows are.

    Attributes:
      rows: a `Row` for each participant.
      shape: of the whole value.
      dtype: of the whole value.
      axis: the axis of the rows.
    """

    rows: tuple[Row, ...]
    shape: tuple[int, ...]
    dtype: Any
    axis: int = 0

    @property
    def clients(self) -> tuple[Hashable, ...]:
        """Whose rows they are."""
        return tuple(row.client for row in self.rows)

    def __repr__(self) -> str:
        size = ",".join(map(str, self.shape))
        return f"Held({self.dtype}[{size}], {len(self.rows)} rows along axis {self.axis})"


def aval_of(var: Any) -> ShapedArray:
    """The type of a variable of a jaxpr."""
    return var.aval


def row_of(aval: ShapedArray, axis: int) -> ShapedArray:
    """The type of one row."""
    shape = (*aval.shape[:axis], *aval.shape[axis + 1 :])
    return ShapedArray(shape, aval.dtype, weak_type=aval.weak_type)


def of_rows(aval: ShapedArray, size: int, axis: int) -> ShapedArray:
    """The type of a value with such rows."""
    shape = (*aval.shape[:axis], size, *aval.shape[axis:])
    return ShapedArray(shape, aval.dtype, weak_type=aval.weak_type)
