"""Federated data in the HDF5 files of TensorFlow Federated's older releases."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fax import _arguments
from fax._extras import require
from fax._nearest import did_you_mean
from fax.data._columns import names_of
from fax.data._lazy import Lazy
from fax.data._protocol import ClientId, DataError, FederatedData


def from_hdf5(
    path: str | os.PathLike[str], *, features: Sequence[str] | None = None
) -> FederatedData:
    """Opens an HDF5 file whose data sets are ``examples/<client>/<feature>``.

    TensorFlow Federated published its data like this before it used SQLite, as in
    ``fed_emnist_train.h5``. A client's examples are read whenever they are asked for. The file is
    opened once in each process.

    Args:
      path: the path of the file.
      features: the names of the features to read. Default: all.

    Returns:
      The clients, in the order of the file, which is that of sorted ids. Strings are bytes.

    Raises:
      FileNotFoundError: if there is no such file.
      ModuleNotFoundError: if h5py is not installed.
      DataError: if the file is damaged, or has no clients; when a client is read, if it has no
        such features.

    Example:

      >>> import h5py, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "people.h5")
      >>> with h5py.File(path, "w") as file:
      ...     file["examples/ada/label"] = [3, 5]
      >>> fax.data.from_hdf5(path).client("ada")
      {'label': array([3, 5])}
    """
    where = "fax.data.from_hdf5"
    require(where, "h5py", "data")
    _arguments.path(where, "path", path, error=DataError)
    given = Path(path).absolute()
    if not given.is_file():
        raise FileNotFoundError(f"{where}: there is no file {given}")
    return HDF5(given, None if features is None else tuple(names_of(where, features)))


class HDF5(Lazy):
    """What `from_hdf5` returns."""

    def __init__(self, path: Path, features: tuple[str, ...] | None) -> None:
        self._path, self._features = path, features
        self._reset()
        super().__init__(self._examples())

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._opened: tuple[int, Any] | None = None

    def _length(self, client_id: ClientId) -> int:
        group = self._examples()[client_id]
        try:
            return len(group[self._names(group)[0]])
        except (IndexError, TypeError) as error:  # no data sets, or scalars
            raise DataError(
                f"client {client_id!r} of {self._path} has no data set with a row for each example."
            ) from error

    def _read(self, client_id: ClientId) -> dict[str, np.ndarray]:
        try:
            group = self._examples()[client_id]
            return {name: group[name][()] for name in self._names(group)}
        except (OSError, TypeError, IndexError) as error:  # damaged, or with other groups
            raise DataError(
                f"{self._path} cannot be read: {error}. It is damaged, or has no data sets "
                "examples/<client>/<feature>."
            ) from error

    def _names(self, group: Any) -> tuple[str, ...]:
        for name in self._features or ():
            if name not in group:
                raise DataError(f"there is no feature {name!r}. {did_you_mean(name, group)}")
        return self._features or tuple(group)

    def _examples(self) -> Any:
        """The group of clients. A file must not be used in a process forked from its own."""
        import h5py

        with self._lock:
            if self._opened is None or self._opened[0] != os.getpid():
                try:
                    self._opened = os.getpid(), h5py.File(self._path, "r")
                except OSError as error:
                    raise DataError(
                        f"{self._path} cannot be opened: {error}. It is damaged, or not an HDF5 "
                        "file."
                    ) from error
            file = self._opened[1]
        if "examples" not in file:
            raise DataError(
                f"{self._path} has no group examples, but {', '.join(file)}. Expected data sets "
                "examples/<client>/<feature>."
            )
        return file["examples"]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_opened")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()
