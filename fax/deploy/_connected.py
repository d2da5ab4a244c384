"""The loop that runs `Elastic` for learners that are connected to it, in whatever way."""

from __future__ import annotations

import abc
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Self

from fax.deploy._backend import ClientError
from fax.deploy._elastic import Action, Elastic, Grace, Send
from fax.deploy._updates import Merge

_POLL = 0.5  # seconds between looks at whether learners are gone


class Name(NamedTuple):
    """A learner. One that is started again has the same number, and another start."""

    number: int
    start: int


class Connected(NamedTuple):
    """A learner can be reached."""

    name: Name


class Left(NamedTuple):
    """A learner cannot be reached any more."""

    name: Name


class Received(NamedTuple):
    """A learner sent a message: that it wants to join, or an update."""

    name: Name
    message: dict[str, Any]


Event = Connected | Left | Received


class ConnectedLearners(abc.ABC):
    """Learners, and the connections to them, which subclasses make.

    Messages to a learner arrive in the order in which they were sent, and so do its own. If one is
    lost, the learner counts as one that has left.

    Args:
      grace: the length of a grace window in seconds.
      timeout: seconds to wait for any message of a learner.
    """

    def __init__(self, grace: float, timeout: float):
        self._grace, self._timeout = grace, timeout
        self._server: Elastic | None = None
        self._window: tuple[int, float] | None = None  # the merge, and when its window ends

    @abc.abstractmethod
    def stop(self) -> None:
        """Ends the learners."""

    @abc.abstractmethod
    def _next_event(self, wait: float) -> Event | None:
        """What happens next, or None if nothing happens for some seconds.

        Raises:
          ClientError: if nothing can happen any more.
        """

    @abc.abstractmethod
    def _send(self, messages: Iterable[Send]) -> None:
        """Sends messages to those of their learners that can be reached, without waiting."""

    @abc.abstractmethod
    def _reachable(self) -> list[Name]:
        """The learners that can be reached."""

    @abc.abstractmethod
    def _statuses(self) -> str:
        """A sentence about the learners that cannot be reached, for errors."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def train(self, server: Elastic) -> Iterator[Merge]:
        """Trains, and yields every merge after it took place.

        Learners do not wait for the caller: they continue until they need a merge. Those that are
        started later join. To end training, leave the loop. Then the learners wait. Call it again
        with the same server to continue, or with another one to begin anew.

        Raises:
          ClientError: if no learner is left, no message comes in time, or an update is not one of
            the server's parameters.
        """
        if server is not self._server:
            self._server, self._window = server, None
            self._send([Send(tuple(self._reachable()), {"do": "settings", **server.settings})])
        last = time.monotonic()
        while True:
            wait = _POLL
            if self._window is not None:
                wait = min(wait, max(0.0, self._window[1] - time.monotonic()))
            event = self._next_event(wait)
            if event is not None:
                yield from self._carry_out(self._happened(event, server))
                last = time.monotonic()  # the caller may have been slow
            elif time.monotonic() > last + self._timeout:
                raise ClientError(
                    f"No learner sent anything for {self._timeout:g} seconds. "
                    f"{len(server.learners)} have joined, and the quorum is "
                    f"{server.settings['quorum']}. {self._statuses()}"
                )
            # If the caller was slow, what came in time is still to be received.
            elif self._window is not None and time.monotonic() >= self._window[1]:
                number, _ = self._window
                self._window = None
                yield from self._carry_out(server.grace_over(number))
                last = time.monotonic()

    def _happened(self, event: Event, server: Elastic) -> list[Action]:
        match event:
            case Connected(name):
                return [Send((name,), {"do": "settings", **server.settings})]
            case Left(name):
                return server.left(name)
            case Received(name, message):
                if message["do"] == "join":
                    return server.joined(name)
                return server.received(name, message["with"])

    def _carry_out(self, actions: list[Action]) -> list[Merge]:
        """Sends messages, opens grace windows, and returns merges, with the learners' numbers."""
        self._send(action for action in actions if isinstance(action, Send))
        merges = []
        for action in actions:
            if isinstance(action, Grace):
                self._window = action.number, time.monotonic() + self._grace
            elif isinstance(action, Merge):
                late = frozenset(name.number for name in action.late)
                merges.append(action._replace(tokens=_by_number(action.tokens), late=late))
        return merges


def _by_number(tokens: dict[Any, int]) -> dict[int, int]:
    """The tokens of each learner, also if it was started again between two updates."""
    found: dict[int, int] = {}
    for name, count in tokens.items():
        found[name.number] = found.get(name.number, 0) + count
    return found
