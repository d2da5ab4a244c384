"""All clients of the data: how many examples they have, and whether these fit on devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fax import _arguments
from fax.data._batching import Batching
from fax.data._client_reader import ClientReader
from fax.data._memory import InMemory
from fax.data._protocol import ClientId, DataError, FederatedData
from fax.data._resident import (
    MOST_ROWS,
    ResidentExamples,
    check_pools,
    fits,
    largest_shard,
    place_examples,
)
from fax.data._samplers import SAMPLERS, WEIGHTED
from fax.sharding._row_sharding import RowSharding

WHERE = "fax.data.cohorts"

# Data that are not in memory are read in full, to keep them on the devices, only if there are no
# more clients than this: no user expects a first round to read millions of files.
_MOST_CLIENTS = 20_000


class AllClients:
    """The clients that cohorts are sampled from, and what their examples look like.

    Attributes:
      ids: the clients, by position.
      batching: how their examples become batches.
      reader: reads a client.
      counted: whether the examples of all clients are counted at the start.
      most_steps: the most steps that any client has, or None if they are not counted.
    """

    ids: Sequence[ClientId]
    batching: Batching
    reader: ClientReader
    counted: bool
    most_steps: int | None

    def __init__(self, data: FederatedData, batching: Batching) -> None:
        self.batching = batching
        self.ids = data.client_ids()
        if not len(self.ids):
            raise DataError(f"{WHERE}: data has no clients.")
        self._data = data
        self.reader = ClientReader(data, self.ids[0])
        self.counted = len(self.ids) <= _MOST_CLIENTS or isinstance(data, InMemory)
        self._counts: np.ndarray | None = None
        self.most_steps = None
        if self.counted:
            self.most_steps = int(batching.steps(self._count_all()).max())

    def num_examples(self, positions: np.ndarray) -> np.ndarray:
        """How many examples the clients at these positions have."""
        if self._counts is not None:
            return self._counts[positions]
        return np.array([self._count(self.ids[p]) for p in positions], np.int64)

    def _count_all(self) -> np.ndarray:
        self._counts = self.num_examples(np.arange(len(self.ids)))
        return self._counts

    def _count(self, client_id: ClientId) -> int:
        client = f"client {client_id!r}"
        count = _arguments.count(
            client, "num_examples", self._data.num_examples(client_id), least=None, error=DataError
        )
        if count < 1:
            raise DataError(
                f"{client} has no examples. Leave such clients out with fax.data.subset."
            )
        if count > MOST_ROWS:
            raise DataError(
                f"{client} has {count} examples, but int32 can number at most {MOST_ROWS}. Divide "
                "it into several clients."
            )
        return count

    def make_resident(
        self, row_sharding: RowSharding, resident: bool | None, clients: int, sampler: Any
    ) -> ResidentExamples | None:
        """Brings the examples to the devices, if that is asked for, or by default if they fit.

        Args:
          row_sharding: how a cohort's clients are spread over devices.
          resident: what the user asks for, or None.
          clients: how many take part in a round.
          sampler: how clients are chosen.
        """
        if resident is False or (resident is None and not self.counted):
            return None
        counts = self._count_all()
        size = self.reader.bytes_per_example
        shards = row_sharding.num_shards
        split = jax.process_count() > 1 or not fits(int(counts.sum()), size, row_sharding)
        any_clients = sampler in (*SAMPLERS, WEIGHTED)  # not those that the user names
        if resident is None and split:
            even = (
                row_sharding.num_shards > 1
                and clients % row_sharding.num_shards == 0
                and any_clients
            )
            if not (
                even and fits(largest_shard(counts, row_sharding.num_shards), size, row_sharding)
            ):
                return None
        if split and shards == 1:
            split = False  # the user asks for it, and there is one device only
        if split and not any_clients:
            raise DataError(
                f"{WHERE}: examples that are split over devices need a sampler that chooses among "
                f"each device's clients, one of {', '.join([*SAMPLERS, WEIGHTED])}, but sampler is "
                f"{sampler!r}. Pass resident=False."
            )
        examples = place_examples(self.reader, self.ids, counts, row_sharding, split)
        check_pools(examples, clients)
        return examples
