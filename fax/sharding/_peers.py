"""How the processes of a run meet before they start, and notice when one of them is gone.

JAX's coordination service ends a process whose peers are unreachable or gone by aborting it, after
a timeout, with a message that cannot be changed. So the processes first meet here, with errors
that can be read. They meet at the coordinator's port, which is given to JAX afterwards: process 0
listens, the others connect. The connections stay open; when one closes, or brings the news of an
exception, its process is gone and all others are told. A process that stands still without closing
its connection is left to the heartbeats of JAX.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax

Message = dict[str, Any]

BEREFT = 3  # the exit status of a process that ends because another one is gone


def meet(address: str, count: int, me: int, timeout: float) -> Watch:
    """Waits for all processes.

    Args:
      address: host and port of process 0.
      count: the number of processes.
      me: the number of this one.
      timeout: how many seconds to wait.

    Returns:
      A watch over them, which has yet to be started.

    Raises:
      RuntimeError: if not all of them come in time, or they disagree who is expected.
    """
    deadline = time.monotonic() + timeout
    if me == 0:
        return Watch(me, _receive_all(address, count, deadline, timeout))
    return Watch(me, {0: _join(address, count, me, deadline, timeout)})


class Connection:
    """Messages, a line of JSON each, over a socket."""

    def __init__(self, peer: socket.socket):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A machine that is cut off says nothing. This notices it after half a minute.
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.socket = peer
        self.host = "?"
        self.finished = False
        self._received = b""

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # who is gone is noticed when reading
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, deadline: float | None = None) -> Message | None:
        """The next message, or None when the connection is closed or time is up."""
        try:
            while b"\n" not in self._received:
                left = None if deadline is None else max(deadline - time.monotonic(), 0.01)
                self.socket.settimeout(left)
                data = self.socket.recv(4096)
                if not data or len(self._received) > 1 << 16:
                    return None
                self._received += data
            self.socket.settimeout(None)
            line, self._received = self._received.split(b"\n", 1)
            message = json.loads(line)
            return message if isinstance(message, dict) else None
        except (OSError, ValueError):
            return None


def _receive_all(
    address: str, count: int, deadline: float, timeout: float
) -> dict[int, Connection]:
    """Process 0: a connection to each of the others."""
    port = int(address.rsplit(":", 1)[1])
    both = socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
        )
    except OSError as error:
        raise RuntimeError(
            f"fax.sharding.initialize: process 0 cannot listen at port {port} of {address}: "
            f"{error.strerror}. Choose a free port."
        ) from error
    present: dict[int, Connection] = {}
    with listener:
        while len(present) < count - 1:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                new = Connection(listener.accept()[0])
            except OSError:
                absent = [i for i in range(1, count) if i not in present]
                _refuse(
                    present,
                    f"process 0 waited {timeout:g} s at {address} for {count - 1} others, and "
                    f"{_names(absent)} did not come. Start all processes with the same "
                    "coordinator_address, and look for errors in the output of those.",
                )
            # Whoever does not say who it is within seconds is none of ours.
            hello = new.receive(min(deadline, time.monotonic() + 5)) or {}
            number, of = hello.get("process"), hello.get("of")
            if not isinstance(number, int) or not isinstance(of, int):
                new.socket.close()
                continue
            new.host = str(hello.get("host"))
            if of != count or not 0 < number < count or number in present:
                mistake = (
                    f"on {new.host} there is one of {of} processes, but process 0 was started as "
                    f"one of {count}"
                    if of != count
                    else f"two processes are number {number}: one on "
                    f"{present[number].host if number in present else 'the coordinator'}, one on "
                    f"{new.host}"
                )
                mend = "Give every process the same num_processes and its own process_id."
                _refuse({**present, -1: new}, f"{mistake}. {mend}")
            present[number] = new
            new.send(welcome=number)
    for number, connection in present.items():
        connection.send(go=number)
    return present


def _refuse(present: dict[int, Connection], reason: str) -> NoReturn:
    for connection in present.values():
        connection.send(refused=reason)
        connection.socket.close()
    raise RuntimeError(f"fax.sharding.initialize: {reason}")


def _join(address: str, count: int, me: int, deadline: float, timeout: float) -> Connection:
    """Any other process: a connection to process 0, which may not have started yet."""
    host, port = address.rsplit(":", 1)
    reason = "nobody answered"
    while (left := deadline - time.monotonic()) > 0:
        try:
            peer = socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 5))
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(min(0.1, left))
            continue
        connection = Connection(peer)
        connection.send(process=me, of=count, host=socket.gethostname())
        answer = connection.receive(min(deadline, time.monotonic() + 5)) or {}
        reason = "whoever is there did not answer as process 0 of this run"
        if "welcome" in answer:
            # Process 0 may have started later, and says who is missing when its time is up.
            answer = connection.receive(deadline + 5) or {}
            reason = "process 0 is there, but not all of the others are"
        if answer.get("go") == me:
            return connection
        peer.close()
        if "refused" in answer:
            raise RuntimeError(f"fax.sharding.initialize: {answer['refused']}")
        time.sleep(min(0.1, left))
    raise RuntimeError(
        f"fax.sharding.initialize: process {me} did not meet process 0 at {address} within "
        f"{timeout:g} s ({reason}). Check that process 0 runs, that coordinator_address is its "
        "address, and that no firewall is in between."
    )


class Watch:
    """Ends this process when another one is gone, and tells the others when it goes itself."""

    def __init__(self, me: int, peers: dict[int, Connection]):
        self._me, self._peers, self._pid = me, peers, os.getpid()
        self._failure: str | None = None
        self._leaving = False

    def start(self) -> None:
        previous = sys.excepthook

        def excepthook(kind, error, trace):
            previous(kind, error, trace)
            self._failure = f"{kind.__name__}: {error}".rstrip(".")[:300]
            if isinstance(error, jax.errors.JaxRuntimeError):
                time.sleep(2)  # probably it is another process that is gone: let that be said

        sys.excepthook = excepthook
        # This runs before JAX's own handler, which waits for the other processes.
        atexit.register(self._leave)
        threading.Thread(target=self._watch, name="fax-watch", daemon=True).start()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for number, connection in self._peers.items():
                selector.register(connection.socket, selectors.EVENT_READ, number)
            while selector.get_map():
                for key, _ in selector.select():
                    number = key.data
                    peer = self._peers[number]
                    message = peer.receive()
                    if message is None and (peer.finished or self._leaving):
                        selector.unregister(peer.socket)
                    elif message is None:
                        self._end(f"process {number}{self._on(peer)} died")
                    elif "gone" in message:
                        self._end(str(message["gone"]))
                    elif "finished" in message:
                        peer.finished = True

    def _on(self, peer: Connection) -> str:
        return f" on {peer.host}" if self._me == 0 else ""

    def _end(self, news: str) -> NoReturn:
        """Another process is gone, and this one can only wait for it for ever."""
        _print(f"fax: {news}. Process {self._me} ends, because the run cannot go on without it.")
        if self._me == 0:
            self._tell(gone=news)
        # What was printed should be seen, but a writer that is stuck must not hold up the end.
        with contextlib.suppress(RuntimeError):  # no threads while the interpreter shuts down
            flush = threading.Thread(target=sys.stdout.flush, daemon=True)
            flush.start()
            flush.join(timeout=1)
        os._exit(BEREFT)

    def _leave(self) -> None:
        if os.getpid() != self._pid:
            return  # a fork
        if self._failure is None:
            for peer in self._peers.values():
                peer.send(finished=True)
            return
        self._leaving = True
        self._tell(gone=f"process {self._me} failed with {self._failure}")
        sys.stdout.flush()
        os._exit(1)  # JAX would wait for the others

    def _tell(self, **news: Any) -> None:
        """Tells the others; all but process 0 know process 0 only, which passes it on."""
        for peer in self._peers.values():
            peer.send(**news)
        if self._me == 0:
            time.sleep(1)  # as soon as this process is gone, JAX aborts them without a clear word


def _print(message: str) -> None:
    os.write(2, f"{message}\n".encode())  # which no other thread can hold up


def _names(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"process{'es' if len(numbers) > 1 else ''} {shown}"
