"""All clients' examples one after the other, in batches of equal size that cross client borders.

A row is a batch, and each device has one row at a time. So no batch but the last ones is short,
however few examples a client has, and there is one shape to compile. A thread reads clients
while the devices work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from fax.data._features import Reader
from fax.data._host import aligned_zeros
from fax.data._prefetch import Prefetch
from fax.data._protocol import DataError, Examples, FederatedData
from fax.sharding._spread import Spread

# Rounds that are read ahead.
_AHEAD = 2

# check(client_id, examples) raises for examples that cannot be evaluated.
Check = Callable[[Any, Examples], Examples]


class Rows(NamedTuple):
    """What the devices work on at once: a batch each.

    Attributes:
      batches: feature -> array [rows, batch, ...].
      mask: bool [rows, batch], False for padding.
      slots: int32 [rows, batch], to which client of its row an example belongs: 0, 1, ...
    """

    batches: dict[str, Any]
    mask: Any
    slots: Any


class Layout:
    """Where examples are among the rows.

    Attributes:
      rounds: how often each device has a row to work on.
      first: int [rounds, rows], the position of a row's client 0 in the data.
      slots: the most clients that any row has examples of.
    """

    def __init__(
        self, data: FederatedData, batch_size: int, spread: Spread, check: Check, where: str
    ):
        self.ids = data.client_ids()
        self.reader, self.check = Reader(data, self.ids[0]), check
        self.counts = np.array([data.num_examples(i) for i in self.ids], np.int64)
        self.ends = np.cumsum(self.counts)
        total = int(self.ends[-1])
        if not total:
            raise DataError(f"{where}: the {len(self.ids)} clients of data have no examples.")
        self.spread, width = spread, spread.ways
        self.own = spread.own_rows(where, width)
        # As many rounds as are needed, and all of them about equally full.
        self.rounds = -(-total // (width * batch_size))
        self.batch_size = -(-total // (width * self.rounds))
        edges = np.minimum(np.arange(self.rounds * width + 1) * self.batch_size, total)
        self.begins, self.stops = edges[:-1], edges[1:]
        first = np.searchsorted(self.ends, np.minimum(self.begins, total - 1), side="right")
        last = np.searchsorted(self.ends, self.stops - 1, side="right")
        self.first = first.reshape(self.rounds, width)
        self.slots = int(np.max(last - first)) + 1
        self._seen: tuple[int, dict[str, np.ndarray]] = (-1, {})

    def __iter__(self) -> Iterator[Rows]:
        """The rows of each round, on the devices."""
        ahead = Prefetch(lambda number: self._read(number % self.rounds), 0, _AHEAD)
        try:
            for _ in range(self.rounds):
                yield Rows(*map(self._put, next(ahead)))
        finally:
            ahead.close()

    def _put(self, x: Any) -> Any:
        width = self.spread.ways
        return jax.tree.map(lambda leaf: self.spread.put(leaf, width, self.own), x)

    def _read(self, number: int) -> Rows:
        """This process' rows, on the host."""
        shape = (len(self.own), self.batch_size)
        batches = {
            name: aligned_zeros((*shape, *feature.shape), feature.dtype)
            for name, feature in self.reader.features.items()
        }
        mask, slots = np.zeros(shape, bool), np.zeros(shape, np.int32)
        for row, here in enumerate(self.own):
            place = number * self.spread.ways + here
            at, stop = int(self.begins[place]), int(self.stops[place])
            mask[row, : stop - at] = True
            position, filled = int(self.first[number, here]), 0
            while at + filled < stop:
                skip = at + filled - int(self.ends[position] - self.counts[position])
                count = min(int(self.counts[position]) - skip, stop - at - filled)
                to = slice(filled, filled + count)
                for name, array in self._client(position).items():
                    batches[name][row, to] = array[skip : skip + count]
                slots[row, to] = position - self.first[number, here]
                filled, position = filled + count, position + 1
        return Rows(batches, mask, slots)

    def _client(self, position: int) -> dict[str, np.ndarray]:
        """A client's examples. One may go on in the next row, and is kept until then."""
        if self._seen[0] != position and self.counts[position]:
            examples = self.reader.client(self.ids[position], int(self.counts[position]))
            self.check(self.ids[position], examples)
            self._seen = (position, examples)
        return self._seen[1] if self.counts[position] else {}
