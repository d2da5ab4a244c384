"""What a run leaves in its folder, and how it continues from there."""

from __future__ import annotations

import collections
import contextlib
import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fax.algorithms import ClientStore
from fax.experiment import _folder
from fax.experiment._checkpoints import Checkpoints
from fax.experiment._curves import read_clients
from fax.experiment._figures import draw
from fax.experiment._history import Table, replace, text_of
from fax.experiment._progress import Progress
from fax.experiment._resume import contents, lost_noise, newest, put_back, say
from fax.experiment._rounds import Run
from fax.experiment._schedule import Schedule
from fax.experiment._stopping import check_best
from fax.experiment._writers import TensorBoard

_MOST_RETURNS = 3
_LOGGED = ".logged"


class Process0Error(RuntimeError):
    """Process 0 has raised an error."""


class Outputs:
    """A context for the outputs of a run. Without a folder, it only has the writers.

    All processes of a run have one and call the same methods together. Process 0 writes the files
    and calls the writers; all of them write their part of a checkpoint.

    Args:
      run: at its start.
      times: when it evaluates and saves, and so which rounds are in one program.
      writers: objects with a method ``write(round, values)``.
      settings: the user's, for ``config.toml``.
      force: whether settings may differ from those of the folder.
    """

    def __init__(
        self,
        run: Run,
        times: Schedule,
        writers: Sequence[Any],
        settings: Mapping[str, Any],
        force: bool,
    ):
        self._run, self._times, self._settings, self._force = run, times, settings, force
        self._first = jax.process_index() == 0
        own = [] if run.folder is None else [TensorBoard(run.folder / "tensorboard")]
        self._writers = [*writers, *own] if self._first else []
        self._written = 0  # rows of the history
        self._table: Table | None = None
        self._checkpoints: Checkpoints | None = None
        self._saved: int | None = None
        self._measured = False  # whether clients.csv has what an evaluation measured before
        self._stack = contextlib.ExitStack()
        # How often the state of each checkpoint was put back after a failure.
        self._returns: collections.Counter[int] = collections.Counter()

    def __enter__(self) -> Outputs:
        with contextlib.ExitStack() as stack:
            for writer in self._writers:
                stack.callback(getattr(writer, "close", lambda: None))
            if self._run.folder is not None:
                self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _open(self, stack: contextlib.ExitStack) -> None:
        run, folder = self._run, self._run.folder
        assert folder is not None

        config = folder / _folder.CONFIG
        text = ""

        def prepare() -> int:
            nonlocal text
            # What is refused in the first round is a mistake in the arguments, and not a run.
            stack.enter_context(_folder.opened(folder, lambda: run.round == 0))
            found = _folder.compare(
                folder, self._settings, _facts(run), self._times._asdict(), force=self._force
            )
            text = found.text
            if found.new:  # whatever comes next is known to belong to a run
                replace(config, text)
            return int(found.same)

        same = _by_first(prepare) == 1
        self._checkpoints = Checkpoints(folder / _folder.CHECKPOINTS, run.keep)
        stack.callback(self._checkpoints.close)
        if self._checkpoints.rounds():
            self._resume(folder, same)
        elif logged(folder):
            raise ValueError(
                f"fax.experiment.run: folder={os.fspath(folder)!r} has metrics of a run, but no "
                "checkpoint to continue it from. Choose another folder, or remove this one."
            )
        if self._first:
            replace(config, text)  # only now, since a run that is refused changes nothing
            self._table = Table(folder / _folder.METRICS)
            self._table.rewrite(run.history)
            stack.callback(self._table.close)
        self._written = len(run.history)

    def _resume(self, folder: Path, same: bool) -> None:
        run = self._run
        assert self._checkpoints is not None
        saved = newest(self._checkpoints, "fax.experiment.run", run.state, delete=True)
        put_back(run, saved)
        if run.round > run.rounds:
            raise ValueError(
                f"fax.experiment.run: rounds is {run.rounds}, but the run in "
                f"folder={os.fspath(folder)!r} has {run.round} already. Pass at least as many."
            )
        last = logged(folder)
        lost_noise(run, last, same)
        if self._first and last > run.round:
            # metrics.csv will not have them any more, and the next process has to know.
            replace(folder / _LOGGED, f"{last}\n")
        self._saved = run.round
        measured = tuple(f"{name}/" for name in run.evaluations)
        self._measured = any(name.startswith(measured) for name in read_clients(folder))
        again = f"; rounds to {last} are run again" if last > run.round else ""
        _folder.log.info("continues after round %d%s", run.round, again)

    def log(self) -> None:
        """Writes the metrics of the rounds since the last call."""
        self._run.settle()
        rows = self._run.history[self._written :]
        if self._table is not None:
            self._table.append(rows, self._run.history[: self._written])
        for row in rows:
            values = {name: value for name, value in row.items() if name != "round"}
            for writer in self._writers:
                writer.write(row["round"], values)
        self._written = len(self._run.history)
        if self._checkpoints is not None:
            self._checkpoints.check()

    def save(self, *, wait: bool = False) -> None:
        """Saves a checkpoint of the run, and the clients' metrics. Rounds go on meanwhile."""
        run = self._run
        if self._checkpoints is not None and run.folder is not None and self._saved != run.round:
            if run.round:
                check_best(run)
            store = run.algorithm.save if isinstance(run.algorithm, ClientStore) else None
            arrays, facts = contents(run)
            row = run.history[-1] if run.history else {}
            self._checkpoints.save(run.round, arrays, facts, row, store)
            self._saved = run.round
            clients = run.measured or ({} if self._measured else run.clients)
            if self._first and clients:
                replace(run.folder / _folder.CLIENTS, text_of(clients), sync=False)
        if wait and self._checkpoints is not None:
            self._checkpoints.wait()

    def go_back(self, error: FloatingPointError) -> None:
        """Puts the state of the last checkpoint back after ``error``. The rounds stay done."""
        run = self._run
        assert self._checkpoints is not None
        self._checkpoints.wait()
        done, cohort, history = run.round, run.cohorts.round, list(run.history)
        put_back(run, newest(self._checkpoints, "fax.experiment.run", run.state, delete=True))
        self._returns[run.round] += 1
        if self._returns[run.round] > _MOST_RETURNS:
            raise error
        say(f"{error} Training continues with the state after round {run.round}.")
        run.round, run.cohorts.round = done, cohort
        run.history[:] = history

    def progress(self) -> list[Progress]:
        """A progress bar in process 0, as a callback. It ends with the context."""
        if not self._first:
            return []
        bar = Progress()
        bar.start(self._run)
        self._stack.callback(bar.close)
        return [bar]

    def finish(self) -> None:
        """Draws the figures."""
        run = self._run
        _folder.log.info("ends after round %d. %s", run.round, run.reason)
        if self._first and run.folder is not None:
            try:
                draw(run.folder)
            except Exception as error:  # all else is there
                say(f"fax.experiment.run: figures could not be drawn ({error}).")


def _facts(run: Run) -> dict[str, Any]:
    """What `run` was called with, for ``config.toml``."""
    return {
        "algorithm": run.name,
        "store": isinstance(run.algorithm, ClientStore),
        "rounds_per_call": run.rounds_per_call,
        "cohorts": run.cohorts.settings,
    }


def logged(folder: Path) -> int:
    """The last round that was ever in ``metrics.csv``, or 0."""
    path, before = folder / _folder.METRICS, folder / _LOGGED
    numbers = [before.read_text(encoding="utf-8").strip()] if before.exists() else []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if "round" not in (rows.fieldnames or ["round"]):
                raise ValueError(f"{path} has no column round, expected that of a run.")
            numbers += [row["round"] or "" for row in rows]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def _by_first(prepare: Callable[[], int]) -> int:
    """What a function returns in process 0. If it raises there, all processes raise."""
    found, error = -1, None
    if jax.process_index() == 0:
        try:
            found = prepare()
        except Exception as raised:
            error = raised
    if jax.process_count() > 1:
        found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
    if error is not None:
        raise error
    if found < 0:
        raise Process0Error("fax.experiment.run: process 0 has failed. See its error message.")
    return found
