"""Checkpoints on the disk, by orbax: atomic, written while training goes on, newest and best."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from fax import _arguments
from fax.algorithms._row_file import verify
from fax.experiment._arrays import Leaf, template

CLIENTS = "clients.sqlite"  # the rows of a ClientStore


class Keep(NamedTuple):
    """Which checkpoints of a run are kept.

    Attributes:
      newest: how many of the newest ones. With at least 2, there is still one if the newest cannot
        be read.
      best: the name of a metric, such as ``"test/accuracy"``: of the checkpoints of rounds that
        have it, the best one is kept, too. If no evaluation or round has a metric of this name,
        the run ends with an error when it first saves one.
      mode: ``"max"`` if more is better, ``"min"`` if less is.

    Example:

      >>> fax.experiment.Keep(newest=3, best="test/loss", mode="min").newest
      3
    """

    newest: int = 2
    best: str | None = None
    mode: str = "max"

    def better(self, metrics: Mapping[str, float]) -> float:
        """A number that is larger if the metrics are better. Without a number it is least."""
        value = float(metrics.get(self.best or "", np.nan))
        return -np.inf if np.isnan(value) else value if self.mode == "max" else -value


class Saved(NamedTuple):
    """What a checkpoint has on the disk.

    Attributes:
      arrays: those of the leaves.
      facts: everything else, as JSON has it.
      clients: the file of the ClientStore's rows, or None.
    """

    arrays: list[Any]
    facts: dict[str, Any]
    clients: Path | None


class Checkpoints:
    """The checkpoints of a run in a folder, by round.

    Only one is written at a time. All processes of a run call the same methods together.

    Args:
      folder: it is made if it does not exist.
      keep: which checkpoints stay.
      read_only: whether nothing may change.
    """

    def __init__(self, folder: Path, keep: Keep, *, read_only: bool = False):
        self.folder = folder
        kept: list[Any] = [policies.LatestN(keep.newest)]
        if keep.best is not None:
            kept.append(policies.BestN(get_metric_fn=keep.better, n=1))
        self._keep = keep
        self._saving: int | None = None
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                best_fn=None if keep.best is None else keep.better,  # or metrics are not saved
                cleanup_tmp_directories=not read_only,
                create=not read_only,
            ),
            item_handlers={
                "arrays": ocp.StandardCheckpointHandler(),
                "facts": ocp.JsonCheckpointHandler(),
                "clients": _Moved(),
            },
        )

    def rounds(self) -> list[int]:
        """The rounds of the checkpoints, from the oldest to the newest."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The round of the checkpoint with the best metric, or None if none has it."""
        known = {number: self._manager.metrics(number) for number in self.rounds()}
        values = {n: self._keep.better(own) for n, own in known.items() if own}
        values = {n: value for n, value in values.items() if value > -np.inf}
        return max(values, key=values.__getitem__) if values else None

    def save(
        self,
        number: int,
        arrays: Sequence[Any],
        facts: Mapping[str, Any],
        metrics: Mapping[str, float],
        clients: Callable[[Path], None] | None,
    ) -> None:
        """Saves a round. It returns when the arrays are copied, and before they are on the disk.

        Args:
          number: of rounds.
          arrays: those of the leaves; arrays without any numbers are left out.
          facts: everything else, for JSON.
          metrics: of the round.
          clients: writes the rows of a ClientStore to a new file.

        Raises:
          OSError: if this checkpoint or the one before could not be written.
        """
        self.wait()
        items: dict[str, Any] = {
            "arrays": ocp.args.StandardSave([_one_copy(x) for x in arrays if x.size]),
            "facts": ocp.args.JsonSave({**facts, "store": clients is not None}),
        }
        self._saving = number
        with self._errors():
            if clients is not None:
                partial = self.folder.parent / f".{CLIENTS}.partial"
                partial.unlink(missing_ok=True)
                clients(partial)
                items["clients"] = _MovedArgs(os.fspath(partial))
            self._manager.save(number, args=ocp.args.Composite(**items), metrics=dict(metrics))

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk.

        Raises:
          OSError: if it could not be written.
        """
        with self._errors():
            self._manager.wait_until_finished()
        self._saving = None

    def check(self) -> None:
        """Raises the OSError of `wait` if the checkpoint that is being written has failed."""
        with self._errors():
            self._manager.check_for_errors()

    def read(self, number: int, like: Callable[[list[Leaf]], Sequence[Any]]) -> Saved:
        """Reads the checkpoint of a round.

        Args:
          number: of rounds.
          like: for the leaves of the checkpoint, arrays that they should be sharded like, or None.
        """
        item = ocp.args.Composite(facts=ocp.args.JsonRestore())
        facts = self._manager.restore(number, args=item).facts
        leaves = [Leaf(**leaf) for leaf in facts["leaves"]]
        whole = [template(leaf, own) for leaf, own in zip(leaves, like(leaves), strict=True)]
        item = ocp.args.Composite(arrays=ocp.args.StandardRestore([x for x in whole if x.size]))
        restored = iter(self._manager.restore(number, args=item).arrays)
        arrays = [next(restored) if x.size else x for x in whole]
        clients = self.folder / str(number) / "clients" / CLIENTS
        if not clients.exists() and not facts.get("store"):
            return Saved(arrays, facts, None)
        verify(os.fspath(clients))
        return Saved(arrays, facts, clients)

    def delete(self, number: int) -> None:
        """Deletes the checkpoint of a round."""
        self._manager.delete(number)

    def close(self) -> None:
        """Waits for a checkpoint that is being written, and ends the threads.

        Raises:
          OSError: if it could not be written.
        """
        with self._errors():
            self._manager.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Raises what orbax raises as an OSError that says what to do."""
        try:
            yield
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> OSError:
        # Every call of orbax after a failure raises, so this one may have been told before.
        what = "a checkpoint" if self._saving is None else f"the checkpoint of round {self._saving}"
        rest = self.rounds()
        left = f"The newest complete one is of round {rest[-1]}" if rest else "There is no other"
        full = "No space left" in str(error)
        return OSError(
            getattr(error, "errno", None) or (errno.ENOSPC if full else errno.EIO),
            f"fax.experiment.run: {what} could not be written "
            f"({type(error).__name__}: {error!s:.300}). {left}. Free some space on the disk, or "
            "allow writing there, and start the run again, which continues from that checkpoint",
            os.fspath(self.folder),
        )


def _one_copy(x: Any) -> Any:
    """An array that CPU devices all have, from one of them.

    orbax lets each device copy a part of it, so that they share the transfer to the host. The
    memory of CPU devices is that of the host, and orbax can write from there without a copy.
    """
    if not isinstance(x, jax.Array) or not (x.is_fully_addressable and x.is_fully_replicated):
        return x
    return x.addressable_data(0) if next(iter(x.devices())).platform == "cpu" else x


class _Moved(ocp.CheckpointHandler):
    """Moves a file that has been written into a checkpoint."""

    def save(self, directory: Any, args: _MovedArgs) -> None:
        if jax.process_index() == 0:
            os.replace(args.path, Path(directory) / CLIENTS)

    def restore(self, directory: Any, args: Any = None) -> None:
        raise NotImplementedError("a ClientStore reads its file itself")


@ocp.args.register_with_handler(_Moved, for_save=True, for_restore=True)
class _MovedArgs(ocp.args.CheckpointArgs):
    def __init__(self, path: str):
        self.path = path


def check_keep(where: str, keep: Any) -> Keep:
    """Checks which checkpoints are to be kept. An int is a number of the newest ones."""
    if not isinstance(keep, Keep):
        expected = "an int of at least 1, or a fax.experiment.Keep"
        return Keep(_arguments.count(where, "keep", keep, expected=expected))
    _arguments.count(where, "keep.newest", keep.newest)
    if keep.best is not None:
        _arguments.text(where, "keep.best", keep.best, "the name of a metric")
    _arguments.choice(where, "keep.mode", keep.mode, ("max", "min"))
    return keep
