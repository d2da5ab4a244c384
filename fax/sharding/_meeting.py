"""How process 0 waits for the other processes, and rejects unknown connections.

While they wait, process 0 regularly asks all processes for a sign of life. It starts the run once
all of them have joined and have answered one more question after that.
"""

from __future__ import annotations

import secrets
import selectors
import socket
import time
from typing import Any, NoReturn

from fax.sharding._connection import Connection, Message, close, printable
from fax.sharding._handshake import HELLO_TIMEOUT, VERSION, has_proof, proof

# If another process claims a number, the seconds in which the first one has to answer.
_ANSWER_TIMEOUT = 2.0
_MAX_UNKNOWN = 64  # unidentified connections at a time, in addition to the number of processes
_WHERE = "fax.sharding.initialize"
_NUMBERS = "Give every process the same num_processes and its own process_id"


class Coordinator:
    """Process 0 while it waits for the others.

    Args:
      address: the address to which the others connect, for messages.
      listeners: the sockets on which process 0 listens.
      count: the number of processes.
      key: the key of the run.
      timeout: how many seconds to wait for all processes.
      heartbeat: how many seconds a process may be silent, or may take to be restarted.
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
        self._joined: dict[int, Connection] = {}
        self._answered: dict[Connection, int] = {}  # the number of the last answered question
        self._question = 0
        self._last_question: int | None = None  # the one after which the run starts
        self._unknown: dict[Connection, tuple[str, float]] = {}  # nonce and deadline, oldest first
        self._duplicates: dict[int, tuple[Connection, int, float]] = {}
        self._lost: dict[int, tuple[str, float]] = {}
        self._num_rejected, self._last_rejected = 0, ""
        self._suspended = 0.0  # how many seconds this process itself did not run

    def gather(self) -> dict[int, Connection]:
        """Waits until all processes have joined, and returns them. They then wait for `release`.

        Raises:
          RuntimeError: if they do not join in time, die, or disagree about their numbers.
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
                        self._receive(ready.data)
                now = time.monotonic()
                if now - awake > self._heartbeat / 3:
                    self._suspended = now - awake
                    for connection in self._joined.values():
                        connection.last_received = now
                awake = now
                self._reject_silent(now)
                self._resolve_duplicates(now)
                if now >= next_beat:
                    self._ask(*self._joined.values())
                    next_beat = now + beat
                if self._last_question is None and len(self._joined) == self._count - 1:
                    self._ask(*self._joined.values())
                    self._last_question = self._question
                self._check_deadlines(now)
            for connection in self._unknown:
                connection.socket.close()
        return self._joined

    def release(self) -> None:
        """Tells all processes to start the run."""
        for number, connection in self._joined.items():
            connection.send(go=number)

    def _complete(self) -> bool:
        if len(self._joined) < self._count - 1 or self._duplicates:
            return False
        last = self._last_question
        return self._count == 1 or (last is not None and not self._unanswered(last))

    def _unanswered(self, question: int) -> list[int]:
        return [i for i, c in self._joined.items() if self._answered.get(c, 0) < question]

    def _ask(self, *connections: Connection) -> None:
        self._question += 1
        for connection in connections:
            connection.send(ask=self._question)

    # Processes that join

    def _accept(self, listener: Any) -> None:
        try:
            connection = Connection(listener.accept()[0])
        except OSError:  # the other side has closed it, or too many files are open
            time.sleep(0.01)
            return
        nonce = secrets.token_hex(16)
        self._selector.register(connection.socket, selectors.EVENT_READ, connection)
        self._unknown[connection] = (nonce, time.monotonic() + HELLO_TIMEOUT)
        connection.send(fax=VERSION, nonce=nonce)
        if len(self._unknown) > _MAX_UNKNOWN + self._count:
            self._reject(next(iter(self._unknown)), "sent nothing")

    def _receive(self, connection: Connection) -> None:
        for message in connection.read():
            if connection in self._unknown:
                self._identify(connection, message)
            elif isinstance(message.get("answer"), int):
                self._answered[connection] = message["answer"]
        if connection in self._unknown and connection.closed:
            self._reject(connection, "did not use the protocol of fax")
        elif connection.closed:
            self._drop(connection)

    def _identify(self, connection: Connection, hello: Message) -> None:
        """Handles the first message of a connection, in which it identifies itself."""
        nonce, _ = self._unknown[connection]
        number, of, host = hello.get("process"), hello.get("of"), hello.get("host")
        claims = (nonce, hello.get("nonce"), number, of, host)
        if not has_proof(hello, proof(self._key, "hello", *claims)):
            self._reject(connection, "did not know the token")
            return
        if hello.get("fax") != VERSION or type(number) is not int or type(of) is not int:
            self._reject(connection, "runs another version of fax")
            return
        del self._unknown[connection]
        connection.host = printable(host, 100)
        welcome = proof(self._key, "welcome", *claims)
        connection.send(proof=welcome)
        if of != self._count:
            mistake = f"a process on {connection.host} has num_processes={of}, but process 0 has "
            self._refuse(f"{mistake}num_processes={self._count}. {_NUMBERS}", connection)
        if not 0 < number < self._count:
            self._refuse_duplicate(number, "the coordinator", connection)
        if number in self._duplicates:
            self._reject(connection, "claimed a number that two other processes claim")
        elif number in self._joined:
            self._ask(self._joined[number])
            # Decide this before the new process concludes that process 0 is not responding.
            deadline = time.monotonic() + min(_ANSWER_TIMEOUT, self._heartbeat / 2)
            self._duplicates[number] = (connection, self._question, deadline)
        else:
            self._admit(number, connection)

    def _admit(self, number: int, connection: Connection) -> None:
        self._joined[number] = connection
        self._lost.pop(number, None)
        self._last_question = None
        connection.send(welcome=number)

    def _resolve_duplicates(self, now: float) -> None:
        """Refuses the duplicate of a process that answers. Otherwise, the duplicate replaces it."""
        for number, (connection, question, deadline) in list(self._duplicates.items()):
            old = self._joined.get(number)
            if old is not None and self._answered.get(old, 0) >= question:
                self._refuse_duplicate(number, old.host, connection)
            if old is None or now > deadline:
                if old is not None:
                    self._drop(old)
                if self._duplicates.pop(number, None) is not None:
                    self._admit(number, connection)

    # Processes that leave

    def _reject(self, connection: Connection, why: str) -> None:
        self._unknown.pop(connection, None)
        try:
            where = connection.socket.getpeername()[0]
        except OSError:
            where = "an unknown address"
        self._num_rejected += 1
        self._last_rejected = f"from {where}, which {why}"
        self._drop(connection)

    def _reject_silent(self, now: float) -> None:
        for connection, (_, deadline) in list(self._unknown.items()):
            if now > deadline:
                self._reject(connection, "sent nothing")

    def _drop(self, connection: Connection) -> None:
        if connection.socket.fileno() < 0:
            return
        connection.closed = True
        self._selector.unregister(connection.socket)
        connection.socket.close()
        self._answered.pop(connection, None)
        for number, joined in list(self._joined.items()):
            if joined is connection:
                del self._joined[number]
                self._lost[number] = (connection.host, time.monotonic())
                self._last_question = None
        for number, (duplicate, *_) in list(self._duplicates.items()):
            if duplicate is connection:
                del self._duplicates[number]

    def _check_deadlines(self, now: float) -> None:
        """Ends the start if a process is lost or silent for too long, or after the timeout."""
        for number, connection in self._joined.items():
            if now - connection.last_received > self._heartbeat:
                self._refuse(
                    f"process {number} on {connection.host} is not responding: it has not answered "
                    f"for {self._heartbeat:g} s. Look for errors in its output"
                )
        for number, (host, since) in self._lost.items():
            if now - since > self._heartbeat and number not in self._duplicates:
                self._refuse(
                    f"process {number} on {host} died before all processes had connected, and was "
                    f"not restarted within {self._heartbeat:g} s. Look for errors in its output"
                )
        if now < self._deadline or self._complete():
            return
        absent = [i for i in range(1, self._count) if i not in self._joined]
        silent = self._unanswered(self._last_question or 0)
        who = f"{names(absent)} did not connect" if absent else f"{names(silent)} did not answer"
        for number, (host, _) in self._lost.items():
            who += f". Process {number} on {host} connected, but died"
        if self._num_rejected:
            several = "s were" if self._num_rejected > 1 else " was"
            who += f". {self._num_rejected} connection{several} rejected, the last "
            who += self._last_rejected
        self._refuse(
            f"process 0 waited {self._timeout:g} s at {self._address} for {self._count - 1} "
            f"others, but {who}. Start all processes with the same coordinator_address and token, "
            "and look for errors in the output of the missing ones"
        )

    def _refuse_duplicate(self, number: int, host: str, new: Connection) -> NoReturn:
        mistake = f"two processes have process_id {number}: one on {host}, one on {new.host}"
        self._refuse(f"{mistake}. {_NUMBERS}", new)

    def _refuse(self, reason: str, *new: Connection) -> NoReturn:
        if self._suspended:
            reason += f". Process 0 itself did not run for {self._suspended:.0f} s"
        reason += "."
        duplicates = [duplicate for duplicate, *_ in self._duplicates.values()]
        everyone = [*self._joined.values(), *duplicates, *new]
        for connection in everyone:
            connection.send(refused=reason)
        close([*dict.fromkeys(everyone)])
        for connection in self._unknown:
            connection.socket.close()
        raise RuntimeError(f"{_WHERE}: {reason}")


def names(numbers: list[int]) -> str:
    """Lists processes in a message."""
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"process{'es' if len(numbers) > 1 else ''} {shown}"
