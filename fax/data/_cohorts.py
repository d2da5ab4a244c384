"""`cohorts`: an endless iterator over the clients of each round and their batches."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fax.data import _batching, _resident
from fax.data._batching import Batching, Plan
from fax.data._cohort import Cohort, Gathered
from fax.data._features import Reader
from fax.data._host import aligned_zeros
from fax.data._memory import InMemory
from fax.data._prefetch import Prefetch
from fax.data._protocol import ClientId, DataError, FederatedData
from fax.data._samplers import SAMPLERS, weighted
from fax.sharding._spread import Spread, spread_in_scope

WHERE = "fax.data.cohorts"
_STREAM = "stream"

# Sources that are not in memory are read in full, to have them on the device, only if they have
# no more clients than this: reading millions of files is not what a user expects of a first round.
_MOST_CLIENTS = 20_000


def cohorts(
    data: FederatedData,
    clients: int,
    batch_size: int,
    *,
    epochs: int = 1,
    max_steps: int | None = None,
    drop_remainder: bool = False,
    shuffle: bool = True,
    sampler: str | Callable[[int], Sequence[int]] = "uniform",
    weights: Sequence[float] | None = None,
    seed: int = 0,
    start: int = 0,
    resident: bool | None = None,
    prefetch: int = 2,
    placement: str = "clients",
) -> Cohorts:
    """The cohorts of all rounds, without end.

    Round r is a function of ``seed`` and r alone, so that ``start=r`` resumes there. In an epoch a
    client goes through all of its examples once, in an order of its own; its last batch may be
    short, and is masked. A thread prepares the rounds to come while a device works.

    Within a cohort clients are ordered such that devices have about the same number of steps to
    run and neighbours have about the same length; ``client_ids`` says who is where. The number
    of steps is rounded up to one of 1, 2, 3, 4, 6, 8, 12, ..., or the most that any client has, so
    that few shapes are compiled; see `Cohorts.shapes`. Steps that are padding are not run; see
    `Client.scan`.

    If the examples fit, they are brought to the devices once, and a round is sent the numbers of
    rows. With a mesh in scope the cohort comes out sharded over the mesh axes of
    ``placement``, and the examples are on every device, or split where they would not fit: a device
    then has examples of its own clients, and a cohort takes equally many clients from each. So
    it is with several processes, each of which reads the clients of its own devices only.

    Args:
      data: the clients and their examples.
      clients: how many take part in a round.
      batch_size: examples in a batch.
      epochs: how often a client goes through its examples in a round.
      max_steps: the most batches a client has in a round.
      drop_remainder: whether an epoch ends with its last full batch.
      shuffle: whether each epoch is in a random order, or all are in the order of the data.
      sampler: who takes part. ``"uniform"``: any set of different clients. ``"weighted"``:
        different clients, drawn one by one in proportion to ``weights``. ``"shuffled"``: passes
        through all clients, each in a new random order. ``"minimum_reuse"``: the same pass again
        and again, so that each client waits as long as it can. ``"stream"``: all clients, in the
        order of the data; each goes on with ``max_steps`` batches where it stopped in the last
        round, in a stream that repeats its examples without end. Or a function from the number
        of a round to positions in ``data.client_ids()``.
      weights: for ``"weighted"``, a number for each client of the data.
      seed: of everything random.
      start: the first round.
      resident: whether examples live on the devices. Default: if they fit.
      prefetch: how many rounds may be prepared ahead.
      placement: the placement that a round's program has for clients.

    Returns:
      The iterator.

    Raises:
      DataError: if an argument is out of range, a cohort is larger than the population, a
        client has no examples or others than the rest (then the message names client and feature).
        What only shows when a client is read is raised by the iterator.

    Example:

      >>> visits = {"ann": {"x": jnp.ones(3)}, "bob": {"x": jnp.ones(2)}, "eve": {"x": jnp.ones(1)}}
      >>> data = fax.data.InMemory(visits)
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=2, epochs=3)
      >>> cohort = next(rounds)
      >>> cohort.mask.shape, cohort.num_examples
      ((2, 6, 2), Array([3, 2], dtype=int32))
    """
    batching = Batching(
        _positive("batch_size", batch_size),
        _positive("epochs", epochs),
        None if max_steps is None else _positive("max_steps", max_steps),
        drop_remainder,
        shuffle,
    )
    _positive("clients", clients)
    _positive("prefetch", prefetch)
    _positive("start", start, least=0)
    _positive("seed", seed, least=0)
    if sampler == _STREAM and max_steps is None:
        raise DataError(f"{WHERE}: sampler='stream' needs max_steps=, the batches of a round.")
    population = _Population(data, batching)
    count = len(population.ids)
    if not callable(sampler) and clients > count:
        raise DataError(
            f"{WHERE}: clients={clients} is more than the {count} clients that the data have."
        )
    if sampler == _STREAM and clients != count:
        raise DataError(
            f"{WHERE}: sampler='stream' takes all clients in every round, clients={count}, but "
            f"clients={clients}. Choose some with fax.data.subset."
        )
    spread = spread_in_scope(WHERE, placement)
    at_home = population.bring(spread, resident, clients, sampler)
    choose = _chooser(sampler, weights, clients, seed, at_home, count)
    return Cohorts(_Maker(population, choose, sampler, clients, seed, spread, at_home), start, prefetch)


class _Population:
    """The clients, their numbers of examples as far as they are known, and what examples look like."""

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
        counts = np.array([self.data.num_examples(self.ids[p]) for p in positions])
        if (counts < 1).any():
            raise DataError(
                f"Client {self.ids[positions[np.argmax(counts < 1)]]!r} has no examples. Leave "
                "such clients out with fax.data.subset."
            )
        return counts

    def bring(self, spread: Spread, wanted: bool | None, clients: int, sampler: Any):
        """Examples on the devices, if that is wanted or possible."""
        if wanted is False or (wanted is None and not self.counted):
            return None
        self.counts = self.count(np.arange(len(self.ids)))
        total = int(self.counts.sum()) * self.reader.bytes_per_example
        several = jax.process_count() > 1
        split = several or not _resident.fits(total, spread)
        free = sampler in SAMPLERS or sampler == "weighted"
        divides = spread.ways > 1 and clients % spread.ways == 0 and free
        if wanted is None and split and not (
            divides and _resident.fits(total // spread.ways, spread)
        ):
            return None
        if split and spread.ways == 1:
            split = False  # asked for, and there is nothing to split over
        if split and not free:
            raise DataError(
                f"{WHERE}: examples that are split over devices need a sampler that chooses among "
                f"each device's clients, one of {', '.join([*SAMPLERS, 'weighted'])}, but sampler is "
                f"{sampler!r}. Take resident=False."
            )
        home = _resident.load(self.reader, self.ids, self.counts, spread, split)
        _resident.check_pools(home, clients)
        return home


def _chooser(sampler, weights, clients, seed, home, count) -> Callable[[int], np.ndarray]:
    """The positions of the clients of a round, pool after pool."""
    if (weights is not None) != (sampler == "weighted"):
        raise DataError(f"{WHERE}: weights= belongs to sampler='weighted', but sampler={sampler!r}.")
    if sampler == _STREAM:
        return lambda number: np.arange(count)
    if callable(sampler):
        return functools.partial(_checked, sampler, clients, count)
    if sampler == "weighted":
        given = np.asarray(weights, float)
        if given.shape != (count,) or not np.isfinite(given).all() or (given < 0).any():
            raise DataError(
                f"{WHERE}: weights has shape {given.shape}, expected {count} finite numbers that are "
                "not negative, one for each client of the data."
            )
        if (given > 0).sum() < clients:
            raise DataError(
                f"{WHERE}: only {(given > 0).sum()} clients have a positive weight, fewer than "
                f"clients={clients}."
            )
        sample = weighted(given)
    elif sampler in SAMPLERS:
        sample = SAMPLERS[sampler]
    else:
        known = ", ".join(map(repr, [*SAMPLERS, "weighted", _STREAM]))
        raise DataError(f"{WHERE}: sampler={sampler!r}, expected a function or one of {known}.")
    pools = [np.arange(count)] if home is None else home.pools
    each = clients // len(pools)

    def choose(number: int) -> np.ndarray:
        return np.concatenate(
            [sample(pool, each, number, (seed, shard)) for shard, pool in enumerate(pools)]
        )

    return choose


def _checked(sampler, clients, count, number) -> np.ndarray:
    positions = np.asarray(sampler(number))
    if positions.shape != (clients,) or not np.issubdtype(positions.dtype, np.integer):
        raise DataError(
            f"{WHERE}: sampler({number}) returned {positions.dtype}{[*positions.shape]}, expected "
            f"{clients} ints, the positions of clients."
        )
    if positions.min() < 0 or positions.max() >= count:
        raise DataError(
            f"{WHERE}: sampler({number}) returned positions from {positions.min()} to "
            f"{positions.max()}, but the data have clients 0 to {count - 1}."
        )
    return positions


class _Maker:
    """Makes the cohort of a round. It runs in the prefetching thread."""

    def __init__(self, population, choose, sampler, clients, seed, spread, home):
        self.population, self.choose, self.clients, self.seed = population, choose, clients, seed
        self.spread, self.home = spread, home
        self.streams = sampler == _STREAM
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
            steps = batching.max_steps
            return _batching.stream(
                batching.batch_size, steps, number, counts, self.seed, batching.shuffle
            )
        steps = batching.steps(counts)
        _batching.check_lengths(steps, positions, population.ids, batching.batch_size)
        if self.home is not None and self.home.axes:
            shares = [self.clients // len(self.home.pools)] * len(self.home.pools)
            order = _batching.sorted_within(steps, shares)
        else:
            order = _batching.balanced(steps, self.spread.ways)
        # The order of a client's examples does not depend on where the client comes.
        rng = np.random.default_rng((self.seed, number, 1))
        plan = _batching.plan(batching, positions, counts, rng, population.most)
        return Plan(*(x[order] for x in plan))

    def batches(self, plan: Plan) -> Any:
        """The batches of this process' clients, on the host: rows, or what they hold."""
        if self.home is not None:
            offsets = self.home.offsets[plan.positions].astype(np.int32)
            return (plan.index + offsets[:, None, None])[self.own]
        population = self.population
        shape = (len(self.own), *plan.index.shape[1:])
        batches = {
            name: aligned_zeros((*shape, *feature.shape), feature.dtype)
            for name, feature in population.reader.features.items()
        }
        counts, steps = population.count(plan.positions[self.own]), plan.steps[self.own]
        for row, (position, count) in enumerate(zip(plan.positions[self.own], counts)):
            client = population.reader.client(population.ids[position], int(count))
            for name, array in client.items():
                # Steps without examples stay zeros: nobody computes with them.
                index = plan.index[self.own[row], : steps[row]]
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


class Cohorts(Iterator[Cohort]):
    """What `cohorts` returns: an endless iterator over cohorts.

    It may be used as a context manager; leaving it ends the thread that works ahead, as does
    dropping it.

    Attributes:
      round: the number of the next cohort.
      shapes: the shapes (clients, steps, batch) that cohorts had so far, and how many had
        each. A jitted round is compiled once for each.
    """

    def __init__(self, make: _Maker, start: int, ahead: int):
        self._make, self._ahead = make, ahead
        self._items: Prefetch | None = None
        self._closed = False
        self._needed = self._computed = 0
        self.round = start
        self.shapes: dict[tuple[int, ...], int] = {}

    def __next__(self) -> Cohort:
        if self._closed:
            raise StopIteration
        if self._items is None:
            self._items = Prefetch(self._make, self.round, self._ahead)
        cohort, steps = next(self._items)
        self._note(cohort.mask.shape, steps)
        self.round += 1
        return cohort

    def take(self, rounds: int) -> Cohort:
        """The next cohorts, for a loop over rounds on the device.

        Args:
          rounds: how many.

        Returns:
          A cohort whose arrays have a leading axis [rounds], but for the examples on the devices.
          All rounds have the steps of the longest.

        Raises:
          DataError: if the examples are not on the devices, or ``rounds`` is not a positive int.
        """
        _positive("rounds", rounds)
        if not self.resident:
            raise DataError(
                f"{WHERE}: several rounds at once need examples on the devices, but these are on the "
                "host. Ask for resident=True, or take one round after the other."
            )
        if self._items is not None:
            self._items.close()
            self._items = None
        cohort, steps = self._make.several(self.round, rounds)
        for own in steps:
            self._note(cohort.mask.shape[1:], own)
        self.round += rounds
        return cohort

    def _note(self, shape: tuple[int, ...], steps: np.ndarray) -> None:
        self.shapes[shape] = self.shapes.get(shape, 0) + 1
        self._needed += int(steps.sum())
        ways, at_once = self._make.spread.ways, self._make.at_once or 1
        self._computed += _batching.computed_steps(steps, ways, at_once)

    @property
    def resident(self) -> bool:
        """Whether the examples live on the devices."""
        return self._make.home is not None

    @property
    def padding(self) -> float:
        """The share of the computed steps, so far, that were nobody's: a number in [0, 1)."""
        return 1 - self._needed / self._computed if self._computed else 0.0

    def close(self) -> None:
        """Ends the thread that works ahead. The iterator has no more cohorts then."""
        self._closed = True
        if self._items is not None:
            self._items.close()

    def __enter__(self) -> Cohorts:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _positive(name: str, value: Any, least: int = 1) -> int:
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise DataError(f"{WHERE}: {name} is {value!r}, expected an int of at least {least}.")
    return number
