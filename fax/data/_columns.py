"""Columns of other libraries' tables and lists as arrays, without a change of their values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fax import _arguments
from fax._nearest import did_you_mean
from fax.data._assignment import group_by_owner
from fax.data._check_examples import exact_array
from fax.data._protocol import DataError

PAD = "for example with fax.data.pad"


def column_array(where: str, name: str, values: Any, how: str = PAD) -> np.ndarray:
    """A column as an array. If its elements are arrays or lists, they are stacked.

    Args:
      where: the name of the function that was called.
      name: the name of the column.
      values: its elements.
      how: how to pad elements of different shapes. It ends the message.
    """
    if isinstance(values, np.ma.MaskedArray):
        hidden = np.nonzero(np.ma.getmaskarray(values))[0]
        check_nothing_missing(where, name, np.unique(hidden).tolist())
        values = values.data
    if isinstance(values, np.ndarray) and not values.dtype.hasobject:
        return values
    rows = [
        value if np.isscalar(value) or np.ma.is_masked(value) else exact_array(value)
        for value in values
    ]
    check_nothing_missing(where, name, [i for i, row in enumerate(rows) if _is_missing(row)])
    strings = [row for row in rows if isinstance(row, str | bytes)]
    if strings:
        if len({isinstance(row, bytes) for row in strings}) > 1 or len(strings) < len(rows):
            kinds = sorted({type(row).__name__ for row in rows})
            raise DataError(
                f"{where}: column {name!r} mixes {' and '.join(kinds)}. Convert it to one type."
            )
        return np.array(rows, object)
    first_rows: dict[tuple[int, ...], int] = {}
    for i, row in enumerate(rows):
        first_rows.setdefault(np.shape(row), i)
    if len(first_rows) > 1:
        (one, i), (other, j), *_ = first_rows.items()
        raise DataError(
            f"{where}: column {name!r} has the shape {one} in row {i}, but {other} in row {j}. Pad "
            f"or crop them to one shape, {how}."
        )
    return exact_array(rows)


def kept(value: Any) -> Any:
    """A value that stays as it is, even if whoever made it writes the next one to its memory."""
    return value.copy() if isinstance(value, np.ndarray) else value


def check_nothing_missing(where: str, name: str, rows: Sequence[int]) -> None:
    """Checks that there are no rows without a value in a column."""
    if len(rows):
        raise DataError(
            f"{where}: column {name!r} has {len(rows)} missing value"
            f"{'' if len(rows) == 1 else 's'}, the first in row {rows[0]}. Fill them, or drop "
            "these rows."
        )


def _is_missing(row: Any) -> bool:
    """Whether an element stands for no value: None, pandas' NA and NaT, and what a mask hides."""
    if isinstance(row, np.ma.MaskedArray):
        return True
    value = (
        row.item() if isinstance(row, np.ndarray) and row.dtype.hasobject and row.ndim == 0 else row
    )
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def chosen(
    where: str, columns: Sequence[Any], client: str | None, features: Sequence[str] | None
) -> list[str]:
    """The names of the columns that become features: by default all but that of clients."""
    for column in columns:
        if not isinstance(column, str):
            raise DataError(
                f"{where}: a column is named {column!r:.80}, {_arguments.of_type(column)}. Names "
                "of features have to be strings; rename the column."
            )
    if client is not None:
        _arguments.text(where, "client", client, "the name of a column", error=DataError)
    names = None if features is None else names_of(where, features)
    for name in [*([] if client is None else [client]), *(names or ())]:
        if name not in columns:
            raise DataError(f"{where}: there is no column {name!r}. {did_you_mean(name, columns)}")
    if names is None:
        names = [name for name in columns if name != client]
    if not names:
        raise DataError(
            f"{where}: there is no column but {client!r}, so examples have no features."
        )
    return names


def names_of(where: str, features: Any) -> list[str]:
    """The names in the argument ``features``, which may be an iterator, an array or an index."""
    text = isinstance(features, str)
    names = list(features) if isinstance(features, Iterable) and not text else []
    if not names or not all(isinstance(name, str) for name in names):
        example = f", [{features!r}]" if text else ""
        raise DataError(
            f"{where}: features is {features!r:.80}, expected a list of names{example}."
        )
    return list(map(str, names))


def owners(where: str, name: str, values: Any) -> tuple[list[str], list[np.ndarray]]:
    """The ids of clients in the order of their values, and the positions of their examples."""
    array = column_array(where, name, values)
    if len(array) == 0:
        raise DataError(f"{where}: there are no examples.")
    if array.ndim != 1:
        raise DataError(
            f"{where}: {name!r} has the shape {array.shape}, expected one id for each example."
        )
    if array.dtype.kind not in "biuOSU":
        raise DataError(
            f"{where}: {name!r} has dtype {array.dtype}, expected ids of clients: ints, bools or "
            "strings."
        )
    found, inverse = np.unique(array, return_inverse=True)
    ids = [v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else str(v) for v in found]
    return ids, group_by_owner(inverse, len(found))
