"""The process of a learner, which connects a `fax.deploy.Learner` to the server that started it.

    python -m fax.deploy._learner_process ADDRESS --make MODULE:FUNCTION --number N

The key of the connection is the first line of standard input. The process ends when the server is
gone or asks it to.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import pathlib
import sys
from collections.abc import Iterator
from multiprocessing import connection
from typing import Any, Protocol

from fax import _arguments
from fax.deploy import _client as runtime
from fax.deploy._learner import Learner


class LineEndedError(Exception):
    """The connection to the server has ended. It is not an error of the learner's own code."""


class Line(Protocol):
    """A learner's connection to its server. A LineEndedError says that it ended."""

    def poll(self) -> bool:
        """Whether a message is there."""

    def receive(self) -> dict[str, Any]:
        """The next message. Waits for it."""

    def send(self, messages: list[dict[str, Any]], waiting: bool) -> None:
        """Sends messages. ``waiting`` says whether the learner now waits for one."""


def make(name: str, argument: Any) -> Learner:
    """Calls the learner function. A file is imported as Python imports a script."""
    module, _, function = name.rpartition(":")
    if module.endswith(".py"):
        path = pathlib.Path(module).resolve()
        sys.path.insert(0, str(path.parent))
        module = path.stem
    learner = getattr(importlib.import_module(module), function)(argument)
    if not isinstance(learner, Learner):
        raise TypeError(
            f"{name} returned {_arguments.shown(learner)}, expected a fax.deploy.Learner."
        )
    return learner


def serve(line: Line, learner: Learner) -> None:
    """Trains until the server stops the learner or is gone."""
    with contextlib.suppress(LineEndedError):
        while True:
            while line.poll() or learner.waiting:
                message = line.receive()
                if message["do"] == "stop":
                    return
                if message["do"] == "settings":
                    learner.prepare(message)
                    line.send([{"do": "join"}], learner.waiting)
                else:
                    learner.receive(message)
            if updates := learner.advance():
                messages = [{"do": "update", "with": update} for update in updates]
                line.send(messages, learner.waiting)


class _Connection:
    """A line that is a connection of multiprocessing."""

    def __init__(self, link: Any):
        self._link = link

    def poll(self) -> bool:
        with _until_it_ends():
            return self._link.poll()

    def receive(self) -> dict[str, Any]:
        with _until_it_ends():
            return runtime.decode(self._link.recv_bytes(runtime.LARGEST))

    def send(self, messages: list[dict[str, Any]], waiting: bool) -> None:
        with _until_it_ends():
            for message in messages:
                self._link.send_bytes(runtime.encode(message))


@contextlib.contextmanager
def _until_it_ends() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise LineEndedError from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="HOST:PORT of the server")
    parser.add_argument("--make", required=True, help="MODULE:FUNCTION or FILE.py:FUNCTION")
    parser.add_argument("--number", type=int, required=True, help="the number of this learner")
    args = parser.parse_args()
    host, _, port = args.address.rpartition(":")
    key = sys.stdin.readline().strip().encode()
    learner = make(args.make, args.number)
    with connection.Client((host, int(port)), authkey=key) as link:
        runtime.without_delay(link)
        link.send_bytes(runtime.encode({"pid": os.getpid()}))
        serve(_Connection(link), learner)


if __name__ == "__main__":
    main()
