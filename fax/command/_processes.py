"""The command in several processes, as launchers such as ``srun`` and ``mpiexec`` start them."""

from __future__ import annotations

import os
import sys
from types import TracebackType

import jax
import numpy as np
from jax.experimental import multihost_utils

import fax.sharding
from fax.command._errors import CommandError, mistakes
from fax.sharding._distributed import find


def count() -> int:
    """How many processes the launcher has started. It does not set up JAX."""
    return find(os.environ).processes or 1


def connect() -> None:
    """Connects the processes, if there are several. From then on, only process 0 prints results.

    Raises:
      CommandError: if the variables of the launcher are wrong, or not all processes connect.
    """
    with mistakes(ValueError, RuntimeError):
        if count() == 1 or jax.distributed.is_initialized():
            return
        # fax.sharding calls it, and then tells the other processes of the error.
        sys.excepthook = _unless_printed
        fax.sharding.initialize()
    if find(os.environ).number:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def _unless_printed(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if not isinstance(error, CommandError):
        sys.__excepthook__(kind, error, trace)


def agreed(number: int) -> int:
    """The number that process 0 has."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))
