"""The process that runs the stages of a Flower node. It needs JAX, and neither fax nor Flower.

`_flower_client.py` starts it, and connects to it for each message. It ends when the node does, or
after a while without messages. Its data and compiled stages stay, and what clients hold apart from
that comes with the connection if the process does not have it yet.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import sys
import threading
import time
import traceback
from multiprocessing import AuthenticationError, connection
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING or __package__:
    from fax.deploy import _client as runtime
else:  # where clients are: it is a script, and that file is beside it
    runtime = importlib.import_module("_client")

FORMAT = 1


def main() -> None:
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what is printed goes to the node's log
    options = json.loads(sys.stdin.readline())
    watch = Watch(options["parent"], options["idle"])
    sys.path[1:] = options["path"]
    data = runtime.load(options["load"], options["config"]) if options["load"] else {}
    folder = None if options["plan"] is None else pathlib.Path(options["plan"])
    plan = None if folder is None else runtime.read_plan(folder)
    clients = _clients(options, data, plan, folder)
    key = bytes.fromhex(options["key"])
    is_new = True
    with connection.Listener(("127.0.0.1", 0)) as listener:
        print(listener.address[1], file=out)
        out.close()
        while True:
            try:
                with runtime.accepted(listener, key) as link, watch:
                    answer(link, clients, is_new)
                    is_new = False
            except (AuthenticationError, OSError, EOFError):
                continue  # the process of a message has ended, or it was not one


def _clients(
    options: dict[str, Any], data: Any, plan: Any, folder: pathlib.Path | None
) -> runtime.Clients:
    threshold, identities = options["secure"], options["identities"]
    if threshold is None:
        return runtime.Clients(data, plan, folder)
    if TYPE_CHECKING or __package__:
        from fax.deploy import _secure_client as secure
    else:
        secure = importlib.import_module("_secure_client")
    if identities is not None:
        identities = runtime.load(identities, options["config"])
    return secure.SecureClients(data, plan, folder, threshold=threshold, identities=identities)


def answer(link: Any, clients: runtime.Clients, is_new: bool) -> None:
    """Answers one message.

    First come the names of what clients hold according to the node, and the values, if this process
    is new. Then comes the message: requests, of which the last one's result is the answer. What is
    sent back are the names of what they hold afterwards, or an error; the values that the node does
    not have; and the answer.
    """
    names = json.loads(link.recv_bytes())
    wanted = names if is_new else []  # later, this process knows better
    link.send_bytes(json.dumps(wanted).encode())
    before = clients.made | {_pair(name): runtime.decode(link.recv_bytes()) for name in wanted}
    clients.made = before
    try:
        parts = runtime.parts(_results(clients, runtime.decode(link.recv_bytes())))
    except Exception as error:
        traceback.print_exc()
        clients.made = before
        link.send_bytes(json.dumps([[], f"{type(error).__name__}: {error}"]).encode())
        return
    made = {json.dumps(name): x for name, x in clients.made.items()}
    link.send_bytes(json.dumps([list(made), None]).encode())
    for name, value in made.items():
        if name not in names:
            link.send_bytes(runtime.encode(value))
    for part in parts:
        link.send_bytes(part)


def _results(clients: runtime.Clients, message: dict[str, Any]) -> Any:
    if message["format"] != FORMAT:
        raise runtime.RefusedError(
            f"the server speaks version {message['format']} of the protocol, expected {FORMAT}; "
            "write the client's files again with the server's version of fax"
        )
    jax.config.update("jax_enable_x64", message["x64"])
    return [clients.answer(request) for request in message["requests"]][-1]


def _pair(name: str) -> tuple[Any, str]:
    client, slot = json.loads(name)
    return client, slot


class Watch:
    """Ends the process when the node has ended, or if there has been no message for a while."""

    def __init__(self, parent: int, idle: float):
        self._parent, self._idle = parent, idle
        self._last: float | None = None  # it is busy, at first with loading
        threading.Thread(target=self._run, daemon=True).start()

    def __enter__(self) -> None:
        self._last = None

    def __exit__(self, *_: object) -> None:
        self._last = time.monotonic()

    def _run(self) -> None:
        while True:
            time.sleep(0.5)
            try:
                os.kill(self._parent, 0)
            except OSError:
                os._exit(0)
            if self._last is not None and time.monotonic() - self._last > self._idle:
                os._exit(0)


if __name__ == "__main__":
    main()
