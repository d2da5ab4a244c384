"""SCAFFOLD: control variates correct the drift of local steps."""

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
from fax.algorithms._exchange import ClientResult, Received, Server, State
from fax.algorithms._federated import federated
from fax.algorithms._local import local_steps
from fax.algorithms._loss import examples_of
from fax.data import Client

PyTree = Any


def scaffold(
    loss: Callable,
    client_learning_rate: Any,
    server_learning_rate: Any = 1.0,
    *,
    num_clients: int,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """SCAFFOLD: local SGD with control variates, which correct client drift.

    Client i of N keeps a control variate c_i between rounds, an estimate of its own gradient, and
    the server keeps their mean c. In a round each of the clients in the cohort starts from the
    server's parameters x, takes K_i steps of SGD, one on each of its batches, and ends with y_i.
    S are the clients of the cohort that took any step, and g_i(y) is the gradient of the batch's
    mean loss:

        y_i <- y_i - client_learning_rate (g_i(y_i) - c_i + c)
        c_i' = c_i - c + (x - y_i) / (K_i client_learning_rate)        (option II)
        x' = x + server_learning_rate mean_S(y_i - x)
        c' = c + 1/N sum_S(c_i' - c_i)

    Each client counts once, as in the paper. So it minimizes the mean of the clients' losses f_i,
    whereas FedAvg weights them by their examples. K_i is the number of the client's own steps,
    without padding. A client without steps keeps its c_i, and so does one whose y_i is not finite,
    which `fax.aggregators.non_finite` can leave out of S. All control variates start at 0, so the
    first round is that of FedAvg.

    Args:
      loss: see `fedavg`.
      client_learning_rate: the learning rate of the local SGD. It may be traced. Other optimizers
        are not possible: only with SGD at a constant rate is c_i' the mean of the client's
        gradients.
      server_learning_rate: the server's learning rate, as in the paper. It may be traced.
      num_clients: N, the number of clients in the data, ``len(data)``.
      aggregator: from `fax.aggregators`, for the updates y_i - x, with weight 1 for the clients in
        S and 0 for the others. Default: the mean above. It cannot be private, because control
        variates do not go through it.
      vectorize: the number of clients that a device works on at once; see `fedavg`.

    Returns:
      The algorithm. ``init(params, model_state=None)`` makes its `State`, which has the size of
      N + 2 models: ``server`` is c, and ``clients`` are the c_i. Metrics and the model's state are
      those of `fedavg`.

    Raises:
      ValueError: if ``client_learning_rate`` is not positive, ``server_learning_rate`` is negative,
        ``num_clients`` is not a positive int, or ``aggregator`` is private; in a round, if the
        cohort has more than ``num_clients`` clients, or the loss is not one number for each
        example. Clients beyond ``num_clients`` make the parameters NaN.

    References:
      Karimireddy et al., SCAFFOLD: stochastic controlled averaging for federated learning,
      arXiv:1910.06378, Algorithm 1.

    Example:

      >>> import optax
      >>> def loss(params, batch, key):
      ...     return batch["a"] * (batch["b"] - params) ** 2 / 2
      >>> data = fax.data.InMemory(
      ...     {
      ...         "ann": {"a": jnp.full(4, 1.0), "b": jnp.full(4, 0.0)},
      ...         "bob": {"a": jnp.full(4, 4.0), "b": jnp.full(4, 1.0)},
      ...     }
      ... )
      >>> for algorithm in (
      ...     fax.algorithms.fedavg(loss, optax.sgd(0.1)),
      ...     fax.algorithms.scaffold(loss, 0.1, num_clients=len(data)),
      ... ):
      ...     rounds = fax.data.cohorts(data, clients=2, batch_size=4, epochs=8)
      ...     state = algorithm.init(jnp.zeros(()))
      ...     state, _ = fax.algorithms.many_rounds(algorithm, state, rounds, 50)
      ...     print(f"{algorithm.params(state):.2f}")  # the optimum is (1 * 0 + 4 * 1) / (1 + 4)
      0.63
      0.80
    """
    name = "fax.algorithms.scaffold"
    what = "the learning rate of plain SGD"
    _arguments.number(name, "client_learning_rate", client_learning_rate, above=0, what=what)
    _arguments.number(name, "server_learning_rate", server_learning_rate, least=0)

    def client(server: Server, c_i: PyTree, data: Client) -> ClientResult:
        x, c = server.params, server.state

        def corrected(gradient: PyTree, *step: Any) -> PyTree:
            return jax.tree.map(lambda g, c_i, c: g - c_i + c, gradient, c_i, c)

        sgd = optax.sgd(client_learning_rate)
        trained = local_steps(loss, sgd, x, data, server.model_state, correct=corrected)
        steps = jnp.sum(jnp.any(data.mask, axis=1))  # K_i
        took_any = (steps > 0).astype(examples_of(trained.metrics).dtype)
        result = ClientResult.of(trained, server, weight=took_any)

        def next_control(c_i: jax.Array, c: jax.Array, update: jax.Array) -> jax.Array:
            scale = (jnp.maximum(steps, 1) * client_learning_rate).astype(update.dtype)
            return jnp.where(steps > 0, c_i - c - update / scale, c_i)

        own = jax.tree.map(next_control, c_i, c, result.update)
        return result._replace(own=own, extra=optax.tree.sub(own, c_i))

    def server(state: State, received: Received, step: Callable) -> tuple[State, dict]:
        change = fax.sum(received.results.extra, where=received.finite)
        c = optax.tree.add_scale(state.server, 1 / num_clients, change)
        return step(received.update)._replace(server=c), {}

    return federated(
        name,
        loss,
        client,
        optax.sgd(server_learning_rate),
        server=server,
        server_state=optax.tree.zeros_like,
        client_state=optax.tree.zeros_like,
        num_clients=num_clients,
        not_private="changes of control variates are averaged over clients",
        aggregator=aggregator,
        vectorize=vectorize,
    )
