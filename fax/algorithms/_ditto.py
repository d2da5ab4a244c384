"""Ditto: each client has a model of its own, held near everyone's."""

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
from fax.algorithms._federated import ClientResult, Server, State, federated
from fax.algorithms._local import local_steps
from fax.data import Client

PyTree = Any


class DittoClient(NamedTuple):
    """What a client keeps.

    Attributes:
      params: v, its own model.
      started: whether it took any step. Its model is the server's until then.
    """

    params: PyTree
    started: jax.Array

    def model(self, params: PyTree) -> PyTree:
        """Its model, where ``params`` is the server's."""
        return jax.tree.map(lambda v, w: jnp.where(self.started, v, w), self.params, params)


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
    """Ditto: fair and robust personalization, by models of clients near the global one.

    The server has a model w, which is that of `fedavg` with the same arguments. Client i has a
    model v_i, too. In a round every client of the cohort trains w for the server, and then takes a
    step of another optimizer on each of its batches, from v_i as it was, to minimise

        f_i(v_i) + mu/2 ‖v_i - w‖^2,    of gradient    grad f_i(v_i) + mu (v_i - w),

    with the w that the server sent and f_i its mean loss. With mu = 0 a client trains alone; the
    larger mu is, the more its model is everyone's. Only what is made of w is sent.

    Args:
      loss: see `fedavg`. A model's state is the global model's: it is made by w, and each v_i is
        trained and to be evaluated with it.
      client_optimizer: from optax, of w; its state starts anew at each client and round.
      server_optimizer: from optax. Default: ``optax.sgd(1.0)``.
      mu: the paper's lambda, which it tries from 0.05 to 2. It may be traced.
      num_clients: how many clients the data have, ``len(data)``.
      personal_optimizer: from optax, of v_i, as the client's. Default: the client's.
      aggregator: as for `fedavg`, of the updates of w. What a private one promises is about w, and
        about what all clients but one get to see: v_i is a client's own.
      vectorize: as for `fedavg`.

    Returns:
      The algorithm. ``init(params, model_state=None)`` makes its `State`, whose ``clients`` are
      `DittoClient`. ``params(state)`` is w. ``models(state)`` are the v_i, leaves
      [num_clients, ...], to be evaluated by `fax.metrics.evaluate_clients` with ``personal=True``;
      a client's is the server's until it takes part for the first time. Metrics are those of
      `fedavg`, and ``"personal/..."`` the same for the v_i.

    Raises:
      ValueError: if ``mu`` is negative or ``num_clients`` no int of at least 1, and as `fedavg`.

    References:
      Li et al., Ditto: fair and robust federated learning through personalization,
      arXiv:2012.04221, Algorithm 1.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2 / 2
      >>> algorithm = fax.algorithms.ditto(loss, optax.sgd(0.1), mu=1.0, num_clients=2)
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(3)}, "bob": {"x": jnp.zeros(3)}})
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=3)
      >>> state = algorithm.init(jnp.zeros(()))
      >>> state, _ = fax.algorithms.many_rounds(algorithm, state, rounds, 200)
      >>> print(algorithm.params(state).round(2), algorithm.models(state).round(2))
      0.5 [0.75 0.25]
    """
    name = "fax.algorithms.ditto"
    _arguments.number(name, "mu", mu, least=0)
    personal_optimizer = client_optimizer if personal_optimizer is None else personal_optimizer
    optimizers = dict(client_optimizer=client_optimizer, personal_optimizer=personal_optimizer)
    arguments(name, loss, **optimizers)

    def client(server: Server, own: DittoClient, data: Client) -> ClientResult:
        w = server.params

        def near(gradient: PyTree, v: PyTree, *step: Any) -> PyTree:
            return jax.tree.map(lambda g, v, w: g + (mu * (v - w)).astype(g.dtype), gradient, v, w)

        trained = local_steps(loss, client_optimizer, w, data, server.model_state)
        mine = local_steps(
            *(loss, personal_optimizer, own.model(w), data, server.model_state), correct=near
        )
        metrics = {f"personal/{name}": value for name, value in mine.metrics.items()}
        own = DittoClient(mine.params, own.started | jnp.any(data.mask))
        result = ClientResult.of(trained, server, own=own)
        return result._replace(metrics={**metrics, **trained.metrics})

    def models(state: State) -> PyTree:
        assert state.clients is not None
        return jax.vmap(lambda own: own.model(state.params))(state.clients.rows)

    return federated(
        name,
        loss,
        client,
        server_optimizer,
        client_state=lambda params: DittoClient(params, jnp.zeros((), bool)),
        num_clients=num_clients,
        models=models,
        aggregator=aggregator,
        vectorize=vectorize,
    )
