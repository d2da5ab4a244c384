"""FedNova: updates are normalized, so that it does not matter how many steps a client takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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

    Clients with more steps go further, and FedAvg counts them for more than their examples. Here
    every client i of the cohort starts from the server's parameters x, and takes a step of its
    optimizer on each of its batches, of gradient g_ik + mu (y - x) for step k. The update that it
    ends with is the sum of its gradients times coefficients, by whose sum it is divided:

        y_i - x = - sum_k a_ik g_ik        A_i = sum_k a_ik
        D = (sum_i p_i A_i) (sum_i p_i (y_i - x) / A_i)        p_i = n_i / sum_j n_j
        x' = server_optimizer(x, gradient = -D)

    The paper's ‖a_i‖ is A_i over the learning rate. For SGD of rate r and tau_i steps A_i is
    r tau_i; momentum, a proximal term and schedules have others. The first factor of D is the
    paper's effective number of steps. So if all clients take as many steps, this is `fedavg`, or
    with mu `fedprox`.

    A_i is found by the optimizer itself: where all gradients are 1, a number goes from 0 to -A_i.
    This is exact for optimizers that are linear in gradients, as `optax.sgd` is. For others, such
    as Adam, it counts steps by the optimizer's own rate. A client without steps does not count.

    Args:
      loss: see `fedavg`.
      client_optimizer: from optax; its state starts anew at each client and round. It has to work
        on a scalar, too.
      server_optimizer: from optax. Default: ``optax.sgd(1.0)``.
      mu: the weight of a proximal term, as in `fedprox`. It may be traced.
      aggregator: from `fax.aggregators`, of the updates (y_i - x) / A_i. Default: the mean weighted
        by p_i. The A_i are not sent through it, so that it cannot be a private one.
      vectorize: how many clients one device works on at once; see `fedavg`.

    Returns:
      The algorithm, with states and metrics as of `fedavg`.

    Raises:
      ValueError: if ``mu`` is negative, ``aggregator`` private or ``client_optimizer`` made for the
        leaves of the parameters, and as `fedavg`.

    References:
      Wang et al., Tackling the objective inconsistency problem in heterogeneous federated
      optimization, arXiv:2007.07481.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2 / 2
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(8)}, "bob": {"x": jnp.zeros(2)}})
      >>> for algorithm in (fax.algorithms.fedavg, fax.algorithms.fednova):
      ...     rounds = fax.data.cohorts(data, clients=2, batch_size=1)
      ...     algorithm = algorithm(loss, optax.sgd(0.01))
      ...     state = algorithm.init(jnp.zeros(()))
      ...     state, _ = fax.algorithms.many_rounds(algorithm, state, rounds, 200)
      ...     print(f"{algorithm.params(state):.2f}")  # the mean of all examples is 0.8
      0.94
      0.80
    """
    name = "fax.algorithms.fednova"
    _arguments.number(name, "mu", mu, least=0)
    arguments(name, loss, client_optimizer=client_optimizer)

    def client(server: Server, own: None, data: Client) -> ClientResult:
        x = server.params

        def proximal(gradient: PyTree, y: PyTree, *step: Any) -> PyTree:
            return jax.tree.map(lambda g, y, x: g + (mu * (y - x)).astype(g.dtype), gradient, y, x)

        def one_more(carry: tuple, *step: Any) -> tuple:
            z, optimizer_state = carry
            move, optimizer_state = client_optimizer.update(1 + mu * z, optimizer_state, z)
            return z + move, optimizer_state

        trained = local_steps(loss, client_optimizer, x, data, server.model_state, correct=proximal)
        result = ClientResult.of(trained, server)
        zero = jnp.zeros((), trained.metrics["loss"].total.dtype)
        a = -data.scan(one_more, (zero, client_optimizer.init(zero)))[0]
        share = jnp.where(a == 0, 0, 1 / jnp.where(a == 0, 1, a))
        update = optax.tree.cast_like(optax.tree.scale(share, result.update), x)
        weight = jnp.where(a == 0, 0, data.num_examples)
        return result._replace(update=update, weight=weight, extra=a)

    def server(state: State, received: Received, step: Callable) -> tuple[State, dict]:
        a = fax.mean(received.results.extra, weights=received.results.weight)
        update = optax.tree.scale(a, received.update)
        return step(optax.tree.cast_like(update, state.params)), {}

    return federated(
        name,
        loss,
        client,
        server_optimizer,
        server=server,
        not_private="how far clients go is averaged over them",
        aggregator=aggregator,
        vectorize=vectorize,
    )
