"""State of clients on the host or in a file, so that devices hold that of one cohort only."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from fax import _arguments
from fax.algorithms._algorithm import Algorithm, check_algorithm
from fax.algorithms._clients import without_rows
from fax.algorithms._row_file import WHERE, RowFile, create
from fax.algorithms._row_layout import Layout, rows_in
from fax.data import Cohort

PyTree = Any


class ClientStore:
    """Keeps the clients' state of an algorithm on the host, in memory or in a file.

    Whatever an algorithm keeps for each client (`fax.aggregators.PerClient`, in its own state or
    its aggregator's) stays here. ``round`` brings the rows of a cohort's clients to the devices and
    takes them back; the algorithm does not notice. What is kept grows with the clients that have
    taken part, not with the population: all others have the row that ``algorithm.init`` gives.

    A file is an SQLite database. It holds what was there at the last `flush` or `close`: if the
    process or the machine dies in between, later rounds are lost, and no half of a round is left.
    So flush where the rest of the state is saved; ``rounds`` tells whether the two belong together.
    Each row has a checksum. One process has the file at a time.

    Rows that were not flushed yet are in SQLite's temporary folder, which ``SQLITE_TMPDIR`` names.
    No error loses rounds. If there is no room for a round's rows, `round` and `scatter` raise
    OSError, and all rows are as before that round; if there is none for a `flush`, the file is as
    it was at the last one, and the store goes on with all rounds. Make room, and call it again.

    Args:
      algorithm: one of `fax.algorithms`, or of your own.
      path: of the file. Default: in memory.
      resume: whether to go on with a file that is there, or to make a new one.

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
      ...     print(store.models(state, [0, 1, 999_999]).round(2))
      [1.  0.  0.5]
    """

    def __init__(
        self,
        algorithm: Algorithm,
        path: str | os.PathLike[str] | None = None,
        *,
        resume: bool = False,
    ):
        check_algorithm(WHERE, algorithm)
        if path is not None:
            _arguments.path(WHERE, "path", path)
        _arguments.flag(WHERE, "resume", resume)
        self.algorithm = algorithm
        self.path: str | None = None if path is None else os.fspath(path)
        self._resume, self._step = resume, jax.jit(algorithm.round)
        self._layout: Layout
        self._rows: RowFile | None = None
        self._closed = False
        self._gathered: np.ndarray | None = None
        self.num_clients: int = 0
        if self.path is None and resume:
            raise ValueError(f"{WHERE}: resume=True needs path=, a file to go on with.")
        self._check_path()

    @property
    def rounds(self) -> int:
        """How many rounds the clients' state has seen, also before it was resumed."""
        return 0 if self._rows is None else self._rows.rounds

    def init(self, params: PyTree, model_state: PyTree = None) -> PyTree:
        """What ``algorithm.init`` returns, without rows of clients; opens the file.

        At the start all clients have the same row, so the rows are never there together. If a file
        is resumed, those who have not taken part have the row that it began with.

        Raises:
          ValueError: if the algorithm keeps nothing for clients, or other rows for some of them; or
            if the file is open elsewhere, is not a store's, or has other clients or rows. Nothing
            has happened then, and `init` can be called again.
          OSError: if the disk is full. No file is left behind then.
        """
        if self._rows is not None or self._closed:
            raise ValueError(f"{WHERE}: init was called before. Make a store for each run.")
        if jax.process_count() > 1:
            raise ValueError(
                f"{WHERE}: this is one of {jax.process_count()} processes, each of which would "
                "have rows of its own. Keep clients' state on the devices, or run in one process."
            )
        # An algorithm of one's own may have no second argument.
        arguments = (params,) if model_state is None else (params, model_state)
        layout = Layout(jax.eval_shape(self.algorithm.init, *arguments))

        def start(*arguments):
            state = self.algorithm.init(*arguments)
            some = (0, layout.num_clients // 2, layout.num_clients - 1)
            # Slices of what is alike in all rows: the compiler does not make the rows.
            return without_rows(state), [[x[i] for i in some] for x in rows_in(state)]

        state, some = jax.jit(start)(*arguments)
        samples = [[np.asarray(x) for x in own] for own in some]
        for leaf, (first, *others) in zip(layout.leaves, samples):
            if not all(np.array_equal(first, x, equal_nan=first.dtype.kind == "f") for x in others):
                raise ValueError(
                    f"{WHERE}: {leaf.name} differs from client to client in what init returns. A "
                    "store begins with the same row for all."
                )
        self._rows = self._open(layout, b"".join(own[0].tobytes() for own in samples))
        self._layout, self.num_clients = layout, layout.num_clients
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
        positions = self._positions(cohort.positions)
        values, counts = np.unique(positions, return_counts=True)
        if len(values) < len(positions):
            raise ValueError(
                f"{WHERE}: client {values[counts > 1][0]} occurs {np.max(counts)} times in the "
                "cohort, and would have as many new rows. Let the clients of a round be different."
            )
        sharding = getattr(cohort.positions, "sharding", None)
        sharding = sharding if isinstance(sharding, NamedSharding) else None
        numbers = np.arange(len(positions), dtype=np.int32)
        rows, numbers = jax.device_put((self._read(positions), numbers), sharding)
        self._gathered = positions
        return self._layout.fill(state, rows), dataclasses.replace(cohort, positions=numbers)

    def scatter(self, state: PyTree, cohort: Cohort) -> PyTree:
        """The state without rows, which are kept as those of the cohort's clients from now on.

        Args:
          state: as ``algorithm.round`` returned it.
          cohort: as `gather` was given it, the last time that it was called.

        Raises:
          ValueError: if it is another cohort, it has been scattered already, or rows have other
            shapes or dtypes than at the start.
          OSError: if there is no room for the rows. All rows are as before then.
        """
        file, positions = self._opened(), self._positions(cohort.positions)
        if self._gathered is None or not np.array_equal(positions, self._gathered):
            what = "nothing" if self._gathered is None else f"clients {_shown(self._gathered)}"
            raise ValueError(
                f"{WHERE}: the cohort to scatter has clients {_shown(positions)}, but {what} was "
                "gathered last. Gather each cohort once, right before its round, and scatter the "
                "same one."
            )
        rows = self._layout.encode(state, len(positions))
        file.write(zip(positions.tolist(), rows))
        self._gathered = None
        return without_rows(state)

    def params(self, state: PyTree) -> PyTree:
        """``algorithm.params``, of a state that `round` returned."""
        return self.algorithm.params(state)

    def models(self, state: PyTree, positions: Sequence[int]) -> PyTree:
        """``algorithm.models`` of some clients, leaves [positions, ...].

        Args:
          state: as `round` returned it.
          positions: the clients' positions in the data.

        Raises:
          ValueError: if there are no such clients, or the algorithm has one model for all.
        """
        rows = jax.device_put(self._read(self._positions(positions)))
        if self.algorithm.models is None:
            raise ValueError(f"{WHERE}: {self.algorithm!r} has one model for all, params(state).")
        return self.algorithm.models(self._layout.fill(state, rows))

    def flush(self) -> None:
        """Makes the file hold all rounds so far, all of them or, if that fails, none.

        Raises:
          OSError: if the disk is full. The store can still be used, and flushed again.
        """
        self._opened().flush()

    def close(self) -> None:
        """Flushes and closes the file. The store cannot be used any more.

        Raises:
          OSError: if the disk is full. The store is still open then.
        """
        if self._rows is not None and not self._closed:
            if self.path is not None:
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

    def _open(self, layout: Layout, start: bytes) -> RowFile:
        self._check_path()
        if self.path is not None and not self._resume:
            create(self.path, layout.facts(), start)
        rows = RowFile(self.path, layout.facts(), start)
        try:
            layout.check(rows.facts, self.path)
        except ValueError:
            rows.close()
            raise
        return rows

    def _check_path(self) -> None:
        if self.path is not None and self._resume and not os.path.exists(self.path):
            raise FileNotFoundError(f"{WHERE}: there is no {self.path!r} to go on with.")
        if self.path is not None and not self._resume and os.path.exists(self.path):
            raise FileExistsError(
                f"{WHERE}: {self.path!r} exists, with the clients' state of other rounds. Pass "
                "resume=True to go on with it, or remove it."
            )

    def _opened(self) -> RowFile:
        if self._rows is None or self._closed:
            raise ValueError(f"{WHERE}: the store is closed, or init was not called yet.")
        return self._rows

    def _drop(self) -> None:
        self._closed = True
        if self._rows is not None:
            self._rows.close()

    def _positions(self, positions: Any) -> np.ndarray:
        self._opened()
        if isinstance(positions, jax.core.Tracer):
            raise ValueError(
                f"{WHERE}: a store is no part of a jitted function. It jits the round."
            )
        positions = np.asarray(positions)
        if positions.ndim != 1 or positions.dtype.kind not in "iu":
            raise ValueError(
                f"{WHERE}: positions is {positions.dtype}{list(positions.shape)}, expected ints "
                "[clients], positions in the data."
            )
        strange = positions[(positions < 0) | (positions >= self.num_clients)]
        if len(strange):
            raise ValueError(
                f"{WHERE}: there is no row for client {strange[0]}: the algorithm was made for "
                f"num_clients={self.num_clients}."
            )
        return positions

    def _read(self, positions: np.ndarray) -> list[np.ndarray]:
        rows = map(self._opened().read, positions.tolist())
        return self._layout.decode(rows, len(positions))


def _shown(positions: np.ndarray) -> str:
    some = ", ".join(map(str, positions[:8]))
    return f"[{some}, ...]" if len(positions) > 8 else f"[{some}]"
