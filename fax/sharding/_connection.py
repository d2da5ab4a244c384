"""Messages between processes, over sockets that hold nobody up."""

from __future__ import annotations

import collections
import contextlib
import json
import selectors
import socket
import threading
import time
from typing import Any

Message = dict[str, Any]

_SENDING = 2.0  # seconds that a message may take to leave
_LONGEST = 1 << 16  # bytes of a message


class Connection:
    """Messages, a line of JSON each, over a socket.

    Attributes:
      socket: the socket, which never blocks.
      host: the name of the other process' host, as far as it is known.
      heard: when something came last, by `time.monotonic`.
      finished: whether the other process has said that it ends.
      closed: whether nothing can come any more, or what came was no message.
    """

    def __init__(self, peer: socket.socket):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A machine that is cut off says nothing. This notices it after half a minute.
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        peer.setblocking(False)
        self.socket = peer
        self.host = "?"
        self.heard = time.monotonic()
        self.finished = False
        self.closed = False
        self._lines = b""
        self._messages: collections.deque[Message] = collections.deque()
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Sends a message. Who is gone, or takes nothing, is noticed when reading."""
        data = json.dumps(message).encode() + b"\n"
        deadline = time.monotonic() + _SENDING
        with self._sending, contextlib.suppress(OSError):
            while data:
                try:
                    data = data[self.socket.send(data) :]
                except BlockingIOError:
                    if not self._ready(selectors.EVENT_WRITE, deadline):
                        return

    def take(self) -> list[Message]:
        """The messages that have come, without waiting."""
        try:
            data = self.socket.recv(_LONGEST)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            data = b""
        if not data:
            self.closed = True
            return []
        self.heard = time.monotonic()
        *lines, self._lines = (self._lines + data).split(b"\n")
        found: list[Message] = []
        for line in lines:
            message = _message(line)
            if message is None:
                self.closed = True
                return found
            found.append(message)
        self.closed = len(self._lines) > _LONGEST
        return found

    def receive(self, deadline: float) -> Message | None:
        """The next message, or None when the connection is closed or time is up."""
        while not self._messages and not self.closed:
            if not self._ready(selectors.EVENT_READ, deadline):
                return None
            self._messages.extend(self.take())
        return self._messages.popleft() if self._messages else None

    def _ready(self, event: int, deadline: float) -> bool:
        """Waits until the socket is ready, but not longer than until the deadline."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.socket, event)
            return bool(selector.select(max(deadline - time.monotonic(), 0)))


def close(connections: list[Connection]) -> None:
    """Closes connections so that what was sent arrives, if the others are there to read it."""
    deadline = time.monotonic() + 1
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.socket.shutdown(socket.SHUT_WR)
    for connection in connections:
        # A socket that is closed with something left to read would take back what was sent.
        while connection.receive(deadline) is not None:
            pass
        connection.socket.close()


def printable(text: Any, most: int = 300) -> str:
    """What somebody else sent, without anything that a terminal would act on."""
    return "".join(c for c in str(text)[:most] if c.isprintable())


def _message(line: bytes) -> Message | None:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
