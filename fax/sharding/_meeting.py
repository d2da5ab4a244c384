"""Process 0 waits for the others, and turns strangers away.

While they wait, process 0 asks everybody regularly whether they are still there. It lets all go
when all have come and have answered once more after that.
"""

from __future__ import annotations

import secrets
import selectors
import socket
import time
from typing import Any, NoReturn

from fax.sharding._connection import Connection, Message, close, printable
from fax.sharding._handshake import HELLO, VERSION, proof, proves

_ANSWER = 2.0  # seconds in which a process answers whose number another one claims
_STRANGERS = 64  # who may be there at once, beside those who are expected, without saying it
_WHERE = "fax.sharding.initialize"
_NUMBERS = "Give every process the same num_processes and its own process_id"


class Host:
    """Process 0, while the others come.

    Args:
      address: where the others look for it, for messages.
      listeners: the sockets where they arrive.
      count: the number of processes.
      key: of the run.
      timeout: how many seconds to wait for all of them.
      heartbeat: how many seconds one of them may be silent, or may be gone until it is restarted.
    """

    def __init__(
        self,
        address: str,
        listeners: list[socket.socket],
        count: int,
        key: bytes,
        timeout: float,
        heartbeat: float,
    ):
        self._address, self._count, self._key = address, count, key
        self._timeout, self._heartbeat = timeout, heartbeat
        self._deadline = time.monotonic() + timeout
        self._listeners = listeners
        self._selector = selectors.DefaultSelector()
        self._present: dict[int, Connection] = {}
        self._answered: dict[Connection, int] = {}  # the last question that was answered
        self._question = 0
        self._last_question: int | None = None  # the one after which all may go
        self._strangers: dict[Connection, tuple[str, float]] = {}  # the oldest first
        self._rivals: dict[int, tuple[Connection, int, float]] = {}
        self._lost: dict[int, tuple[str, float]] = {}
        self._turned_away, self._last_stranger = 0, ""
        self._stood_still = 0.0  # seconds that this process did itself

    def gather(self) -> dict[int, Connection]:
        """Waits until all are there, and returns them. They wait in turn for `let_go`.

        Raises:
          RuntimeError: if they do not come in time, die, or disagree who is expected.
        """
        beat = min(1.0, self._heartbeat / 10)
        awake = next_beat = time.monotonic()
        with self._selector:
            for listener in self._listeners:
                listener.setblocking(False)
                self._selector.register(listener, selectors.EVENT_READ)
            while not self._complete():
                until = min(next_beat, self._deadline) - time.monotonic()
                for ready, _ in self._selector.select(max(until, 0.01)):
                    if ready.data is None:
                        self._accept(ready.fileobj)
                    elif not ready.data.closed:
                        self._hear(ready.data)
                now = time.monotonic()
                if now - awake > self._heartbeat / 3:
                    self._stood_still = now - awake
                    for connection in self._present.values():
                        connection.heard = now
                awake = now
                self._turn_away_who_says_nothing(now)
                self._decide_between_rivals(now)
                if now >= next_beat:
                    self._ask(*self._present.values())
                    next_beat = now + beat
                if self._last_question is None and len(self._present) == self._count - 1:
                    self._ask(*self._present.values())
                    self._last_question = self._question
                self._check_time(now)
            for connection in self._strangers:
                connection.socket.close()
        return self._present

    def let_go(self) -> None:
        """Tells all that they have met."""
        for number, connection in self._present.items():
            connection.send(go=number)

    def _complete(self) -> bool:
        if len(self._present) < self._count - 1 or self._rivals:
            return False
        last = self._last_question
        return self._count == 1 or (last is not None and not self._unanswered(last))

    def _unanswered(self, question: int) -> list[int]:
        return [i for i, c in self._present.items() if self._answered.get(c, 0) < question]

    def _ask(self, *connections: Connection) -> None:
        self._question += 1
        for connection in connections:
            connection.send(ask=self._question)

    # Those who come

    def _accept(self, listener: Any) -> None:
        try:
            connection = Connection(listener.accept()[0])
        except OSError:  # gone again, or there are too many of them
            time.sleep(0.01)
            return
        nonce = secrets.token_hex(16)
        self._selector.register(connection.socket, selectors.EVENT_READ, connection)
        self._strangers[connection] = (nonce, time.monotonic() + HELLO)
        connection.send(fax=VERSION, nonce=nonce)
        if len(self._strangers) > _STRANGERS + self._count:
            self._turn_away(next(iter(self._strangers)), "said nothing")

    def _hear(self, connection: Connection) -> None:
        for message in connection.take():
            if connection in self._strangers:
                self._introduce(connection, message)
            elif isinstance(message.get("answer"), int):
                self._answered[connection] = message["answer"]
        if connection in self._strangers and connection.closed:
            self._turn_away(connection, "did not speak as a process of fax does")
        elif connection.closed:
            self._forget(connection)

    def _introduce(self, connection: Connection, hello: Message) -> None:
        """Somebody says who it is."""
        nonce, _ = self._strangers[connection]
        number, of, host = hello.get("process"), hello.get("of"), hello.get("host")
        said = (nonce, hello.get("nonce"), number, of, host)
        if not proves(hello, proof(self._key, "hello", *said)):
            self._turn_away(connection, "did not know the token")
            return
        if hello.get("fax") != VERSION or type(number) is not int or type(of) is not int:
            self._turn_away(connection, "runs another version of fax")
            return
        del self._strangers[connection]
        connection.host = printable(host, 100)
        welcome = proof(self._key, "welcome", *said)
        connection.send(proof=welcome)
        if of != self._count:
            mistake = f"on {connection.host} there is one of {of} processes, but process 0 was "
            self._refuse(f"{mistake}started as one of {self._count}. {_NUMBERS}", connection)
        if not 0 < number < self._count:
            self._refuse_double(number, "the coordinator", connection)
        if number in self._rivals:
            self._turn_away(connection, "claimed a number that is in dispute")
        elif number in self._present:
            self._ask(self._present[number])
            # Before the new one takes the silence for that of a process 0 that stands still.
            deadline = time.monotonic() + min(_ANSWER, self._heartbeat / 2)
            self._rivals[number] = (connection, self._question, deadline)
        else:
            self._admit(number, connection)

    def _admit(self, number: int, connection: Connection) -> None:
        self._present[number] = connection
        self._lost.pop(number, None)
        self._last_question = None
        connection.send(welcome=number)

    def _decide_between_rivals(self, now: float) -> None:
        """A process that has been restarted takes its place; one that is there keeps it."""
        for number, (connection, question, deadline) in list(self._rivals.items()):
            old = self._present.get(number)
            if old is not None and self._answered.get(old, 0) >= question:
                self._refuse_double(number, old.host, connection)
            if old is None or now > deadline:
                if old is not None:
                    self._forget(old)
                if self._rivals.pop(number, None) is not None:
                    self._admit(number, connection)

    # Those who go

    def _turn_away(self, connection: Connection, why: str) -> None:
        self._strangers.pop(connection, None)
        try:
            where = connection.socket.getpeername()[0]
        except OSError:
            where = "an unknown address"
        self._turned_away += 1
        self._last_stranger = f"one from {where} {why}"
        self._forget(connection)

    def _turn_away_who_says_nothing(self, now: float) -> None:
        for connection, (_, deadline) in list(self._strangers.items()):
            if now > deadline:
                self._turn_away(connection, "said nothing")

    def _forget(self, connection: Connection) -> None:
        if connection.socket.fileno() < 0:
            return
        connection.closed = True
        self._selector.unregister(connection.socket)
        connection.socket.close()
        self._answered.pop(connection, None)
        for number, present in list(self._present.items()):
            if present is connection:
                del self._present[number]
                self._lost[number] = (connection.host, time.monotonic())
                self._last_question = None
        for number, (rival, *_) in list(self._rivals.items()):
            if rival is connection:
                del self._rivals[number]

    def _check_time(self, now: float) -> None:
        """Ends the start if somebody is gone or silent for too long, or time is up."""
        for number, connection in self._present.items():
            if now - connection.heard > self._heartbeat:
                self._refuse(
                    f"process {number} on {connection.host} stands still: it has not answered for "
                    f"{self._heartbeat:g} s"
                )
        for number, (host, since) in self._lost.items():
            if now - since > self._heartbeat and number not in self._rivals:
                self._refuse(
                    f"process {number} on {host} died before all processes had met, and was not "
                    f"started again within {self._heartbeat:g} s. Look for errors in its output"
                )
        if now < self._deadline or self._complete():
            return
        absent = [i for i in range(1, self._count) if i not in self._present]
        silent = self._unanswered(self._last_question or 0)
        who = f"{names(absent)} did not come" if absent else f"{names(silent)} did not answer"
        for number, (host, _) in self._lost.items():
            who += f". Process {number} on {host} came, and died"
        if self._turned_away:
            who += f". {self._turned_away} connections were turned away: {self._last_stranger}"
        self._refuse(
            f"process 0 waited {self._timeout:g} s at {self._address} for {self._count - 1} "
            f"others, and {who}. Start all processes with the same coordinator_address and token, "
            "and look for errors in the output of those"
        )

    def _refuse_double(self, number: int, host: str, new: Connection) -> NoReturn:
        one = f"two processes are number {number}: one on {host}, one on {new.host}"
        self._refuse(f"{one}. {_NUMBERS}", new)

    def _refuse(self, reason: str, *new: Connection) -> NoReturn:
        if self._stood_still:
            reason += f". Process 0 itself had stood still for {self._stood_still:.0f} s"
        reason += "."
        everybody = [*self._present.values(), *(rival for rival, *_ in self._rivals.values()), *new]
        for connection in everybody:
            connection.send(refused=reason)
        close([*dict.fromkeys(everybody)])
        for connection in self._strangers:
            connection.socket.close()
        raise RuntimeError(f"{_WHERE}: {reason}")


def names(numbers: list[int]) -> str:
    """Some processes, for messages."""
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"process{'es' if len(numbers) > 1 else ''} {shown}"
