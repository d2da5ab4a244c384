"""A thread that works ahead by a few items, hands errors on, and ends with its iterator."""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_PATIENCE = 0.5  # seconds until a thread that waits looks whether it still should
_FAREWELL = 5.0  # seconds that a thread has to end
_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")


class Prefetch(Iterator[T], Generic[T]):
    """``make(0), make(1), ...``, made ahead by a thread.

    An error in ``make`` is raised when its item is due, and again whenever another is asked for.
    The thread ends when the iterator is closed, when nobody holds it any more, or when it has
    raised.

    Args:
      make: item ``number``; runs in the thread.
      start: the first number.
      ahead: how many items may wait.
    """

    def __init__(self, make: Callable[[int], T], start: int, ahead: int):
        self._items: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        # The thread knows the queue and not the iterator, so that it cannot keep it alive.
        self._thread = threading.Thread(
            target=_work,
            args=(make, start, self._items, self._stop),
            name="fax.data.cohorts",
            daemon=True,
        )
        # Garbage is collected at any time, in any thread, whatever locks are held: it must not
        # wait for anybody. The thread finds out by itself.
        weakref.finalize(self, self._stop.set).atexit = False
        _running[self._thread] = _Work(self._stop)
        self._thread.start()

    def __next__(self) -> T:
        while self._error is None:
            if self._stop.is_set():
                raise StopIteration
            # What is made last is in the queue before its thread ends.
            alive = self._thread.is_alive()
            try:
                item, self._error = self._items.get(timeout=_PATIENCE if alive else 0)
            except queue.Empty:
                if alive:
                    continue  # and look whether somebody has closed the iterator
                self._error = RuntimeError(
                    "fax.data.cohorts: the thread that prepares cohorts does not exist in this "
                    "process, which was forked from the one that made it. Make an iterator in each "
                    "process, with start= to go on at a round."
                )
                break
            if self._error is None:
                return item
            self._stop.set()
        raise self._error

    def close(self) -> None:
        """Ends the thread, and waits until it has, but not for ever: it may be stuck."""
        self._stop.set()
        while True:  # if it waits for room in the queue it finds some
            try:
                self._items.get_nowait()
            except queue.Empty:
                break
        if self._thread is not threading.current_thread():
            _join([self._thread])


def _work(make, number, items, stop):
    while not stop.is_set():
        try:
            result: tuple[Any, BaseException | None] = make(number), None
        except _Closed:
            return
        except StopIteration as error:  # which would end the loop over cohorts without a word
            result = None, RuntimeError(f"fax.data.cohorts: round {number} raised StopIteration.")
            result[1].__cause__ = error
        except BaseException as error:  # raised where the item is asked for
            result = None, error
        while not stop.is_set():
            try:
                items.put(result, timeout=_PATIENCE)
                break
            except queue.Full:
                continue
        if result[1] is not None:
            return
        del result  # so that no item is held while the next one is made
        number += 1


class _Work:
    """What a thread is at."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop, self.client = stop, ""


class _Closed(BaseException):
    """Ends a thread whose iterator is closed, in the middle of a round."""


_running: weakref.WeakKeyDictionary[threading.Thread, _Work] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def reading(client_id: Any) -> Iterator[None]:
    """Says which client is read, and ends a thread whose iterator is closed before it is read."""
    work = _running.get(threading.current_thread())
    if work is None:
        yield
        return
    if work.stop.is_set():
        raise _Closed
    work.client = f", for client {client_id!r:.80}"
    try:
        yield
    finally:
        work.client = ""


def _join(threads: list[threading.Thread]) -> None:
    """Waits for threads that should end. Of one that does not it says where it is stuck."""
    last = time.monotonic() + _FAREWELL
    for thread in threads:
        thread.join(max(0.0, last - time.monotonic()))
        work, frame = _running.get(thread), sys._current_frames().get(thread.ident or 0)
        if thread.is_alive() and work is not None and frame is not None:
            warnings.warn(
                f"fax.data: the iterator is closed, but after {_FAREWELL:g} seconds the thread "
                f"that reads ahead for it is still in {_place(frame)}{work.client}. It ends when "
                "that returns. If it never does, look there for what it waits for, such as a lock, "
                "a queue or a connection.",
                UserWarning,
                stacklevel=4,
            )


def _place(frame: Any) -> str:
    """The function that fax has called, whatever that has called itself."""
    stack = traceback.extract_stack(frame)
    ours = max(i for i, entry in enumerate(stack) if entry.filename.startswith(_PACKAGE))
    entry = stack[min(ours + 1, len(stack) - 1)]
    return f"{entry.name} ({entry.filename}, line {entry.lineno})"


# Threads must not be in the middle of a computation when the interpreter goes away.
@atexit.register
def _end_all() -> None:
    running = list(_running.items())
    for _, work in running:
        work.stop.set()
    _join([thread for thread, _ in running])
