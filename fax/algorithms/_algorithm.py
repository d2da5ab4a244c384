"""The interface of all algorithms, and many rounds in one compiled loop."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax

from fax import _arguments
from fax.data import Cohorts

PyTree = Any


class Algorithm(NamedTuple):
    """A federated algorithm as pure functions, which can be jitted and differentiated.

    The states of fax's algorithms can be pickled. The functions cannot, so make the algorithm again
    in each process.

    Attributes:
      init: ``init(params) -> state``, the initial state for a model's parameters.
      round: ``round(state, cohort) -> (state, metrics)``. The cohort sets the number of clients.
        The metrics are a flat dict: means over the cohort's examples, taken before each step, and
        ``clients/...`` of shape [clients].
      params: ``params(state)``, the parameters of the model to evaluate.
      models: ``models(state)``, for an algorithm with several models: leaves [models, ...], one for
        each client, cluster or replica, as the algorithm says. None if there is a single model.
    """

    init: Callable[..., Any]
    round: Callable[..., tuple[Any, dict[str, jax.Array]]]
    params: Callable[[Any], PyTree]
    models: Callable[[Any], PyTree] | None = None

    def __repr__(self) -> str:
        """The name of the algorithm, such as ``Algorithm(fedavg)``."""
        name = getattr(self.round, "__qualname__", type(self.round).__name__)
        return f"Algorithm({name.partition('.<locals>')[0].removesuffix('.round')})"


def many_rounds(
    algorithm: Algorithm, state: PyTree, cohorts: Cohorts, rounds: int
) -> tuple[PyTree, dict[str, jax.Array]]:
    """Runs rounds in one compiled loop on the devices.

    The result is the same as that of ``state, metrics = algorithm.round(state, next(cohorts))`` in
    a Python loop, but nothing happens on the host between rounds. It advances ``cohorts``.

    Args:
      algorithm: what to run. It is compiled once for each number of rounds and shape of cohorts.
      state: the state to start from.
      cohorts: from `fax.data.cohorts`, with its examples resident on the devices.
      rounds: the number of rounds.

    Returns:
      The state after the last round, and the metrics of all rounds, each with a leading axis
      [rounds].

    Raises:
      ValueError: if ``algorithm`` or ``cohorts`` is something else.
      DataError: if the examples are not on the devices, or ``rounds`` is not a positive int.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2
      >>> algorithm = fax.algorithms.fedavg(loss, optax.sgd(0.1))
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(3)}, "bob": {"x": jnp.zeros(2)}})
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=2)
      >>> state = algorithm.init(jnp.zeros(()))
      >>> state, metrics = fax.algorithms.many_rounds(algorithm, state, rounds, 20)
      >>> metrics["loss"].shape, rounds.round
      ((20,), 20)
    """
    where = "fax.algorithms.many_rounds"
    check_algorithm(where, algorithm)
    if not isinstance(cohorts, Cohorts):
        raise ValueError(
            f"{where}: cohorts is {_arguments.shown(cohorts)}, expected the iterator that "
            "fax.data.cohorts returns."
        )
    first = cohorts.round
    try:
        return _scan(algorithm, state, cohorts.take(rounds))
    except Exception:
        cohorts.round = first  # nothing was run
        raise


def check_algorithm(where: str, algorithm: Any) -> None:
    """Checks that an algorithm, fax's or a user's own, has the functions that it needs."""
    if not all(callable(getattr(algorithm, part, None)) for part in ("init", "round", "params")):
        raise ValueError(
            f"{where}: algorithm is {_arguments.shown(algorithm)}, expected an Algorithm, such as "
            "fax.algorithms.fedavg(loss, optax.sgd(0.1))."
        )


@functools.partial(jax.jit, static_argnums=0)
def _scan(algorithm, state, cohorts):
    batches = cohorts.batches

    def one(state, own):  # the examples are the same in all rounds
        own = dataclasses.replace(own, batches=dataclasses.replace(batches, rows=own.batches))
        return algorithm.round(state, own)

    return lax.scan(one, state, dataclasses.replace(cohorts, batches=batches.rows))
