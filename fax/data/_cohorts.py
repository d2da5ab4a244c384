"""`cohorts`: an endless iterator over the clients of each round and their batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fax import _arguments
from fax.data import _batching
from fax.data._batching import Batching
from fax.data._check import federated
from fax.data._cohort import Cohort
from fax.data._maker import Maker
from fax.data._population import WHERE, Population
from fax.data._prefetch import Prefetch
from fax.data._protocol import DataError, FederatedData
from fax.data._samplers import STREAM, check_sampler, chooser
from fax.sharding._spread import spread_in_scope

_LARGEST = 2**31 - 1  # that int32 holds, and so JAX in its usual configuration


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
    run and neighbours have about the same length; ``positions`` says who is where. The number
    of steps is rounded up to one of 1, 2, 3, 4, 6, 8, 12, ..., or to the most that any client has
    if that is not far, so that few shapes are compiled; see `Cohorts.shapes`. Steps that are
    padding are not run; see `Client.scan`.

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
        of a round to different positions in ``data.client_ids()``.
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
      ((2, 6, 2), Array([2, 1], dtype=int32))
    """
    federated(WHERE, "data", data)
    for name, value in (("drop_remainder", drop_remainder), ("shuffle", shuffle)):
        _arguments.flag(WHERE, name, value, error=DataError)
    if resident is not None:
        _arguments.flag(WHERE, "resident", resident, error=DataError)
    _arguments.text(WHERE, "placement", placement, "the name of a placement", error=DataError)
    check_sampler(sampler, weights)
    batching = Batching(
        _positive("batch_size", batch_size),
        _positive("epochs", epochs),
        None if max_steps is None else _positive("max_steps", max_steps),
        drop_remainder,
        shuffle,
    )
    clients = _positive("clients", clients)
    prefetch = _positive("prefetch", prefetch)
    start = _positive("start", start, least=0)
    seed = _positive("seed", seed, least=0)
    if sampler == STREAM and max_steps is None:
        raise DataError(f"{WHERE}: sampler='stream' needs max_steps=, the batches of a round.")
    if sampler == STREAM and batching.epochs > 1:
        raise DataError(
            f"{WHERE}: sampler='stream' knows no epochs, but epochs={epochs}. A round has "
            "max_steps batches, wherever an epoch ends."
        )
    population = Population(data, batching)
    count = len(population.ids)
    if clients > count:
        raise DataError(
            f"{WHERE}: clients={clients} is more than the {count} clients that the data have."
        )
    if sampler == STREAM and clients != count:
        raise DataError(
            f"{WHERE}: sampler='stream' takes all clients in every round, clients={count}, but "
            f"clients={clients}. Choose some with fax.data.subset."
        )
    spread = spread_in_scope(WHERE, placement)
    at_home = population.bring(spread, resident, clients, sampler)
    pools = [np.arange(count)] if at_home is None else at_home.pools
    choose = chooser(sampler, weights, clients, seed, pools)
    make = Maker(population, sampler, choose, clients, seed, spread, at_home)
    return Cohorts(make, start, prefetch)


class Cohorts(Iterator[Cohort]):
    """What `cohorts` returns: an endless iterator over cohorts.

    It may be used as a context manager; leaving it ends the thread that works ahead, as does
    dropping it.

    Attributes:
      round: the number of the next cohort.
      shapes: the shapes (clients, steps, batch) that cohorts had so far, and how many had
        each. A jitted round is compiled once for each.
    """

    def __init__(self, make: Maker, start: int, ahead: int):
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
          DataError: if the examples are not on the devices, ``rounds`` is not a positive int, or
            the iterator is closed.
        """
        rounds = _positive("rounds", rounds)
        if self._closed:
            raise DataError(f"{WHERE}: take: the iterator is closed, and has no more cohorts.")
        if not self.resident:
            raise DataError(
                f"{WHERE}: several rounds at once need examples on the devices, but these are on "
                "the host. Ask for resident=True, or take one round after the other."
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

    def __repr__(self) -> str:
        population, batching = self._make.population, self._make.population.batching
        where = "devices" if self.resident else "host"
        return (
            f"Cohorts(clients={self._make.clients} of {len(population.ids)}, "
            f"batch_size={batching.batch_size}, epochs={batching.epochs}, round={self.round}, "
            f"examples on the {where})"
        )

    def close(self) -> None:
        """Ends the thread that works ahead. The iterator has no more cohorts then.

        It waits for a client that is being read, but for a few seconds at most. If a function that
        prepares examples is stuck, a warning names it, and the thread ends when it returns.
        """
        self._closed = True
        if self._items is not None:
            self._items.close()

    def __enter__(self) -> Cohorts:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _refuse(*_: Any) -> Any:
    raise TypeError(
        "The iterator that fax.data.cohorts returns cannot be passed to a function of JAX. Pass "
        "next(cohorts), the cohort of one round."
    )


# JAX would say that it is not an array, and not what to do.
jax.tree_util.register_pytree_node(Cohorts, _refuse, _refuse)


def _positive(name: str, value: Any, least: int = 1) -> int:
    number = _arguments.count(WHERE, name, value, least=least, error=DataError)
    if number > _LARGEST:
        raise DataError(f"{WHERE}: {name} is {value!r}, expected an int of at most {_LARGEST}.")
    return number
