"""Builds the cohort of a round: chooses clients, batches their examples, puts it on the devices."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fax._keys import Use, derive
from fax.data import _batching
from fax.data._aligned import aligned_zeros
from fax.data._all_clients import WHERE, AllClients
from fax.data._batching import RoundPlan
from fax.data._client_reader import settings_here
from fax.data._cohort import Cohort, Gathered
from fax.data._resident import ResidentExamples
from fax.data._samplers import STREAM, uniform
from fax.primitives._round import AtMost
from fax.sharding._row_sharding import RowSharding

_MOST_IDS = 1_000_000  # which takes a second


class CohortBuilder:
    """Builds the cohort of a round, in the thread that prefetches.

    Attributes:
      all_clients: the clients that cohorts are sampled from.
      clients: how many take part in a round.
      row_sharding: how they are spread over devices.
      resident: the examples on the devices, or None if they stay on the host.
      vectorize: how many clients a device may vectorize, or None to leave that to `fax.map`.
    """

    all_clients: AllClients
    clients: int
    row_sharding: RowSharding
    resident: ResidentExamples | None
    vectorize: int | None

    def __init__(
        self,
        all_clients: AllClients,
        sampler: Any,
        weights: Sequence[float] | None,
        choose: Callable[[int], np.ndarray],
        clients: int,
        seed: int,
        row_sharding: RowSharding,
        resident: ResidentExamples | None,
    ) -> None:
        self.all_clients, self._choose, self.clients = all_clients, choose, clients
        self._seed, self.row_sharding, self.resident = seed, row_sharding, resident
        self._streams, self._custom_sampler = sampler == STREAM, callable(sampler)
        self._sampler = {"sampler": "a function" if callable(sampler) else sampler}
        if weights is not None:
            self._sampler["weights"] = _sha256(np.asarray(weights, float).tobytes())
        self._sharding = row_sharding.sharding(clients)
        self._own = row_sharding.own_rows(WHERE, clients)
        self._settings = settings_here()  # a thread builds the cohorts
        self._key = derive(jax.random.key(seed), Use.COHORTS)
        # The leading axis of several rounds is not split.
        self._sharding_of_rounds = self._sharding and NamedSharding(
            self._sharding.mesh, PartitionSpec(None, *self._sharding.spec)
        )
        self._make_keys = jax.jit(_keys, out_shardings=self._sharding)
        self._make_keys_of_rounds = jax.jit(_keys_of_rounds, out_shardings=self._sharding_of_rounds)
        device = (
            jax.devices()[0] if row_sharding.mesh is None else row_sharding.mesh.devices.flat[0]
        )
        self.vectorize = None if device.platform == "cpu" else self._choose_vectorize()

    def _choose_vectorize(self) -> int:
        """How many clients to vectorize at most, from rounds 0 to 7, wherever training starts.

        It must not depend on ``start``, for it decides in which order sums are formed. A sampler
        that is a user's function may not know these rounds, and is not called.
        """
        rounds = [
            self._typical_steps(r) if self._custom_sampler else self._plan(r).steps
            for r in range(8)
        ]
        return _batching.vectorized_clients(rounds, self.row_sharding.num_shards)

    def _typical_steps(self, number: int) -> np.ndarray:
        """The steps of a cohort of clients that are drawn uniformly."""
        everyone = np.arange(len(self.all_clients.ids))
        positions = uniform(everyone, self.clients, number, (self._seed,))
        steps = self.all_clients.batching.steps(self.all_clients.num_examples(positions))
        return steps[_batching.balanced_order(steps, self.row_sharding.num_shards)]

    def settings(self) -> dict[str, Any]:
        """What a round depends on besides its number and the examples."""
        batching = dataclasses.asdict(self.all_clients.batching)
        return {
            "clients": self.clients,
            "of_clients": len(self.all_clients.ids),
            "ids": _digest(self.all_clients.ids),
            **self._sampler,
            "seed": self._seed,
            **{name: "none" if value is None else value for name, value in batching.items()},
        }

    def positions(self, number: int) -> np.ndarray:
        """The clients of a round, in the order of its cohort."""
        return self._plan(number).positions

    def _plan(self, number: int) -> RoundPlan:
        """The clients of a round, in order, and which examples are in which batch."""
        all_clients, batching = self.all_clients, self.all_clients.batching
        positions = self._choose(number)
        counts = all_clients.num_examples(positions)
        if self._streams:
            return _batching.plan_stream(batching, number, counts, self._seed)
        steps = batching.steps(counts)
        _batching.check_batches(steps, positions, all_clients.ids, batching.batch_size)
        if self.resident is not None and self.resident.axes:
            shares = [self.clients // len(self.resident.pools)] * len(self.resident.pools)
            order = _batching.order_within_shares(steps, shares)
        else:
            order = _batching.balanced_order(steps, self.row_sharding.num_shards)
        # The order of a client's examples does not depend on the client's place in the cohort.
        plan = _batching.plan_epochs(
            batching, positions, counts, self._seed, number, all_clients.most_steps
        )
        return RoundPlan(*(x[order] for x in plan))

    def _batches(self, plan: RoundPlan) -> Any:
        """The batches of this process' clients on the host, or the numbers of their rows."""
        if self.resident is not None:
            offsets = self.resident.offsets[plan.positions].astype(np.int32)
            return (plan.rows + offsets[:, None, None])[self._own]
        reader, ids = self.all_clients.reader, self.all_clients.ids
        shape = (len(self._own), *plan.rows.shape[1:])
        batches = {
            name: aligned_zeros((*shape, *feature.shape), feature.dtype)
            for name, feature in reader.features.items()
        }
        positions, steps = plan.positions[self._own], plan.steps[self._own]
        for row, (position, count) in enumerate(
            zip(positions, self.all_clients.num_examples(positions))
        ):
            for name, array in reader.client(ids[position], int(count)).items():
                # Steps without examples remain zero. They are never run.
                index = plan.rows[self._own[row], : steps[row]]
                batches[name][row, : steps[row]] = array[index]
        return batches

    def _arrays(self, plan: RoundPlan) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
        """A cohort's batches, mask, numbers of examples and positions, on the host."""
        counts = self.all_clients.num_examples(plan.positions)[self._own].astype(np.int32)
        positions = plan.positions[self._own].astype(np.int32)
        return self._batches(plan), plan.mask[self._own], counts, positions

    def _cohort(self, placed: tuple[Any, ...], keys: jax.Array) -> Cohort:
        batches, mask, counts, positions = placed
        if self.resident is not None:
            batches = Gathered(self.resident.examples, batches, self.resident.axes)
        at_once = AtMost(self.vectorize) if self.vectorize else None
        full = (mask,) if self._streams else None  # a stream has no end
        return Cohort(batches, mask, counts, positions, keys, at_once, full)

    def _put(self, arrays: Any, sharding: Any) -> Any:
        """Makes global arrays of the rows of each process."""
        if jax.process_count() == 1:
            return jax.device_put(arrays, sharding)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), arrays)

    def __call__(self, number: int) -> tuple[Cohort, RoundPlan]:
        """The cohort of a round, and its plan."""
        with self._settings():
            plan = self._plan(number)
            placed = self._put(self._arrays(plan), self._sharding)
            numbers = jax.device_put((np.int32(number), plan.positions.astype(np.int32)))
            return self._cohort(placed, self._make_keys(self._key, *numbers)), plan

    def several(self, start: int, rounds: int) -> tuple[Cohort, list[RoundPlan]]:
        """The cohorts of several rounds, padded to one shape, with a leading axis [rounds]."""
        with self._settings():
            plans = [self._plan(number) for number in range(start, start + rounds)]
            most = max(plan.mask.shape[1] for plan in plans)
            plans = [plan.padded(most) for plan in plans]
            arrays = jax.tree.map(lambda *x: np.stack(x), *map(self._arrays, plans))
            positions = np.stack([plan.positions for plan in plans]).astype(np.int32)
            numbers = np.arange(start, start + rounds, dtype=np.int32)
            keys = self._make_keys_of_rounds(self._key, *jax.device_put((numbers, positions)))
            placed = self._put(arrays, self._sharding_of_rounds)
            return self._cohort(placed, keys), plans


def _digest(ids: Sequence[Any]) -> str:
    """Which clients have which positions, in a few letters. Of very many, some are looked at."""
    chosen = np.linspace(0, len(ids) - 1, min(len(ids), _MOST_IDS), dtype=int).tolist()
    text = "\0".join(str(ids[position]) for position in chosen)
    return f"{ids[0]!s:.40} to {ids[-1]!s:.40}, {_sha256(text.encode('utf-8', 'backslashreplace'))}"


def _sha256(content: bytes) -> str:
    return f"SHA-256 {hashlib.sha256(content).hexdigest()[:16]}"


def _keys(key: jax.Array, number: jax.Array, positions: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, number), positions)


# A function of the module, so that JAX compiles it once for all calls of `cohorts`.
_keys_of_rounds = jax.vmap(_keys, (None, 0, 0))
