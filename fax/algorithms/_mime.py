"""Mime and MimeLite: clients take the steps of a central optimizer with fixed statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

import fax
from fax import _arguments
from fax.aggregators import Aggregator
from fax.aggregators._per_client import all_finite
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._checks import arguments
from fax.algorithms._exchange import ClientResult, Received, Server, State
from fax.algorithms._federated import federated
from fax.algorithms._local import local_gradient, local_steps
from fax.algorithms._loss import batch_gradient
from fax.data import Client

PyTree = Any


def mime(
    loss: Callable,
    base_optimizer: optax.GradientTransformation,
    server_learning_rate: Any = 1.0,
    *,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """Mime: local steps that mimic those of a central optimizer, corrected for client drift.

    The server has parameters x and the statistics s of an optimizer, such as its momentum. In a
    round the clients i of the cohort first send their gradients at x, each over all of its batches,
    and c is their mean, weighted by the numbers of examples n_i. Then every client starts from x,
    and takes a step on each of its batches b, where g_i(y; b) is the gradient at y:

        y_i <- y_i + U(g_i(y_i; b) - g_i(x; b) + c, s)

    U is the optimizer's update with fixed statistics. Then

        s' = V(c, s)        x' = x + server_learning_rate sum_i n_i (y_i - x) / sum_i n_i

    where V updates the optimizer's statistics with the gradient c at x.

    U is ``base_optimizer.update(gradient, s, y)[0]``. As usual in optax, and as in FedJAX, a step's
    own gradient enters its moments, with Adam also the second moment.

    Args:
      loss: see `fedavg`.
      base_optimizer: from optax. With ``optax.sgd`` it has no statistics, and Mime is like SVRG.
      server_learning_rate: the server's learning rate; 1 in the paper. It may be traced.
      aggregator: from `fax.aggregators`, for the updates y_i - x. Default: the mean above. It
        cannot be private, because gradients do not go through it.
      vectorize: the number of clients that a device works on at once; see `fedavg`.

    Returns:
      The algorithm. ``init(params, model_state=None)`` makes its `State`, whose ``server`` is s.
      Metrics and the model's state are those of `fedavg`. A batch costs three gradients, and a
      round goes through all batches of all epochs twice.

    Raises:
      ValueError: if ``server_learning_rate`` is negative or ``aggregator`` is private; also as
        `fedavg`.

    References:
      Karimireddy et al., Mime: mimicking centralized stochastic algorithms in federated learning,
      arXiv:2008.03606, Algorithm 1. FedJAX updates statistics in the same order.

    Example:

      >>> import optax
      >>> def loss(params, batch, key):
      ...     return (batch["x"] - params) ** 2
      >>> algorithm = fax.algorithms.mime(loss, optax.sgd(0.02, momentum=0.9))
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(3)}, "bob": {"x": jnp.zeros(3)}})
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=1)
      >>> state = algorithm.init(jnp.ones(()))
      >>> state, _ = fax.algorithms.many_rounds(algorithm, state, rounds, 100)
      >>> print(f"{algorithm.params(state):.2f}")
      0.50
    """
    return _mimicking(
        "fax.algorithms.mime",
        loss,
        base_optimizer,
        server_learning_rate,
        aggregator,
        vectorize,
        lite=False,
    )


def mime_lite(
    loss: Callable,
    base_optimizer: optax.GradientTransformation,
    server_learning_rate: Any = 1.0,
    *,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """MimeLite: `mime` without the correction for client drift, in a single pass.

    Every client i of the cohort starts from the server's parameters x, and takes a step on each of
    its batches b with the fixed statistics s of the server's optimizer:

        y_i <- y_i + U(g_i(y_i; b), s)

    The rest is as in `mime`: s' = V(c, s), where c is the mean of the clients' gradients at x. With
    ``optax.sgd``, which has no statistics, it is federated averaging.

    Args:
      loss: see `fedavg`.
      base_optimizer: from optax.
      server_learning_rate: the server's learning rate; 1 in the paper. It may be traced.
      aggregator: from `fax.aggregators`, for the updates y_i - x. Default: the mean, weighted by
        the numbers of examples. It cannot be private, because gradients do not go through it.
      vectorize: the number of clients that a device works on at once; see `fedavg`.

    Returns:
      The algorithm, with the states and metrics of `mime`. A batch costs two gradients.

    Raises:
      ValueError: as `mime`.

    References:
      See `mime`.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2
      >>> algorithm = fax.algorithms.mime_lite(loss, optax.adam(0.02))
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(3)}, "bob": {"x": jnp.zeros(3)}})
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=1)
      >>> state = algorithm.init(jnp.ones(()))
      >>> state, metrics = algorithm.round(state, next(rounds))
      >>> sorted(metrics)
      ['clients/loss', 'loss']
    """
    return _mimicking(
        "fax.algorithms.mime_lite",
        loss,
        base_optimizer,
        server_learning_rate,
        aggregator,
        vectorize,
        lite=True,
    )


def _mimicking(
    name: str,
    loss: Callable,
    base_optimizer: optax.GradientTransformation,
    server_learning_rate: Any,
    aggregator: Aggregator | None,
    vectorize: int | None,
    lite: bool,
) -> Algorithm:
    _arguments.number(name, "server_learning_rate", server_learning_rate, least=0)
    arguments(name, loss, base_optimizer=base_optimizer)

    def gradient(server: Server, own: None, data: Client) -> PyTree:
        return local_gradient(loss, server.params, data, server.model_state)[0]

    def client(server: Server, own: None, data: Client) -> ClientResult:
        x, s, c = server.params, server.state, server.first

        def update(gradient: PyTree, own: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
            return base_optimizer.update(gradient, s, y)[0], own  # U, with fixed s

        def corrected(
            gradient: PyTree, y: PyTree, batch: PyTree, mask: jax.Array, key: jax.Array
        ) -> PyTree:
            at_x, _ = batch_gradient(loss, x, batch, mask, key, server.model_state)
            return jax.tree.map(lambda g, h, c: g - h + c, gradient, at_x, c)

        optimizer = optax.GradientTransformation(lambda params: (), update)
        correct = None if lite else corrected
        trained = local_steps(loss, optimizer, x, data, server.model_state, correct=correct)
        result = ClientResult.of(trained, server)
        if lite:
            g = gradient(server, own, data)
            result = result._replace(extra=(g, all_finite(g)))
        return result

    def server(state: State, received: Received, step: Callable) -> tuple[State, dict]:
        c = received.first
        if lite:
            g, finite = received.results.extra  # `fax.aggregators.non_finite` may leave out some
            c = fax.mean(g, weights=received.cohort.num_examples, where=finite & received.finite)
        _, statistics = base_optimizer.update(c, state.server, state.params)
        return step(received.update)._replace(server=statistics), {}

    return federated(
        name,
        loss,
        client,
        optax.sgd(server_learning_rate),
        server=server,
        server_state=base_optimizer.init,
        first=None if lite else gradient,
        not_private="gradients for the optimizer's statistics are averaged over clients",
        aggregator=aggregator,
        vectorize=vectorize,
    )
