"""FedDyn: clients' losses are regularized so that their optima become those of everyone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

import fax
from fax import _arguments
from fax.aggregators import Aggregator
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._checks import arguments
from fax.algorithms._federated import ClientResult, Received, Server, State, federated
from fax.algorithms._local import local_steps
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

    Client i of a population of N keeps g_i, an estimate of the gradient of its mean loss f_i, and
    the server h, their mean. In a round every client of the cohort starts from the server's
    parameters x, and takes a step of its optimizer on each of its batches, to minimise

        f_i(y) - <g_i, y> + alpha/2 ‖y - x‖^2,    of gradient    grad f_i(y) - g_i + alpha (y - x)

    It ends with y_i. With S the clients that took any step,

        g_i' = g_i - alpha (y_i - x)        h' = h - alpha/N sum_S (y_i - x)
        x' = server_optimizer(x, gradient = -(mean_S(y_i - x) - h' / alpha))

    All g_i and h start at 0. With the default, ``optax.sgd(1.0)``, x' is mean_S(y_i) - h' / alpha.
    Where nothing moves any more the gradients at x add up to 0, however many steps clients take:
    what is minimised is the mean of the f_i, and each client counts once, as in the paper.

    Args:
      loss: see `fedavg`.
      client_optimizer: from optax; its state starts anew at each client and round.
      server_optimizer: from optax. Default: ``optax.sgd(1.0)``.
      alpha: positive; the paper takes 0.001 to 0.1. It may be traced. The h of one alpha does not
        fit another.
      num_clients: N, how many clients the data have, ``len(data)``.
      aggregator: from `fax.aggregators`, what makes mean_S; its weights are 1. What it changes in
        updates, it changes in h, where it adds up. It cannot be a private one.
      vectorize: how many clients one device works on at once; see `fedavg`.

    Returns:
      The algorithm. ``init(params, model_state=None)`` makes its `State`, which has the size of
      N + 2 models: ``server`` is h, and ``clients`` are the g_i. Metrics and the model's state are
      as of `fedavg`.

    Raises:
      ValueError: if ``alpha`` is not positive, ``num_clients`` no int of at least 1 or
        ``aggregator`` private, and as `fedavg`.

    References:
      Acar et al., Federated learning based on dynamic regularization, arXiv:2111.04263,
      Algorithm 1.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: batch["a"] * (batch["b"] - params) ** 2 / 2
      >>> ann = {"a": jnp.full(4, 1.0), "b": jnp.full(4, 0.0)}
      >>> bob = {"a": jnp.full(4, 4.0), "b": jnp.full(4, 1.0)}
      >>> data = fax.data.InMemory({"ann": ann, "bob": bob})
      >>> algorithm = fax.algorithms.feddyn(loss, optax.sgd(0.1), alpha=1.0, num_clients=2)
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=4, epochs=8)
      >>> state, _ = fax.algorithms.many_rounds(algorithm, algorithm.init(0.0), rounds, 50)
      >>> print(f"{algorithm.params(state):.2f}")  # the optimum is (1 * 0 + 4 * 1) / (1 + 4)
      0.80
    """
    name = "fax.algorithms.feddyn"
    _arguments.number(name, "alpha", alpha, above=0)
    arguments(name, loss, client_optimizer=client_optimizer)

    def client(server: Server, g: PyTree, data: Client) -> ClientResult:
        def regularized(gradient: PyTree, y: PyTree, *step: Any) -> PyTree:
            return jax.tree.map(
                lambda f, g, y, x: f - g + (alpha * (y - x)).astype(f.dtype),
                *(gradient, g, y, server.params),
            )

        trained = local_steps(
            *(loss, client_optimizer, server.params, data, server.model_state), correct=regularized
        )
        examples = trained.metrics["loss"].weight
        weight = (examples > 0).astype(examples.dtype)
        result = ClientResult.of(trained, server, weight=weight)
        own = optax.tree.cast_like(optax.tree.add_scale(g, -alpha, result.update), g)
        return result._replace(own=own)

    def server(state: State, received: Received, step: Callable) -> tuple[State, dict]:
        share = fax.sum(received.results.weight) / num_clients
        h = optax.tree.add_scale(state.server, -alpha * share, received.update)
        update = optax.tree.add_scale(received.update, -1 / alpha, h)
        h, update = optax.tree.cast_like((h, update), (state.params, state.params))
        return step(update)._replace(server=h), {}

    return federated(
        name,
        loss,
        client,
        server_optimizer,
        server=server,
        server_state=optax.tree.zeros_like,
        client_state=optax.tree.zeros_like,
        num_clients=num_clients,
        not_private="the number of clients that took a step is used",
        aggregator=aggregator,
        vectorize=vectorize,
    )
