"""All clients' examples one after the other, in batches of equal size that cross client borders.

A row is a batch, and each device has one row at a time. So no batch but the last ones is short,
however few examples a client has, and there is one shape to compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from fax.data._features import Reader
from fax.data._host import aligned_zeros
from fax.data._protocol import DataError, FederatedData
from fax.sharding._spread import Spread


class Rows(NamedTuple):
    """What the devices work on at once: a batch each.

    Attributes:
      batches: feature -> array [rows, batch, ...].
      mask: bool [rows, batch], False for padding.
      slots: int32 [rows, batch], to which client of its row an example belongs: 0, 1, ...
      first: int [rows], the position of a row's client 0 in the data.
    """

    batches: dict[str, jax.Array]
    mask: jax.Array
    slots: jax.Array
    first: np.ndarray


class Layout:
    """Where examples are among the rows.

    Attributes:
      slots: the most clients that any row has examples of.
      reader: reads a client.
    """

    def __init__(self, data: FederatedData, batch_size: int, spread: Spread, where: str):
        self.ids = data.client_ids()
        self.reader = Reader(data, self.ids[0])
        self.counts = np.array([data.num_examples(i) for i in self.ids], np.int64)
        self.ends = np.cumsum(self.counts)
        self.total = int(self.ends[-1])
        if not self.total:
            raise DataError(f"{where}: the {len(self.ids)} clients of data have no examples.")
        self.spread, self.width = spread, spread.ways
        self.own = spread.own_rows(where, self.width)
        # As many rounds as are needed, and all of them equally full.
        self.rounds = -(-self.total // (self.width * batch_size))
        self.batch_size = -(-self.total // (self.width * self.rounds))
        starts = np.arange(self.rounds * self.width) * self.batch_size
        self.starts = np.minimum(starts, self.total - 1)
        self.first = np.searchsorted(self.ends, self.starts, side="right")
        lasts = np.minimum(starts + self.batch_size, self.total) - 1
        last = np.searchsorted(self.ends, np.maximum(lasts, self.starts), side="right")
        self.slots = int((last - self.first).max()) + 1

    def rows(self) -> Iterator[Rows]:
        """All rows, in rounds."""
        shape = (len(self.own), self.batch_size)
        seen: tuple[int, dict[str, np.ndarray]] = (-1, {})
        for number in range(self.rounds):
            batches = {
                name: aligned_zeros((*shape, *feature.shape), feature.dtype)
                for name, feature in self.reader.features.items()
            }
            mask, slots = np.zeros(shape, bool), np.zeros(shape, np.int32)
            for row, global_row in enumerate(number * self.width + self.own):
                at, end = (min(self.batch_size * (global_row + i), self.total) for i in (0, 1))
                filled, position = 0, int(self.first[global_row])
                mask[row, : end - at] = True
                while filled < end - at:
                    if seen[0] != position:  # a client may go on in the next row
                        seen = (position, self._read(position))
                    begin = at + filled - int(self.ends[position] - self.counts[position])
                    count = min(int(self.counts[position]) - begin, end - at - filled)
                    for name, array in seen[1].items():
                        batches[name][row, filled : filled + count] = array[begin : begin + count]
                    slots[row, filled : filled + count] = position - self.first[global_row]
                    filled += count
                    position += filled < end - at
            first = self.first[number * self.width : (number + 1) * self.width]
            yield Rows(self._put(batches), self._put(mask), self._put(slots), first)

    def _read(self, position: int) -> dict[str, np.ndarray]:
        count = int(self.counts[position])
        return self.reader.client(self.ids[position], count) if count else {}

    def _put(self, x: Any) -> Any:
        return jax.tree.map(lambda leaf: self.spread.put(leaf, self.width, self.own), x)
