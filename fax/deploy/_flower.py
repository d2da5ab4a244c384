"""Clients behind the nodes of a Flower federation, reached through a ServerApp's grid."""

from __future__ import annotations

import os
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax

from fax import _arguments, _extras
from fax.deploy import _client as runtime
from fax.deploy._backend import ClientError
from fax.deploy._hosts import Hosts, Read
from fax.deploy._secure_sums import SecureSums, check_secure
from fax.deploy._stages import PLATFORMS
from fax.deploy._values import Row

FORMAT = 1  # of messages; see _flower_worker.py
_POLL = 0.1  # seconds between questions for answers


class Grid(Protocol):
    """What is used of Flower's `Grid`."""

    def get_node_ids(self) -> Iterable[int]: ...

    def push_messages(self, messages: Any) -> Iterable[Any]: ...

    def pull_messages(self, message_ids: Any) -> Iterable[Any]: ...


class Flower(Hosts):
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
      secure: has the server learn nothing but sums; see `SecureSums`. The nodes' ClientApp has to
        be made with ``secure=``, too, by which they know what to refuse.

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

    _host, _hosts = "node", "nodes"
    _platforms = PLATFORMS

    def __init__(
        self,
        grid: Grid,
        nodes: int,
        *,
        plan: str | os.PathLike[str] | None = None,
        timeout: float = 300.0,
        secure: SecureSums | None = None,
    ):
        where = "fax.deploy.Flower"
        check_secure(where, secure)
        if secure is not None and secure.identities is not None:
            raise ValueError(
                f"{where}: secure has identities, expected None; pass them to the nodes' "
                "client_app, because the server must not know them."
            )
        _extras.require(where, "flwr", "flower")
        from fax.deploy import _flower_client  # imports Flower

        self._wire = _flower_client
        _arguments.count(where, "nodes", nodes)
        _arguments.number(where, "timeout", timeout, above=0)
        super().__init__(plan, secure)
        self._grid, self._timeout = grid, timeout
        self._put: dict[tuple[Hashable, str], Any] = {}  # what no client has confirmed to have
        self._numbers = self._wait_for(nodes)
        self._look(self._numbers)

    def put(self, clients: Sequence[Hashable], rows: Sequence[Any]) -> list[Row]:
        self._by_host(clients)
        made = [Row(client, next(self._slots)) for client in clients]
        # They are sent with the next message, because each message takes long.
        with self._lock:
            self._put |= {(row.client, row.slot): x for row, x in zip(made, rows, strict=True)}
        return made

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

    def _ask(self, do: str, requests: Mapping[int, Mapping[str, Any]], read: Read) -> None:
        with self._lock:
            freed = self._take_freed()
            for row in freed:
                self._put.pop(row, None)
            parts = self._by_host([client for client, _ in freed])
            frees = {node: [freed[i] for i in own] for node, own in parts.items()}
            try:
                self._exchange(do, requests, frees, read)
            finally:
                for own in frees.values():  # what no client has confirmed to have freed
                    self._freed.extend(own)

    def _exchange(
        self,
        do: str,
        requests: Mapping[int, Mapping[str, Any]],
        frees: dict[int, list[tuple[Hashable, str]]],
        read: Read,
    ) -> None:
        """As `_ask`, with rows to free by node, of which those are removed that are freed."""
        there = set(self._grid.get_node_ids())
        messages = {
            node: [
                *([_request("free", rows=frees[node])] if node in frees else []),
                *self._puts(node),
                _request(do, **what),
            ]
            for node, what in requests.items()
            if node in there
        }
        waiting = self._send(messages)
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
                frees.pop(node, None)
                for row in [row for row in self._put if self._home[row[0]] == node]:
                    del self._put[row]
                try:
                    if read(node, runtime.decode(self._wire.message_of(message.content))):
                        return
                except (ValueError, TypeError) as error:
                    failed[node] = f"sent what is not an answer: {error}"
            if waiting:
                time.sleep(_POLL)
        failed |= dict.fromkeys(waiting.values(), "did not answer in time")
        if failed:
            raise self._failed(failed)

    def _send(self, requests: Mapping[int, Sequence[Any]]) -> dict[str, int]:
        """Sends requests, and returns the nodes by the numbers of the messages."""
        messages, known = [], dict[Any, Any]()
        for node, own in requests.items():
            what = {"format": FORMAT, "x64": jax.config.jax_enable_x64, "requests": own}
            content = self._wire.records(runtime.parts(what), known)
            # After that, a node that has been away does not get it any more.
            messages.append(self._wire.request(content, node, self._timeout))
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
