"""Federated data of Hugging Face's datasets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fax import _arguments
from fax.data._columns import check_nothing_missing, chosen, column_array, owners
from fax.data._lazy import Lazy
from fax.data._protocol import ClientId, DataError, FederatedData
from fax.data._tables import from_records


def from_huggingface(
    dataset: Any, client: str, *, features: Sequence[str] | None = None
) -> FederatedData:
    """Makes a client for each value in a column of a dataset of Hugging Face.

    A client's examples are read from the dataset's Arrow table whenever they are asked for. Numbers
    keep the dtypes that the dataset declares, images are decoded, and a transform of the dataset
    (``with_transform``) is applied. A streaming dataset is read to the end, and kept in memory.

    Args:
      dataset: a ``datasets.Dataset`` or ``datasets.IterableDataset``, which is one split.
      client: the name of the column that says whose an example is. It holds ints, bools or strings.
      features: the names of the columns to keep. Default: all but ``client``.

    Returns:
      The clients, in the order of the values in ``client``. The id of a client is its value as a
      string.

    Raises:
      DataError: if the dataset has several splits, or no such column; when a client is read, if
        values are missing or have different shapes.

    Example:

      >>> import datasets
      >>> table = {"user": ["bob", "ada", "bob"], "x": [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]}
      >>> data = fax.data.from_huggingface(datasets.Dataset.from_dict(table), client="user")
      >>> data.client_ids(), data.client("bob")["x"].tolist()
      (('ada', 'bob'), [[1.0, 0.0], [3.0, 0.0]])
    """
    where = "fax.data.from_huggingface"
    if isinstance(dataset, Mapping):
        names = list(map(str, dataset))
        example = f", such as dataset[{names[0]!r}]" if names else ""
        raise DataError(
            f"{where}: dataset is {_arguments.of_type(dataset)} with the splits "
            f"{', '.join(names) or '(none)'}. Pass one of them{example}."
        )
    if not hasattr(dataset, "features"):
        raise DataError(
            f"{where}: dataset is {_arguments.of_type(dataset)}, expected a datasets.Dataset or a "
            "datasets.IterableDataset."
        )
    if not hasattr(dataset, "__len__"):
        try:
            return from_records(dataset, client, features=features)
        except DataError as error:
            message = str(error).removeprefix("fax.data.from_records: ")
            raise DataError(f"{where}: {message}") from error
    names = chosen(where, dataset.column_names, client, features)
    ids = dataset.select_columns([client]).with_format("arrow")[:].column(0).to_pylist()
    found, parts = owners(where, client, ids)
    return HuggingFace(where, dataset, names, dict(zip(found, parts, strict=True)))


class HuggingFace(Lazy):
    """What `from_huggingface` returns: some rows of a dataset for each client."""

    def __init__(
        self, where: str, dataset: Any, names: list[str], rows: Mapping[Any, np.ndarray]
    ) -> None:
        super().__init__(rows)
        self._where, self._dataset, self._names, self._rows = where, dataset, names, rows

    def _length(self, client_id: ClientId) -> int:
        return len(self._rows[client_id])

    def _read(self, client_id: ClientId) -> dict[str, np.ndarray]:
        rows = self._rows[client_id].tolist()
        how = "for example with dataset.map and fax.data.pad"
        if self._dataset.format["type"] == "custom":  # a transform may make other columns
            columns = dict(self._dataset[rows])
            return {name: column_array(self._where, name, columns[name], how) for name in columns}
        chosen_columns = self._dataset.select_columns(self._names)
        # The format "numpy" decodes images and audio, but changes the dtypes of numbers, and drops
        # zeros at the end of byte strings.
        table = chosen_columns.with_format("arrow")[rows]
        for name in self._names:
            missing = np.flatnonzero(table.column(name).is_null().to_numpy())
            check_nothing_missing(self._where, name, missing.tolist())
        plain = {name: _as_they_are(self._where, name, table.column(name)) for name in self._names}
        rest = [name for name, values in plain.items() if values is None]
        decoded = self._dataset.select_columns(rest).with_format("numpy")[rows] if rest else {}
        return {
            name: column_array(self._where, name, decoded[name], how) if values is None else values
            for name, values in plain.items()
        }


def _as_they_are(where: str, name: str, column: Any) -> np.ndarray | None:
    """A column of bytes, numbers or bools, or of lists of numbers of one length. None if not."""
    if "binary" in str(column.type).partition("<")[0]:  # of which there are several types
        return column_array(where, name, column.to_pylist())
    values, shape = column.combine_chunks(), [len(column)]
    if hasattr(values, "chunks"):  # what combine_chunks returns depends on pyarrow's version
        if values.num_chunks != 1:
            return None
        values = values.chunk(0)
    values = getattr(values, "storage", values)
    while hasattr(values, "flatten") and hasattr(values.type, "value_type"):
        lengths = values.value_lengths().unique().to_pylist()
        if len(lengths) != 1:
            return None
        shape += lengths
        values = values.flatten()
        if values.null_count:
            raise DataError(f"{where}: column {name!r} has missing values in its lists. Fill them.")
    array = values.to_numpy(zero_copy_only=False)
    return array.reshape(shape) if array.dtype.kind in "biuf" else None
