"""State of clients on the host or in a file, so that devices hold that of one cohort only."""

from __future__ import annotations

import dataclasses
import json
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.tree_util import keystr, tree_leaves_with_path

from fax import _arguments
from fax.aggregators import PerClient
from fax.algorithms._algorithm import Algorithm, check_algorithm
from fax.algorithms._clients import is_per_client
from fax.data import Cohort

PyTree = Any
WHERE = "fax.algorithms.ClientStore"
_FORMAT = "clients of fax 1"
_START = -1  # the row of clients that have not taken part
_TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE clients (position INTEGER PRIMARY KEY, checksum INTEGER NOT NULL, row BLOB NOT NULL);
"""


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """An array of a client's row."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class ClientStore:
    """Keeps the clients' state of an algorithm on the host, in memory or in a file.

    Whatever an algorithm keeps for each client (`fax.aggregators.PerClient`, in its own state or
    its aggregator's) stays here. ``round`` brings the rows of a cohort's clients to the devices and
    takes them back; the algorithm does not notice. What is kept grows with the clients that have
    taken part, not with the population: all others have the row that ``algorithm.init`` gives.

    A file is an SQLite database. It holds what was there at the last `flush` or `close`: if the
    process or the machine dies in between, later rounds are undone when the file is opened again,
    and no half of a round is left. So flush where the rest of the state is saved; ``rounds`` tells
    whether the two belong together. Each row has a checksum. One process has the file at a time.

    Args:
      algorithm: one of `fax.algorithms`, or of your own.
      path: of the file. Default: in memory.
      resume: whether to go on with a file that is there, or to make a new one.

    Attributes:
      rounds: how many rounds the clients' state has seen, also before it was resumed.

    Raises:
      FileExistsError: if there is a file already, and ``resume`` is false.
      FileNotFoundError: if there is none, and ``resume`` is true.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2
      >>> algorithm = fax.algorithms.apfl(loss, optax.sgd(0.1), num_clients=1_000_000)
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(3)}, "bob": {"x": jnp.zeros(3)}})
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=3)
      >>> with fax.algorithms.ClientStore(algorithm) as store:
      ...     state = store.init(jnp.zeros(()))
      ...     for _ in range(200):
      ...         state, metrics = store.round(state, next(rounds))
      ...     print(store.params(state, [0, 1, 999_999]).round(2))
      [1.  0.  0.5]
    """

    def __init__(
        self, algorithm: Algorithm, path: str | os.PathLike | None = None, *, resume: bool = False
    ):
        check_algorithm(WHERE, algorithm)
        if path is not None:
            _arguments.path(WHERE, "path", path)
        _arguments.flag(WHERE, "resume", resume)
        self.algorithm = algorithm
        self.rounds = 0
        self.path = None if path is None else os.fspath(path)
        self._resume, self._step = resume, jax.jit(algorithm.round)
        self._file: sqlite3.Connection | None = None
        self._leaves: list[_Leaf] = []
        self._structures: list[Any] = []
        self.num_clients = 0
        if self.path is None and resume:
            raise ValueError(f"{WHERE}: resume=True needs path=, a file to go on with.")
        if self.path is not None and resume and not os.path.exists(self.path):
            raise FileNotFoundError(f"{WHERE}: there is no {self.path!r} to go on with.")
        if self.path is not None and not resume and os.path.exists(self.path):
            raise FileExistsError(
                f"{WHERE}: {self.path!r} exists, with the clients' state of other rounds. Pass "
                "resume=True to go on with it, or remove it."
            )

    def init(self, params: PyTree, model_state: PyTree = None) -> PyTree:
        """What ``algorithm.init`` returns, without rows of clients; opens the file.

        At the start all clients have the same row, so the rows are never there together. If a file
        is resumed, those who have not taken part have the row that it began with.

        Raises:
          ValueError: if the algorithm keeps nothing for clients, or other rows for some of them; or
            if the file is open elsewhere, is not a store's, or has other clients or rows.
        """
        if self._leaves:
            raise ValueError(f"{WHERE}: init was called before. Make a store for each run.")
        if jax.process_count() > 1:
            raise ValueError(
                f"{WHERE}: this is one of {jax.process_count()} processes, each of which would "
                "have rows of its own. Keep clients' state on the devices, or run in one process."
            )
        self._learn(jax.eval_shape(self.algorithm.init, params, model_state))

        def start(params, model_state):
            state = self.algorithm.init(params, model_state)
            some = (0, self.num_clients // 2, self.num_clients - 1)
            # Slices of what is alike in all rows: the compiler does not make the rows.
            return _without_rows(state), [[x[i] for i in some] for x in _rows(state)]

        state, some = jax.jit(start)(params, model_state)
        samples = [[np.asarray(x) for x in own] for own in some]
        for leaf, (first, *others) in zip(self._leaves, samples):
            if not all(np.array_equal(first, x, equal_nan=first.dtype.kind == "f") for x in others):
                raise ValueError(
                    f"{WHERE}: {leaf.name} differs from client to client in what init returns. A "
                    "store begins with the same row for all."
                )
        self._open([own[0] for own in samples])
        return state

    def round(self, state: PyTree, cohort: Cohort) -> tuple[PyTree, dict[str, jax.Array]]:
        """A round of the algorithm, jitted: `gather`, ``algorithm.round`` and `scatter`."""
        state, own = self.gather(state, cohort)
        state, metrics = self._step(state, own)
        return self.scatter(state, cohort), metrics

    def gather(self, state: PyTree, cohort: Cohort) -> tuple[PyTree, Cohort]:
        """The state with the rows of the cohort's clients, and the cohort numbered by these rows.

        Rows are spread over devices as the cohort is.

        Raises:
          ValueError: if a client occurs twice, for it would have two new rows, or has no row.
        """
        positions = self._positions(cohort.client_ids)
        values, counts = np.unique(positions, return_counts=True)
        if len(values) < len(positions):
            raise ValueError(
                f"{WHERE}: client {values[counts > 1][0]} occurs {np.max(counts)} times in the "
                "cohort, and would have as many new rows. Let the clients of a round be different."
            )
        sharding = getattr(cohort.client_ids, "sharding", None)
        sharding = sharding if isinstance(sharding, NamedSharding) else None
        numbers = np.arange(len(positions), dtype=np.int32)
        rows, numbers = jax.device_put((self._read(positions), numbers), sharding)
        return self._with_rows(state, rows), dataclasses.replace(cohort, client_ids=numbers)

    def scatter(self, state: PyTree, cohort: Cohort) -> PyTree:
        """The state without rows, which are kept as those of the cohort's clients from now on.

        Args:
          state: as ``algorithm.round`` returned it.
          cohort: as `gather` was given it.

        Raises:
          ValueError: if rows have other shapes or dtypes than at the start.
        """
        positions = self._positions(cohort.client_ids)
        rows = [np.asarray(x) for x in jax.device_get(_rows(state))]
        for leaf, x in zip(self._leaves, rows, strict=True):
            if x.shape != (len(positions), *leaf.shape) or x.dtype.name != leaf.dtype:
                raise ValueError(
                    f"{WHERE}: {leaf.name} has rows {x.dtype.name}{list(x.shape)} after a round, "
                    f"expected {len(positions)} of {leaf}."
                )
        self._write(zip(positions.tolist(), zip(*rows)))
        self.rounds += 1
        return _without_rows(state)

    def params(self, state: PyTree, client_ids: Sequence[int] | None = None) -> PyTree:
        """``algorithm.params``, where it depends on clients' rows with those of some clients.

        Args:
          state: as `round` returned it.
          client_ids: positions in the data. May be left out if the parameters are no client's.
        """
        if client_ids is not None:
            rows = jax.device_put(self._read(self._positions(client_ids)))
            return self.algorithm.params(self._with_rows(state, rows))
        try:
            return self.algorithm.params(state)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{WHERE}: the parameters are clients' own. Pass client_ids=, whose."
            ) from error

    def flush(self) -> None:
        """Makes the file hold all rounds so far, all of them or, if that fails, none."""
        file = self._opened()
        file.execute("UPDATE facts SET value = ? WHERE name = 'rounds'", [str(self.rounds)])
        file.execute("COMMIT")
        file.execute("BEGIN IMMEDIATE")

    def close(self) -> None:
        """Flushes and closes the file. The store cannot be used any more."""
        if self._file is not None:
            self.flush()
            self._drop()

    def __repr__(self) -> str:
        where = "memory" if self.path is None else repr(self.path)
        return (
            f"ClientStore({self.algorithm!r}, clients={self.num_clients}, rounds={self.rounds}, "
            f"in {where})"
        )

    def __enter__(self) -> ClientStore:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Closes the file; after an exception without flushing, as if the process had died."""
        if kind is None:
            self.close()
        else:
            self._drop()

    def _learn(self, state: PyTree) -> None:
        """Takes note of what there is for each client."""
        flat = tree_leaves_with_path(state, is_leaf=is_per_client)
        parts = [(keystr(path), x.rows) for path, x in flat if is_per_client(x)]
        self._structures = [jax.tree.structure(rows) for _, rows in parts]
        counts: dict[Any, str] = {}
        for outer, rows in parts:
            for path, x in tree_leaves_with_path(rows):
                name = f"state{outer}{keystr(path)}"
                if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
                    raise ValueError(
                        f"{WHERE}: {name} is {x.dtype}, which is no plain number. Let the "
                        "algorithm keep jax.random.key_data of keys."
                    )
                counts[x.shape[0] if x.shape else None] = name
                self._leaves.append(_Leaf(name, x.shape[1:], x.dtype.name))
        if len(counts) != 1 or None in counts:
            found = "nothing" if not counts else f"{sorted(map(str, counts))} rows"
            raise ValueError(
                f"{WHERE}: the algorithm keeps {found} for clients, expected arrays in "
                "fax.aggregators.PerClient, each with a row for every client."
            )
        (self.num_clients,) = counts

    def _open(self, start: list[np.ndarray]) -> None:
        facts = {
            "format": _FORMAT,
            "num_clients": str(self.num_clients),
            "leaves": json.dumps([dataclasses.astuple(leaf) for leaf in self._leaves]),
        }
        file = sqlite3.connect(self.path or ":memory:", isolation_level=None, timeout=0)
        try:
            if self.path is None:
                file.execute("PRAGMA journal_mode = OFF")  # nobody can come back to it
            file.execute("BEGIN IMMEDIATE")
            if self._resume:
                self.rounds = self._check(
                    dict(file.execute("SELECT name, value FROM facts")), facts
                )
            else:
                for statement in _TABLES.split(";"):
                    file.execute(statement)
                pairs = {**facts, "rounds": "0"}.items()
                file.executemany("INSERT INTO facts VALUES (?, ?)", pairs)
        except sqlite3.Error as error:
            file.close()
            locked = "locked" in str(error)
            what = "is open in another store" if locked else f"is not a store's file ({error})"
            raise ValueError(f"{WHERE}: {self.path!r} {what}.") from error
        except ValueError:
            file.close()
            raise
        self._file = file
        if not self._resume:
            self._write([(_START, start)])
            self.flush()

    def _check(self, found: dict[str, str], expected: dict[str, str]) -> int:
        """Checks that a file is of this algorithm; returns its rounds."""
        if found.get("format") != _FORMAT:
            raise ValueError(
                f"{WHERE}: {self.path!r} has the format {found.get('format')!r}, expected "
                f"{_FORMAT!r}."
            )
        if found["num_clients"] != expected["num_clients"]:
            raise ValueError(
                f"{WHERE}: {self.path!r} is of {found['num_clients']} clients, but the algorithm "
                f"has {self.num_clients}."
            )
        if found["leaves"] != expected["leaves"]:
            old = {name: _Leaf(name, tuple(s), d) for name, s, d in json.loads(found["leaves"])}
            new = {leaf.name: leaf for leaf in self._leaves}
            name = next(name for name in {**new, **old} if new.get(name) != old.get(name))
            raise ValueError(
                f"{WHERE}: {self.path!r} has {old.get(name, 'no')} rows of {name}, but the "
                f"algorithm has {new.get(name, 'none')}."
            )
        return int(found["rounds"])

    def _opened(self) -> sqlite3.Connection:
        if self._file is None:
            raise ValueError(f"{WHERE}: the store is closed, or init was not called yet.")
        return self._file

    def _drop(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _positions(self, client_ids: Any) -> np.ndarray:
        if isinstance(client_ids, jax.core.Tracer):
            raise ValueError(
                f"{WHERE}: a store is no part of a jitted function. It jits the round."
            )
        positions = np.asarray(client_ids)
        if positions.ndim != 1 or positions.dtype.kind not in "iu":
            raise ValueError(
                f"{WHERE}: client_ids is {positions.dtype}{list(positions.shape)}, expected ints "
                "[clients], positions in the data."
            )
        strange = positions[(positions < 0) | (positions >= self.num_clients)]
        if len(strange):
            raise ValueError(
                f"{WHERE}: there is no row for client {strange[0]}: the algorithm was made for "
                f"num_clients={self.num_clients}."
            )
        return positions

    def _with_rows(self, state: PyTree, rows: Iterable[jax.Array]) -> PyTree:
        leaves, structures = iter(rows), iter(self._structures)

        def fill(_):
            structure = next(structures)
            own = [next(leaves) for _ in range(structure.num_leaves)]
            return PerClient(jax.tree.unflatten(structure, own))

        return _of_parts(fill, state)

    def _read(self, positions: np.ndarray) -> list[np.ndarray]:
        rows = [
            np.empty((len(positions), *x.shape), jax.numpy.dtype(x.dtype)) for x in self._leaves
        ]
        for number, position in enumerate(positions.tolist()):
            for x, value in zip(rows, self._row(position)):
                x[number] = value
        return rows

    def _row(self, position: int) -> Iterable[np.ndarray]:
        query = "SELECT checksum, row FROM clients WHERE position = ?"
        file = self._opened()
        found = file.execute(query, [position]).fetchone()
        checksum, row = found or file.execute(query, [_START]).fetchone()
        dtypes = [jax.numpy.dtype(leaf.dtype) for leaf in self._leaves]
        sizes = [int(np.prod(leaf.shape)) for leaf in self._leaves]
        total = sum(dtype.itemsize * size for dtype, size in zip(dtypes, sizes))
        if len(row) != total or zlib.crc32(row) != checksum:
            raise ValueError(
                f"{WHERE}: the row of client {position} in {self.path!r} is damaged. Go on with a "
                "copy of the file."
            )
        offset = 0
        for leaf, dtype, size in zip(self._leaves, dtypes, sizes):
            yield np.frombuffer(row, dtype, size, offset).reshape(leaf.shape)
            offset += dtype.itemsize * size

    def _write(self, rows: Iterable[tuple[int, Sequence[np.ndarray]]]) -> None:
        def encoded():
            for position, row in rows:
                data = b"".join(x.tobytes() for x in row)
                yield position, zlib.crc32(data), data

        self._opened().executemany("INSERT OR REPLACE INTO clients VALUES (?, ?, ?)", encoded())


def _rows(state: PyTree) -> list[jax.Array]:
    parts = jax.tree.leaves(state, is_leaf=is_per_client)
    return [x for part in parts if is_per_client(part) for x in jax.tree.leaves(part)]


def _without_rows(state: PyTree) -> PyTree:
    return _of_parts(lambda part: PerClient(None), state)


def _of_parts(fn: Callable[[PerClient], PerClient], state: PyTree) -> PyTree:
    return jax.tree.map(lambda x: fn(x) if is_per_client(x) else x, state, is_leaf=is_per_client)
