"""Makes the cohort of a round: who, which examples in which batch, and all of it on the devices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fax._keys import Use, derive
from fax.data import _batching
from fax.data._batching import Plan
from fax.data._cohort import Cohort, Gathered
from fax.data._host import aligned_zeros
from fax.data._population import WHERE, Population
from fax.data._resident import Resident
from fax.data._samplers import STREAM, uniform
from fax.sharding._spread import Spread


class Maker:
    """Makes the cohort of a round. It runs in the prefetching thread."""

    def __init__(
        self,
        population: Population,
        sampler: Any,
        choose: Callable[[int], np.ndarray],
        clients: int,
        seed: int,
        spread: Spread,
        home: Resident | None,
    ):
        self.population, self.choose, self.clients, self.seed = population, choose, clients, seed
        self.spread, self.home = spread, home
        self.streams, self.given = sampler == STREAM, callable(sampler)
        self.sharding = spread.sharding(clients)
        self.own = spread.own_rows(WHERE, clients)
        self.x64, self.device = jax.config.jax_enable_x64, jax.config.jax_default_device
        self.key = derive(jax.random.key(seed), Use.COHORTS)
        # A leading axis of rounds is on every device.
        self.shardings = self.sharding and NamedSharding(
            self.sharding.mesh, PartitionSpec(None, *self.sharding.spec)
        )
        self.make_keys = jax.jit(_keys, out_shardings=self.sharding)
        self.make_keys_of_rounds = jax.jit(
            jax.vmap(_keys, (None, 0, 0)), out_shardings=self.shardings
        )
        device = jax.devices()[0] if spread.mesh is None else spread.mesh.devices.flat[0]
        self.at_once = None if device.platform == "cpu" else self._at_once()

    def _at_once(self) -> int:
        """How many clients to work on at once, from the same rounds wherever one begins.

        How many are vectorised decides in which order sums are formed. A sampler that is a
        function may not have these rounds, and is not asked.
        """
        rounds = [self._typical_steps(r) if self.given else self.plan(r).steps for r in range(8)]
        return _batching.vectorized_clients(rounds, self.spread.ways)

    def _typical_steps(self, number: int) -> np.ndarray:
        """The steps of a cohort in which any client is as likely as any other."""
        everybody = np.arange(len(self.population.ids))
        positions = uniform(everybody, self.clients, number, (self.seed,))
        steps = self.population.batching.steps(self.population.count(positions))
        return steps[_batching.balanced(steps, self.spread.ways)]

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """What held where cohorts were asked for, in whatever thread makes them."""
        with jax.enable_x64(self.x64), jax.default_device(self.device):
            yield

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
        with self.settings():
            plan = self.plan(number)
            placed = self.put(self.arrays(plan), self.sharding)
            numbers = jax.device_put((np.int32(number), plan.positions.astype(np.int32)))
            return self.cohort(placed, self.make_keys(self.key, *numbers)), plan.steps

    def several(self, start: int, rounds: int) -> tuple[Cohort, list[np.ndarray]]:
        """Rounds from ``start``, all of one shape, with a leading axis [rounds]."""
        with self.settings():
            plans = [self.plan(number) for number in range(start, start + rounds)]
            most = max(plan.mask.shape[1] for plan in plans)
            plans = [plan.padded(most) for plan in plans]
            arrays = jax.tree.map(lambda *x: np.stack(x), *map(self.arrays, plans))
            positions = np.stack([plan.positions for plan in plans]).astype(np.int32)
            numbers = np.arange(start, start + rounds, dtype=np.int32)
            keys = self.make_keys_of_rounds(self.key, *jax.device_put((numbers, positions)))
            return self.cohort(self.put(arrays, self.shardings), keys), [p.steps for p in plans]


def _keys(key: jax.Array, number: jax.Array, positions: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, number), positions)
