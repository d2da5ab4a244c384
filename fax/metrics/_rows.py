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

from fax import _arguments
from fax.data._check import federated
from fax.data._features import Reader
from fax.data._host import aligned_zeros
from fax.data._prefetch import Prefetch
from fax.data._protocol import ClientId, DataError, Examples, FederatedData
from fax.data._resident import fits
from fax.sharding._row_sharding import RowSharding, row_sharding_in_scope

BATCH_SIZE = 256
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
        self, where: str, data: FederatedData, batch_size: int | None, spread: RowSharding
    ):
        batch_size = batch_size_of(where, batch_size)
        self.ids = data.client_ids()
        if not len(self.ids):
            raise DataError(f"{where}: data has no clients.")
        self.reader = Reader(data, self.ids[0])
        self.counts = np.array([data.num_examples(i) for i in self.ids], np.int64)
        self.ends = np.cumsum(self.counts)
        total = int(self.ends[-1])
        if not total:
            raise DataError(f"{where}: the {len(self.ids)} clients of data have no examples.")
        self.spread, width = spread, spread.num_shards
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

    @property
    def examples(self) -> int:
        """How many examples, with padding, each device gets."""
        return self.rounds * self.batch_size

    def rows(self, check: Check) -> Iterator[Rows]:
        """The rows of each round, on the devices."""
        ahead = Prefetch(lambda number: self._read(number % self.rounds, check), 0, _AHEAD)
        try:
            for _ in range(self.rounds):
                yield Rows(*map(self._put, next(ahead)))
        finally:
            ahead.close()

    def _put(self, x: Any) -> Any:
        width = self.spread.num_shards
        return jax.tree.map(lambda leaf: self.spread.put(leaf, width, self.own), x)

    def _read(self, number: int, check: Check) -> Rows:
        """This process' rows, on the host."""
        shape = (len(self.own), self.batch_size)
        batches = {
            name: aligned_zeros((*shape, *feature.shape), feature.dtype)
            for name, feature in self.reader.features.items()
        }
        mask, slots = np.zeros(shape, bool), np.zeros(shape, np.int32)
        for row, here in enumerate(self.own):
            place = number * self.spread.num_shards + here
            at, stop = int(self.begins[place]), int(self.stops[place])
            mask[row, : stop - at] = True
            position, filled = int(self.first[number, here]), 0
            while at + filled < stop:
                skip = at + filled - int(self.ends[position] - self.counts[position])
                count = min(int(self.counts[position]) - skip, stop - at - filled)
                to = slice(filled, filled + count)
                for name, array in self._client(position, check).items():
                    batches[name][row, to] = array[skip : skip + count]
                slots[row, to] = position - self.first[number, here]
                filled, position = filled + count, position + 1
        return Rows(batches, mask, slots)

    def _client(self, position: int, check: Check) -> dict[str, np.ndarray]:
        """A client's examples. One may go on in the next row, and is kept until then."""
        if self._seen[0] != position and self.counts[position]:
            examples = self.reader.client(self.ids[position], int(self.counts[position]))
            check(self.ids[position], examples)
            self._seen = (position, examples)
        return self._seen[1] if self.counts[position] else {}


class Prepared:
    """What `prepare` returns: clients' examples on the devices, ready to be evaluated on.

    Attributes:
      layout: where they are.
      rows: all of them.
      extremes: the least and the greatest number of each integer feature, by whose it is.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        found: dict[str, list[tuple[int, ClientId]]] = {}

        def note(client_id: ClientId, examples: Examples) -> Examples:
            for name, array in examples.items():
                if array.dtype.kind in "iu" and array.size:
                    low, high = (int(array.min()), client_id), (int(array.max()), client_id)
                    least, most = found.get(name, (low, high))
                    found[name] = [min(least, low, key=_number), max(most, high, key=_number)]
            return examples

        self.rows = tuple(layout.rows(note))
        self.extremes: list[tuple[ClientId, Examples]] = [
            (client_id, {name: np.array([number])})
            for name, pair in found.items()
            for number, client_id in pair
        ]

    def __len__(self) -> int:
        """The number of clients."""
        return len(self.layout.ids)

    def __repr__(self) -> str:
        examples = int(self.layout.ends[-1])
        return f"Prepared(clients={len(self)}, examples={examples}, on the devices)"

    def check_use(self, where: str, batch_size: int | None, spread: RowSharding) -> None:
        """Raises if something else is asked for than was prepared."""
        if batch_size is not None:
            raise ValueError(
                f"{where}: batch_size={batch_size} comes too late for data that are prepared. Say "
                "it to fax.metrics.prepare."
            )
        if spread != self.layout.spread:
            raise ValueError(
                f"{where}: the data were prepared under another mesh or placement. Call "
                "fax.metrics.prepare under the mesh that they are evaluated under."
            )


def batch_size_of(where: str, batch_size: int | None) -> int:
    """What the user says, or the default."""
    return BATCH_SIZE if batch_size is None else _arguments.count(where, "batch_size", batch_size)


def _number(pair: tuple[int, ClientId]) -> int:
    return pair[0]


def prepare(
    data: FederatedData, *, batch_size: int | None = None, placement: str = "clients"
) -> Prepared:
    """Brings clients' examples to the devices, to evaluate on them again and again.

    Otherwise they are read from the host in each evaluation, which takes longer than small models
    do.

    Args:
      data: the clients.
      batch_size: the most examples a device works on at once. Default: 256.
      placement: the placement whose mesh axes batches are spread over.

    Returns:
      What `fax.metrics.evaluate` and `fax.metrics.evaluate_clients` take for data.

    Raises:
      ValueError: if ``batch_size`` is not a positive int.
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
    federated(where, "data", data)
    _arguments.text(where, "placement", placement, "the name of a placement")
    spread = row_sharding_in_scope(where, placement)
    layout = Layout(where, data, batch_size, spread)
    size = layout.reader.bytes_per_example
    if not fits(layout.examples, size, spread):
        raise DataError(
            f"{where}: the {layout.examples} examples of each device take "
            f"{layout.examples * size / 2**30:.1f} GiB, more than there is room for. Evaluate on "
            "the data as they are, which are read in turns."
        )
    return Prepared(layout)
