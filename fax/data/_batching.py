"""Which examples are in which batch: arithmetic on indices in NumPy, without any data.

The plan of a round says for each client of its cohort which examples are in each batch. Clients
are ordered so that all devices have about the same number of steps, and neighbors on a device
have about the same length.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fax.data._protocol import DataError

# Different uses of a seed, which must not draw the same numbers. `_samplers` has another one.
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
        """How many batches clients with these numbers of examples have."""
        steps = self.epochs * self._steps_of_epoch(num_examples)
        return steps if self.max_steps is None else np.minimum(steps, self.max_steps)

    def _steps_of_epoch(self, num_examples: np.ndarray) -> np.ndarray:
        return (
            num_examples + (0 if self.drop_remainder else self.batch_size - 1)
        ) // self.batch_size

    def fill(self, rng: np.random.Generator, n: int, index: np.ndarray, mask: np.ndarray) -> None:
        """Writes the order of ``n`` examples into flat ``index`` and ``mask``, epoch by epoch.

        Padding is left unchanged.
        """
        whole = int(self._steps_of_epoch(np.asarray(n))) * self.batch_size
        used = min(n, whole)
        total = int(self.steps(np.asarray(n))) * self.batch_size
        for start in range(0, total, whole or 1):
            order = rng.permutation(n) if self.shuffle else np.arange(n)
            count = min(used, total - start)
            index[start : start + count] = order[:count]
            mask[start : start + count] = True


class RoundPlan(NamedTuple):
    """The clients of a round, and which examples are in each of their batches.

    Attributes:
      positions: int [clients], the clients' positions in the data.
      rows: int32 [clients, steps, batch], which of the client's examples. Padding is 0.
      mask: bool [clients, steps, batch].
    """

    positions: np.ndarray
    rows: np.ndarray
    mask: np.ndarray

    @property
    def steps(self) -> np.ndarray:
        """How many steps each client has."""
        return self.mask.any(axis=2).sum(axis=1)

    def padded(self, steps: int) -> RoundPlan:
        """The same plan, padded to more steps."""
        width = ((0, 0), (0, steps - self.mask.shape[1]), (0, 0))
        return self._replace(rows=np.pad(self.rows, width), mask=np.pad(self.mask, width))


def padded_steps(steps: int, most: int | None) -> int:
    """Rounds a number of steps up to one of few: 1, 2, 3, 4, 6, 8, 12, 16, ..., or ``most``.

    A step of padding costs next to nothing, but each new shape has to be compiled. So the result
    is ``most``, the most steps that any client has, if that is at most twice as many.
    """
    size = 1 << max(steps - 1, 0).bit_length()
    size = size * 3 // 4 if steps <= size * 3 // 4 else size
    return size if most is None or most > 2 * size else most


def plan_epochs(
    batching: Batching,
    positions: np.ndarray,
    num_examples: np.ndarray,
    seed: int,
    number: int,
    most: int | None,
) -> RoundPlan:
    """One or several epochs of each client of a cohort.

    Args:
      batching: how examples become batches.
      positions: the clients.
      num_examples: how many examples each of them has.
      seed: of the orders.
      number: of the round.
      most: the most steps that any client of the data has, or None if that is not known.
    """
    rng = np.random.default_rng((seed, _ORDERS, number))
    steps = padded_steps(int(batching.steps(num_examples).max()), most)
    shape = (len(positions), steps, batching.batch_size)
    rows, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for client, n in enumerate(num_examples):
        batching.fill(rng, int(n), rows[client].reshape(-1), mask[client].reshape(-1))
    return RoundPlan(positions, rows, mask)


def plan_stream(batching: Batching, number: int, num_examples: np.ndarray, seed: int) -> RoundPlan:
    """The next ``max_steps`` batches of each client, from a stream that repeats its examples.

    A round continues where the one before it stopped. Each repetition is in a new order. A batch
    may have the last examples of one repetition and the first of the next.
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
    return RoundPlan(np.arange(len(num_examples)), index.reshape(shape), np.ones(shape, bool))


# Order


def rows_of_devices(size: int, devices: int) -> list[list[int]]:
    """The rows of a cohort that each device computes, as `fax.map` divides them."""
    even, left = divmod(size, devices)
    return [
        [*range(d * even, (d + 1) * even), *([even * devices + d] if d < left else [])]
        for d in range(devices)
    ]


def balanced_order(steps: np.ndarray, devices: int) -> np.ndarray:
    """An order of clients that gives all devices about the same number of steps.

    It is greedy: the longest client that is left goes to the device with the fewest steps among
    those that have room. Each device has its longest clients first.
    """
    rows = rows_of_devices(len(steps), devices)
    loads = [(0, device) for device in range(devices) if rows[device]]
    order = np.empty(len(steps), int)
    filled = [0] * devices
    for client in np.argsort(-steps, kind="stable"):
        load, device = heapq.heappop(loads)
        order[rows[device][filled[device]]] = client
        filled[device] += 1
        if filled[device] < len(rows[device]):
            heapq.heappush(loads, (load + int(steps[client]), device))
    return order


def order_within_shares(steps: np.ndarray, shares: Sequence[int]) -> np.ndarray:
    """An order of clients with the longest first, within each of consecutive shares."""
    ends = itertools.pairwise(np.cumsum([0, *shares]))
    return np.concatenate([a + np.argsort(-steps[a:b], kind="stable") for a, b in ends])


def computed_steps(steps: np.ndarray, devices: int, vectorize: int) -> int:
    """How many steps devices compute if vectorized clients wait for the longest of them."""
    total = 0
    for rows in rows_of_devices(len(steps), devices):
        own = steps[rows]
        total += sum(
            len(own[i : i + vectorize]) * int(own[i : i + vectorize].max())
            for i in range(0, len(own), vectorize)
        )
    return total


# Vectorized clients wait for the longest of them. This share of the work may be padding.
_PADDING = 0.15
_MOST_VECTORIZED = 64  # the most that fax.map vectorizes by default


def vectorized_clients(samples: Sequence[np.ndarray], devices: int) -> int:
    """How many clients to vectorize at most, such that little of the work is padding.

    Args:
      samples: of some rounds, the steps of each client, in order.
      devices: over how many devices clients are spread.
    """
    needed = sum(int(steps.sum()) for steps in samples)
    vectorize = _MOST_VECTORIZED
    while vectorize > 1:
        computed = sum(computed_steps(steps, devices, vectorize) for steps in samples)
        if needed >= (1 - _PADDING) * computed:
            break
        vectorize //= 2
    return vectorize


def check_batches(steps: np.ndarray, positions: np.ndarray, ids: Sequence, batch_size: int) -> None:
    """Checks that every client has a batch."""
    empty = np.flatnonzero(steps == 0)
    if len(empty):
        raise DataError(
            f"fax.data.cohorts: client {ids[positions[empty[0]]]!r} has fewer examples than "
            f"batch_size={batch_size}, so that drop_remainder=True leaves it no batch. Leave such "
            "clients out with fax.data.subset, or pass a smaller batch_size."
        )
