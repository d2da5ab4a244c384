"""Federated data in a folder with one `.npz` file for each client."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import math
import os
import re
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote

import numpy as np

from fax import _arguments
from fax.data._atomic_write import atomic_write, sync_to_disk
from fax.data._check_examples import (
    Schema,
    check_federated,
    checked_examples,
    is_numeric,
    read_client,
    utf8_of,
)
from fax.data._decompress import check_max_bytes, check_size
from fax.data._protocol import ClientId, DataError, FederatedData

_UNQUOTED = " +,=@()"  # not percent-encoded in file names, besides letters, digits and _.-~
_LONGEST_NAME = 255  # bytes, on nearly all file systems
_LONGEST_FEATURE = 10_000  # characters; a zip archive holds 65,535 bytes
_LONGEST_HEADER = 1 << 16  # bytes; NumPy writes a few hundred
_CHUNK = 1 << 20


class Files:
    """Federated data in a folder: each client is one ``.npz`` file, with an array for each feature.

    Nothing is read when the folder is opened, so it may have millions of clients. `client` and
    `num_examples` open only the client's own file. The first call of `client_ids` or ``len`` lists
    the folder and sorts the ids.

    A client's file is ``<id>.npz``, either in the folder itself or, as `Files.write` writes it, in
    one of 256 subfolders, named by the first two hexadecimal digits of the id's SHA-256 checksum.
    In file names, characters other than letters, digits, space and ``_.-~+,=@()`` are
    percent-encoded. File names have at most 255 bytes, which limits the length of ids. Files may be
    compressed. Arrays are read without pickle, so they can be of numbers, bools or fixed-width
    strings.

    Args:
      folder: the path of the folder.
      max_bytes: the most bytes that a client's arrays may have. Default: 256 MiB, or 100 times the
        size of the client's file if that is more.

    Raises:
      FileNotFoundError: if there is no such folder.
      DataError: when a client is read, if there is no such client, or its file is damaged, becomes
        too large or has other features than the first client; when the folder is listed, if it has
        no clients, or ``.npz`` files whose names are not those of clients.

    Example:

      >>> import pathlib, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp(), "people")
      >>> people = fax.data.InMemory({"ada": {"age": jnp.array([36])}})
      >>> data = fax.data.Files.write(folder, people)
      >>> fax.data.Files(folder).client("ada")
      {'age': array([36], dtype=int32)}
    """

    def __init__(self, folder: str | os.PathLike[str], *, max_bytes: int | None = None) -> None:
        self._max_bytes = check_max_bytes("fax.data.Files", max_bytes)
        _arguments.path("fax.data.Files", "folder", folder, error=DataError)
        self._folder = Path(folder).absolute()
        if not self._folder.is_dir():
            raise FileNotFoundError(f"fax.data.Files: there is no folder {self._folder}")
        self._schema = Schema()
        self._ids: tuple[str, ...] | None = None
        self._lock = threading.Lock()

    @staticmethod
    def write(folder: str | os.PathLike[str], data: FederatedData) -> Files:
        """Writes federated data to a folder, in 256 subfolders.

        The write is atomic: the folder appears under its name when all of it is on the disk. Client
        ids have to be strings, and features numbers or bools.

        Args:
          folder: the path of the folder, which must not exist.
          data: the data to write.

        Returns:
          The folder, opened.

        Raises:
          DataError: if the folder exists, or a client cannot be written.
          OSError: if the disk is full. No part of the folder is left behind.
        """
        check_federated("fax.data.Files.write", "data", data)
        _arguments.path("fax.data.Files.write", "folder", folder, error=DataError)
        folder, schema = Path(folder).absolute(), Schema()
        with atomic_write("fax.data.Files.write", folder) as temporary:
            temporary.mkdir()
            for client_id in data.client_ids():
                path = temporary / _file(client_id, sharded=True)
                examples = read_client(data, client_id)
                schema.check(client_id, examples)
                for name, array in examples.items():
                    if not is_numeric(array.dtype) or array.dtype.kind == "V":
                        raise DataError(
                            f"client {client_id!r}, feature {name!r} has dtype {array.dtype}, but "
                            "files can hold only NumPy's numbers and bools. Convert it with "
                            "fax.data.map, or use fax.data.SQLite.write, which can write byte "
                            "strings."
                        )
                    if "\0" in name or len(name) > _LONGEST_FEATURE:
                        raise DataError(
                            f"client {client_id!r}, feature {name!r:.80}: the name of a feature "
                            f"may have {_LONGEST_FEATURE} characters, and no null character. "
                            "Rename it with fax.data.map."
                        )
                path.parent.mkdir(exist_ok=True)
                if path.exists():  # on a file system that ignores case
                    raise DataError(f"client {client_id!r} has the file name of another client.")
                try:
                    _save(path, examples)
                except UnicodeEncodeError as error:
                    raise DataError(
                        f"client {client_id!r} has a feature whose name is not text: {error}."
                    ) from error
            for shard in (*temporary.iterdir(), temporary):
                sync_to_disk(shard)
        return Files(folder)

    def client_ids(self) -> tuple[str, ...]:
        if self._ids is None:
            with self._lock:
                if self._ids is None:
                    self._ids = self._listed()
        return self._ids

    def num_examples(self, client_id: ClientId) -> int:
        with self._open(client_id) as file, self._reading(client_id):
            # Decompress nothing but the header of the first array.
            with (
                zipfile.ZipFile(file) as archive,
                _opened(archive, archive.infolist()[0]) as member,
            ):
                shape, _, _ = _header(member)
            if not shape:
                raise ValueError("its first array is a scalar")
            return shape[0]

    def client(self, client_id: ClientId) -> dict[str, np.ndarray]:
        with self._open(client_id) as file, self._reading(client_id):
            arrays = _load(file, f"client {client_id!r}", self._max_bytes)
            examples = checked_examples(client_id, arrays)
            self._schema.check(client_id, examples)
            return examples

    def __len__(self) -> int:
        return len(self.client_ids())

    def __repr__(self) -> str:
        return f"Files({str(self._folder)!r})"

    def _open(self, client_id: ClientId) -> IO[bytes]:
        for sharded in (True, False):
            try:
                return (self._folder / _file(client_id, sharded)).open("rb")
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise DataError(f"client {client_id!r} cannot be read: {error}.") from error
        raise DataError(
            f"no client {client_id!r} in {self._folder}: there is neither "
            f"{_file(client_id, True)} nor {_file(client_id, False)}."
        )

    @contextlib.contextmanager
    def _reading(self, client_id: ClientId) -> Iterator[None]:
        """Turns any error that a damaged file can cause into a `DataError`."""
        try:
            yield
        except DataError as error:
            raise DataError(f"{self._folder}: {error}") from error.__cause__
        except Exception as error:
            raise DataError(
                f"{self._folder}: client {client_id!r} cannot be read: {error}. Its file is "
                "damaged or not an .npz file. Get it again."
            ) from error

    def _listed(self) -> tuple[str, ...]:
        """The ids of all files, in order."""
        ids: list[str] = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith(".npz"):
                    ids.append(_id(entry.name))
                elif re.fullmatch("[0-9a-f]{2}", entry.name) and entry.is_dir():
                    with os.scandir(entry.path) as shard:
                        names = [inner.name for inner in shard if inner.name.endswith(".npz")]
                    ids += [_id(f"{entry.name}/{name}") for name in names]
        if not ids:
            raise DataError(f"{self._folder} has neither .npz files nor folders of them.")
        ids.sort()
        for one, other in itertools.pairwise(ids):
            if one == other:
                raise DataError(f"{self._folder} has two files of client {one!r}. Remove one.")
        return tuple(ids)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def _file(client_id: ClientId, sharded: bool) -> str:
    """The path of a client's file in the folder."""
    if not isinstance(client_id, str):
        raise DataError(
            f"client {client_id!r:.80} has an id of type {type(client_id).__name__}, but ids in "
            "files are strings."
        )
    try:
        raw = utf8_of(client_id)
    except ValueError as error:
        raise DataError(f"client {client_id!r:.80} has no file name: {error}.") from error
    name = quote(raw, safe=_UNQUOTED) + ".npz"
    if len(name) > _LONGEST_NAME:
        raise DataError(
            f"client {client_id!r:.80} has an id of {len(client_id)} characters, whose file name "
            f"would have {len(name)} bytes, but at most {_LONGEST_NAME} are possible. Shorten ids, "
            "for example to their checksums, or use fax.data.SQLite.write."
        )
    return f"{hashlib.sha256(raw).hexdigest()[:2]}/{name}" if sharded else name


def _id(path: str) -> str:
    """The client whose file has this path. `_file` is the inverse."""
    name = path.rpartition("/")[2].removesuffix(".npz")
    client_id = unquote(name, errors="surrogateescape")
    if path != _file(client_id, sharded="/" in path):
        raise DataError(
            f"{path!r} is not the name of a client's file. The file of client {client_id!r} is "
            f"{_file(client_id, False)} or {_file(client_id, True)}. Rename it."
        )
    return client_id


def _save(path: Path, examples: dict[str, np.ndarray]) -> None:
    with path.open("xb") as file:
        # Not np.savez, which may pickle, and which cannot write a feature named "file".
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in examples.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _load(file: IO[bytes], where: str, max_bytes: int | None) -> dict[str, np.ndarray]:
    """All arrays of a file. They are read to their end, where zipfile compares the checksum."""
    arrays: dict[str, np.ndarray] = {}
    stored = file.seek(0, os.SEEK_END)
    file.seek(max(0, stored - (1 << 16) - 22))
    content = file.read()
    with zipfile.ZipFile(file) as archive:
        # zipfile does not compare the number of members with that at the end of the file.
        end = content.rfind(b"PK\5\6")
        if len(archive.infolist()) & 0xFFFF != int.from_bytes(
            content[end + 10 : end + 12], "little"
        ):
            raise ValueError("the list of its arrays is damaged")
        # No more bytes are read than the list says.
        size = sum(info.file_size for info in archive.infolist())
        check_size(where, size, max_bytes, stored)
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name == info.filename or name in arrays:
                raise ValueError(f"{info.filename!r:.80} is not an array, or occurs twice")
            with _opened(archive, info) as member:
                arrays[name] = _array(name, member)
    return arrays


def _opened(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    # zipfile's other methods decompress without a limit.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename!r:.80} is compressed by method {info.compress_type}")
    return archive.open(info)


def _array(name: str, member: IO[bytes]) -> np.ndarray:
    shape, fortran, dtype = _header(member)
    values = bytearray()
    while chunk := member.read(_CHUNK):
        values += chunk
    if dtype.hasobject or len(values) != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"feature {name!r:.80} has {len(values)} bytes for {dtype} of shape {shape}"
        )
    array = np.frombuffer(values, dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """The shape, the order and the dtype of an array in NumPy's format."""
    version = np.lib.format.read_magic(member)
    readers = {
        (1, 0): (2, np.lib.format.read_array_header_1_0),
        (2, 0): (4, np.lib.format.read_array_header_2_0),
    }
    if version not in readers:
        raise ValueError(f"version {version} of NumPy's format is not used for plain arrays")
    size, reader = readers[version]
    length = member.read(size)
    if int.from_bytes(length, "little") > _LONGEST_HEADER:
        raise ValueError("the header of an array is too long")
    header = member.read(int.from_bytes(length, "little"))
    shape, fortran, dtype = reader(io.BytesIO(length + header))
    if any(n < 0 for n in shape):
        raise ValueError(f"an array has the shape {shape}")
    return shape, fortran, dtype
