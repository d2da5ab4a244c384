"""How the processes of a run connect before it starts, and notice when one of them is lost.

If a process is lost or unreachable, JAX's coordination service aborts its peers after a timeout,
with a message that cannot be changed. So the processes first connect to each other here, with clear
errors. They use the coordinator's port, which is passed to JAX afterward: process 0 listens, and
the others connect to it. The connections stay open. When one closes, or reports an exception, its
process is lost and all others are notified.

A process that stops responding keeps its connection. So each process also sends heartbeats here.
While JAX is being set up, a process that sends none for too long ends the run. Afterward the
others only name it, and JAX's own heartbeats decide, because they continue while Python is busy in
one long call, and these do not.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import selectors
import sys
import threading
import time
import warnings
from typing import Any, NoReturn

import jax

from fax.sharding._address import bind_address, is_loopback, listen
from fax.sharding._connection import Connection, printable
from fax.sharding._handshake import run_key
from fax.sharding._joining import join
from fax.sharding._meeting import Coordinator

EXIT_PEER_LOST = 3  # the exit status of a process that ends because another one is lost


def meet(
    address: str,
    count: int,
    me: int,
    timeout: float,
    *,
    heartbeat: float = 30.0,
    token: str | None = None,
    job: str = "",
) -> Watch:
    """Waits until all processes have connected.

    Args:
      address: host and port of process 0.
      count: the number of processes.
      me: the number of this one.
      timeout: how many seconds to wait.
      heartbeat: after how many seconds of silence a process counts as dead.
      token: the secret that the processes of this run share.
      job: the launcher's name of this run. Processes of other runs are rejected.

    Returns:
      A watch over the other processes, which has yet to be started.

    Raises:
      RuntimeError: if a process does not connect in time, dies and is not restarted, or if
        processes disagree about their numbers.
    """
    key = run_key(token, job)
    if me > 0:
        return Watch(me, {0: join(address, count, me, key, timeout, heartbeat)}, heartbeat)
    listeners = listen(address)
    try:
        if token is None and not all(is_loopback(x.getsockname()[0]) for x in listeners):
            warnings.warn(
                f"fax.sharding.initialize: anyone who can connect to {address} can take the place "
                "of a process, because there is no token. Set FAX_TOKEN to the same secret in all "
                "processes, a new one for each run, or pass token=.",
                stacklevel=3,
            )
        coordinator = Coordinator(address, listeners, count, key, timeout, heartbeat)
        peers = coordinator.gather()
        bind = bind_address(listeners, [*peers.values()])
    finally:
        for listener in listeners:  # JAX needs the port before the others connect to it
            listener.close()
    coordinator.release()
    return Watch(me, peers, heartbeat, bind)


class Watch:
    """Ends this process when another one is lost, and notifies the others when it ends itself.

    Attributes:
      bind: the address where JAX should listen in process 0, or None for JAX's default.
      starting: whether JAX is not set up yet, so that the heartbeats here decide.
    """

    def __init__(
        self,
        me: int,
        peers: dict[int, Connection],
        heartbeat: float = 30.0,
        bind: str | None = None,
    ):
        self._me, self._peers, self._pid = me, peers, os.getpid()
        self._heartbeat, self.bind = heartbeat, bind
        self.starting = True
        self._failure: str | None = None
        self._leaving = False
        self._silent: dict[int, str] = {}
        self._reported_silent: list[str] = []
        self._suspended = (0.0, 0.0)  # how long this process did not run, and until when to say so

    def start(self) -> None:
        previous = sys.excepthook

        def excepthook(kind, error, trace):
            previous(kind, error, trace)
            self._failure = f"{kind.__name__}: {error}".rstrip(".")[:300]
            if isinstance(error, jax.errors.JaxRuntimeError):
                time.sleep(2)  # probably another process is lost: let its error be reported first

        sys.excepthook = excepthook
        # This runs before JAX's own handler, which waits for the other processes.
        atexit.register(self._leave)
        if hasattr(os, "register_at_fork"):
            # A forked worker that outlives this process must not keep its connections open.
            os.register_at_fork(after_in_child=self._close)
        threading.Thread(target=self._watch, name="fax-watch", daemon=True).start()

    def _watch(self) -> None:
        beat = min(1.0, self._heartbeat / 10)
        with selectors.DefaultSelector() as selector:
            for number, connection in self._peers.items():
                connection.last_received = time.monotonic()
                selector.register(connection.socket, selectors.EVENT_READ, number)
            awake = next_beat = time.monotonic()
            while selector.get_map():
                ready = selector.select(max(next_beat - time.monotonic(), 0))
                now = time.monotonic()
                if now - awake > self._heartbeat / 3:
                    self._suspended = (now - awake, now + self._heartbeat)
                    for connection in self._peers.values():
                        connection.last_received = now  # what they sent meanwhile is still unread
                awake = now
                for key, _ in ready:
                    if self._receive(key.data):
                        selector.unregister(key.fileobj)
                if now >= next_beat:
                    next_beat = now + beat
                    for peer in self._peers.values():
                        peer.send(beat=True)
                    self._report_silent(now)

    def _receive(self, number: int) -> bool:
        """Reads a process's messages. Returns whether it has ended normally."""
        peer = self._peers[number]
        for message in peer.read():
            if "gone" in message and not self._leaving:  # process 0 relays our own messages
                self._exit(printable(message["gone"], 1000))
            if "silent" in message:
                self._reported_silent = [printable(name) for name in message["silent"]]
                for line in message.get("news", []):
                    _print(f"fax: {printable(line)}.")
            peer.finished = peer.finished or "finished" in message
        if not peer.closed or peer.finished or self._leaving:
            return peer.closed
        name = f"process {number}{self._on(peer)}"
        silent = [*(x for i, x in self._silent.items() if i != number), *self._reported_silent]
        duration, until = self._suspended
        if time.monotonic() < until:
            self._exit(f"process {self._me} did not run for {duration:.0f} s, and {name} has ended")
        if silent:
            self._exit(f"{' and '.join(silent)} stopped responding, and {name} has ended")
        self._exit(f"{name} died")

    def _report_silent(self, now: float) -> None:
        """Names processes that stopped responding, before JAX aborts without naming them."""
        news = []
        for number, peer in self._peers.items():
            silence = 0.0 if peer.finished or peer.closed else now - peer.last_received
            name = f"process {number}{self._on(peer)}"
            if self.starting and silence > self._heartbeat:
                self._exit(f"{name} is not responding: it sent no heartbeat for {silence:.0f} s")
            if silence <= self._heartbeat / 3:
                if self._silent.pop(number, None):
                    news.append(f"{name} has resumed")
            elif number not in self._silent:
                self._silent[number] = name
                news.append(
                    f"{name} has sent no heartbeat for {silence:.1f} s. Unless it resumes, the "
                    f"run ends after {self._heartbeat:g} s"
                )
        for line in news:
            _print(f"fax: {line}.")
        if self._me == 0 and news:
            for number, peer in self._peers.items():
                if number not in self._silent:
                    peer.send(silent=list(self._silent.values()), news=news)

    def _on(self, peer: Connection) -> str:
        return f" on {peer.host}" if self._me == 0 else ""

    def _exit(self, news: str) -> NoReturn:
        """Ends this process, because another one is lost and would never answer."""
        reason = "because the run cannot continue without it"
        _print(f"fax: {news}. Process {self._me} exits, {reason}.")
        if self._me == 0:
            self._notify(gone=news)
        # Flush what was printed, but do not wait for a writer that is stuck.
        with contextlib.suppress(RuntimeError):  # threads cannot start at interpreter shutdown
            flush = threading.Thread(target=sys.stdout.flush, daemon=True)
            flush.start()
            flush.join(timeout=1)
        os._exit(EXIT_PEER_LOST)

    def _close(self) -> None:
        for peer in self._peers.values():
            peer.socket.close()

    def _leave(self) -> None:
        if os.getpid() != self._pid:
            return  # in a forked process
        if self._failure is None:
            for peer in self._peers.values():
                peer.send(finished=True)
            return
        self._leaving = True
        self._notify(gone=f"process {self._me} failed with {self._failure}")
        sys.stdout.flush()
        os._exit(1)  # a normal exit would let JAX wait for the others

    def _notify(self, **news: Any) -> None:
        """Notifies the others. Only process 0 is connected to all, and relays messages."""
        for peer in self._peers.values():
            peer.send(**news)
        if self._me == 0:
            time.sleep(1)  # when this process ends, JAX aborts the others without a clear message


def _print(message: str) -> None:
    os.write(2, f"{message}\n".encode(errors="replace"))  # never waits for another thread's lock
