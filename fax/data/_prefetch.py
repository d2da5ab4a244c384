"""A thread that works ahead by a few items, hands errors on, and ends with its iterator."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_PATIENCE = 0.5  # seconds until a thread that waits looks whether it still should


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
        thread = threading.Thread(
            target=_work,
            args=(make, start, self._items, self._stop),
            name="fax.data.cohorts",
            daemon=True,
        )
        self._end = weakref.finalize(self, _end, thread, self._items, self._stop)
        thread.start()

    def __next__(self) -> T:
        while self._error is None:
            if not self._end.alive:
                raise StopIteration
            try:
                item, self._error = self._items.get(timeout=_PATIENCE)
            except queue.Empty:
                continue  # and look whether somebody has closed the iterator
            if self._error is None:
                return item
            self._end()
        raise self._error

    def close(self) -> None:
        """Ends the thread, and waits until it has."""
        self._end()


def _work(make, number, items, stop):
    while not stop.is_set():
        try:
            result: tuple[Any, BaseException | None] = make(number), None
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


def _end(thread, items, stop):
    stop.set()
    while True:  # whoever waits for room in the queue finds some
        try:
            items.get_nowait()
        except queue.Empty:
            break
    if thread is not threading.current_thread():
        thread.join()
