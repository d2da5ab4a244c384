"""The server's end of connections to clients' processes: requests, and answers to them in time.

Nothing here waits for a single process. What a process does not read at once is sent when it does,
so a process that has stopped does not delay others, and can go on later.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import pathlib
import secrets
import selectors
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import connection
from typing import Any

import jax

from fax.deploy import _client as runtime
from fax.deploy._backend import ClientError

_FOLDER = pathlib.Path(runtime.__file__).parent
# Before a message is its size, in the format of multiprocessing.connection: a short one, or -1 and
# a long one.
_SHORT, _LONG = struct.Struct("!i"), struct.Struct("!Q")
_AT_ONCE = 2**20  # bytes that are read in one go


class LinkError(Exception):
    """A process has ended, failed, or did not answer in time. The text says what it did."""


class Link:
    """A process, and the connection to it.

    A process that is forked from this one has the same connection. It must not use it, or end the
    process, which is not its own.

    Attributes:
      sent, received: the bytes of all messages so far.
    """

    def __init__(self, process: subprocess.Popen, line: connection.Connection):
        self.sent = self.received = 0
        self.process = process
        self._socket = socket.socket(fileno=os.dup(line.fileno()))
        self._socket.setblocking(False)
        line.close()
        self._number = 0  # of the last request
        self._out: collections.deque[_Request] = collections.deque()
        self._in = bytearray()
        self._error: LinkError | None = None  # why the connection is closed
        self._pid = os.getpid()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def events(self) -> int:
        """What to wait for."""
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._out else 0)

    @property
    def is_own(self) -> bool:
        """Whether it was made in this process, and not in one that this was forked from."""
        return os.getpid() == self._pid

    def check_own(self) -> None:
        """Checks that this is the process that it was made in.

        Raises:
          RuntimeError: if not.
        """
        if not self.is_own:
            raise RuntimeError(
                "fax.deploy.Processes: its processes answer only the process that started them, "
                "and this one was forked from it. Make a backend in each process."
            )

    def send(self, do: str, **what: Any) -> None:
        """Sends a request, or as much of it as the process reads at once.

        Raises:
          LinkError: if the process has ended.
          RuntimeError: if this is not the process that it was made in.
        """
        self.check_own()
        if self._error is not None:
            raise self._error
        self._number += 1
        x64 = bool(jax.config.jax_enable_x64)
        data = runtime.encode({"do": do, "with": what, "number": self._number, "x64": x64})
        short = len(data) < 2**31
        size = _SHORT.pack(len(data)) if short else _SHORT.pack(-1) + _LONG.pack(len(data))
        self._out.append(_Request(do, memoryview(size + data)))
        self.sent += len(data)
        self._write()

    def advance(self) -> Iterator[Any]:
        """Sends and receives what is possible at once, and yields the answer to the last request.

        Answers to requests before it are dropped.

        Raises:
          LinkError: if the process has ended, could not do what was asked, or sent anything else.
        """
        self._write()
        try:
            data = self._socket.recv(_AT_ONCE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            raise self._close(self._ended())
        self._in += data
        while (message := self._message()) is not None:
            self.received += len(message)
            yield from self._answer(message)

    def abandon(self) -> None:
        """Drops requests whose answers nobody waits for any more, and that are not sent yet."""
        self._out = collections.deque(
            request for request in self._out if request.begun or request.do == "free"
        )

    def close(self) -> None:
        """Asks the process to end, if it is this one's own."""
        with contextlib.suppress(LinkError):
            if self.is_own:
                self.send("stop")
        self._close(LinkError("was stopped"))

    def _write(self) -> None:
        try:
            while self._out:
                request = self._out[0]
                sent = self._socket.send(request.rest)
                request.begun = True
                request.rest = request.rest[sent:]
                if request.rest:
                    return
                self._out.popleft()
        except BlockingIOError:
            return
        except OSError as error:
            raise self._close(self._ended()) from error

    def _message(self) -> bytes | None:
        """The next message, if all of it has arrived."""
        if len(self._in) < _SHORT.size:
            return None
        (size,), start = _SHORT.unpack_from(self._in), _SHORT.size
        if size == -1:
            start += _LONG.size
            if len(self._in) < start:
                return None
            (size,) = _LONG.unpack_from(self._in, _SHORT.size)
        if not 0 <= size <= runtime.LARGEST:
            raise self._close(LinkError("sent a message that is too large"))
        end = start + size
        if len(self._in) < end:
            return None
        message = bytes(memoryview(self._in)[start:end])
        del self._in[:end]
        return message

    def _answer(self, message: bytes) -> Iterator[Any]:
        try:
            answer = runtime.decode(message)
            number, failed = answer["number"], "error" in answer
            result = answer["error"] if failed else answer["result"]
        except (runtime.MessageError, TypeError, KeyError) as error:
            raise self._close(LinkError("sent what is not an answer")) from error
        if number != self._number:
            return
        if failed:
            raise LinkError(f"failed: {result}")
        yield result

    def _close(self, error: LinkError) -> LinkError:
        self._error = self._error or error
        self._socket.close()
        self._out.clear()
        return self._error

    def _ended(self) -> LinkError:
        try:
            return LinkError(f"has ended with status {self.process.wait(5)}")
        except subprocess.TimeoutExpired:
            return LinkError("closed its connection")


class _Request:
    """What is not sent yet of a request."""

    def __init__(self, do: str, rest: memoryview):
        self.do, self.rest, self.begun = do, rest, False


def exchange(
    links: Mapping[int, Link],
    timeout: float,
    is_enough: Callable[[int, Any], bool] = lambda process, answer: False,
) -> tuple[dict[int, Any], dict[int, LinkError]]:
    """Waits for the answers to the last requests.

    Args:
      links: the connections, by the number of the process.
      timeout: for how many seconds.
      is_enough: called with each answer, and whose it is: whether no more are needed. It may raise
        a `LinkError` to refuse an answer.

    Returns:
      The answers, and why the other processes did not answer, by the number of the process.
    """
    found: dict[int, Any] = {}
    failed: dict[int, LinkError] = {}
    end = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        for process, link in links.items():
            selector.register(link, link.events, process)
        waiting = dict(links)
        while waiting and (left := end - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                process = key.data
                link, done = waiting[process], False
                try:
                    for answer in link.advance():
                        enough = is_enough(process, answer)
                        found[process], done = answer, True
                        if enough:
                            waiting.clear()
                except LinkError as error:
                    failed[process], done = error, True
                if not waiting:
                    break
                if done:
                    selector.unregister(key.fileobj)
                    del waiting[process]
                elif key.events != link.events:
                    selector.modify(link, link.events, process)
    for process in links.keys() - found.keys() - failed.keys():
        failed[process] = LinkError("did not answer in time")
        links[process].abandon()
    return found, failed


def start(numbers: Iterable[int], options: Sequence[str], timeout: float) -> list[Link]:
    """Starts processes, and connects to them.

    Args:
      numbers: of the processes. Each gets its own by ``--number``.
      options: other arguments of ``_client.py``, or with ``--secure``, of ``_secure_client.py``.
      timeout: seconds to wait for each.

    Raises:
      ClientError: if a process ends or does not connect in time.
    """
    key = secrets.token_hex(32)
    file = str(_FOLDER / ("_secure_client.py" if "--secure" in options else "_client.py"))
    started: dict[int, subprocess.Popen] = {}
    lines: dict[int, Any] = {}
    with connection.Listener(("127.0.0.1", 0)) as listener:
        host, port = listener.address
        # The listener has no timeout of its own.
        listener._listener._socket.settimeout(0.5)  # type: ignore[attr-defined]
        try:
            for i in numbers:
                # With -P, the folder of the file is not where it looks for modules.
                command = [sys.executable, "-P", file, f"{host}:{port}", "--number", str(i)]
                x64 = str(int(jax.config.jax_enable_x64))
                env = {"JAX_PLATFORMS": "cpu"} | os.environ | {"JAX_ENABLE_X64": x64}
                process = subprocess.Popen(
                    [*command, *options], stdin=subprocess.PIPE, env=env, text=True
                )
                started[i] = process
                assert process.stdin is not None
                process.stdin.write(f"{key}\n")
                process.stdin.close()
            for _ in started:
                line = _accept(listener, key.encode(), list(started.values()), timeout)
                # In case the process stops within its first message.
                runtime.limit(line, timeout)
                lines[runtime.decode(line.recv_bytes())["number"]] = line
            return [Link(process, lines[i]) for i, process in started.items()]
        except BaseException:
            for process in started.values():
                process.kill()
                process.wait()
            raise


def stop(links: Iterable[Link], seconds: float = 5.0) -> None:
    """Asks processes to end, and kills those that have not ended after some seconds."""
    links = list(links)
    for link in links:
        link.close()
    end = time.monotonic() + seconds
    for link in links:
        if not link.is_own:
            continue
        with contextlib.suppress(subprocess.TimeoutExpired):
            link.process.wait(max(0.0, end - time.monotonic()))
        link.process.kill()  # does nothing if it has ended
        link.process.wait()


def _accept(
    listener: connection.Listener,
    key: bytes,
    started: Sequence[subprocess.Popen],
    timeout: float,
) -> Any:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            return runtime.accepted(listener, key)
        except TimeoutError:  # nobody has connected
            ended = [p.returncode for p in started if p.poll() is not None]
            if any(ended):
                raise ClientError(
                    f"A client's process ended at its start, with status {ended[0]}; its error is "
                    "above."
                ) from None
        except (multiprocessing.AuthenticationError, EOFError, OSError):
            continue  # it was not one of the processes
    raise ClientError(f"A client's process did not start within {timeout:g} seconds.")
