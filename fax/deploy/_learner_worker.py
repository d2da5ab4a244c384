"""The process of a learner on a Flower node. It needs fax, and not Flower.

    python -P -m fax.deploy._learner_worker

`_flower_client.py` starts it, and connects to it for each message of the server. The learner takes
its steps in the meantime. A message brings what the server has to tell the learner, and is answered
with what the learner has to tell the server: as soon as there is something, when the learner waits
for the server, or after a while. A node works on one message at a time, and the next one may be
urgent.

The messages of a conversation are numbered. If one of them or its answer is lost, the server begins
another conversation, in which the learner starts again from the outer parameters.
"""

from __future__ import annotations

import collections
import json
import os
import sys
import threading
import traceback
from multiprocessing import AuthenticationError, connection
from typing import Any

import jax

from fax.deploy import _client as runtime
from fax.deploy._flower_worker import FORMAT, Watch
from fax.deploy._learner_process import make, serve


class Mailbox:
    """A line to the server, which takes part in a conversation by one message after another."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._talk: str | None = None
        self._number = 0  # of the next message in the conversation
        self._inbox: collections.deque[tuple[str, dict[str, Any]]] = collections.deque()
        self._outbox: list[dict[str, Any]] = []
        self._heard: str | None = None  # the conversation that the learner takes part in
        self._waiting = self._ended = False

    # For the learner

    def poll(self) -> bool:
        return bool(self._inbox)

    def receive(self) -> dict[str, Any]:
        with self._changed:
            self._waiting = not self._inbox
            self._changed.notify_all()
            self._changed.wait_for(self.poll)
            self._heard, message = self._inbox.popleft()
            return message

    def send(self, messages: list[dict[str, Any]], waiting: bool) -> None:
        with self._changed:
            if self._heard == self._talk:
                self._outbox += messages
                self._waiting = waiting and not self._inbox
                self._changed.notify_all()

    def wait(self) -> None:
        """Waits for the first message."""
        with self._changed:
            self._changed.wait_for(self.poll)

    def end(self) -> None:
        """The learner has ended."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    # For the server

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Delivers messages, and answers with those of the learner.

        Args:
          asked: ``talk`` and ``number``, the conversation and the message in it, ``messages`` for
            the learner, and ``hold``, how many seconds to wait for anything to answer.

        Returns:
          ``messages`` of the learner, and whether it is now ``waiting`` for one, or has ``ended``.
          Only that it is ``lost``, if messages are missing in between.
        """
        with self._changed:
            if asked["number"] == 0:
                self._talk, self._number, self._outbox = asked["talk"], 0, []
                self._inbox.clear()
            if (asked["talk"], asked["number"]) != (self._talk, self._number):
                return {"lost": True}
            self._number += 1
            if asked["messages"]:
                self._inbox.extend((asked["talk"], message) for message in asked["messages"])
                self._waiting = False
                self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._outbox or self._waiting or self._ended, asked["hold"]
            )
            found, self._outbox = self._outbox, []
            return {"messages": found, "waiting": self._waiting, "ended": self._ended}


def main() -> None:
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what is printed goes to the node's log
    options = json.loads(sys.stdin.readline())
    watch = Watch(options["parent"], options["idle"])
    sys.path[:] = options["path"]
    mailbox = Mailbox()
    listener, key = connection.Listener(("127.0.0.1", 0)), bytes.fromhex(options["key"])
    print(listener.address[1], file=out)
    out.close()
    thread = threading.Thread(target=_accept, args=(listener, key, mailbox, watch), daemon=True)
    thread.start()
    mailbox.wait()  # for the first message, which says which dtypes there are
    serve(mailbox, make(options["make"], options["config"]))
    mailbox.end()
    thread.join(60)  # the server learns that it has ended


def _accept(listener: Any, key: bytes, mailbox: Mailbox, watch: Watch) -> None:
    """Answers one message after another, until the learner has ended."""
    ended = False
    while not ended:
        try:
            with runtime.accepted(listener, key) as link, watch:
                found = _answered(mailbox, link.recv_bytes())
                for part in runtime.parts(found):
                    link.send_bytes(part)
                ended = found.get("ended", False)
        except (AuthenticationError, OSError, EOFError):
            continue  # the process of a message has ended, or it was not one


def _answered(mailbox: Mailbox, data: bytes) -> dict[str, Any]:
    """The answer to a message, or the error."""
    try:
        asked = runtime.decode(data)
        if asked["format"] != FORMAT:
            raise runtime.RefusedError(
                f"the server speaks version {asked['format']} of the protocol, expected {FORMAT}; "
                "install the same version of fax on both sides"
            )
        jax.config.update("jax_enable_x64", asked["x64"])
        return mailbox.answer(asked)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main()
