"""FedProx: local steps are held near the server's parameters by a proximal term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from fax import _arguments
from fax.aggregators import Aggregator
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._averaging import averaging
from fax.algorithms._checks import arguments
from fax.algorithms._local import Local, difference, train
from fax.data import Client

PyTree = Any


def fedprox(
    loss: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    mu: Any,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """FedProx: FedAvg whose clients do not go far from the server's parameters.

    In a round every client i of the cohort starts from the server's parameters x, and takes a step
    of its optimizer on each of its batches, to minimise

        h_i(y; x) = f_i(y) + mu/2 ‖y - x‖^2,    of gradient    grad f_i(y) + mu (y - x),

    where f_i is its mean loss. The server does what it does in `fax.algorithms.fedavg`. With mu = 0
    it is federated averaging.

    Args:
      loss: see `fax.algorithms.fedavg`.
      client_optimizer: from optax; its state starts anew at each client and round.
      server_optimizer: from optax. Default: ``optax.sgd(1.0)``.
      mu: the weight of the proximal term; the paper tries 0.001, 0.01, 0.1 and 1. It may be traced.
      aggregator: from `fax.aggregators`. Default: the mean, weighted by the numbers of examples.
      vectorize: how many clients one device works on at once; see `fax.algorithms.fedavg`.

    Returns:
      The algorithm, with states and metrics as of `fax.algorithms.fedavg`. The losses are f_i,
      without the proximal term.

    Raises:
      ValueError: if ``mu`` is negative, and as `fax.algorithms.fedavg`.

    References:
      Li et al., Federated optimization in heterogeneous networks, arXiv:1812.06127, Algorithm 2.

    Example:

      >>> import optax
      >>> def loss(params, batch, key):
      ...     return (batch["x"] - params) ** 2 / 2
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(3)}})
      >>> cohort = next(fax.data.cohorts(data, clients=1, batch_size=3, epochs=100))
      >>> for mu in (0.0, 1.0):  # to 1, or half the way
      ...     algorithm = fax.algorithms.fedprox(loss, optax.sgd(0.1), mu=mu)
      ...     state, _ = algorithm.round(algorithm.init(jnp.zeros(())), cohort)
      ...     print(f"{algorithm.params(state):.2f}")
      1.00
      0.50
    """
    caller = "fax.algorithms.fedprox"
    _arguments.number(caller, "mu", mu, least=0)
    server_optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer
    aggregator = arguments(
        caller,
        loss,
        aggregator,
        vectorize,
        client_optimizer=client_optimizer,
        server_optimizer=server_optimizer,
    )

    def local(params: PyTree, model_state: PyTree, client: Client) -> Local:
        def proximal(gradient: PyTree, own: PyTree) -> PyTree:
            return jax.tree.map(
                lambda g, y, x: g + (mu * (y - x)).astype(g.dtype), gradient, own, params
            )

        trained = train(loss, client_optimizer, params, model_state, client, proximal)
        return difference(trained, params)

    return averaging(caller, loss, local, server_optimizer, aggregator, vectorize)
