"""How a process other than process 0 joins a run: it connects to process 0 and waits there."""

from __future__ import annotations

import secrets
import socket
import time

from fax.sharding._connection import Connection, printable
from fax.sharding._handshake import HELLO_TIMEOUT, VERSION, has_proof, proof

_WHERE = "fax.sharding.initialize"


def join(
    address: str, count: int, me: int, key: bytes, timeout: float, heartbeat: float
) -> Connection:
    """Returns a connection to process 0, which may not have started yet.

    Raises:
      RuntimeError: if process 0 does not start in time, dies, or refuses the connection.
    """
    host, port = address.rsplit(":", 1)
    deadline = time.monotonic() + timeout
    reason, restart_deadline = "no answer", deadline
    while (left := min(deadline, restart_deadline) - time.monotonic()) > 0:
        try:
            peer = socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 5))
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            time.sleep(min(0.1, left))
            continue
        connection = Connection(peer)
        try:
            until = min(deadline, time.monotonic() + HELLO_TIMEOUT)
            reason = _introduce(connection, count, me, key, until)
            if not reason:
                # Process 0 may have started later, and reports who is missing at its own deadline.
                reason = _wait(connection, address, deadline + 5, heartbeat)
                if not reason:
                    return connection
                restart_deadline = time.monotonic() + heartbeat
        except BaseException:
            peer.close()
            raise
        peer.close()
        time.sleep(max(min(0.1, left), 0))
    if restart_deadline < deadline:
        raise RuntimeError(
            f"{_WHERE}: process 0 at {address} died before all processes had connected, and was "
            f"not restarted within {heartbeat:g} s. Look for errors in its output."
        )
    raise RuntimeError(
        f"{_WHERE}: process {me} could not connect to process 0 at {address} within {timeout:g} s "
        f"({reason}). Check that process 0 is running, that coordinator_address is its address, "
        "and that no firewall blocks the port."
    )


def _introduce(connection: Connection, count: int, me: int, key: bytes, deadline: float) -> str:
    """Identifies this process. Returns the reason if that failed, or an empty string."""
    unknown = "the server at this address did not answer as process 0 of this run"
    challenge = connection.receive(deadline) or {}
    if not isinstance(challenge.get("nonce"), str):
        return unknown
    if challenge.get("fax") != VERSION:
        return "process 0 runs another version of fax"
    host, nonce = socket.gethostname(), secrets.token_hex(16)
    claims = (challenge["nonce"], nonce, me, count, host)
    connection.send(
        fax=VERSION,
        process=me,
        of=count,
        host=host,
        nonce=nonce,
        proof=proof(key, "hello", *claims),
    )
    if has_proof(connection.receive(deadline) or {}, proof(key, "welcome", *claims)):
        return ""
    rejected = "process 0 closed the connection: it has another token, or belongs to another run"
    return rejected if connection.closed else unknown


def _wait(connection: Connection, address: str, deadline: float, heartbeat: float) -> str:
    """Waits until process 0 starts the run. Returns the reason if it does not, or "".

    Raises:
      RuntimeError: if process 0 refuses this process, or stops responding.
    """
    while True:
        silent = min(deadline, time.monotonic() + heartbeat)
        message = connection.receive(silent)
        if message is None and connection.closed:
            return "process 0 died"
        if message is None and silent < deadline:
            raise RuntimeError(
                f"{_WHERE}: process 0 at {address} is not responding: it has sent nothing for "
                f"{heartbeat:g} s. Look for errors in its output."
            )
        if message is None:
            return "process 0 is running, but other processes are missing"
        if "refused" in message:
            raise RuntimeError(f"{_WHERE}: {printable(message['refused'], 2000)}")
        if "go" in message:
            return ""
        if "ask" in message:
            connection.send(answer=message["ask"])
