"""Learners in processes on this machine, connected over its loopback interface."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from multiprocessing import connection
from typing import Any

import jax

from fax import _arguments
from fax.deploy import _client as runtime
from fax.deploy._backend import ClientError
from fax.deploy._connected import Connected, ConnectedLearners, Event, Left, Name, Received
from fax.deploy._elastic import Send

_WHERE = "fax.deploy.Learners"


class _Outbox:
    """Sends messages in a thread of its own, so that nobody waits for a learner that hangs."""

    def __init__(self, line: Any):
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._line = line
        threading.Thread(target=self._send, daemon=True).start()

    def put(self, data: bytes | None) -> None:
        """Sends bytes. None ends the thread."""
        self._messages.put(data)

    def _send(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while (data := self._messages.get()) is not None:
                self._line.send_bytes(data)


class Learners(ConnectedLearners):
    """Learners in processes on this machine, each with devices and a mesh of its own.

    The processes import fax and the code of the model. They connect over this machine's loopback
    interface, with a key that only they know.

    Args:
      number: how many learners.
      make: ``"module:function"`` or ``"file.py:function"``, called in each process with the
        learner's number, from 0. It returns a `Learner`.
      grace: the length of a grace window in seconds: how long a merge waits for learners that have
        been called.
      timeout: seconds to wait for any message of a learner.

    Raises:
      ValueError: if an argument is out of range.

    Example::

      server = fax.deploy.Elastic(params, steps=50, quorum=2)
      with fax.deploy.Learners(4, "my_learner.py:learner") as learners:
          for merge in learners.train(server):
              print(merge.number, merge.loss)
              if merge.number == 100:
                  break
    """

    def __init__(self, number: int, make: str, *, grace: float = 1.0, timeout: float = 300.0):
        _arguments.count(_WHERE, "number", number)
        _arguments.text(_WHERE, "make", make, '"module:function" or "file.py:function"')
        _arguments.number(_WHERE, "grace", grace, least=0)
        _arguments.number(_WHERE, "timeout", timeout, above=0)
        super().__init__(grace, timeout)
        self._make = make
        self._folder = os.getcwd()  # from where all of them import, also those started later
        self._key = secrets.token_hex(32)
        # Whoever connects has to prove in `_read` that it knows the key, so nobody waits for that.
        self._listener = connection.Listener(("127.0.0.1", 0))
        self._address = self._listener.address
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._processes: dict[Name, subprocess.Popen] = {}
        self._lines: dict[Name, Any] = {}  # of those who have just connected
        self._outboxes: dict[Name, _Outbox] = {}
        self._stopped = False
        threading.Thread(target=self._accept, daemon=True).start()
        try:
            for learner in range(number):
                self.start(learner)
        except BaseException:
            self.stop()
            raise

    def start(self, learner: int) -> None:
        """Starts a learner whose process has ended, or one more with a new number.

        Raises:
          ValueError: if the process of the learner is running.
        """
        _arguments.count(f"{_WHERE}.start", "learner", learner, least=0)
        if learner in self.running:
            raise ValueError(f"{_WHERE}.start: learner {learner} is running; kill it first.")
        starts = sum(name.number == learner for name in self._processes)
        host, port = self._address
        command = [sys.executable, "-m", "fax.deploy._learner_process", f"{host}:{port}"]
        x64 = str(int(jax.config.jax_enable_x64))
        process = subprocess.Popen(
            [*command, "--make", self._make, "--number", str(learner)],
            stdin=subprocess.PIPE,
            env=os.environ | {"JAX_ENABLE_X64": x64},
            cwd=self._folder,
            text=True,
        )
        self._processes[Name(learner, starts)] = process
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            process.stdin.write(f"{self._key}\n")
            process.stdin.close()

    def kill(self, learner: int) -> None:
        """Kills a learner's process, to try what happens then.

        Raises:
          ValueError: if there is no such learner.
        """
        if all(name.number != learner for name in self._processes):
            raise ValueError(f"{_WHERE}.kill: learner is {learner!r:.80}, which was not started.")
        for name, process in self._processes.items():
            if name.number == learner:
                process.kill()
                process.wait()

    @property
    def running(self) -> list[int]:
        """The learners whose processes are running."""
        return sorted(n.number for n, process in self._processes.items() if process.poll() is None)

    def stop(self) -> None:
        """Ends the processes. Learners that do not end at once are killed."""
        self._stopped = True
        with contextlib.suppress(OSError):
            connection.Client(self._address).close()  # wakes the thread that accepts
        self._listener.close()
        for outbox in self._outboxes.values():
            outbox.put(runtime.encode({"do": "stop"}))
            outbox.put(None)
        end = time.monotonic() + 2
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            process.kill()
            process.wait()

    def _next_event(self, wait: float) -> Event | None:
        try:
            event = self._events.get(timeout=wait)
        except queue.Empty:
            if not self.running and self._events.empty():
                raise ClientError(f"No learner is left. {self._statuses()}") from None
            return None
        if isinstance(event, Connected):
            self._outboxes[event.name] = _Outbox(self._lines.pop(event.name))
        elif isinstance(event, Left):
            self._outboxes.pop(event.name).put(None)
        return event

    def _send(self, messages: Iterable[Send]) -> None:
        for names, message in messages:
            data = runtime.encode(message)
            for name in self._outboxes.keys() & names:
                self._outboxes[name].put(data)

    def _reachable(self) -> list[Name]:
        return [*self._outboxes]

    def _statuses(self) -> str:
        ended = {n.number: process.poll() for n, process in self._processes.items()}
        shown = [f"{n} with status {status}" for n, status in ended.items() if status is not None]
        return f"Learners that ended, with their errors above: {', '.join(shown) or 'none'}."

    # Threads

    def _accept(self) -> None:
        """Accepts connections until the learners are stopped."""
        while not self._stopped:
            with contextlib.suppress(OSError):  # whoever connected is gone
                line = self._listener.accept()
                if not self._stopped:
                    threading.Thread(target=self._read, args=(line,), daemon=True).start()

    def _read(self, line: Any) -> None:
        """Passes on what a learner sends. Others do not know the key."""
        key = self._key.encode()
        try:
            runtime.without_delay(line)
            connection.deliver_challenge(line, key)
            connection.answer_challenge(line, key)
            pid = runtime.decode(line.recv_bytes())["pid"]
            # The last one, because the system gives numbers of processes again.
            name = [name for name, own in [*self._processes.items()] if own.pid == pid][-1]
        except (multiprocessing.AuthenticationError, EOFError, OSError, ValueError, LookupError):
            line.close()  # it was not a learner
            return
        self._lines[name] = line
        self._events.put(Connected(name))
        try:
            while True:
                message = runtime.decode(line.recv_bytes(runtime.LARGEST))
                self._events.put(Received(name, message))
        except (EOFError, OSError, runtime.MessageError):
            self._events.put(Left(name))
