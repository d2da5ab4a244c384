"""Messages between processes, over sockets that never block."""

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

_SEND_TIMEOUT = 2.0  # seconds
_MAX_BYTES = 1 << 16  # of a message


class Connection:
    """Sends and receives messages over a socket, one line of JSON each.

    Attributes:
      socket: the socket, which never blocks.
      host: the host name of the other process, or "?" if it is not known.
      last_received: the `time.monotonic` at which data were last received.
      finished: whether the other process has announced that it finished.
      closed: whether the connection has ended, or received something that is not a message.
    """

    def __init__(self, peer: socket.socket):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A machine that loses its network closes nothing. This detects it after half a minute.
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        peer.setblocking(False)
        self.socket = peer
        self.host = "?"
        self.last_received = time.monotonic()
        self.finished = False
        self.closed = False
        self._lines = b""
        self._messages: collections.deque[Message] = collections.deque()
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Sends a message. If that fails, reading from the connection will show it."""
        data = json.dumps(message).encode() + b"\n"
        deadline = time.monotonic() + _SEND_TIMEOUT
        with self._sending, contextlib.suppress(OSError):
            while data:
                try:
                    data = data[self.socket.send(data) :]
                except BlockingIOError:
                    if not self._ready(selectors.EVENT_WRITE, deadline):
                        return

    def read(self) -> list[Message]:
        """Returns the messages that have arrived, without waiting."""
        try:
            data = self.socket.recv(_MAX_BYTES)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            data = b""
        if not data:
            self.closed = True
            return []
        self.last_received = time.monotonic()
        *lines, self._lines = (self._lines + data).split(b"\n")
        found: list[Message] = []
        for line in lines:
            message = _message(line)
            if message is None:
                self.closed = True
                return found
            found.append(message)
        self.closed = len(self._lines) > _MAX_BYTES
        return found

    def receive(self, deadline: float) -> Message | None:
        """Returns the next message, or None if the connection closes or the deadline passes."""
        while not self._messages and not self.closed:
            if not self._ready(selectors.EVENT_READ, deadline):
                return None
            self._messages.extend(self.read())
        return self._messages.popleft() if self._messages else None

    def _ready(self, event: int, deadline: float) -> bool:
        """Waits until the socket is ready or the deadline has passed."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.socket, event)
            return bool(selector.select(max(deadline - time.monotonic(), 0)))


def close(connections: list[Connection]) -> None:
    """Closes connections, and lets sent messages arrive first if the other side reads them."""
    deadline = time.monotonic() + 1
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.socket.shutdown(socket.SHUT_WR)
    for connection in connections:
        # Closing a socket with unread data would discard what was sent.
        while connection.receive(deadline) is not None:
            pass
        connection.socket.close()


def printable(text: Any, limit: int = 300) -> str:
    """Removes control characters from received text, so that it is safe to print."""
    return "".join(c for c in str(text)[:limit] if c.isprintable())


def _message(line: bytes) -> Message | None:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
