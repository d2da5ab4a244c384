"""Any other process comes to process 0, and waits there for the rest."""

from __future__ import annotations

import secrets
import socket
import time

from fax.sharding._connection import Connection, printable
from fax.sharding._handshake import HELLO, VERSION, proof, proves

_WHERE = "fax.sharding.initialize"


def join(
    address: str, count: int, me: int, key: bytes, timeout: float, heartbeat: float
) -> Connection:
    """Any other process: a connection to process 0, which may not have started yet.

    Raises:
      RuntimeError: if process 0 is not there in time, dies, or refuses.
    """
    host, port = address.rsplit(":", 1)
    deadline = time.monotonic() + timeout
    reason, comes_back = "nobody answered", deadline
    while (left := min(deadline, comes_back) - time.monotonic()) > 0:
        try:
            peer = socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 5))
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            time.sleep(min(0.1, left))
            continue
        connection = Connection(peer)
        try:
            reason = _introduce(connection, count, me, key, min(deadline, time.monotonic() + HELLO))
            if not reason:
                # Process 0 may have started later, and says who is missing when its time is up.
                reason = _wait(connection, address, deadline + 5, heartbeat)
                if not reason:
                    return connection
                comes_back = time.monotonic() + heartbeat
        except BaseException:
            peer.close()
            raise
        peer.close()
        time.sleep(max(min(0.1, left), 0))
    if comes_back < deadline:
        raise RuntimeError(
            f"{_WHERE}: process 0 at {address} died before all processes had met, and was not "
            f"started again within {heartbeat:g} s. Look for errors in its output."
        )
    raise RuntimeError(
        f"{_WHERE}: process {me} did not meet process 0 at {address} within {timeout:g} s "
        f"({reason}). Check that process 0 runs, that coordinator_address is its address, and that "
        "no firewall is in between."
    )


def _introduce(connection: Connection, count: int, me: int, key: bytes, deadline: float) -> str:
    """Says who this is. Returns why that did not work, or nothing."""
    stranger = "whoever is there did not answer as process 0 of this run"
    challenge = connection.receive(deadline) or {}
    if not isinstance(challenge.get("nonce"), str):
        return stranger
    if challenge.get("fax") != VERSION:
        return "process 0 runs another version of fax"
    host, nonce = socket.gethostname(), secrets.token_hex(16)
    said = (challenge["nonce"], nonce, me, count, host)
    connection.send(
        fax=VERSION,
        process=me,
        of=count,
        host=host,
        nonce=nonce,
        proof=proof(key, "hello", *said),
    )
    if proves(connection.receive(deadline) or {}, proof(key, "welcome", *said)):
        return ""
    closed = "process 0 closed the connection: it has another token, or is of another run"
    return closed if connection.closed else stranger


def _wait(connection: Connection, address: str, deadline: float, heartbeat: float) -> str:
    """Waits until all may go. Returns why it came to nothing, or nothing.

    Raises:
      RuntimeError: if process 0 refuses, or stands still.
    """
    while True:
        silent = min(deadline, time.monotonic() + heartbeat)
        message = connection.receive(silent)
        if message is None and connection.closed:
            return "process 0 died"
        if message is None and silent < deadline:
            raise RuntimeError(
                f"{_WHERE}: process 0 at {address} stands still: it has sent nothing for "
                f"{heartbeat:g} s."
            )
        if message is None:
            return "process 0 is there, but not all of the others are"
        if "refused" in message:
            raise RuntimeError(f"{_WHERE}: {printable(message['refused'], 2000)}")
        if "go" in message:
            return ""
        if "ask" in message:
            connection.send(answer=message["ask"])
