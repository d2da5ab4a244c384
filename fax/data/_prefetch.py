"""A thread that works ahead by a few items, passes errors on, and ends with its iterator."""

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

_POLL_SECONDS = 0.5  # how often a thread that waits checks whether it should end
_JOIN_SECONDS = 5.0  # how long to wait for a thread to end
_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")


def forked() -> RuntimeError:
    """The error for an iterator that this process has only because it was forked."""
    return RuntimeError(
        "fax.data.cohorts: this process was forked from the one that made the iterator, and has "
        "neither the thread that prepares cohorts nor a JAX that works. Start processes with "
        'multiprocessing.get_context("spawn"), and make an iterator in each, with start= to go on '
        "at a round."
    )


class Prefetch(Iterator[T], Generic[T]):
    """``make(start), make(start + 1), ...``, computed ahead by a thread.

    After the last item, do not ask for another one.

    An error in ``make`` is raised when its item is asked for, and every time after that. The
    thread ends when the iterator is closed or garbage-collected, or when ``make`` has raised.

    Args:
      make: returns the item of a number. It runs in the thread.
      start: the first number.
      ahead: how many items may wait to be asked for.
      end: the number after the last one. Default: there is no last one.
    """

    def __init__(self, make: Callable[[int], T], start: int, ahead: int, end: int | None = None):
        self._items: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        # The thread refers to the queue but not to the iterator, so it does not keep it alive.
        self._thread = threading.Thread(
            target=_work,
            args=(make, start, end, self._items, self._stop),
            name="fax.data.cohorts",
            daemon=True,
        )
        # The garbage collector may run in any thread, whatever locks are held, so this must not
        # wait for the thread to end. The thread will see that it should.
        weakref.finalize(self, self._stop.set).atexit = False
        _running[self._thread] = _Work(self._stop)
        self._thread.start()

    def __next__(self) -> T:
        while self._error is None:
            if self._stop.is_set():
                raise StopIteration
            # A thread puts its last item into the queue before it ends.
            alive = self._thread.is_alive()
            try:
                item, self._error = self._items.get(timeout=_POLL_SECONDS if alive else 0)
            except queue.Empty:
                if alive:
                    continue  # after checking whether the iterator was closed
                self._error = forked()
                break
            if self._error is None:
                return item
            self._stop.set()
        raise self._error

    def close(self) -> None:
        """Ends the thread, and waits for it for a while, but not forever: it may hang."""
        self._stop.set()
        while True:  # make room in the queue, for which the thread may wait
            try:
                self._items.get_nowait()
            except queue.Empty:
                break
        if self._thread is not threading.current_thread():
            _join([self._thread])


def _work(
    make: Callable[[int], Any],
    number: int,
    end: int | None,
    items: queue.Queue[Any],
    stop: threading.Event,
) -> None:
    while number != end and not stop.is_set():
        try:
            result: tuple[Any, BaseException | None] = make(number), None
        except _Closed:
            return
        except StopIteration as error:  # which would silently end the loop over cohorts
            result = None, RuntimeError(f"fax.data.cohorts: round {number} raised StopIteration.")
            result[1].__cause__ = error
        except BaseException as error:  # raised where the item is asked for
            result = None, error
        while not stop.is_set():
            try:
                items.put(result, timeout=_POLL_SECONDS)
                break
            except queue.Full:
                continue
        if result[1] is not None:
            return
        del result  # so that the item can be freed while the next one is computed
        number += 1


class _Work:
    """What a thread is doing."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop, self.client = stop, ""


class _Closed(BaseException):
    """Ends a thread in the middle of a round, because its iterator was closed."""


_running: weakref.WeakKeyDictionary[threading.Thread, _Work] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def reading(client_id: Any) -> Iterator[None]:
    """Notes which client is being read. Ends the thread first if its iterator was closed."""
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
    """Waits for threads that should end. A warning says where a thread hangs that does not."""
    last = time.monotonic() + _JOIN_SECONDS
    for thread in threads:
        thread.join(max(0.0, last - time.monotonic()))
        work, frame = _running.get(thread), sys._current_frames().get(thread.ident or 0)
        if thread.is_alive() and work is not None and frame is not None:
            warnings.warn(
                f"fax.data: the iterator is closed, but after {_JOIN_SECONDS:g} seconds the thread "
                f"that reads ahead for it is still in {_place(frame)}{work.client}. It ends when "
                "that function returns. If it never does, find out what it waits for there, such "
                "as a lock, a queue or a connection.",
                UserWarning,
                stacklevel=4,
            )


def _place(frame: Any) -> str:
    """The function that fax called, whatever it has called itself."""
    stack = traceback.extract_stack(frame)
    ours = max(i for i, entry in enumerate(stack) if entry.filename.startswith(_PACKAGE))
    entry = stack[min(ours + 1, len(stack) - 1)]
    return f"{entry.name} ({entry.filename}, line {entry.lineno})"


# Threads must not be in the middle of a computation when the interpreter exits.
@atexit.register
def _end_all() -> None:
    running = list(_running.items())
    for _, work in running:
        work.stop.set()
    _join([thread for thread, _ in running])
