"""SIGTERM and Ctrl-C: they are remembered until a round has ended and is saved."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """A context in which SIGTERM and Ctrl-C do not end the process, but are remembered.

    The second one of a kind has its usual effect at once. Python only runs handlers in its main
    thread; in other threads this does nothing.

    Attributes:
      caught: the number of the signal, or 0.
    """

    def __init__(self) -> None:
        self.caught = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # None stands for a handler that is not Python's.
                self._before[number] = signal.signal(number, self._remember) or signal.SIG_DFL
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        signal.signal(number, self._before[number])

    def leave(self, number: int) -> NoReturn:
        """Ends the process as the signal would have: by KeyboardInterrupt, or with status 143."""
        if number == signal.SIGINT:
            raise KeyboardInterrupt("the run has been saved")
        sys.exit(128 + number)
