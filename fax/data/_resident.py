"""All clients' examples on the devices, so that a round needs the numbers of rows alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fax.data._features import Reader
from fax.data._host import aligned_zeros
from fax.data._protocol import ClientId, DataError
from fax.sharding._row_sharding import RowSharding

# The share of a device's memory that examples may take, and what is assumed where the device
# does not say how much it has.
_SHARE = 0.4
_CPU_BYTES = 4 << 30

# Rows are numbered by int32.
MOST_ROWS = 2**31 - 1


class Resident(NamedTuple):
    """Examples on the devices.

    Attributes:
      examples: feature -> array [examples, ...], client after client. Split over devices, each
        of these has its own clients' examples: [shards * examples of the largest shard, ...].
      offsets: int [population], where a client's examples start, on its own shard.
      pools: the clients of each shard, as positions in the data. One pool if all examples are
        on all devices.
      axes: the mesh axes that examples are split over, or None.
    """

    examples: dict[str, jax.Array]
    offsets: np.ndarray
    pools: list[np.ndarray]
    axes: tuple[str, ...] | None


def fits(rows: int, bytes_per_row: int, spread: RowSharding) -> bool:
    """Whether so many examples fit on each device, and can be numbered."""
    device = jax.devices()[0] if spread.mesh is None else spread.mesh.devices.flat[0]
    return rows <= MOST_ROWS and rows * bytes_per_row <= _room(device)


def _room(device: Any) -> float:
    stats = device.memory_stats() if device.platform != "cpu" else None
    limit = (stats or {}).get("bytes_limit")
    return _CPU_BYTES if limit is None else _SHARE * limit


def load(
    reader: Reader,
    ids: Sequence[ClientId],
    counts: np.ndarray,
    spread: RowSharding,
    split: bool,
) -> Resident:
    """Brings examples to the devices in scope.

    Args:
      reader: reads a client.
      ids: the clients.
      counts: how many examples each of them has.
      spread: how a cohort's clients are spread over devices.
      split: whether each device has its own clients' examples alone, or those of all.
    """
    if not split:
        everybody = np.arange(len(ids))
        _check_rows(int(counts.sum()))
        offsets = np.cumsum(counts) - counts
        arrays = _concatenated(reader, ids, counts, everybody, int(counts.sum()))
        sharding = None if spread.mesh is None else NamedSharding(spread.mesh, PartitionSpec())
        return Resident(jax.device_put(arrays, sharding), offsets, [everybody], None)

    pools = _divided(counts, spread.num_shards)
    offsets = np.zeros(len(ids), np.int64)
    for pool in pools:
        offsets[pool] = np.cumsum(counts[pool]) - counts[pool]
    size = largest_shard(counts, spread.num_shards)
    _check_rows(size)
    assert spread.mesh is not None
    sharding = NamedSharding(spread.mesh, PartitionSpec(spread.axes))
    shards: dict[int, dict[str, np.ndarray]] = {}

    def part(name, index):
        number = (index[0].start or 0) // size
        if number not in shards:
            shards[number] = _concatenated(reader, ids, counts, pools[number], size)
        return shards[number][name]

    examples: dict[str, jax.Array] = {
        name: jax.make_array_from_callback(
            (spread.num_shards * size, *feature.shape), sharding, functools.partial(part, name)
        )
        for name, feature in reader.features.items()
    }
    return Resident(examples, offsets, pools, spread.axes)


def _divided(counts: np.ndarray, ways: int) -> list[np.ndarray]:
    """Clients in equal numbers, as far as that goes, and with about the same number of examples."""
    order = np.argsort(-counts, kind="stable")
    snake = np.arange(len(order)) % (2 * ways)
    owner = np.minimum(snake, 2 * ways - 1 - snake)
    return [np.sort(order[owner == number]) for number in range(ways)]


def largest_shard(counts: np.ndarray, ways: int) -> int:
    """How many examples the device has that has the most, if they are split."""
    return max(int(counts[pool].sum()) for pool in _divided(counts, ways))


def _check_rows(rows: int) -> None:
    if rows > MOST_ROWS:
        raise DataError(
            f"fax.data.cohorts: {rows} examples on a device are more than the {MOST_ROWS} that "
            "int32 can number. Take resident=False, or a mesh of more devices."
        )


def _concatenated(reader, ids, counts, positions, size):
    """The examples of some clients, one after the other, in arrays of ``size`` examples."""
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


def check_pools(resident: Resident, clients: int) -> int:
    """How many clients of a cohort come from each pool."""
    ways = len(resident.pools)
    each, left = divmod(clients, ways)
    if left:
        raise DataError(
            f"fax.data.cohorts: clients={clients} cannot be divided evenly over {ways} devices, "
            "each of which has examples of its own clients. Take a multiple, or resident=False."
        )
    smallest = min(map(len, resident.pools))
    if each > smallest:
        raise DataError(
            f"fax.data.cohorts: clients={clients} asks for {each} clients from each of {ways} "
            f"devices, but one of them has the examples of {smallest} clients only."
        )
    return each
