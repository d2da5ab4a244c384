"""Packs the examples of all clients into batches of equal size, across the borders of clients.

Each device has one batch at a time. So only the last batches can be short, however few examples
clients have, and there is one shape to compile. A thread reads clients while the devices compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fax import _arguments
from fax.data._aligned import aligned_zeros
from fax.data._check_examples import check_federated
from fax.data._client_reader import ClientReader, settings_here
from fax.data._prefetch import Prefetch
from fax.data._protocol import ClientId, DataError, Examples, FederatedData
from fax.data._resident import fits
from fax.sharding._row_sharding import RowSharding, row_sharding_in_scope

BATCH_SIZE = 256
# How many rounds are read ahead.
_AHEAD = 2
# How many of the least and of the greatest numbers of a feature are remembered.
_KEPT = 16

# check(client_id, examples) raises an error for examples that cannot be evaluated.
Check = Callable[[Any, Examples], Examples]


class PackedBatches(NamedTuple):
    """A batch for each device.

    Attributes:
      batches: feature -> array [devices, batch, ...].
      mask: bool [devices, batch], False for padding.
      slots: int32 [devices, batch], the client of each example: 0 for the first client of its
        batch, 1 for the next, ...
    """

    batches: dict[str, Any]
    mask: Any
    slots: Any


class Packing:
    """Which examples of which clients are in which batch.

    Attributes:
      ids: the clients, by position.
      reader: reads a client.
      row_sharding: how batches are spread over devices.
      rounds: how many batches each device gets.
      batch_size: how many examples each batch has, with padding.
      first: int [rounds, devices], the position of the first client of each batch.
      slots: the most clients that any batch has examples of.
    """

    ids: Sequence[ClientId]
    reader: ClientReader
    row_sharding: RowSharding
    rounds: int
    batch_size: int
    first: np.ndarray
    slots: int

    def __init__(
        self, where: str, data: FederatedData, batch_size: int | None, row_sharding: RowSharding
    ) -> None:
        batch_size = batch_size_of(where, batch_size)
        self.ids = data.client_ids()
        if not len(self.ids):
            raise DataError(f"{where}: data has no clients.")
        self.reader, self._settings = ClientReader(data, self.ids[0]), settings_here()
        self._counts = np.array([data.num_examples(i) for i in self.ids], np.int64)
        for client_id, count in zip(self.ids, self._counts):
            if count < 1:
                raise DataError(
                    f"{where}: client {client_id!r} has no examples. Leave such clients out with "
                    "fax.data.subset."
                )
        self._ends = np.cumsum(self._counts)
        total = int(self._ends[-1])
        self.row_sharding, devices = row_sharding, row_sharding.num_shards
        self._own = row_sharding.own_rows(where, devices)
        # As few rounds as possible, and batches as small as these allow.
        self.rounds = -(-total // (devices * batch_size))
        self.batch_size = -(-total // (devices * self.rounds))
        edges = np.minimum(np.arange(self.rounds * devices + 1) * self.batch_size, total)
        self._starts, self._stops = edges[:-1], edges[1:]
        first = np.searchsorted(self._ends, np.minimum(self._starts, total - 1), side="right")
        last = np.searchsorted(self._ends, self._stops - 1, side="right")
        self.first = first.reshape(self.rounds, devices)
        self.slots = int(np.max(last - first)) + 1
        self._seen: tuple[int, dict[str, np.ndarray]] = (-1, {})

    @property
    def num_examples(self) -> int:
        """How many examples all clients have."""
        return int(self._ends[-1])

    @property
    def rows_per_device(self) -> int:
        """How many examples each device gets, with padding."""
        return self.rounds * self.batch_size

    def batches(self, check: Check) -> Iterator[PackedBatches]:
        """The batches of each round, on the devices."""

        def read(number: int) -> PackedBatches:
            with self._settings():
                return self._read(number, check)

        ahead = Prefetch(read, 0, _AHEAD, self.rounds)
        try:
            for _ in range(self.rounds):
                yield PackedBatches(*map(self._put, next(ahead)))
        finally:
            ahead.close()

    def _put(self, x: Any) -> Any:
        devices = self.row_sharding.num_shards
        return jax.tree.map(lambda leaf: self.row_sharding.put(leaf, devices, self._own), x)

    def _read(self, number: int, check: Check) -> PackedBatches:
        """The batches of this process in a round, on the host."""
        shape = (len(self._own), self.batch_size)
        batches = {
            name: aligned_zeros((*shape, *feature.shape), feature.dtype)
            for name, feature in self.reader.features.items()
        }
        mask, slots = np.zeros(shape, bool), np.zeros(shape, np.int32)
        for row, here in enumerate(self._own):
            place = number * self.row_sharding.num_shards + here
            at, stop = int(self._starts[place]), int(self._stops[place])
            mask[row, : stop - at] = True
            position, filled = int(self.first[number, here]), 0
            while at + filled < stop:
                skip = at + filled - int(self._ends[position] - self._counts[position])
                count = min(int(self._counts[position]) - skip, stop - at - filled)
                to = slice(filled, filled + count)
                for name, array in self._client(position, check).items():
                    batches[name][row, to] = array[skip : skip + count]
                slots[row, to] = position - self.first[number, here]
                filled, position = filled + count, position + 1
        return PackedBatches(batches, mask, slots)

    def _client(self, position: int, check: Check) -> dict[str, np.ndarray]:
        """A client's examples, which are kept for the next batch, where they may continue."""
        if self._seen[0] != position:
            examples = self.reader.client(self.ids[position], int(self._counts[position]))
            check(self.ids[position], examples)
            self._seen = (position, examples)
        return self._seen[1]


class Prepared:
    """What `prepare` returns: clients' examples on the devices, ready for evaluation.

    Example:

      >>> data = fax.data.InMemory({"ann": {"x": jnp.arange(3.0)}, "bob": {"x": jnp.arange(2.0)}})
      >>> fax.metrics.prepare(data)
      Prepared(clients=2, examples=5, on the devices)
    """

    def __init__(self, packing: Packing) -> None:
        self._packing = packing
        found: dict[str, dict[int, ClientId]] = {}

        def note(client_id: ClientId, examples: Examples) -> Examples:
            for name, array in examples.items():
                if array.dtype.kind in "iu" and array.size:
                    known = found.setdefault(name, {})
                    for number in _extremes(array):
                        known.setdefault(number, client_id)
                    found[name] = {n: known[n] for n in _extremes(np.array(list(known)))}
            return examples

        self._batches = tuple(packing.batches(note))
        # The least and the greatest numbers of each integer feature, with a client that has them.
        self._extremes: list[tuple[ClientId, Examples]] = [
            (client_id, {name: np.array([number])})
            for name, known in found.items()
            for number, client_id in known.items()
        ]

    def __len__(self) -> int:
        """The number of clients."""
        return len(self._packing.ids)

    def __repr__(self) -> str:
        examples = self._packing.num_examples
        return f"Prepared(clients={len(self)}, examples={examples}, on the devices)"

    def _use(self, where: str, batch_size: int | None, row_sharding: RowSharding) -> Packing:
        """The packing, after a check that it is the one that is asked for."""
        if batch_size is not None:
            raise ValueError(
                f"{where}: batch_size={batch_size} has no effect on prepared data. Pass it to "
                "fax.metrics.prepare."
            )
        if row_sharding != self._packing.row_sharding:
            raise ValueError(
                f"{where}: the data were prepared under another mesh or placement. Call "
                "fax.metrics.prepare under the mesh that they are evaluated under."
            )
        return self._packing


def batch_size_of(where: str, batch_size: int | None) -> int:
    """The batch size that the user passes, or the default."""
    return BATCH_SIZE if batch_size is None else _arguments.count(where, "batch_size", batch_size)


def _extremes(array: np.ndarray) -> list[int]:
    """The least and the greatest of different numbers: several, as metrics may ignore some."""
    if array.ndim > 2:  # nothing that metrics use as labels
        return [int(array.min()), int(array.max())]
    numbers = np.unique(array).tolist()
    return numbers if len(numbers) <= 2 * _KEPT else [*numbers[:_KEPT], *numbers[-_KEPT:]]


def prepare(
    data: FederatedData, *, batch_size: int | None = None, placement: str = "clients"
) -> Prepared:
    """Copies clients' examples to the devices, for repeated evaluation.

    Otherwise they are read from the host in each evaluation, which takes longer than evaluating a
    small model.

    Args:
      data: the clients.
      batch_size: the most examples in a batch. Default: 256.
      placement: the placement whose mesh axes batches are spread over.

    Returns:
      Data for `fax.metrics.evaluate` and `fax.metrics.evaluate_clients`.

    Raises:
      ValueError: if ``batch_size`` is not an int of at least 1.
      DataError: if the examples do not fit on the devices, or cannot be used.

    Example:

      >>> data = fax.data.InMemory({"ann": {"x": jnp.arange(3.0)}, "bob": {"x": jnp.arange(2.0)}})
      >>> ready = fax.metrics.prepare(data)
      >>> total = lambda batch, scores: fax.metrics.Sum(scores)
      >>> apply = lambda params, batch: params * batch["x"]
      >>> for factor in (1.0, 2.0):
      ...     print(fax.metrics.evaluate(apply, factor, ready, {"total": total})["total"])
      4.0
      8.0
    """
    where = "fax.metrics.prepare"
    check_federated(where, "data", data)
    _arguments.text(where, "placement", placement, "the name of a placement")
    row_sharding = row_sharding_in_scope(where, placement)
    packing = Packing(where, data, batch_size, row_sharding)
    size, rows = packing.reader.bytes_per_example, packing.rows_per_device
    if not fits(rows, size, row_sharding):
        raise DataError(
            f"{where}: {rows} examples take {rows * size / 2**30:.1f} GiB on each device, which "
            "does not fit. Evaluate without fax.metrics.prepare, which reads examples in turns."
        )
    return Prepared(packing)
