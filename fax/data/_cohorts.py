"""`cohorts`: an endless iterator over rounds, each with its clients and their batches."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fax import _arguments, _compat
from fax._placement import PlacementError
from fax.data import _batching
from fax.data._all_clients import WHERE, AllClients
from fax.data._batching import Batching, RoundPlan
from fax.data._check_examples import check_federated
from fax.data._cohort import Cohort
from fax.data._cohort_builder import CohortBuilder
from fax.data._prefetch import Prefetch, forked
from fax.data._protocol import ClientId, DataError, FederatedData
from fax.data._samplers import STREAM, check_sampler, make_sampler
from fax.sharding._row_sharding import row_sharding_in_scope

_LARGEST = 2**31 - 1  # the largest int32, which JAX uses by default


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
    """An endless iterator over the cohorts of all rounds.

    Round r depends on ``seed`` and r alone, so that ``start=r`` resumes there. In an epoch a
    client goes through all of its examples once, in a random order of its own; its last batch may
    be short, and is masked. A thread prepares the next rounds while the devices compute.

    Clients of a cohort are ordered so that all devices have about the same number of steps, and
    neighbors have about the same length; ``positions`` says which clients they are. The number of
    steps is rounded up to one of 1, 2, 3, 4, 6, 8, 12, ..., or to the most steps that any client
    has if that is at most twice as many, so that few shapes are compiled; see `Cohorts.shapes`.
    Steps that are only padding are not run; see `Client.scan`.

    If the examples fit, they are copied to the devices once, and each round only needs the numbers
    of rows. With a mesh in scope the cohort is sharded over the mesh axes of ``placement``. The
    examples are then replicated on all devices or, if they would not fit, split: each device has
    the examples of its own clients, and a cohort takes equally many clients from each device.
    They are always split between several processes, each of which reads only its own clients.

    Args:
      data: the clients and their examples.
      clients: how many take part in a round.
      batch_size: examples in a batch.
      epochs: how often a client goes through its examples in a round.
      max_steps: the most batches that a client has in a round.
      drop_remainder: whether to drop the last batch of an epoch if it is short.
      shuffle: whether each epoch is in a random order, rather than in the order of the data.
      sampler: how clients are chosen. ``"uniform"``: distinct clients, all sets equally likely.
        ``"weighted"``: distinct clients, drawn one by one in proportion to ``weights``.
        ``"shuffled"``: passes through all clients, each in a new random order.
        ``"minimum_reuse"``: passes in one fixed random order, so that the rounds of a client are as
        far apart as possible. ``"stream"``: all clients, in the
        order of the data; each continues with the next ``max_steps`` batches of a stream that
        repeats its examples without end. Or a function from the number of a round to distinct
        positions in ``data.client_ids()``.
      weights: for ``"weighted"``, a number for each client of the data.
      seed: an int, from which everything random is derived.
      start: the first round.
      resident: whether the examples are kept on the devices. Default: if they fit.
      prefetch: how many rounds may be prepared ahead.
      placement: the name of the clients' placement in the program of a round.

    Returns:
      The iterator.

    Raises:
      DataError: if an argument is out of range, or a cohort is larger than the number of clients.
        The iterator raises it if a client that it reads has no examples, or other features than
        the first client; the message names the client and the feature.
      PlacementError: if the devices of the mesh in scope are only described, by
        `fax.sharding.topology`, or the mesh does not say where the clients are.

    Example:

      >>> visits = {"ann": {"x": jnp.ones(3)}, "bob": {"x": jnp.ones(2)}, "eve": {"x": jnp.ones(1)}}
      >>> data = fax.data.InMemory(visits)
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=2, epochs=3)
      >>> cohort = next(rounds)
      >>> cohort.mask.shape, cohort.num_examples
      ((2, 6, 2), Array([2, 1], dtype=int32))
    """
    check_federated(WHERE, "data", data)
    for name, value in (("drop_remainder", drop_remainder), ("shuffle", shuffle)):
        _arguments.flag(WHERE, name, value, error=DataError)
    if resident is not None:
        _arguments.flag(WHERE, "resident", resident, error=DataError)
    _arguments.text(WHERE, "placement", placement, "the name of a placement", error=DataError)
    check_sampler(sampler, weights)
    batching = Batching(
        _count("batch_size", batch_size),
        _count("epochs", epochs),
        None if max_steps is None else _count("max_steps", max_steps),
        drop_remainder,
        shuffle,
    )
    clients = _count("clients", clients)
    prefetch = _count("prefetch", prefetch)
    start = _count("start", start, least=0)
    seed = _arguments.seed(WHERE, seed, error=DataError)
    if sampler == STREAM and max_steps is None:
        raise DataError(f"{WHERE}: sampler='stream' needs max_steps=, the batches of a round.")
    if sampler == STREAM and batching.epochs > 1:
        raise DataError(
            f"{WHERE}: epochs={epochs} has no meaning for sampler='stream', with which a round has "
            "max_steps batches, wherever an epoch ends. Leave it out."
        )
    all_clients = AllClients(data, batching)
    count = len(all_clients.ids)
    if clients > count:
        raise DataError(f"{WHERE}: clients is {clients}, but data has only {count} clients.")
    if sampler == STREAM and clients != count:
        raise DataError(
            f"{WHERE}: clients is {clients}, but with sampler='stream' all {count} clients of data "
            "take part in every round. Choose clients with fax.data.subset."
        )
    row_sharding = row_sharding_in_scope(WHERE, placement)
    if row_sharding.mesh is not None and _compat.is_described(row_sharding.mesh.devices.flat[0]):
        raise PlacementError(
            f"{WHERE}: the devices of the mesh in scope are only described, so no examples can be "
            "on them. Make the cohort outside of jax.set_mesh, with resident=False, and pass it to "
            "fax.inspect.report inside."
        )
    examples = all_clients.make_resident(row_sharding, resident, clients, sampler)
    pools = [np.arange(count)] if examples is None else examples.pools
    choose = make_sampler(sampler, weights, clients, seed, pools)
    builder = CohortBuilder(
        all_clients, sampler, weights, choose, clients, seed, row_sharding, examples
    )
    return Cohorts(builder, start, prefetch)


class Cohorts(Iterator[Cohort]):
    """What `cohorts` returns: an endless iterator over cohorts.

    It can be used as a context manager, whose end closes the thread that works ahead. The thread
    also ends when nothing refers to the iterator any more. Several threads may call ``next``: each
    cohort goes to one of them.

    Attributes:
      shapes: how many cohorts so far had each shape (clients, steps, batch). A jitted round is
        compiled once for each shape.
      examples: how many examples the batches of the cohorts so far had, each in every epoch.

    Example:

      >>> visits = {name: {"x": jnp.arange(5.0)} for name in ("ann", "bob", "eve")}
      >>> with fax.data.cohorts(fax.data.InMemory(visits), clients=2, batch_size=2) as rounds:
      ...     for _, cohort in zip(range(3), rounds):
      ...         pass  # train on the cohort here
      >>> rounds.round, rounds.shapes, rounds.examples, rounds.padding
      (3, {(2, 3, 2): 3}, 30, 0.0)
    """

    shapes: dict[tuple[int, ...], int]
    examples: int

    def __init__(self, builder: CohortBuilder, start: int, ahead: int) -> None:
        self._builder, self._ahead = builder, ahead
        self._items: Prefetch | None = None
        self._closed, self._lock = False, threading.RLock()
        self._pid = os.getpid()
        self._needed = self._computed = 0
        self._round = start
        self.shapes = {}
        self.examples = 0

    def __next__(self) -> Cohort:
        self._check_process()
        with self._lock:
            if self._closed:
                raise StopIteration
            if self._items is None:
                self._items = Prefetch(self._builder, self.round, self._ahead)
            items = self._items
        cohort, plan = next(items)  # without the lock, so that the iterator can be closed
        with self._lock:
            self._note(cohort.mask.shape, plan)
            self._round += 1
        return cohort

    @property
    def round(self) -> int:
        """The number of the next cohort. Set it to go to another round."""
        return self._round

    @round.setter
    def round(self, number: int) -> None:
        number = _count("round", number, least=0)
        if number != self._round:
            self._stop_working_ahead()
        self._round = number

    def client_ids(self, number: int) -> list[ClientId]:
        """The ids of the clients of a round, in the order of its cohort."""
        positions = self._builder.positions(_count("number", number, least=0))
        return [self._builder.all_clients.ids[position] for position in positions]

    @property
    def settings(self) -> dict[str, Any]:
        """What round r depends on besides r and the examples, as strings, numbers and bools."""
        return self._builder.settings()

    def take(self, rounds: int) -> Cohort:
        """The next cohorts, for a loop over rounds on the devices.

        Args:
          rounds: how many.

        Returns:
          A cohort whose arrays have a leading axis [rounds], except for the examples on the
          devices. All rounds are padded to the steps of the longest.

        Raises:
          DataError: if the examples are not on the devices, ``rounds`` is less than 1, or the
            iterator is closed.
        """
        rounds = _count("rounds", rounds)
        self._check_process()
        if self._closed:
            raise DataError(f"{WHERE}: take: the iterator is closed, and has no more cohorts.")
        if not self.resident:
            raise DataError(
                f"{WHERE}: several rounds at once need examples on the devices, but these are on "
                "the host. Pass resident=True, or take one round at a time."
            )
        self._stop_working_ahead()
        cohort, plans = self._builder.several(self.round, rounds)
        for plan in plans:
            self._note(cohort.mask.shape[1:], plan)
        self._round += rounds
        return cohort

    def _check_process(self) -> None:
        if os.getpid() != self._pid:  # the lock may be one that nobody releases
            raise forked()

    def _stop_working_ahead(self) -> None:
        if self._items is not None:
            self._items.close()
            self._items = None

    def _note(self, shape: tuple[int, ...], plan: RoundPlan) -> None:
        self.shapes[shape] = self.shapes.get(shape, 0) + 1
        self.examples += int(plan.mask.sum())
        steps = plan.steps
        self._needed += int(steps.sum())
        devices, vectorize = self._builder.row_sharding.num_shards, self._builder.vectorize or 1
        self._computed += _batching.computed_steps(steps, devices, vectorize)

    @property
    def resident(self) -> bool:
        """Whether the examples are kept on the devices."""
        return self._builder.resident is not None

    @property
    def padding(self) -> float:
        """The share of the steps computed so far that were only padding: a number in [0, 1).

        If the device's default vectorizes fewer clients than the cohorts allow, it is less.
        """
        return 1 - self._needed / self._computed if self._computed else 0.0

    def __repr__(self) -> str:
        all_clients, batching = self._builder.all_clients, self._builder.all_clients.batching
        where = "devices" if self.resident else "host"
        return (
            f"Cohorts(clients={self._builder.clients} of {len(all_clients.ids)}, "
            f"batch_size={batching.batch_size}, epochs={batching.epochs}, round={self.round}, "
            f"examples on the {where})"
        )

    def close(self) -> None:
        """Ends the thread that works ahead. After that the iterator has no more cohorts.

        It waits a few seconds at most for a client that is being read. If a function that reads or
        prepares examples hangs, a warning names it, and the thread ends when the function returns.
        """
        with self._lock:
            self._closed, items = True, self._items
        if items is not None:
            items.close()

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{WHERE}: the iterator cannot be pickled or copied, because a thread works ahead for "
            "it. Make one in each process, with start= to go on at a round. The data and its "
            "cohorts can be pickled."
        )

    def __enter__(self) -> Cohorts:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _refuse(*_: Any) -> Any:
    raise TypeError(
        "The iterator that fax.data.cohorts returns cannot be passed to a function of JAX. Pass "
        "next(cohorts), the cohort of one round."
    )


# JAX's own message would only say that it is not an array, and not how to fix it.
jax.tree_util.register_pytree_node(Cohorts, _refuse, _refuse)


def _count(name: str, value: Any, least: int = 1) -> int:
    number = _arguments.count(WHERE, name, value, least=least, error=DataError)
    if number > _LARGEST:
        raise DataError(f"{WHERE}: {name} is {value!r}, expected an int of at most {_LARGEST}.")
    return number
