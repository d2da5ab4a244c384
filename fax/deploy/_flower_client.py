"""Flower ClientApps that run stages, or a learner. They need Flower, and neither fax nor JAX.

Flower starts a process for each message. Importing JAX, loading data and compiling would take most
of its time, so the first process starts another one, `_flower_worker.py` or `_learner_worker.py`,
which stays, and does all of that. The processes of messages pass on what they receive.

What clients hold apart from their data is in the node's `context.state`. The worker can be started
again at any time, and gets it from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from multiprocessing import AuthenticationError, connection
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

ACTION, LEARNER = "fax", "learner"  # what messages ask for: "query.fax", of stages, or of a learner
# How the bytes of arrays are serialized: as they are. Flower's own way loses some dtypes, such as
# bfloat16, and `Array.numpy` refuses this one.
STYPE = "fax"
_WORKER = [str(pathlib.Path(__file__).with_name("_flower_worker.py"))]
_LEARNER_WORKER = ["-P", "-m", "fax.deploy._learner_worker"]
_STATE, _VALUES = "fax", "fax.values"  # the names of records


class WorkerError(RuntimeError):
    """The process that stays failed, or refused to do what it was asked for."""


def client_app(
    load: str | None = None,
    *,
    plan: str | None = None,
    idle: float = 600.0,
    secure: float | None = None,
    identities: str | None = None,
) -> ClientApp:
    """The ClientApp of a node.

    Args:
      load: ``"module:function"``, called with the node's configuration, a dict. It returns the data
        of the node's clients, ``{client: {name: array}}``. Clients are ints or strings. The module
        is imported in the worker only. None if the server has all data, to try a plan.
      plan: a folder on the node that `fax.deploy.Plan.save` wrote. The node then runs only its
        stages. ``fax-plan`` in the node's configuration takes precedence.
      idle: seconds without a message after which the worker ends. The next message starts another.
      secure: the threshold of secure sums, if the node sends nothing else; see
        `fax.deploy.SecureSums`. It refuses sums whose threshold is less.
      identities: ``"module:function"``, called with the node's configuration. See there, too.
    """
    app = ClientApp()

    @app.query(ACTION)
    def answer(message: Message, context: Context) -> Message:
        config = dict(context.node_config)
        options = {"load": load, "config": config, "plan": config.get("fax-plan", plan)}
        options |= {"secure": secure, "identities": identities}
        with _worker(context, _WORKER, options | {"idle": idle}) as link:
            found = _ask(link, message.content, context.state)
        return Message(found, reply_to=message)

    return app


def learner_app(make: str, *, idle: float = 600.0) -> ClientApp:
    """The ClientApp of a node that is a learner of `fax.deploy.FlowerLearners`. It needs fax.

    Args:
      make: ``"module:function"``, called with the node's configuration, a dict. It returns a
        `fax.deploy.Learner`. The module is imported in the worker only.
      idle: seconds without a message after which the worker ends.
    """
    app = ClientApp()

    @app.query(LEARNER)
    def answer(message: Message, context: Context) -> Message:
        options = {"make": make, "config": dict(context.node_config), "idle": idle}
        with _worker(context, _LEARNER_WORKER, options) as link:
            link.send_bytes(message_of(message.content))
            found = records(_receive_parts(link))
        return Message(found, reply_to=message)

    return app


def _ask(link: Any, content: RecordDict, state: RecordDict) -> RecordDict:
    """The worker's answer to a message. Changes the state as the message asks for."""
    values = state.array_records.get(_VALUES, ArrayRecord())
    _send_json(link, list(values))
    for name in _receive_json(link):  # all of them, if the worker is new
        link.send_bytes(values[name].data)
    link.send_bytes(message_of(content))
    names, error = _receive_json(link)
    if error is not None:
        raise WorkerError(error)
    new = {}
    for name in names:
        if name in values:
            new[name] = values[name]
        else:
            data = link.recv_bytes()
            new[name] = Array("bytes", (len(data),), STYPE, data)
    found = records(_receive_parts(link))
    state[_VALUES] = ArrayRecord(array_dict=new)
    return found


# The worker

_started: list[subprocess.Popen] = []  # Python warns of processes that outlive their objects


@contextlib.contextmanager
def _worker(context: Context, command: list[str], options: dict[str, Any]) -> Iterator[Any]:
    """A connection to the node's worker, which is started if it is not there."""
    try:
        with _connection(context, command, options) as link:
            yield link
    except (OSError, EOFError) as error:
        raise WorkerError("the worker has ended; see the log of the SuperNode") from error


def _connection(context: Context, command: list[str], options: dict[str, Any]) -> Any:
    if (state := context.state.config_records.get(_STATE)) is not None:
        try:
            return _link_to(state["port"], state["key"])
        except (OSError, EOFError, AuthenticationError):
            pass  # it has ended, or another process has its port now
    key = secrets.token_bytes(32)
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _started.append(process)
    assert process.stdin is not None
    assert process.stdout is not None
    # It ends when the process that starts processes for messages does.
    line = json.dumps(options | {"key": key.hex(), "parent": os.getppid(), "path": sys.path})
    try:
        process.stdin.write(f"{line}\n")
        process.stdin.close()
        with process.stdout as out:
            port = out.readline()
    except BrokenPipeError:
        port = ""
    if not port:
        # The error may quote data, so it stays in the log of the node.
        raise WorkerError(
            f"the worker ended at its start, with status {process.wait()}; its error is in the log "
            "of the SuperNode"
        )
    context.state[_STATE] = ConfigRecord({"port": int(port), "key": key, "pid": process.pid})
    return _link_to(int(port), key)


def _link_to(port: int, key: bytes) -> Any:
    link = connection.Client(("127.0.0.1", port), authkey=key)
    # The end of a message need not wait until the beginning is confirmed, which takes 40 ms.
    with socket.socket(fileno=os.dup(link.fileno())) as own:
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return link


def _send_json(link: Any, value: Any) -> None:
    link.send_bytes(json.dumps(value).encode())


def _receive_json(link: Any) -> Any:
    return json.loads(link.recv_bytes())


def _receive_parts(link: Any) -> list[bytes]:
    """A message in parts, see `records`."""
    text = link.recv_bytes()
    return [text, *(link.recv_bytes() for _ in _described(json.loads(text)))]


# Messages, which fax's server and clients describe by a JSON document and the bytes of arrays


def records(parts: Sequence[bytes], known: dict[Any, Array] | None = None) -> RecordDict:
    """A message as Flower sends it: each array with its dtype and shape, and bytes as they are.

    ``known`` is for several messages: arrays that are the same are one object. Flower computes its
    hash once, and sends it once.
    """
    text, *buffers = parts
    known = {} if known is None else known
    arrays: dict[str, Array] = {}
    for about, data in zip(_described(json.loads(text)), buffers, strict=True):
        key = about.get("dtype", "bytes"), tuple(about.get("shape", [len(data)])), data
        arrays[str(len(arrays))] = known.setdefault(key, Array(key[0], key[1], STYPE, data))
    message = ConfigRecord({"text": text.decode()})
    return RecordDict({"message": message, "arrays": ArrayRecord(array_dict=arrays)})


def request(content: RecordDict, node: int, ttl: float, action: str = ACTION) -> Message:
    """A message to a node, which it gets only within some seconds."""
    return Message(content, dst_node_id=node, message_type=f"query.{action}", ttl=ttl)


def message_of(content: RecordDict) -> bytes:
    """The message in one piece.

    Raises:
      ValueError: if it is not a message of fax.
    """
    try:
        text = str(content.config_records["message"]["text"]).encode()
        arrays = content.array_records["arrays"]
        buffers = [arrays[str(number)] for number in range(len(arrays))]
    except KeyError as error:
        raise ValueError("not a message of fax") from error
    if any(own.stype != STYPE for own in buffers):
        raise ValueError("not a message of fax")
    return b"".join([struct.pack("<Q", len(text)), text, *(own.data for own in buffers)])


def _described(x: Any) -> Iterator[dict[str, Any]]:
    """The descriptions of arrays in a JSON document, in their order."""
    if isinstance(x, dict) and "" in x:
        yield x
    elif isinstance(x, dict | list):
        for each in x.values() if isinstance(x, dict) else x:
            yield from _described(each)
