"""Writers: where the numbers of a run go, besides its folder's `metrics.csv`."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from fax import _arguments

_PREFIX = "events.out.tfevents."


class Writer(Protocol):
    """What `fax.experiment.run` calls with the numbers that it logs.

    A writer may also have a method ``close()``, which is called at the end of the run.

    Example:

      >>> class Print:
      ...     def write(self, round, values):
      ...         print(round, values)
      >>> writer: fax.experiment.Writer = Print()
      >>> writer.write(1, {"loss": 0.5})
      1 {'loss': 0.5}
    """

    def write(self, round: int, values: Mapping[str, float]) -> None:
        """Writes the numbers of a round, by name."""


class TensorBoard:
    """Writes the numbers of a run as scalars for TensorBoard.

    When a run is resumed, TensorBoard drops what the earlier process wrote from the first round
    that is written again, so it shows no round twice. Every event is in the file when `write`
    returns, so none is missing after a crash of the process.

    Args:
      folder: where the event files are. It is made with the first event.

    Raises:
      ValueError: if ``folder`` is not a path.

    Example:

      >>> import tempfile
      >>> folder = tempfile.TemporaryDirectory()
      >>> writer = fax.experiment.TensorBoard(folder.name)
      >>> writer.write(1, {"loss": 0.5})
      >>> writer.close()
      >>> folder.cleanup()
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(_arguments.path("fax.experiment.TensorBoard", "folder", folder))
        self._file: BinaryIO | None = None

    def write(self, round: int, values: Mapping[str, float]) -> None:
        """Writes the numbers of a round, by name."""
        if self._file is None:
            self._open(round)
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=round, summary=Summary(value=scalars))

    def close(self) -> None:
        """Closes the file. Another `write` begins a new one."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, round: int) -> None:
        """Begins a file, whose name sorts last even if the clock has been set back."""
        self._folder.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in self._folder.glob(f"{_PREFIX}*")]
        stamps = [name.removeprefix(_PREFIX).partition(".")[0] for name in names]
        later = [int(stamp) + 1 for stamp in stamps if stamp.isdecimal()]
        stamp = max([int(time.time()), *later])
        path = self._folder / f"{_PREFIX}{stamp:010d}.{socket.gethostname()}"
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 (close closes it)
        self._add(file_version="brain.Event:2")
        if names:  # TensorBoard drops the earlier events of this round and of later ones
            self._add(step=round, session_log=SessionLog(status=SessionLog.START))

    def _add(self, **fields: object) -> None:
        """Writes an event as a TFRecord, in one write.

        tensorboardX's own writers keep events in a queue, which is lost if the process is killed.
        """
        assert self._file is not None
        data = Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        record = length + checksums[0] + data + checksums[1]
        if self._file.write(record) < len(record):
            raise OSError(
                errno.ENOSPC,
                "fax.experiment.TensorBoard: no space is left on the disk. Free some space, and "
                "start the run again, which continues from the newest checkpoint",
                self._file.name,
            )
