"""All clients that a cohort is drawn from: who they are, how many examples they have, and where."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fax.data._batching import Batching
from fax.data._features import Reader
from fax.data._memory import InMemory
from fax.data._protocol import ClientId, DataError, FederatedData
from fax.data._resident import MOST_ROWS, Resident, check_pools, fits, largest_shard, load
from fax.data._samplers import SAMPLERS, WEIGHTED
from fax.sharding._row_sharding import RowSharding

WHERE = "fax.data.cohorts"

# Sources that are not in memory are read in full, to have them on the device, only if they have
# no more clients than this: reading millions of files is not what a user expects of a first round.
_MOST_CLIENTS = 20_000


class Population:
    """The clients and what their examples look like.

    Attributes:
      ids: the clients, by position.
      batching: how their examples become batches.
      reader: reads a client.
      most: the most steps that any client has, or None where the data are too many to count.
    """

    def __init__(self, data: FederatedData, batching: Batching):
        self.batching = batching
        self.ids: Sequence[ClientId] = data.client_ids()
        if not len(self.ids):
            raise DataError(f"{WHERE}: data has no clients.")
        self.data = data
        self.reader = Reader(data, self.ids[0])
        self.counted = len(self.ids) <= _MOST_CLIENTS or isinstance(data, InMemory)
        self.most: int | None = None
        if self.counted:
            self.counts = self.count(np.arange(len(self.ids)))
            self.most = int(batching.steps(self.counts).max())

    def count(self, positions: np.ndarray) -> np.ndarray:
        """How many examples clients have."""
        if hasattr(self, "counts"):
            return self.counts[positions]
        return np.array([self._count(self.ids[p]) for p in positions], np.int64)

    def _count(self, client_id: ClientId) -> int:
        given = self.data.num_examples(client_id)
        try:
            count = operator.index(given)
        except TypeError:
            raise DataError(
                f"client {client_id!r}: num_examples is {given!r}, expected an int."
            ) from None
        if count < 1:
            raise DataError(
                f"client {client_id!r} has no examples. Leave such clients out with "
                "fax.data.subset."
            )
        if count > MOST_ROWS:
            raise DataError(
                f"client {client_id!r} has {count} examples, more than the {MOST_ROWS} that int32 "
                "can count. Divide it into several clients."
            )
        return count

    def bring(
        self, spread: RowSharding, wanted: bool | None, clients: int, sampler: Any
    ) -> Resident | None:
        """Examples on the devices, if that is wanted, or possible and nothing else is wanted."""
        if wanted is False or (wanted is None and not self.counted):
            return None
        self.counts = self.count(np.arange(len(self.ids)))
        several = jax.process_count() > 1
        size = self.reader.bytes_per_example
        split = several or not fits(int(self.counts.sum()), size, spread)
        free = sampler in (*SAMPLERS, WEIGHTED)
        if wanted is None and split:
            divides = spread.num_shards > 1 and clients % spread.num_shards == 0 and free
            if not (divides and fits(largest_shard(self.counts, spread.num_shards), size, spread)):
                return None
        if split and spread.num_shards == 1:
            split = False  # asked for, and there is nothing to split over
        if split and not free:
            raise DataError(
                f"{WHERE}: examples that are split over devices need a sampler that chooses among "
                f"each device's clients, one of {', '.join([*SAMPLERS, WEIGHTED])}, but sampler is "
                f"{sampler!r}. Take resident=False."
            )
        home = load(self.reader, self.ids, self.counts, spread, split)
        check_pools(home, clients)
        return home
