"""Keeps clients' state on the host or in a file, so that devices hold only a cohort's rows."""

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

    The store holds what an algorithm keeps for each client (`fax.aggregators.PerClient`, in its own
    state or its aggregator's). `round` copies the rows of a cohort's clients to the devices and
    back; the algorithm works as without a store. Its size grows with the number of clients that
    have taken part, not with ``num_clients``: all others have the row from ``algorithm.init``.

    A file is an SQLite database. It contains all rounds up to the last `flush` or `close`: if the
    process or the machine dies, later rounds are lost, but no round is half written. So flush when
    you save the rest of the state; ``rounds`` tells whether the two belong together. Each row has a
    checksum. Only one process can open the file at a time.

    Rows that were not flushed yet are in SQLite's temporary folder, which ``SQLITE_TMPDIR`` sets.
    No error loses rounds. If there is no space for a round's rows, `round` and `scatter` raise
    OSError, and all rows are as before that round. If there is no space for a `flush`, the file is
    as it was at the last one, and the store keeps all rounds. Free some space, and call it again.

    Args:
      algorithm: one of `fax.algorithms`, or your own.
      path: the path of the file. Default: in memory.
      resume: whether to continue with an existing file, or to make a new one.

    Raises:
      FileExistsError: if the file exists, and ``resume`` is false.
      FileNotFoundError: if it does not exist, and ``resume`` is true.

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
            raise ValueError(f"{WHERE}: resume=True needs path=, a file to continue with.")
        self._check_path()

    @property
    def rounds(self) -> int:
        """The number of rounds of the clients' state, including those before it was resumed."""
        return 0 if self._rows is None else self._rows.rounds

    def init(self, params: PyTree, model_state: PyTree = None) -> PyTree:
        """Opens the file, and returns what ``algorithm.init`` returns, without rows of clients.

        Initially all clients have the same row, so the rows of all clients are never in memory. In
        a resumed file, clients that have not taken part have the initial row of that file.

        Raises:
          ValueError: if the algorithm keeps nothing for clients, or different initial rows; or if
            the file is open elsewhere, is not a store's, or has other clients or rows. Then nothing
            has changed, and `init` can be called again.
          OSError: if the disk is full. No file is left behind then.
        """
        if self._rows is not None or self._closed:
            raise ValueError(f"{WHERE}: init was called before. Make a store for each run.")
        if jax.process_count() > 1:
            raise ValueError(
                f"{WHERE}: this is one of {jax.process_count()} processes, and each would have "
                "separate rows. Keep clients' state on the devices, or run in one process."
            )
        # The init of a user's algorithm may have no second parameter.
        arguments = (params,) if model_state is None else (params, model_state)
        layout = Layout(jax.eval_shape(self.algorithm.init, *arguments))

        def start(*arguments):
            state = self.algorithm.init(*arguments)
            some = (0, layout.num_clients // 2, layout.num_clients - 1)
            # Slices of a broadcast: the compiler does not materialize all rows.
            return without_rows(state), [[x[i] for i in some] for x in rows_in(state)]

        state, some = jax.jit(start)(*arguments)
        samples = [[np.asarray(x) for x in own] for own in some]
        for leaf, (first, *others) in zip(layout.leaves, samples):
            if not all(np.array_equal(first, x, equal_nan=first.dtype.kind == "f") for x in others):
                raise ValueError(
                    f"{WHERE}: {leaf.name} differs between clients in what init returns. A store "
                    "starts with the same row for all clients."
                )
        self._rows = self._open(layout, b"".join(own[0].tobytes() for own in samples))
        self._layout, self.num_clients = layout, layout.num_clients
        return state

    def round(self, state: PyTree, cohort: Cohort) -> tuple[PyTree, dict[str, jax.Array]]:
        """Runs a round of the algorithm: `gather`, a jitted ``algorithm.round``, and `scatter`."""
        state, own = self.gather(state, cohort)
        state, metrics = self._step(state, own)
        return self.scatter(state, cohort), metrics

    def gather(self, state: PyTree, cohort: Cohort) -> tuple[PyTree, Cohort]:
        """Adds the rows of the cohort's clients to the state, and numbers the cohort by these rows.

        Rows are sharded like the cohort.

        Raises:
          ValueError: if a client occurs twice, as it would have two new rows, or has no row.
        """
        positions = self._positions(cohort.positions)
        values, counts = np.unique(positions, return_counts=True)
        if len(values) < len(positions):
            raise ValueError(
                f"{WHERE}: client {values[counts > 1][0]} occurs {np.max(counts)} times in the "
                "cohort, and would have as many new rows. The clients of a round must differ."
            )
        sharding = getattr(cohort.positions, "sharding", None)
        sharding = sharding if isinstance(sharding, NamedSharding) else None
        numbers = np.arange(len(positions), dtype=np.int32)
        rows, numbers = jax.device_put((self._read(positions), numbers), sharding)
        self._gathered = positions
        return self._layout.fill(state, rows), dataclasses.replace(cohort, positions=numbers)

    def scatter(self, state: PyTree, cohort: Cohort) -> PyTree:
        """Stores the new rows of the cohort's clients, and returns the state without rows.

        Args:
          state: the state that ``algorithm.round`` returned.
          cohort: the cohort that was last passed to `gather`.

        Raises:
          ValueError: if it is another cohort, it has already been scattered, or the rows' shapes or
            dtypes differ from those of the initial state.
          OSError: if there is no space for the rows. Then all rows are as before.
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
        """Returns ``algorithm.params`` of a state that `round` returned."""
        return self.algorithm.params(state)

    def models(self, state: PyTree, positions: Sequence[int]) -> PyTree:
        """Returns ``algorithm.models`` of some clients, leaves [positions, ...].

        Args:
          state: the state that `round` returned.
          positions: the clients' positions in the data.

        Raises:
          ValueError: if there are no such clients, or the algorithm has one model for all.
        """
        rows = jax.device_put(self._read(self._positions(positions)))
        if self.algorithm.models is None:
            raise ValueError(
                f"{WHERE}: {self.algorithm!r} has one model for all clients. Use params(state)."
            )
        return self.algorithm.models(self._layout.fill(state, rows))

    def flush(self) -> None:
        """Writes all rounds since the last flush to the file or, if that fails, none of them.

        Raises:
          OSError: if the disk is full. The store can still be used, and flushed again.
        """
        self._opened().flush()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all rows and the number of rounds to a new file, for a checkpoint.

        Raises:
          OSError: if the disk is full. No file is left behind then.
          DataError: if the file exists.
        """
        self._opened().save(os.fspath(_arguments.path(f"{WHERE}.save", "path", path)))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replaces all rows and the number of rounds by those that `save` has written.

        With a file of its own, the store has them there, too. Call it after `init`.

        Raises:
          FileNotFoundError: if there is no such file.
          ValueError: if it has the rows of other clients or parameters.
          OSError: if the disk is full. Nothing has changed then.
        """
        path = os.fspath(_arguments.path(f"{WHERE}.load", "path", path))
        rows = self._opened()
        if not os.path.exists(path):
            raise FileNotFoundError(f"{WHERE}: there is no file {path!r} to load.")
        rows.load(path)
        self._gathered = None

    def close(self) -> None:
        """Flushes and closes the file. The store cannot be used anymore.

        In a process that was forked from the one that opened the file, nothing is flushed.

        Raises:
          OSError: if the disk is full. The store is still open then.
        """
        if self._rows is not None and not self._closed:
            if self.path is not None and self._rows.is_own:
                self.flush()
            self._drop()

    def __repr__(self) -> str:
        where = "memory" if self.path is None else repr(self.path)
        return (
            f"ClientStore({self.algorithm!r}, clients={self.num_clients}, rounds={self.rounds}, "
            f"in {where})"
        )

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{WHERE}: a store cannot be pickled or copied, because only one process can use its "
            "rows. Write them with save(), and load() them into another store."
        )

    def __enter__(self) -> ClientStore:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Closes the file. After an exception it does not flush, as if the process had died."""
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
            raise FileNotFoundError(f"{WHERE}: there is no file {self.path!r} to resume.")
        if self.path is not None and not self._resume and os.path.exists(self.path):
            raise FileExistsError(
                f"{WHERE}: {self.path!r} exists, with the clients' state of other rounds. Pass "
                "resume=True to continue with it, or remove it."
            )

    def _opened(self) -> RowFile:
        if self._rows is None or self._closed:
            raise ValueError(f"{WHERE}: the store is closed, or init has not been called.")
        if not self._rows.is_own:
            raise ValueError(
                f"{WHERE}: {self.path!r} was opened by another process, from which this one was "
                "forked, and only one process can use it. Do it there, or save() a copy there, and "
                "load() it into a store of this process."
            )
        return self._rows

    def _drop(self) -> None:
        self._closed = True
        if self._rows is not None:
            self._rows.close()

    def _positions(self, positions: Any) -> np.ndarray:
        self._opened()
        if isinstance(positions, jax.core.Tracer):
            raise ValueError(
                f"{WHERE}: a store cannot be used in a jitted function. It jits the round itself."
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
