"""FedNova: averages normalized updates of clients that take different numbers of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

import fax
from fax import _arguments
from fax.aggregators import Aggregator
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._checks import arguments, check_scalar_optimizer
from fax.algorithms._exchange import ClientResult, Received, Server, State
from fax.algorithms._federated import federated
from fax.algorithms._local import local_steps, proximal
from fax.algorithms._loss import examples_of
from fax.data import Client

_NO_SCALAR = (
    "client_optimizer does not work on a scalar, which FedNova uses to measure its steps. Use an "
    "optimizer that does not depend on the leaves of the parameters, such as optax.sgd(0.1)."
)


def fednova(
    loss: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    mu: Any = 0.0,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """FedNova: federated averaging of normalized updates.

    In FedAvg a client that takes more steps moves further, and so has more influence than its
    weight. FedNova divides each update by the sum of the coefficients of its gradients g_ik:

        y_i - x = - sum_k a_ik g_ik        A_i = sum_k a_ik        p_i = n_i / sum_j n_j
        D = (sum_i p_i A_i) sum_i p_i (y_i - x) / A_i    x' = server_optimizer(x, gradient = -D)

    For SGD, A_i is the learning rate times the number of steps. In general, client_optimizer takes
    the same steps on a scalar whose gradient is always 1, which moves from 0 to -A_i. This is exact
    if its steps are linear in the gradients. If all A_i are equal, this is `fedavg`, or `fedprox`.

    Args:
      loss, server_optimizer, vectorize: as for `fedavg`.
      client_optimizer: from optax; its state is reset in each round. It must work on a scalar.
      mu: the weight of a proximal term, as in `fedprox`. It may be traced.
      aggregator: for (y_i - x) / A_i, with weights n_i. Not private, as clients also send A_i.

    Returns:
      The algorithm, with the states and metrics of `fedavg`.

    Raises:
      ValueError: if ``mu`` is negative or ``aggregator`` is private; also as `fedavg`.

    References:
      Wang et al., Tackling the objective inconsistency problem in heterogeneous federated
      optimization, arXiv:2007.07481.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2 / 2
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(8)}, "bob": {"x": jnp.zeros(2)}})
      >>> for make in (fax.algorithms.fedavg, fax.algorithms.fednova):
      ...     algorithm = make(loss, optax.sgd(0.01))
      ...     rounds = fax.data.cohorts(data, clients=2, batch_size=1)
      ...     state, _ = fax.algorithms.many_rounds(algorithm, algorithm.init(0.0), rounds, 200)
      ...     print(f"{algorithm.params(state):.2f}")  # the mean of all examples is 0.8
      0.94
      0.80
    """
    name = "fax.algorithms.fednova"
    _arguments.number(name, "mu", mu, least=0)
    arguments(name, loss, client_optimizer=client_optimizer)
    check_scalar_optimizer(name, client_optimizer, _NO_SCALAR)

    def client(server: Server, own: None, data: Client) -> ClientResult:
        def one_more(carry: tuple, *step: Any) -> tuple:
            z, state = carry
            move, state = client_optimizer.update(1 + mu * z, state, z)
            return z + move, state

        x, state, near = server.params, server.model_state, proximal(server.params, mu)
        trained = local_steps(loss, client_optimizer, x, data, state, correct=near)
        zero = jnp.zeros((), examples_of(trained.metrics).dtype)
        a = -data.scan(one_more, (zero, client_optimizer.init(zero)))[0]
        result = ClientResult.of(trained, server, weight=jnp.where(a == 0, 0, data.num_examples))
        update = optax.tree.scale(1 / jnp.where(a == 0, 1, a), result.update)
        return result._replace(update=optax.tree.cast_like(update, x), extra=a)

    def server(state: State, received: Received, step: Callable) -> tuple[State, dict]:
        results = received.results
        a = fax.mean(results.extra, weights=results.weight, where=received.finite)
        return step(optax.tree.cast_like(optax.tree.scale(a, received.update), state.params)), {}

    return federated(
        *(name, loss, client, server_optimizer),
        server=server,
        not_private="the sums of coefficients are averaged over clients",
        aggregator=aggregator,
        vectorize=vectorize,
    )
