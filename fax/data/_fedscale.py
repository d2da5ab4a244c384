"""Federated data by a list of files that says whose each of them is, as FedScale publishes them."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fax import _arguments, _functions
from fax._nearest import did_you_mean
from fax.data._columns import column_array, kept, owners
from fax.data._lazy import Lazy
from fax.data._protocol import ClientId, DataError, FederatedData


def from_fedscale(
    path: str | os.PathLike[str],
    read: Callable[[dict[str, str]], Mapping[str, Any]],
    *,
    client: str = "client_id",
) -> FederatedData:
    """Makes federated data of a CSV file with a row for each example, and of the files it names.

    FedScale describes its data like this, with the columns ``client_id``, ``sample_path``,
    ``label_name`` and ``label_id``. The CSV file is kept in memory. Examples are read whenever
    their client is asked for. See Lai et al., arXiv:2105.11367.

    Args:
      path: the path of the CSV file, whose first line has the names of columns.
      read: ``read(row)`` returns an example, a mapping from names to values. The row is a dict of
        strings by the names of columns. If the data are sent to other processes, it has to be
        picklable.
      client: the name of the column that says whose an example is.

    Returns:
      The clients, in the order of their ids, which are strings.

    Raises:
      FileNotFoundError: if there is no such file.
      DataError: if the file has no such column, no rows, or a row with too many or too few values;
        when a client is read, if its examples have different names or shapes.

    Example:

      >>> import pathlib, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> _ = (folder / "train.csv").write_text(
      ...     "client_id,sample_path,label_name,label_id\\n7,a.txt,cat,0\\n3,b.txt,dog,1\\n")
      >>> _ = (folder / "a.txt").write_text("12"), (folder / "b.txt").write_text("5")
      >>> def read(row):
      ...     return {"x": int((folder / row["sample_path"]).read_text())}
      >>> fax.data.from_fedscale(folder / "train.csv", read).client("7")
      {'x': array([12])}
    """
    where = "fax.data.from_fedscale"
    _arguments.path(where, "path", path, error=DataError)
    _functions.function(where, "read", read, {1: "read(row)"}, error=DataError)
    given = Path(path).absolute()
    if not given.is_file():
        raise FileNotFoundError(f"{where}: there is no file {given}")
    with given.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        try:
            names = next(lines, [])
            rows = [line for line in lines if line]
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{where}: {given} cannot be read: {error}.") from error
    if client not in names:
        raise DataError(f"{where}: {given} has no column {client!r}. {did_you_mean(client, names)}")
    for number, row in enumerate(rows):
        if len(row) != len(names):
            raise DataError(
                f"{where}: row {number} of {given} has {len(row)} values for {len(names)} columns."
            )
    ids, parts = owners(where, client, [row[names.index(client)] for row in rows])
    own = {key: [rows[i] for i in part] for key, part in zip(ids, parts, strict=True)}
    return FedScale(where, read, names, own)


class FedScale(Lazy):
    """What `from_fedscale` returns: some rows of the CSV file for each client."""

    def __init__(
        self,
        where: str,
        read: Callable[..., Any],
        names: list[str],
        rows: Mapping[Any, list[list[str]]],
    ) -> None:
        super().__init__(rows)
        self._where, self._example_of, self._names, self._rows = where, read, names, rows

    def _length(self, client_id: ClientId) -> int:
        return len(self._rows[client_id])

    def _read(self, client_id: ClientId) -> dict[str, np.ndarray]:
        columns: dict[str, list[Any]] = {}
        for row in self._rows[client_id]:
            example = self._example_of(dict(zip(self._names, row, strict=True)))
            if not isinstance(example, Mapping) or (columns and example.keys() != columns.keys()):
                found = sorted(example) if isinstance(example, Mapping) else type(example).__name__
                wanted = sorted(columns) or "a mapping from names to values"
                raise DataError(
                    f"{self._where}: read returned {found} for {row}, expected {wanted}."
                )
            for name, value in example.items():
                columns.setdefault(name, []).append(kept(value))
        how = "for example in read"
        return {name: column_array(self._where, name, x, how) for name, x in columns.items()}
