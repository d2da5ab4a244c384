"""Clients behind the nodes of a Flower federation, reached through a ServerApp's grid."""

from __future__ import annotations

import hashlib
import itertools
import os
import pathlib
import secrets
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from fax import _arguments, _extras
from fax.deploy import _client as runtime
from fax.deploy._backend import ClientError, combine, held_rows, is_answer
from fax.deploy._stages import Stage
from fax.deploy._values import Held, Row

FORMAT = 1  # of messages; see _flower_worker.py
_POLL = 0.1  # seconds between questions for answers


class Grid(Protocol):
    """What is used of Flower's `Grid`."""

    def get_node_ids(self) -> Iterable[int]: ...

    def push_messages(self, messages: Any) -> Iterable[Any]: ...

    def pull_messages(self, message_ids: Any) -> Iterable[Any]: ...


class Flower:
    """Clients behind the SuperNodes of a Flower federation. A node runs one client or several.

    It is made in a ServerApp. The ClientApp is that of the files that `write_flower_client` writes.
    It runs stages with JAX, and needs neither fax nor the code of the model. Clients' data are
    loaded by a process of the node, and stay there. What clients hold apart from that is in the
    node's ``context.state``.

    A node fails if it does not answer in time, or answers with an error; see `Plan.run` for what
    happens then.

    Args:
      grid: the ServerApp's grid.
      nodes: how many nodes to wait for. Nodes that connect later take no part.
      plan: a folder that `Plan.save` wrote, if the nodes run only its stages.
      timeout: seconds to wait for nodes to connect, and for the answers of a stage. Answers that
        come later are ignored.

    Raises:
      ClientError: in any method, if nodes fail.

    Example::

      app = flwr.serverapp.ServerApp()

      @app.main()
      def main(grid, context):
          backend = fax.deploy.Flower(grid, nodes=3, timeout=60.0)
          rows = backend.held()  # what the clients loaded, by reference
          slope = plan.run(backend, 0.0, rows, quorum=2)
    """

    def __init__(
        self,
        grid: Grid,
        nodes: int,
        *,
        plan: str | os.PathLike[str] | None = None,
        timeout: float = 300.0,
    ):
        where = "fax.deploy.Flower"
        _extras.require(where, "flwr", "flower")
        from fax.deploy import _flower_client  # imports Flower

        self._wire = _flower_client
        _arguments.count(where, "nodes", nodes)
        _arguments.number(where, "timeout", timeout, above=0)
        self._grid, self._timeout = grid, timeout
        # The same run may continue with another backend, so slots of this one differ.
        name = secrets.token_hex(4)
        self._slots = (f"{name}.{i}" for i in itertools.count())
        self._put: dict[tuple[Hashable, str], Any] = {}  # what no client has confirmed to have
        self._freed: list[tuple[Hashable, str]] = []
        self._home: dict[Hashable, int] = {}
        self._saved: dict[str, str] | None = None  # stages by what they compute
        if plan is not None:
            stages = runtime.read_plan(pathlib.Path(plan))["stages"]
            self._saved = {stage.get("program"): name for name, stage in stages.items()}
        self._blobs: weakref.WeakKeyDictionary[Stage, tuple[str, bytes]]
        self._blobs = weakref.WeakKeyDictionary()
        self._nodes = self._wait_for(nodes)
        self._about: list[tuple[Hashable, str, str, tuple[int, ...]]] = []
        self._ask({node: [_request("about")] for node in self._nodes}, self._look)

    def held(self, clients: Sequence[Hashable] | None = None) -> dict[str, Held]:
        """What the clients loaded, by name: for some clients, or for all in the order of names.

        Clients may have different numbers of steps, which are the leading axis; see ``ragged`` of
        `cut`.

        Raises:
          ValueError: if an array has other different shapes or dtypes at different clients, or is
            missing at some.
        """
        return held_rows("Flower.held", self._about, clients)

    def _look(self, node: int, answer: Any) -> bool:
        """Learns what a node's clients have loaded."""
        for client, name, dtype, shape in answer:
            self._about.append((client, str(name), str(dtype), tuple(map(int, shape))))
            if self._home.setdefault(client, node) != node:
                raise ClientError(f"fax.deploy.Flower: two nodes have a client {client!r}.")
        return False

    def put(self, clients: Sequence[Hashable], rows: Sequence[Any]) -> list[Row]:
        self._by_node(clients)
        made = [Row(client, next(self._slots)) for client in clients]
        # They are sent with the next message, because each message takes long.
        self._put |= {(row.client, row.slot): x for row, x in zip(made, rows, strict=True)}
        return made

    def run(self, stage: Stage, clients: Sequence[Hashable], operands: Sequence[Any]) -> list[Any]:
        return self.race(stage, clients, operands, len(clients))[1]

    def race(
        self, stage: Stage, clients: Sequence[Hashable], operands: Sequence[Any], take: int
    ) -> tuple[list[int], list[Any]]:
        parts = self._by_node(clients)
        name, blob = self._artifact(stage)
        kept = [
            [next(self._slots) if m == "placed" else None for m in stage.outputs] for _ in clients
        ]
        shared = [None if m == "placed" else x for x, m in zip(operands, stage.inputs, strict=True)]
        placed = [x for x, m in zip(operands, stage.inputs, strict=True) if m == "placed"]
        requests = {}
        for node, numbers in parts.items():
            jobs = [[clients[i], [_named(x[i]) for x in placed], kept[i]] for i in numbers]
            # A node may have lost a stage since the last message, so it comes with every message.
            run = {"stage": name, "blob": blob, "shared": shared, "jobs": jobs}
            requests[node] = [_request("run", **run)]
        sent: dict[int, list[Any]] = {}

        def read(node: int, answer: Any) -> bool:
            if not is_answer(stage, len(parts[node]), answer):
                raise ValueError("not what the stage sends")
            sent.update(zip(parts[node][: take - len(sent)], answer))
            return len(sent) == take

        try:
            self._ask(requests, read)
        except ClientError:
            self._free_slots(clients, kept, range(len(clients)))
            raise
        first = sorted(sent)
        # Those that were too late free what they keep with the next message.
        self._free_slots(clients, kept, set(range(len(clients))) - sent.keys())
        contributions = iter(zip(*(sent[i] for i in first), strict=True))
        return first, [
            [Row(clients[i], str(kept[i][k])) for i in first]
            if mode == "placed"
            else combine(mode, next(contributions))
            for k, mode in enumerate(stage.outputs)
        ]

    def fetch(self, rows: Sequence[Row]) -> list[np.ndarray]:
        parts = self._by_node([row.client for row in rows])
        found: dict[int, Any] = {}

        def read(node: int, answer: Any) -> bool:
            found.update(zip(parts[node], answer, strict=True))
            return False

        wanted = {
            node: [[rows[i].client, rows[i].slot] for i in own] for node, own in parts.items()
        }
        self._ask({node: [_request("fetch", rows=own)] for node, own in wanted.items()}, read)
        return [found[i] for i in range(len(rows))]

    def free(self, rows: Iterable[tuple[Hashable, str]]) -> None:
        self._freed += rows  # later, because this may be called at any moment

    def _free_slots(
        self, clients: Sequence[Hashable], kept: Sequence[Sequence[Any]], numbers: Iterable[int]
    ) -> None:
        self.free((clients[i], slot) for i in numbers for slot in kept[i] if slot is not None)

    def _artifact(self, stage: Stage) -> tuple[str, bytes | None]:
        """The name of a stage, and what nodes need to run it."""
        if self._saved is None:
            if stage not in self._blobs:
                blob = stage.exported()
                self._blobs[stage] = hashlib.sha256(blob).hexdigest(), blob
            return self._blobs[stage]
        if stage.digest not in self._saved:
            raise ClientError(
                f"The stage {stage.name!r} is not in the plan of these nodes. Save the plan that "
                "runs there, with the same version of JAX."
            )
        return self._saved[stage.digest], None

    def _by_node(self, clients: Sequence[Hashable]) -> dict[int, list[int]]:
        """The numbers of the clients that each node runs."""
        parts: dict[int, list[int]] = {}
        for number, client in enumerate(clients):
            home = self._home.setdefault(client, self._nodes[len(self._home) % len(self._nodes)])
            parts.setdefault(home, []).append(number)
        return parts

    def _wait_for(self, number: int) -> list[int]:
        end = time.monotonic() + self._timeout
        while len(found := sorted(self._grid.get_node_ids())) < number:
            if time.monotonic() > end:
                raise ClientError(
                    f"fax.deploy.Flower: {len(found)} nodes are connected after {self._timeout:g} "
                    f"seconds, expected {number}."
                )
            time.sleep(_POLL)
        return found

    def _ask(self, requests: Mapping[int, list[Any]], read: Callable[[int, Any], bool]) -> None:
        """Sends requests to nodes, and waits for all answers, for as long as `timeout` says.

        Args:
          requests: by node. The answer is that of a node's last one.
          read: called with each node and its answer: whether no more answers are needed. It may
            raise an error if the answer is wrong.

        Raises:
          ClientError: if some nodes did not answer, or not as they should, and are needed. It names
            all of their clients.
        """
        there = set(self._grid.get_node_ids())
        waiting = self._send({node: own for node, own in requests.items() if node in there})
        failed = dict.fromkeys(requests.keys() - waiting.values(), "cannot be reached")
        end = time.monotonic() + self._timeout
        while waiting and time.monotonic() < end:
            for message in self._grid.pull_messages(list(waiting)):
                node = waiting.pop(message.metadata.reply_to_message_id, None)
                if node is None:
                    continue
                if message.has_error():
                    failed[node] = f"failed: {message.error.reason}"
                    continue
                for row in [row for row in self._put if self._home[row[0]] == node]:
                    del self._put[row]
                try:
                    if read(node, runtime.decode(self._wire.message_of(message.content))):
                        return
                except (ValueError, TypeError, KeyError):
                    failed[node] = "sent what is not an answer"
            if waiting:
                time.sleep(_POLL)
        failed |= dict.fromkeys(waiting.values(), "did not answer in time")
        if failed:
            text = "; ".join(f"node {node} {what}" for node, what in failed.items())
            clients = [client for client, home in self._home.items() if home in failed]
            raise ClientError(f"{text}. Clients that they run: {clients}.", clients)

    def _send(self, requests: Mapping[int, list[Any]]) -> dict[str, int]:
        """Sends requests, and returns the nodes by the numbers of the messages."""
        freed, self._freed = self._freed, []
        for row in freed:
            self._put.pop(row, None)
        parts = self._by_node([client for client, _ in freed])
        messages, known = [], dict[Any, Any]()
        for node, own in requests.items():
            frees = [_request("free", rows=[list(freed[i]) for i in parts.pop(node, [])])]
            what = {
                "format": FORMAT,
                "x64": jax.config.jax_enable_x64,
                "requests": [*frees, *self._puts(node), *own],
            }
            content = self._wire.records(runtime.parts(what), known)
            # After that, a node that has been away does not get it any more.
            messages.append(self._wire.request(content, node, self._timeout))
        self._freed += [freed[i] for own in parts.values() for i in own]
        numbers = list(self._grid.push_messages(messages))
        if len(numbers) != len(messages):
            raise ClientError("fax.deploy.Flower: the SuperLink did not take the messages.")
        return {
            number: node
            for number, node in zip(numbers, requests, strict=True)
            if number is not None
        }

    def _puts(self, node: int) -> list[Any]:
        own = {row: value for row, value in self._put.items() if self._home[row[0]] == node}
        if not own:
            return []
        clients, slots = zip(*own, strict=True)
        return [_request("put", clients=clients, slots=slots, values=list(own.values()))]


def _request(do: str, **what: Any) -> dict[str, Any]:
    return {"do": do, "with": what}


def _named(x: Any) -> Any:
    """The name of what a client holds, or a value for it."""
    return x.slot if isinstance(x, Row) else x
