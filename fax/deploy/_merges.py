"""When learners send which fragment: the sequence of merges, which is the same for all of them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from fax.algorithms._fragments import Fragment, Span
from fax.algorithms._in_flight import events_of


class Sequence:
    """The merges 0, 1, 2, ... of learners that all take the same steps.

    Merge number n is of fragment ``fragment(n)``, and learners send their updates for it after
    ``step(n)`` inner steps. The times are those of `fax.algorithms.streaming_diloco`. Only, if
    τ = ceil(H / P), that also sends before the first step of all, when updates are zero.
    """

    def __init__(self, steps: int, fragments: int, tau: int):
        events = events_of(steps, fragments, tau)
        # What is sent before the first step of a period is sent after the last of the one before.
        first = {p: event.step or steps for event in events for p in event.sent}
        self._order = sorted(range(fragments), key=lambda p: (first[p], p))
        self._first = sorted(first.values())
        self._steps = steps

    def __len__(self) -> int:
        """The number of fragments, which is how many merges a period has."""
        return len(self._order)

    def fragment(self, number: int) -> int:
        return self._order[number % len(self)]

    def step(self, number: int) -> int:
        """After which inner step learners send it; 0 for the merge before the first."""
        if number < 0:
            return 0
        periods, place = divmod(number, len(self))
        return periods * self._steps + self._first[place]

    def gap(self, number: int) -> int:
        """How many steps learners take after they sent the merge before."""
        return self.step(number) - self.step(number - 1)


def described(part: Fragment) -> list[list[Any]]:
    """A fragment for a message."""
    return [
        [path, None if span is None else [span.axis, list(span.indices)]]
        for path, span in part.items()
    ]


def fragment_of(message: list[list[Any]]) -> Fragment:
    """The fragment that `described` describes."""
    return {path: None if span is None else Span(span[0], tuple(span[1])) for path, span in message}


def types(leaves: dict[str, Any]) -> list[list[Any]]:
    """Paths, dtypes and shapes for a message."""
    return [[path, str(jnp.dtype(x.dtype)), list(np.shape(x))] for path, x in leaves.items()]
