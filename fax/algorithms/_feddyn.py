"""FedDyn: dynamic regularization moves each client's optimum to the optimum of all clients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

import fax
from fax import _arguments
from fax.aggregators import Aggregator
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._checks import arguments
from fax.algorithms._exchange import ClientResult, Received, Server, State
from fax.algorithms._federated import federated
from fax.algorithms._local import local_steps, proximal
from fax.algorithms._loss import examples_of
from fax.data import Client

PyTree = Any


def feddyn(
    loss: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    alpha: Any,
    num_clients: int,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """FedDyn: federated learning with dynamic regularization.

    Client i of N keeps g_i, an estimate of the gradient of its mean loss f_i, and the server keeps
    their mean h. Starting from the server's x, a client takes one step on each batch to minimize
    the first line, and ends at y_i. S are the clients of the cohort that took any step:

        f_i(y) - <g_i, y> + alpha/2 ‖y - x‖^2
        g_i' = g_i - alpha (y_i - x)        h' = h - alpha/N sum_S (y_i - x)
        x' = server_optimizer(x, gradient = -(mean_S(y_i - x) - h' / alpha))

    All g_i and h start at 0. At a fixed point the gradients of all f_i add up to 0, whatever the
    numbers of steps. So the mean of the f_i is minimized, and each client counts once. A client
    whose y_i is not finite keeps its g_i, and `fax.aggregators.non_finite` can leave it out of S.

    Args:
      loss, client_optimizer, server_optimizer, vectorize: as for `fedavg`.
      alpha: positive; the paper takes 0.001 to 0.1. It may be traced.
      num_clients: N, the number of clients in the data, ``len(data)``.
      aggregator: computes mean_S. It cannot be private. Its errors, if any, accumulate in h.

    Returns:
      The algorithm. In its `State`, ``server`` is h and ``clients`` are the g_i, each as large as
      the model. Metrics and the model's state are those of `fedavg`.

    Raises:
      ValueError: if ``alpha`` is not positive or ``aggregator`` is private; also as `scaffold`.

    References:
      Acar et al., Federated learning based on dynamic regularization, arXiv:2111.04263.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: batch["a"] * (batch["b"] - params) ** 2 / 2
      >>> data = {b: {"a": jnp.full(4, 1.0 + 3 * b), "b": jnp.full(4, b)} for b in (0, 1)}
      >>> algorithm = fax.algorithms.feddyn(loss, optax.sgd(0.1), alpha=1.0, num_clients=2)
      >>> rounds = fax.data.cohorts(fax.data.InMemory(data), clients=2, batch_size=4, epochs=8)
      >>> state, _ = fax.algorithms.many_rounds(algorithm, algorithm.init(0.0), rounds, 50)
      >>> print(f"{algorithm.params(state):.2f}")  # the optimum is (1 * 0 + 4 * 1) / (1 + 4)
      0.80
    """
    name = "fax.algorithms.feddyn"
    _arguments.number(name, "alpha", alpha, above=0)
    arguments(name, loss, client_optimizer=client_optimizer)

    def client(server: Server, g: PyTree, data: Client) -> ClientResult:
        def regularized(gradient: PyTree, *step: Any) -> PyTree:
            return optax.tree.sub(proximal(x, alpha)(gradient, *step), g)

        x, state = server.params, server.model_state
        trained = local_steps(loss, client_optimizer, x, data, state, correct=regularized)
        count = examples_of(trained.metrics)
        weight = (count > 0).astype(count.dtype)
        result = ClientResult.of(trained, server, weight=weight)
        own = optax.apply_updates(g, optax.tree.scale(-alpha, result.update))
        return result._replace(own=own, extra=weight)

    def server(state: State, received: Received, step: Callable) -> tuple[State, dict]:
        share = fax.sum(received.results.extra, where=received.finite) / num_clients
        h = optax.apply_updates(state.server, optax.tree.scale(-alpha * share, received.update))
        update = optax.apply_updates(received.update, optax.tree.scale(-1 / alpha, h))
        return step(update)._replace(server=h), {}

    return federated(
        *(name, loss, client, server_optimizer),
        server=server,
        server_state=optax.tree.zeros_like,
        client_state=optax.tree.zeros_like,
        num_clients=num_clients,
        not_private="the number of clients that took a step is counted",
        aggregator=aggregator,
        vectorize=vectorize,
    )
