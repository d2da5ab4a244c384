"""Which examples come in which batch, in NumPy: index arithmetic without any data.

A round's plan names, for every client of its cohort, the examples of each batch. Clients are
put in an order in which devices have about the same number of steps to run and neighbours on
a device have about the same length.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fax.data._protocol import DataError

# What a seed is used for, so that no two uses draw the same numbers.
_ORDERS, _STREAMS = 1, 2


@dataclasses.dataclass(frozen=True)
class Batching:
    """How a client's examples become batches."""

    batch_size: int
    epochs: int
    max_steps: int | None
    drop_remainder: bool
    shuffle: bool

    def steps(self, num_examples: np.ndarray) -> np.ndarray:
        """How many batches clients of so many examples have."""
        steps = self.epochs * self._steps_of_epoch(num_examples)
        return steps if self.max_steps is None else np.minimum(steps, self.max_steps)

    def _steps_of_epoch(self, num_examples: np.ndarray) -> np.ndarray:
        return (
            num_examples + (0 if self.drop_remainder else self.batch_size - 1)
        ) // self.batch_size

    def fill(self, rng: np.random.Generator, n: int, index: np.ndarray, mask: np.ndarray) -> None:
        """Writes a client's examples into flat ``index`` and ``mask``, epoch after epoch.

        What is padding stays as it was.
        """
        whole = int(self._steps_of_epoch(np.asarray(n))) * self.batch_size
        used = min(n, whole)
        total = int(self.steps(np.asarray(n))) * self.batch_size
        for start in range(0, total, whole or 1):
            order = rng.permutation(n) if self.shuffle else np.arange(n)
            count = min(used, total - start)
            index[start : start + count] = order[:count]
            mask[start : start + count] = True


class Plan(NamedTuple):
    """What a round works on.

    Attributes:
      positions: int [clients], the clients' positions in the data.
      rows: int32 [clients, steps, batch], numbers of a client's own examples. Padding is 0.
      mask: bool [clients, steps, batch].
    """

    positions: np.ndarray
    rows: np.ndarray
    mask: np.ndarray

    @property
    def steps(self) -> np.ndarray:
        """How many steps each client has."""
        return self.mask.any(axis=2).sum(axis=1)

    def padded(self, steps: int) -> Plan:
        """The same plan with room for more steps."""
        width = ((0, 0), (0, steps - self.mask.shape[1]), (0, 0))
        return self._replace(rows=np.pad(self.rows, width), mask=np.pad(self.mask, width))


def bucket(steps: int, most: int | None) -> int:
    """A capacity for so many steps, one of few: 1, 2, 3, 4, 6, 8, 12, 16, ..., or ``most``.

    A step that is not run costs next to nothing, and a new shape has to be compiled. So it is the
    most that any client has, if that is no more than twice as much.
    """
    size = 1 << max(steps - 1, 0).bit_length()
    size = size * 3 // 4 if steps <= size * 3 // 4 else size
    return size if most is None or most > 2 * size else most


def plan(
    batching: Batching,
    positions: np.ndarray,
    num_examples: np.ndarray,
    seed: int,
    number: int,
    most: int | None,
) -> Plan:
    """An epoch, or several, for each client of a cohort.

    Args:
      batching: how examples become batches.
      positions: the clients.
      num_examples: how many examples each of them has.
      seed: of everything random.
      number: the round's.
      most: the most steps that any client in the data has, if that is known.
    """
    rng = np.random.default_rng((seed, _ORDERS, number))
    steps = bucket(int(batching.steps(num_examples).max()), most)
    shape = (len(positions), steps, batching.batch_size)
    rows, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for client, n in enumerate(num_examples):
        batching.fill(rng, int(n), rows[client].reshape(-1), mask[client].reshape(-1))
    return Plan(positions, rows, mask)


def stream(batching: Batching, number: int, num_examples: np.ndarray, seed: int) -> Plan:
    """The next ``max_steps`` batches of every client, of a stream that repeats its examples.

    Round ``number`` goes on where the one before stopped. Each repetition is in an order of its
    own; a batch may hold the last examples of one and the first of the next.
    """
    assert batching.max_steps is not None
    size = batching.max_steps * batching.batch_size
    index = np.zeros((len(num_examples), size), np.int32)
    for row, n in enumerate(map(int, num_examples)):
        filled, at = 0, number * size
        while filled < size:
            epoch, begin = divmod(at + filled, n)
            rng = np.random.default_rng((seed, _STREAMS, row, epoch))
            order = rng.permutation(n) if batching.shuffle else np.arange(n)
            count = min(n - begin, size - filled)
            index[row, filled : filled + count] = order[begin : begin + count]
            filled += count
    shape = (len(num_examples), batching.max_steps, batching.batch_size)
    return Plan(np.arange(len(num_examples)), index.reshape(shape), np.ones(shape, bool))


# Order


def spans(size: int, ways: int) -> list[list[int]]:
    """The rows that each of ``ways`` devices works on, as `fax.map` divides them."""
    even, left = divmod(size, ways)
    return [
        [*range(d * even, (d + 1) * even), *([even * ways + d] if d < left else [])]
        for d in range(ways)
    ]


def balanced(steps: np.ndarray, ways: int) -> np.ndarray:
    """An order of clients in which devices have about the same number of steps.

    Greedily: the longest client that is left goes to the device that has the fewest steps and
    room. Each device has its clients in order of length, the longest first.
    """
    rows = spans(len(steps), ways)
    loads = [(0, device) for device in range(ways) if rows[device]]
    order = np.empty(len(steps), int)
    filled = [0] * ways
    for client in np.argsort(-steps, kind="stable"):
        load, device = heapq.heappop(loads)
        order[rows[device][filled[device]]] = client
        filled[device] += 1
        if filled[device] < len(rows[device]):
            heapq.heappush(loads, (load + int(steps[client]), device))
    return order


def sorted_within(steps: np.ndarray, shares: Sequence[int]) -> np.ndarray:
    """The order that puts the longest first in each of consecutive shares of clients."""
    ends = itertools.pairwise(np.cumsum([0, *shares]))
    return np.concatenate([a + np.argsort(-steps[a:b], kind="stable") for a, b in ends])


def computed_steps(steps: np.ndarray, ways: int, at_once: int) -> int:
    """How many steps devices compute, if clients who are worked on at once wait for the longest."""
    total = 0
    for rows in spans(len(steps), ways):
        own = steps[rows]
        total += sum(
            len(own[i : i + at_once]) * int(own[i : i + at_once].max())
            for i in range(0, len(own), at_once)
        )
    return total


# Vectorised clients wait for the longest among them. This much of the work may be for nothing.
_PADDING = 0.15
_MOST_AT_ONCE = 16


def vectorized_clients(samples: Sequence[np.ndarray], ways: int) -> int:
    """How many clients to work on at once so that little of what is computed is padding.

    Args:
      samples: the clients' steps of some rounds, in order.
      ways: over how many devices they are spread.
    """
    needed = sum(int(steps.sum()) for steps in samples)
    at_once = _MOST_AT_ONCE
    while at_once > 1:
        computed = sum(computed_steps(steps, ways, at_once) for steps in samples)
        if needed >= (1 - _PADDING) * computed:
            break
        at_once //= 2
    return at_once


def check_lengths(steps: np.ndarray, positions: np.ndarray, ids: Sequence, batch_size: int) -> None:
    """Raises if some client has no batch."""
    empty = np.flatnonzero(steps == 0)
    if len(empty):
        raise DataError(
            f"fax.data.cohorts: client {ids[positions[empty[0]]]!r} has fewer examples than "
            f"batch_size={batch_size}, so that drop_remainder=True leaves it no batch. Leave such "
            "clients out with fax.data.subset, or take a smaller batch_size."
        )
