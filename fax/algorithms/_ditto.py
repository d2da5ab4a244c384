"""Ditto: each client has its own model, near the global one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fax import _arguments
from fax.aggregators import Aggregator
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._checks import arguments
from fax.algorithms._exchange import ClientResult, Server, State
from fax.algorithms._federated import federated
from fax.algorithms._local import local_steps, proximal
from fax.algorithms._metrics import with_personal
from fax.data import Client

PyTree = Any


class DittoClient(NamedTuple):
    """What a client of `ditto` keeps: its own model.

    Attributes:
      params: v, its own model.
      started: whether it has taken a step. Until then, its model is the server's.
    """

    params: PyTree
    started: jax.Array

    def model(self, params: PyTree) -> PyTree:
        """The client's model, where ``params`` is the server's."""
        return optax.tree.where(self.started, self.params, params)


def ditto(
    loss: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    mu: Any,
    num_clients: int,
    personal_optimizer: optax.GradientTransformation | None = None,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """Ditto: fair and robust personalization, with a model for each client near the global one.

    The global model w is that of `fedavg` with the same arguments. Client i also keeps its own
    model v_i. When it takes part, it trains w for the server, and then trains v_i to minimize

        f_i(v_i) + mu/2 ‖v_i - w‖^2,    with gradient    grad f_i(v_i) + mu (v_i - w),

    where w is what the server sent, and f_i is the client's mean loss. With mu = 0, v_i is trained
    independently of w; the larger mu is, the closer v_i is to w. The client does not send v_i.

    Args:
      loss: see `fedavg`. A model's state comes from training w; v_i uses the same state.
      client_optimizer, server_optimizer, vectorize: as for `fedavg`, for w.
      mu: the paper's lambda, which it tries from 0.05 to 2. It may be traced.
      num_clients: the number of clients in the data, ``len(data)``.
      personal_optimizer: from optax, for v_i; its state is also reset in each round. Default:
        ``client_optimizer``.
      aggregator: as for `fedavg`, for the updates of w. A private one does not protect v_i.

    Returns:
      The algorithm, whose ``state.clients`` are `DittoClient`. ``params(state)`` is w, and
      ``models(state)`` are the v_i, leaves [num_clients, ...]. Until a client takes part, its v_i
      is w. Metrics are those of `fedavg`, and ``"personal/..."`` are the same for the v_i.

    Raises:
      ValueError: if ``mu`` is negative or ``num_clients`` is not a positive int; also as `fedavg`.

    References:
      Li et al., Ditto: fair and robust federated learning through personalization,
      arXiv:2012.04221, Algorithm 1.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2 / 2
      >>> algorithm = fax.algorithms.ditto(loss, optax.sgd(0.1), mu=1.0, num_clients=2)
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(3)}, "bob": {"x": jnp.zeros(3)}})
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=3)
      >>> state, _ = fax.algorithms.many_rounds(algorithm, algorithm.init(0.0), rounds, 200)
      >>> print(algorithm.params(state).round(2), algorithm.models(state).round(2))
      0.5 [0.75 0.25]
    """
    name = "fax.algorithms.ditto"
    _arguments.number(name, "mu", mu, least=0)
    mine = client_optimizer if personal_optimizer is None else personal_optimizer
    arguments(name, loss, client_optimizer=client_optimizer, personal_optimizer=mine)

    def client(server: Server, own: DittoClient, data: Client) -> ClientResult:
        w, state, near = server.params, server.model_state, proximal(server.params, mu)
        trained = local_steps(loss, client_optimizer, w, data, state)
        v = local_steps(loss, mine, own.model(w), data, state, correct=near)
        own = DittoClient(v.params, own.started | jnp.any(data.mask))
        result = ClientResult.of(trained, server, own=own)
        return result._replace(metrics=with_personal("ditto", result.metrics, v.metrics))

    def models(state: State) -> PyTree:
        assert state.clients is not None
        return jax.vmap(lambda own: own.model(state.params))(state.clients.rows)

    return federated(
        *(name, loss, client, server_optimizer),
        client_state=lambda params: DittoClient(params, jnp.zeros((), bool)),
        num_clients=num_clients,
        models=models,
        aggregator=aggregator,
        vectorize=vectorize,
    )
