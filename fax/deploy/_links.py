"""The server's end of connections to clients' processes: requests, and answers to them in time."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import secrets
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing import connection
from typing import Any

import jax

from fax.deploy import _client as runtime
from fax.deploy._backend import ClientError

_FILE = pathlib.Path(runtime.__file__)


class LinkError(Exception):
    """A process has ended, or did not answer in time. The text says what it did."""


class Link:
    """A process, and the connection to it.

    Attributes:
      sent, received: the bytes of all messages so far.
    """

    def __init__(self, process: subprocess.Popen, line: Any):
        self.sent = self.received = 0
        self.process = process
        self._line = line
        self._number = 0  # of the last request

    def send(self, do: str, **what: Any) -> None:
        """Sends a request.

        Raises:
          LinkError: if the process has ended.
        """
        self._number += 1
        data = runtime.encode({"do": do, "with": what, "number": self._number})
        try:
            self._line.send_bytes(data)
        except (OSError, ValueError) as error:
            raise self._ended(error) from error
        self.sent += len(data)

    def receive(self, timeout: float) -> Any:
        """Waits for the answer to the last request. Answers to requests before it are dropped.

        Raises:
          LinkError: if the process has ended, or does not answer within ``timeout`` seconds.
          ClientError: if the process could not do what was asked.
        """
        end = time.monotonic() + timeout
        while True:
            try:
                if not self._line.poll(max(0.0, end - time.monotonic())):
                    raise LinkError("did not answer in time")
                data = self._line.recv_bytes(runtime.LARGEST)
            except (EOFError, OSError) as error:
                raise self._ended(error) from error
            self.received += len(data)
            try:
                answer = runtime.decode(data)
                if answer["number"] != self._number:
                    continue
                if "error" not in answer:
                    return answer["result"]
            except (runtime.MessageError, TypeError, KeyError) as error:
                raise LinkError("sent what is not an answer") from error
            raise ClientError(f"A client's process failed: {answer['error']}")

    def _ended(self, error: Exception) -> LinkError:
        self._line.close()  # a message may have been cut off
        if isinstance(error, BlockingIOError):
            return LinkError("did not answer in time")
        try:
            return LinkError(f"has ended with status {self.process.wait(5)}")
        except subprocess.TimeoutExpired:
            return LinkError("closed its connection")

    def stop(self) -> None:
        """Asks the process to end, and kills it if it does not."""
        try:
            if not self._line.closed:
                self.send("stop")
                self._line.close()
                self.process.wait(5)
        except (LinkError, OSError, subprocess.TimeoutExpired):
            pass
        self.process.kill()  # does nothing if it has ended
        self.process.wait()


def start(number: int, options: Sequence[str], timeout: float) -> list[Link]:
    """Starts processes, and connects to them.

    Args:
      number: of processes. Each gets its own by ``--number``.
      options: other arguments of ``_client.py``.
      timeout: seconds to wait for each.

    Raises:
      ClientError: if a process ends or does not connect in time.
    """
    key = secrets.token_hex(32)
    started: list[subprocess.Popen] = []
    lines: dict[int, Any] = {}
    with connection.Listener(("127.0.0.1", 0), authkey=key.encode()) as listener:
        host, port = listener.address
        # The listener has no timeout of its own.
        listener._listener._socket.settimeout(0.5)  # type: ignore[attr-defined]
        try:
            for i in range(number):
                # With -P, the folder of the file is not where it looks for modules.
                command = [sys.executable, "-P", str(_FILE), f"{host}:{port}", "--number", str(i)]
                x64 = str(int(jax.config.jax_enable_x64))
                env = {"JAX_PLATFORMS": "cpu"} | os.environ | {"JAX_ENABLE_X64": x64}
                process = subprocess.Popen(
                    [*command, *options], stdin=subprocess.PIPE, env=env, text=True
                )
                started.append(process)
                assert process.stdin is not None
                process.stdin.write(f"{key}\n")
                process.stdin.close()
            for _ in range(number):
                line = _accept(listener, started, timeout)
                _limit(line, timeout)
                lines[runtime.decode(line.recv_bytes())["number"]] = line
        except BaseException:
            for process in started:
                process.kill()
                process.wait()
            raise
    return [Link(process, lines[i]) for i, process in enumerate(started)]


def _limit(line: Any, timeout: float) -> None:
    """Lets reading and writing fail after a while, if the process stops within a message."""
    with socket.socket(fileno=os.dup(line.fileno())) as own:
        limit = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _accept(
    listener: connection.Listener, started: Sequence[subprocess.Popen], timeout: float
) -> Any:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            return listener.accept()
        except (multiprocessing.AuthenticationError, EOFError, ConnectionError):
            continue  # it was not one of the processes
        except TimeoutError:
            ended = [p.returncode for p in started if p.poll() is not None]
            if any(ended):
                raise ClientError(
                    f"A client's process ended at its start, with status {ended[0]}; its error is "
                    "above."
                ) from None
    raise ClientError(f"A client's process did not start within {timeout:g} seconds.")
