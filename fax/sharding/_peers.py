"""How the processes of a run meet before they start, and notice when one of them is gone.

JAX's coordination service ends a process whose peers are unreachable or gone by aborting it, after
a timeout, with a message that cannot be changed. So the processes first meet here, with errors
that can be read. They meet at the coordinator's port, which is given to JAX afterwards: process 0
listens, the others connect. The connections stay open; when one closes, or brings the news of an
exception, its process is gone and all others are told.

A process that stands still keeps its connection. So each sends heartbeats here as well. While JAX
is being set up, one that sends none for too long ends the run. Afterwards it is named, and JAX's
own heartbeats decide, because they go on while Python is busy in one long call, and these do not.
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
from fax.sharding._handshake import key_of
from fax.sharding._joining import join
from fax.sharding._meeting import Host

BEREFT = 3  # the exit status of a process that ends because another one is gone


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
    """Waits for all processes.

    Args:
      address: host and port of process 0.
      count: the number of processes.
      me: the number of this one.
      timeout: how many seconds to wait.
      heartbeat: after how many seconds of silence one of them counts as dead.
      token: what processes of this run know, and nobody else.
      job: what a launcher calls this run. Processes of another one are strangers.

    Returns:
      A watch over them, which has yet to be started.

    Raises:
      RuntimeError: if not all of them come in time, one dies and does not come back, or they
        disagree who is expected.
    """
    key = key_of(token, job)
    if me > 0:
        return Watch(me, {0: join(address, count, me, key, timeout, heartbeat)}, heartbeat)
    listeners = listen(address)
    try:
        if token is None and not all(is_loopback(x.getsockname()[0]) for x in listeners):
            warnings.warn(
                f"fax.sharding.initialize: whoever reaches {address} can take the place of a "
                "process, because there is no token. Set FAX_TOKEN to the same secret in all "
                "processes, a new one for each run, or pass token=.",
                stacklevel=3,
            )
        host = Host(address, listeners, count, key, timeout, heartbeat)
        peers = host.gather()
        bind = bind_address(listeners, [*peers.values()])
    finally:
        for listener in listeners:  # JAX needs the port, as soon as the others look for it there
            listener.close()
    host.let_go()
    return Watch(me, peers, heartbeat, bind)


class Watch:
    """Ends this process when another one is gone, and tells the others when it goes itself.

    Attributes:
      bind: where JAX should listen at process 0; None: wherever it likes.
      starting: whether JAX has no heartbeats of its own yet, so that these decide.
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
        self._told_silent: list[str] = []
        self._stood_still = (0.0, 0.0)  # how long this process did itself, and until when

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
        if hasattr(os, "register_at_fork"):
            # A worker that outlives this process must not hold its connections open.
            os.register_at_fork(after_in_child=self._close)
        threading.Thread(target=self._watch, name="fax-watch", daemon=True).start()

    def _watch(self) -> None:
        beat = min(1.0, self._heartbeat / 10)
        with selectors.DefaultSelector() as selector:
            for number, connection in self._peers.items():
                connection.heard = time.monotonic()
                selector.register(connection.socket, selectors.EVENT_READ, number)
            awake = next_beat = time.monotonic()
            while selector.get_map():
                ready = selector.select(max(next_beat - time.monotonic(), 0))
                now = time.monotonic()
                if now - awake > self._heartbeat / 3:
                    self._stood_still = (now - awake, now + self._heartbeat)
                    for connection in self._peers.values():
                        connection.heard = now  # what they sent meanwhile has not been read yet
                awake = now
                for key, _ in ready:
                    if self._hear(key.data):
                        selector.unregister(key.fileobj)
                if now >= next_beat:
                    next_beat = now + beat
                    for peer in self._peers.values():
                        peer.send(beat=True)
                    self._look_for_silent_ones(now)

    def _hear(self, number: int) -> bool:
        """Reads what a process says. Returns whether it has ended as it should."""
        peer = self._peers[number]
        for message in peer.take():
            if "gone" in message and not self._leaving:  # process 0 passes our own news on to us
                self._end(printable(message["gone"], 1000))
            if "silent" in message:
                self._told_silent = [printable(name) for name in message["silent"]]
                for line in message.get("news", []):
                    _print(f"fax: {printable(line)}.")
            peer.finished = peer.finished or "finished" in message
        if not peer.closed or peer.finished or self._leaving:
            return peer.closed
        name = f"process {number}{self._on(peer)}"
        still = [*(x for i, x in self._silent.items() if i != number), *self._told_silent]
        duration, until = self._stood_still
        if time.monotonic() < until:
            self._end(f"process {self._me} stood still for {duration:.0f} s, and {name} has ended")
        if still:
            self._end(f"{' and '.join(still)} stands still, and {name} has ended")
        self._end(f"{name} died")

    def _look_for_silent_ones(self, now: float) -> None:
        """Names those who stand still before JAX ends this process without a clear word."""
        news = []
        for number, peer in self._peers.items():
            silence = 0.0 if peer.finished or peer.closed else now - peer.heard
            name = f"process {number}{self._on(peer)}"
            if self.starting and silence > self._heartbeat:
                self._end(f"{name} stands still: it has sent no heartbeat for {silence:.0f} s")
            if silence <= self._heartbeat / 3:
                if self._silent.pop(number, None):
                    news.append(f"{name} goes on")
            elif number not in self._silent:
                self._silent[number] = name
                news.append(
                    f"{name} has sent no heartbeat for {silence:.1f} s. If it stands still, the "
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

    def _close(self) -> None:
        for peer in self._peers.values():
            peer.socket.close()

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
    os.write(2, f"{message}\n".encode(errors="replace"))  # which no other thread can hold up
