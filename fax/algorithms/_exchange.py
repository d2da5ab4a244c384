"""The state of a federated algorithm, and what clients and server exchange in a round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax

from fax.aggregators import PerClient
from fax.algorithms._local import Trained
from fax.algorithms._personal import PersonalParts
from fax.data import Cohort
from fax.metrics import Statistic

PyTree = Any


class State(NamedTuple):
    """The state of a federated algorithm between rounds. A checkpoint needs all of it.

    Attributes:
      params: the server's model.
      optimizer: the state of the server's optimizer.
      model_state: what the model has besides parameters, such as batch statistics, or None.
      aggregator: the state of the aggregator, or None.
      server: what else the server keeps, or None. It depends on the algorithm.
      clients: what each client keeps, a `fax.aggregators.PerClient` with leaves [num_clients, ...],
        or None.
      personal: the part of the model that stays with each client, if the loss comes from
        `personal_parts`.
    """

    params: PyTree
    optimizer: PyTree
    model_state: PyTree
    aggregator: PyTree = None
    server: PyTree = None
    clients: PerClient | None = None
    personal: PersonalParts | None = None


class Server(NamedTuple):
    """What a client function of `federated` gets from the server.

    Attributes:
      params: the server's model.
      model_state: what the model has besides parameters, or None.
      state: what else the server keeps, ``state.server``.
      first: the mean of what clients sent before they train; see `federated`.
    """

    params: PyTree
    model_state: PyTree
    state: PyTree
    first: PyTree = None


class ClientResult(NamedTuple):
    """What a client function of `federated` returns.

    The client sends all of it to the server, except ``own``.

    Attributes:
      update: how the server's parameters should change, according to this client.
      metrics: by name. A `fax.metrics.Statistic` is reported for all clients together and, as
        ``"clients/..."``, for each client. An array is reported only for each client.
      model_state: the model's next state, or None. The server takes the mean over clients whose
        update is finite, weighted by the numbers of examples; leaves that are not floats do not
        change.
      weight: the weight of the update in the mean, a scalar. Default: the number of examples.
      own: what the client keeps, with the same structure, shapes and dtypes as before. If the
        update has NaN or infinity, it keeps what it had.
      extra: anything else that the server needs.
    """

    update: PyTree
    metrics: Mapping[str, Statistic | jax.Array]
    model_state: PyTree = None
    weight: Any = None
    own: PyTree = None
    extra: PyTree = None

    @classmethod
    def of(cls, trained: Trained, server: Server, **others: Any) -> ClientResult:
        """The result of a client that trained, starting from the server's parameters."""
        update = optax.tree.sub(trained.params, server.params)
        return cls(update, trained.metrics, trained.model_state, **others)


class Received(NamedTuple):
    """What a server function of `federated` gets: the aggregated update and clients' results.

    Attributes:
      update: the aggregated update, by default the weighted mean.
      results: the `ClientResult` of all clients, placed. Reduce it, for example with `fax.mean`.
      first: the mean of what clients sent before they trained, if they did.
      cohort: the cohort of the round.
      finite: whether each client's update is finite, placed bool. `fax.aggregators.non_finite`
        drops the others. Pass it as ``where=`` to a reduction to leave them out there, too.
    """

    update: PyTree
    results: ClientResult
    first: PyTree
    cohort: Cohort
    finite: jax.Array
