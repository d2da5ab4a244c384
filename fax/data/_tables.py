"""Federated data of tables and lists of examples in memory, divided by a column."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fax import _arguments
from fax.data import partition
from fax.data._columns import check_nothing_missing, chosen, column_array, kept
from fax.data._memory import InMemory
from fax.data._protocol import DataError


def from_pandas(frame: Any, client: str, *, features: Sequence[str] | None = None) -> InMemory:
    """Makes a client for each value in a column of a table of pandas or polars.

    The order of a client's rows stays, and so do the dtypes of columns. Columns of strings become
    arrays of dtype object. If the elements of a column are arrays or lists, they are stacked.

    Args:
      frame: a ``DataFrame``.
      client: the name of the column that says whose a row is. It holds ints, bools or strings.
      features: the names of the columns to keep. Default: all but ``client``.

    Returns:
      The clients, in the order of the values in ``client``. The id of a client is its value as a
      string.

    Raises:
      DataError: if there is no such column, if values are missing in a column that is not of
        floats, or if the elements of a column have different shapes.

    Example:

      >>> import pandas as pd
      >>> frame = pd.DataFrame({"user": ["bob", "ada", "bob"], "x": [1.0, 2.0, 3.0]})
      >>> data = fax.data.from_pandas(frame, client="user")
      >>> data.client_ids(), data.client("bob")
      (('ada', 'bob'), {'x': array([1., 3.])})
    """
    where = "fax.data.from_pandas"
    if not hasattr(frame, "columns") or not hasattr(frame, "dtypes"):
        raise DataError(
            f"{where}: frame is {_arguments.shown(frame)}, expected a DataFrame. pandas.read_csv "
            "reads one from a file, and fax.data.from_records takes a list of dicts."
        )
    columns = list(frame.columns)
    if len(set(columns)) < len(columns):
        raise DataError(f"{where}: the columns {columns} have a name twice. Rename one of them.")
    names = chosen(where, columns, client, features)
    arrays = {name: _array(where, name, frame[name]) for name in dict.fromkeys([client, *names])}
    return _divided(where, arrays, client, names)


def from_records(
    records: Iterable[Mapping[str, Any]], client: str, *, features: Sequence[str] | None = None
) -> InMemory:
    """Makes a client for each value in a field of examples that come one by one.

    The records may come from a generator, such as a stream or the lines of a file. They are read to
    the end, and kept in memory.

    Args:
      records: an iterable of mappings from names to values, all with the same names.
      client: the name of the field that says whose an example is. It holds ints, bools or strings.
      features: the names of the fields to keep. Default: all but ``client``.

    Returns:
      The clients, in the order of the values in ``client``. The id of a client is its value as a
      string.

    Raises:
      DataError: if there are no records, if a record has other names than the first, if a value is
        missing, or if the values of a field have different shapes.

    Example:

      >>> records = [
      ...     {"user": "bob", "x": [1.0, 0.0], "y": 1},
      ...     {"user": "ada", "x": [0.0, 2.0], "y": 0},
      ... ]
      >>> fax.data.from_records(records, client="user").client("ada")
      {'x': array([[0., 2.]]), 'y': array([0])}
    """
    where = "fax.data.from_records"
    if hasattr(records, "columns") and hasattr(records, "dtypes"):
        raise DataError(
            f"{where}: records is {_arguments.shown(records)}, expected an iterable of mappings, "
            "one for each example. fax.data.from_pandas takes a DataFrame."
        )
    if isinstance(records, Mapping | str | bytes) or not isinstance(records, Iterable):
        raise DataError(
            f"{where}: records is {_arguments.of_type(records)}, expected an iterable of mappings, "
            "one for each example."
        )
    columns: dict[str, list[Any]] = {}
    for number, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise DataError(
                f"{where}: record {number} is {_arguments.of_type(record)}, expected a mapping "
                "from names to values."
            )
        if number == 0:
            names = chosen(where, list(record), client, features)
            columns = {name: [] for name in dict.fromkeys([client, *names])}
            all_names = set(record)
        if set(record) != all_names:
            different = sorted(map(str, set(record) ^ all_names))
            raise DataError(
                f"{where}: record {number} differs from the first in having or lacking "
                f"{', '.join(different)}. All records need the same names."
            )
        for name, values in columns.items():
            values.append(kept(record[name]))
    if not columns:
        raise DataError(f"{where}: there are no records.")
    arrays = {name: column_array(where, name, values) for name, values in columns.items()}
    return _divided(where, arrays, client, names)


def _array(where: str, name: str, column: Any) -> np.ndarray:
    """A column of a table. Missing values would turn ints into floats; NaNs of floats may stay."""
    if not isinstance(column.dtype, np.dtype) or column.dtype.kind not in "fc":
        missing = column.isna() if hasattr(column, "isna") else column.is_null()
        check_nothing_missing(where, name, np.flatnonzero(missing.to_numpy()).tolist())
    return column_array(where, name, column.to_numpy())


def _divided(where: str, arrays: dict[str, np.ndarray], client: str, names: list[str]) -> InMemory:
    """Clients by the values of a column, which they keep if it is among the names of features."""
    ids = arrays.get(client)
    if ids is not None and not len(ids):
        raise DataError(f"{where}: there are no rows, expected at least one.")
    if ids is not None and ids.dtype.kind == "f" and ids.ndim == 1:
        # pandas makes floats of a column of ints where some are missing.
        check_nothing_missing(where, client, np.flatnonzero(np.isnan(ids)).tolist())
        raise DataError(
            f"{where}: column {client!r} has dtype {ids.dtype}, but ids of clients are ints, bools "
            "or strings. Convert it first, for example by astype(int)."
        )
    try:
        return partition.by_column(arrays, client, keep=client in names)
    except DataError as error:
        message = str(error).removeprefix("fax.data.partition.by_column: ")
        raise DataError(f"{where}: {message}") from error
