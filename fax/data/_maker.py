"""Makes the cohort of a round: who, which examples in which batch, and all of it on the devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fax.data import _batching
from fax.data._batching import Plan
from fax.data._cohort import Cohort, Gathered
from fax.data._host import aligned_zeros
from fax.data._population import WHERE, Population
from fax.data._resident import Resident
from fax.sharding._spread import Spread


class Maker:
    """Makes the cohort of a round. It runs in the prefetching thread."""

    def __init__(
        self,
        population: Population,
        choose: Callable[[int], np.ndarray],
        streams: bool,
        clients: int,
        seed: int,
        spread: Spread,
        home: Resident | None,
    ):
        self.population, self.choose, self.clients, self.seed = population, choose, clients, seed
        self.spread, self.home, self.streams = spread, home, streams
        self.sharding = spread.sharding(clients)
        self.own = spread.own_rows(WHERE, clients)
        # What holds in the thread that asks for cohorts has to hold in the one that makes them.
        self.x64, self.device = jax.config.jax_enable_x64, jax.config.jax_default_device
        self.key = jax.random.key(seed)
        self.make_keys = jax.jit(_keys, out_shardings=self.sharding)
        device = jax.devices()[0] if spread.mesh is None else spread.mesh.devices.flat[0]
        self.at_once = None if device.platform == "cpu" else self._at_once()

    def _at_once(self) -> int:
        rounds = [self.plan(number) for number in range(8)]
        return _batching.clients_at_once([plan.steps for plan in rounds], self.spread.ways)

    def plan(self, number: int) -> Plan:
        """Who takes part in a round, in order, and which examples come in which batch."""
        population, batching = self.population, self.population.batching
        positions = self.choose(number)
        counts = population.count(positions)
        if self.streams:
            return _batching.stream(batching, number, counts, self.seed)
        steps = batching.steps(counts)
        _batching.check_lengths(steps, positions, population.ids, batching.batch_size)
        if self.home is not None and self.home.axes:
            shares = [self.clients // len(self.home.pools)] * len(self.home.pools)
            order = _batching.sorted_within(steps, shares)
        else:
            order = _batching.balanced(steps, self.spread.ways)
        # The order of a client's examples does not depend on where the client comes.
        plan = _batching.plan(batching, positions, counts, self.seed, number, population.most)
        return Plan(*(x[order] for x in plan))

    def batches(self, plan: Plan) -> Any:
        """The batches of this process' clients, on the host: rows, or what they hold."""
        if self.home is not None:
            offsets = self.home.offsets[plan.positions].astype(np.int32)
            return (plan.rows + offsets[:, None, None])[self.own]
        population = self.population
        shape = (len(self.own), *plan.rows.shape[1:])
        batches = {
            name: aligned_zeros((*shape, *feature.shape), feature.dtype)
            for name, feature in population.reader.features.items()
        }
        counts, steps = population.count(plan.positions[self.own]), plan.steps[self.own]
        for row, (position, count) in enumerate(zip(plan.positions[self.own], counts)):
            client = population.reader.client(population.ids[position], int(count))
            for name, array in client.items():
                # Steps without examples stay zeros: nobody computes with them.
                index = plan.rows[self.own[row], : steps[row]]
                batches[name][row, : steps[row]] = array[index]
        return batches

    def arrays(self, plan: Plan) -> tuple:
        """What a cohort is made of, on the host."""
        counts = self.population.count(plan.positions)[self.own].astype(np.int32)
        positions = plan.positions[self.own].astype(np.int32)
        return self.batches(plan), plan.mask[self.own], counts, positions

    def cohort(self, placed: tuple, keys: jax.Array) -> Cohort:
        batches, mask, counts, positions = placed
        if self.home is not None:
            batches = Gathered(self.home.examples, batches, self.home.axes)
        return Cohort(batches, mask, counts, positions, keys, self.at_once)

    def put(self, arrays: Any, sharding: Any) -> Any:
        """This process' rows, as arrays of all processes."""
        if jax.process_count() == 1:
            return jax.device_put(arrays, sharding)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), arrays)

    def __call__(self, number: int) -> tuple[Cohort, np.ndarray]:
        plan = self.plan(number)
        arrays = self.arrays(plan)
        with jax.enable_x64(self.x64), jax.default_device(self.device):
            placed = self.put(arrays, self.sharding)
            keys = self.make_keys(self.key, number, plan.positions.astype(np.int32))
        return self.cohort(placed, keys), plan.steps

    def several(self, start: int, rounds: int) -> tuple[Cohort, list[np.ndarray]]:
        """Rounds from ``start``, all of one shape, with a leading axis [rounds]."""
        plans = [self.plan(number) for number in range(start, start + rounds)]
        most = max(plan.mask.shape[1] for plan in plans)
        plans = [plan.padded(most) for plan in plans]
        arrays = jax.tree.map(lambda *x: np.stack(x), *map(self.arrays, plans))
        sharding = self.sharding and NamedSharding(
            self.sharding.mesh, PartitionSpec(None, *self.sharding.spec)
        )
        positions = np.stack([plan.positions for plan in plans]).astype(np.int32)
        make_keys = jax.jit(jax.vmap(_keys, (None, 0, 0)), out_shardings=sharding)
        keys = make_keys(self.key, np.arange(start, start + rounds, dtype=np.int32), positions)
        return self.cohort(self.put(arrays, sharding), keys), [plan.steps for plan in plans]


def _keys(key: jax.Array, number: jax.Array, positions: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, number), positions)
