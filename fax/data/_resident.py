"""Examples of all clients on the devices, so that a round only needs the numbers of rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fax.data._aligned import aligned_zeros
from fax.data._client_reader import ClientReader
from fax.data._protocol import ClientId, DataError
from fax.sharding._row_sharding import RowSharding

# The share of a device's memory that examples may take, and the bytes that they may take on a
# CPU, or on a device that does not report its memory.
_SHARE = 0.4
_CPU_BYTES = 4 << 30

# Rows are numbered in int32.
MOST_ROWS = 2**31 - 1


class ResidentExamples(NamedTuple):
    """Examples of all clients on the devices.

    They are either replicated, with all examples on every device, or split into shards, one for
    each device, which has the examples of its own clients.

    Attributes:
      examples: feature -> array [examples, ...], client after client. If they are split,
        [shards * examples of the largest shard, ...].
      offsets: int [clients], the first row of each client, counted from the start of its shard.
      pools: the clients of each shard, as positions in the data. One pool of all clients if the
        examples are replicated.
      axes: the mesh axes that the examples are split over, or None.
    """

    examples: dict[str, jax.Array]
    offsets: np.ndarray
    pools: list[np.ndarray]
    axes: tuple[str, ...] | None


def fits(rows: int, bytes_per_row: int, row_sharding: RowSharding) -> bool:
    """Whether this many examples fit on each device, and their rows can be numbered."""
    device = jax.devices()[0] if row_sharding.mesh is None else row_sharding.mesh.devices.flat[0]
    return rows <= MOST_ROWS and rows * bytes_per_row <= _capacity(device)


def _capacity(device: Any) -> float:
    stats = device.memory_stats() if device.platform != "cpu" else None
    limit = (stats or {}).get("bytes_limit")
    return _CPU_BYTES if limit is None else _SHARE * limit


def place_examples(
    reader: ClientReader,
    ids: Sequence[ClientId],
    counts: np.ndarray,
    row_sharding: RowSharding,
    split: bool,
) -> ResidentExamples:
    """Brings examples to the devices in scope.

    Args:
      reader: reads a client.
      ids: the clients.
      counts: how many examples each of them has.
      row_sharding: how a cohort's clients are spread over devices.
      split: whether each device has the examples of its own clients only, or of all clients.
    """
    mesh, devices = row_sharding.mesh, row_sharding.num_shards
    if not split:
        everyone = np.arange(len(ids))
        _check_rows(int(counts.sum()))
        offsets = np.cumsum(counts) - counts
        arrays = _concatenated(reader, ids, counts, everyone, int(counts.sum()))
        sharding = (
            None if row_sharding.mesh is None else NamedSharding(row_sharding.mesh, PartitionSpec())
        )
        return ResidentExamples(jax.device_put(arrays, sharding), offsets, [everyone], None)

    pools = _divide(counts, devices)
    offsets = np.zeros(len(ids), np.int64)
    for pool in pools:
        offsets[pool] = np.cumsum(counts[pool]) - counts[pool]
    size = largest_shard(counts, devices)
    _check_rows(size)
    assert mesh is not None
    sharding = NamedSharding(mesh, PartitionSpec(row_sharding.axes))
    shards: dict[int, dict[str, np.ndarray]] = {}

    def shard_of(name: str, index: Any) -> np.ndarray:
        number = (index[0].start or 0) // size
        if number not in shards:
            shards[number] = _concatenated(reader, ids, counts, pools[number], size)
        return shards[number][name]

    examples: dict[str, jax.Array] = {
        name: jax.make_array_from_callback(
            (devices * size, *feature.shape),
            sharding,
            functools.partial(shard_of, name),
        )
        for name, feature in reader.features.items()
    }
    return ResidentExamples(examples, offsets, pools, row_sharding.axes)


def _divide(counts: np.ndarray, devices: int) -> list[np.ndarray]:
    """Divides clients over devices: about as many clients, and about as many examples, on each."""
    order = np.argsort(-counts, kind="stable")
    snake = np.arange(len(order)) % (2 * devices)
    owner = np.minimum(snake, 2 * devices - 1 - snake)
    return [np.sort(order[owner == number]) for number in range(devices)]


def largest_shard(counts: np.ndarray, devices: int) -> int:
    """The number of examples in the largest shard, if they are split."""
    return max(int(counts[pool].sum()) for pool in _divide(counts, devices))


def _check_rows(rows: int) -> None:
    if rows > MOST_ROWS:
        raise DataError(
            f"fax.data.cohorts: a device would have {rows} examples, but int32 can number at most "
            f"{MOST_ROWS}. Pass resident=False, or use a mesh of more devices."
        )


def _concatenated(
    reader: ClientReader, ids: Sequence[ClientId], counts: np.ndarray, positions: Any, size: int
) -> dict[str, np.ndarray]:
    """The examples of some clients, one client after the other, in arrays of ``size`` examples."""
    arrays = {
        name: aligned_zeros((size, *feature.shape), feature.dtype)
        for name, feature in reader.features.items()
    }
    start = 0
    for position in positions:
        count = int(counts[position])
        for name, array in reader.client(ids[position], count).items():
            arrays[name][start : start + count] = array
        start += count
    return arrays


def check_pools(resident: ResidentExamples, clients: int) -> None:
    """Checks that equally many clients of a cohort can be drawn from each pool."""
    devices = len(resident.pools)
    each, left = divmod(clients, devices)
    if left:
        raise DataError(
            f"fax.data.cohorts: clients={clients} cannot be divided evenly over {devices} devices, "
            "each of which has the examples of its own clients. Pass a multiple, or resident=False."
        )
    smallest = min(map(len, resident.pools))
    if each > smallest:
        raise DataError(
            f"fax.data.cohorts: clients={clients} asks for {each} clients from each of {devices} "
            f"devices, but one of them has the examples of {smallest} clients only."
        )
