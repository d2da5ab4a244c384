"""How processes prove to each other that they belong to one run.

Process 0 listens and speaks first: a random number. Who comes proves that it knows the key of the
run, by a message authentication code of that number, one of its own, and who it says it is. Process
0 proves the same in its answer. So no key is sent, and what was overheard is of no use a second
time. Whoever cannot prove it changes nothing: no stranger ends the start or takes a place.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

from fax.sharding._connection import Message

VERSION = 2  # of what processes say to each other
HELLO = 10.0  # seconds in which one has to say who one is


def key_of(token: str | None, job: str) -> bytes:
    """What the processes of a run know and others do not, if there is a token."""
    secret = (token or "").encode(errors="surrogateescape")
    return hmac.new(secret, f"fax {job}".encode(errors="surrogateescape"), hashlib.sha256).digest()


def proof(key: bytes, *said: Any) -> str:
    return hmac.new(key, json.dumps(said).encode(), hashlib.sha256).hexdigest()


def proves(message: Message, expected: str) -> bool:
    return hmac.compare_digest(
        str(message.get("proof")).encode(errors="replace"), expected.encode()
    )
