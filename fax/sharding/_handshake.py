"""How processes prove to each other that they belong to the same run.

Process 0 listens, and sends a random number to each process that connects. The process proves that
it knows the key of the run: it replies with a message authentication code of that number, of a
random number of its own, and of its process number and host. Process 0 answers with a proof of the
same kind. So the key is never sent, and recorded messages cannot be used again. A connection
without a proof has no effect: it neither ends the start nor takes a process's place.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

from fax.sharding._connection import Message

VERSION = 2  # of the protocol
HELLO_TIMEOUT = 10.0  # seconds in which a new connection has to identify itself


def run_key(token: str | None, job: str) -> bytes:
    """The key of a run. If there is a token, only the processes of the run know it."""
    secret = (token or "").encode(errors="surrogateescape")
    return hmac.new(secret, f"fax {job}".encode(errors="surrogateescape"), hashlib.sha256).digest()


def proof(key: bytes, *claims: Any) -> str:
    return hmac.new(key, json.dumps(claims).encode(), hashlib.sha256).hexdigest()


def has_proof(message: Message, expected: str) -> bool:
    return hmac.compare_digest(
        str(message.get("proof")).encode(errors="replace"), expected.encode()
    )
