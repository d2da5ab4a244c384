"""Learners on the nodes of a Flower federation, reached through a ServerApp's grid."""

from __future__ import annotations

import collections
import secrets
import time
from collections.abc import Iterable
from typing import Any

import jax

from fax import _arguments, _extras
from fax.deploy import _client as runtime
from fax.deploy._backend import ClientError
from fax.deploy._connected import Connected, ConnectedLearners, Event, Left, Name, Received
from fax.deploy._elastic import Send
from fax.deploy._flower import FORMAT, Grid

_WHERE = "fax.deploy.FlowerLearners"
_POLL = 0.1  # seconds between questions for answers
_LOOK = 1.0  # seconds between questions for the nodes that are there
_HOLD = 10.0  # seconds that a node keeps a message at most
_STOP = 30.0  # seconds in which learners learn that they should stop


class _Conversation:
    """Messages to the learner of a node, and its answers, one after the other.

    Attributes:
      name: of the learner.
      queue: what it is to be told.
      number: how many messages it has answered.
      joined: whether it has said anything.
      waiting: whether it waits to be told something.
      asked: the number of the message that it has not answered, and until when it has time.
    """

    def __init__(self, name: Name):
        self.name = name
        self.talk = f"{secrets.token_hex(8)}.{name.start}"
        self.queue: list[dict[str, Any]] = []
        self.number = 0
        self.joined = False
        self.waiting = True
        self.asked: tuple[str, float] | None = None


class FlowerLearners(ConnectedLearners):
    """Learners on the SuperNodes of a Flower federation, each with devices and a mesh of its own.

    It is made in a ServerApp. The ClientApp is made by ``learner_app("module:function")`` of the
    package that `write_flower_client` writes. The function is called with the node's configuration,
    a dict, in a process of the node that stays, and returns a `Learner`. This process imports fax
    and the code of the model.

    Every node that is connected is a learner, also those that connect later. Its number in a
    `Merge` is that of the node. A learner has left if its node is not connected any more, does not
    answer in time, or answers with an error. It is then asked to join again.

    A node works on one message at a time, and needs seconds for each, whatever is in it. It keeps a
    message until the learner has something to answer, or waits for an answer, but at most ten
    seconds, or half of the grace window, so that calls arrive in time.

    Args:
      grid: the ServerApp's grid.
      grace: the length of a grace window in seconds: how long a merge waits for learners that have
        been called.
      timeout: seconds to wait for any message of a learner, and for the answer of a node.

    Raises:
      ValueError: if an argument is out of range.

    Example::

      app = flwr.serverapp.ServerApp()

      @app.main()
      def main(grid, context):
          server = fax.deploy.Elastic(params, steps=500, tau=20, quorum=2)
          with fax.deploy.FlowerLearners(grid) as learners:
              for merge in learners.train(server):
                  print(merge.number, merge.loss, flush=True)
                  if merge.number == 100:
                      break
    """

    def __init__(self, grid: Grid, *, grace: float = 30.0, timeout: float = 300.0):
        _extras.require(_WHERE, "flwr", "flower")
        from fax.deploy import _flower_client  # imports Flower

        self._wire = _flower_client
        _arguments.number(_WHERE, "grace", grace, least=0)
        _arguments.number(_WHERE, "timeout", timeout, above=0)
        super().__init__(grace, timeout)
        self._grid = grid
        self._hold = min(_HOLD, grace / 2, timeout / 2)
        self._talks: dict[int, _Conversation] = {}  # by node
        self._starts: collections.Counter[int] = collections.Counter()
        self._failures: dict[int, str] = {}  # why a node's learner has not joined
        self._events: collections.deque[Event] = collections.deque()
        self._next_look = 0.0

    def stop(self) -> None:
        """Ends the learners, and waits up to half a minute until they have learned that."""
        self._send([Send(tuple(self._reachable()), {"do": "stop"})])
        end = time.monotonic() + _STOP
        while self._talks and time.monotonic() < end:
            self._ask()
            self._read_answers()
            time.sleep(_POLL)
        self._talks.clear()

    def _next_event(self, wait: float) -> Event | None:
        end = time.monotonic() + wait
        while not self._events:
            if time.monotonic() >= self._next_look:
                self._look()
            self._ask()
            self._read_answers()
            left = end - time.monotonic()
            if left <= 0 and not self._events:
                return None
            if not self._events:
                time.sleep(min(_POLL, left))
        return self._events.popleft()

    def _send(self, messages: Iterable[Send]) -> None:
        for names, message in messages:
            for talk in self._talks.values():
                if talk.name in names:
                    talk.queue.append(message)
        self._ask()  # now, because the caller of `train` may be slow

    def _reachable(self) -> list[Name]:
        return [talk.name for talk in self._talks.values()]

    def _statuses(self) -> str:
        shown = "; ".join(f"node {node} {why}" for node, why in self._failures.items())
        return f"Nodes whose learners could not join: {shown or 'none'}."

    # Nodes

    def _look(self) -> None:
        """Begins conversations with new nodes, and ends those with nodes that are gone."""
        self._next_look = time.monotonic() + _LOOK
        nodes = set(self._grid.get_node_ids())
        assert self._server is not None
        if len(nodes) >= self._server.settings["quorum"] and nodes <= self._failures.keys():
            raise ClientError(f"No learner can join. {self._statuses()}")
        for node in self._talks.keys() - nodes:
            self._fail(self._talks[node], "is not connected any more")
        for node in sorted(nodes - self._talks.keys()):
            name = Name(node, self._starts[node])
            self._starts[node] += 1
            self._talks[node] = _Conversation(name)
            self._events.append(Connected(name))

    def _fail(self, talk: _Conversation, why: str) -> None:
        """Ends a conversation. If the node is there, another one begins at the next look."""
        node = talk.name.number
        del self._talks[node]
        self._events.append(Left(talk.name))
        if not talk.joined:
            self._failures[node] = why

    def _ask(self) -> None:
        """Sends the next messages to nodes that have none, and something to be told or to tell."""
        messages, talks, known = [], [], dict[Any, Any]()
        for talk in self._talks.values():
            if talk.asked is None and (talk.queue or not talk.waiting):
                what = {"format": FORMAT, "x64": jax.config.jax_enable_x64, "talk": talk.talk}
                what |= {"number": talk.number, "messages": talk.queue, "hold": self._hold}
                content = self._wire.records(runtime.parts(what), known)
                node, action = talk.name.number, self._wire.LEARNER
                messages.append(self._wire.request(content, node, self._timeout, action))
                talks.append(talk)
        if not messages:
            return
        numbers = list(self._grid.push_messages(messages))
        if len(numbers) != len(messages):
            raise ClientError(f"{_WHERE}: the SuperLink did not take the messages.")
        for talk, number in zip(talks, numbers, strict=True):
            if number is None:
                self._fail(talk, "cannot be reached")
            else:
                talk.asked, talk.queue = (number, time.monotonic() + self._timeout), []

    def _read_answers(self) -> None:
        waiting = {talk.asked[0]: talk for talk in self._talks.values() if talk.asked}
        if not waiting:
            return
        for message in self._grid.pull_messages(list(waiting)):
            talk = waiting.pop(message.metadata.reply_to_message_id, None)
            if talk is None:
                continue
            if message.has_error():
                self._fail(talk, f"failed: {message.error.reason}")
                continue
            try:
                answer = runtime.decode(self._wire.message_of(message.content))
                self._take(talk, answer)
            except (ValueError, TypeError, KeyError) as error:
                self._fail(talk, f"sent what is not an answer: {error}")
        for talk in waiting.values():
            if talk.asked is not None and time.monotonic() > talk.asked[1]:
                self._fail(talk, "did not answer in time")

    def _take(self, talk: _Conversation, answer: Any) -> None:
        """Takes note of an answer."""
        if "error" in answer:
            self._fail(talk, f"refused: {answer['error']}")
        elif "lost" in answer:
            self._fail(talk, "missed a message")
        elif answer["ended"]:
            del self._talks[talk.name.number]  # it was told to stop
        else:
            messages = answer["messages"]
            if not all(m["do"] == "join" or isinstance(m["with"], dict) for m in messages):
                raise ValueError("a message is neither an update nor a wish to join")
            talk.asked, talk.waiting = None, answer["waiting"]
            talk.number += 1
            if messages:
                talk.joined = True
                self._failures.pop(talk.name.number, None)
            self._events.extend(Received(talk.name, message) for message in messages)
