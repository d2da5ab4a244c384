"""Federated averaging and its variants: FedOpt, FedProx and Reptile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from fax import _arguments
from fax.aggregators import Aggregator
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._checks import arguments
from fax.algorithms._exchange import ClientResult, Server
from fax.algorithms._federated import federated
from fax.algorithms._local import local_steps, proximal
from fax.data import Client

PyTree = Any


def fedavg(
    loss: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """Federated averaging (FedAvg) and, with another server optimizer, adaptive FedOpt.

    In a round every client i of the cohort starts from the server's parameters x, takes a step of
    its optimizer on each of its batches, and ends with y_i. The server uses the negative mean of
    the updates, weighted by the numbers of examples n_i, as a gradient:

        D = sum_i n_i (y_i - x) / sum_i n_i        x' = server_optimizer(x, gradient = -D)

    With SGD of rate 1, the default, x' = x + D, which is federated averaging. With momentum, Adam,
    Yogi or Adagrad it is FedAvgM, FedAdam, FedYogi or FedAdagrad.

    Args:
      loss: ``loss(params, batch, key)``, which returns per-example losses of shape [batch], or a
        pair of these and a dict of per-example metrics: arrays of the same shape, whose means are
        reported, or any `fax.metrics.Statistic` with leaves [batch, ...]. It gets padded batches;
        fax applies the mask to what it returns. A loss that combines several examples, such as a
        contrastive loss or one with batch statistics, has to leave out padding itself. If it has a
        parameter ``mask``, it is called with ``mask=``, bool [batch], False for padding. For a
        model with state that is not trained:
        ``loss(params, model_state, batch, key) -> (losses, metrics, model_state)``.
      client_optimizer: from optax. Its state is reset for each client in each round.
      server_optimizer: from optax. Default: ``optax.sgd(1.0)``.
      aggregator: from `fax.aggregators`; it computes D from the updates. A transformation alone is
        treated as a chain of it. Default: the mean above.
      vectorize: the number of clients that a device works on at once; see `fax.map`. Default: the
        cohort's setting, or 1 on CPU.

    Returns:
      The algorithm. ``init(params, model_state=None)`` makes its `State`. A round's metrics are
      means over the cohort's examples, each computed before the step on its batch: ``"loss"`` and
      those of the loss function by name; and ``"clients/loss"`` and so on, arrays [clients] of
      means over each client's examples, 0 for a client without examples. The new model state is
      the mean of the clients' states, weighted by n_i; leaves that are not floats do not change.
      The state shares no memory with ``params``, so a jitted round may donate it.

    Raises:
      ValueError: if an argument is invalid; in ``init``, if a leaf of ``params`` is not an array of
        floats; in a round, if the loss is not one number for each example.

    References:
      McMahan et al., Communication-efficient learning of deep networks from decentralized data,
      arXiv:1602.05629. Reddi et al., Adaptive federated optimization, arXiv:2003.00295.

    Example:

      >>> import optax
      >>> def loss(params, batch, key):
      ...     return (batch["x"] - params) ** 2
      >>> algorithm = fax.algorithms.fedavg(loss, optax.sgd(0.1), optax.adam(0.1))
      >>> state = algorithm.init(jnp.zeros(()))
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(3)}, "bob": {"x": jnp.zeros(2)}})
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=2)
      >>> for _ in range(50):
      ...     state, metrics = jax.jit(algorithm.round)(state, next(rounds))
      >>> sorted(metrics)
      ['clients/loss', 'loss']
    """
    name = "fax.algorithms.fedavg"
    return averaging(name, loss, client_optimizer, server_optimizer, aggregator, vectorize)


def fedopt(
    loss: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation,
    *,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """Federated optimization (FedOpt): FedAvg with an optimizer at the server.

    In a round every client i of the cohort starts from the server's parameters x, takes a step of
    its optimizer on each of its batches, and ends with y_i. The server uses the negative mean of
    the updates, weighted by the numbers of examples n_i, as a gradient:

        D = sum_i n_i (y_i - x) / sum_i n_i        x' = server_optimizer(x, gradient = -D)

    ``optax.sgd(1.0)`` is FedAvg, the default of `fedavg`; `server_momentum` is FedAvgM;
    `server_adagrad`, `server_adam` and `server_yogi` are FedAdagrad, FedAdam and FedYogi. Any other
    optax optimizer works, too, if its ``update`` needs only gradients and parameters, unlike that
    of ``optax.polyak_sgd``, which needs the loss.

    Args:
      loss: see `fedavg`.
      client_optimizer: from optax. Its state is reset for each client in each round.
      server_optimizer: one of the above.
      aggregator: from `fax.aggregators`; it computes D from the updates. Default: the mean above.
      vectorize: the number of clients that a device works on at once; see `fedavg`.

    Returns:
      The algorithm, with the states and metrics of `fedavg`.

    Raises:
      ValueError: as `fedavg`.

    References:
      Reddi et al., Adaptive federated optimization, arXiv:2003.00295, Algorithms 1 and 2.

    Example:

      >>> import optax
      >>> def loss(params, batch, key):
      ...     return (batch["x"] - params) ** 2
      >>> algorithm = fax.algorithms.fedopt(
      ...     loss, optax.sgd(0.1), fax.algorithms.server_yogi(0.1)
      ... )
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(3)}, "bob": {"x": jnp.zeros(3)}})
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=3)
      >>> state = algorithm.init(jnp.ones(()))
      >>> state, _ = fax.algorithms.many_rounds(algorithm, state, rounds, 100)
      >>> print(f"{algorithm.params(state):.2f}")
      0.50
    """
    name = "fax.algorithms.fedopt"
    arguments(name, loss, server_optimizer=server_optimizer)  # there is no default
    return averaging(name, loss, client_optimizer, server_optimizer, aggregator, vectorize)


def fedprox(
    loss: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    mu: Any,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """FedProx: FedAvg with a proximal term that keeps clients near the server's parameters.

    In a round every client i of the cohort starts from the server's parameters x, and takes a step
    of its optimizer on each of its batches, to minimize

        h_i(y; x) = f_i(y) + mu/2 ‖y - x‖^2,    with gradient    grad f_i(y) + mu (y - x),

    where f_i is its mean loss. The server does the same as in `fedavg`. With mu = 0 it is federated
    averaging.

    Args:
      loss: see `fedavg`.
      client_optimizer: from optax. Its state is reset for each client in each round.
      server_optimizer: from optax. Default: ``optax.sgd(1.0)``.
      mu: the weight of the proximal term; the paper tries 0.001, 0.01, 0.1 and 1. It may be traced.
      aggregator: from `fax.aggregators`. Default: the mean, weighted by the numbers of examples.
      vectorize: the number of clients that a device works on at once; see `fedavg`.

    Returns:
      The algorithm, with the states and metrics of `fedavg`. The losses are f_i, without the
      proximal term.

    Raises:
      ValueError: if ``mu`` is negative; also as `fedavg`.

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
    name = "fax.algorithms.fedprox"
    _arguments.number(name, "mu", mu, least=0)
    return averaging(name, loss, client_optimizer, server_optimizer, aggregator, vectorize, mu)


def reptile(
    loss: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """Reptile: first-order meta-learning, which moves the model toward the clients' models.

        x' = server_optimizer(x, gradient = mean_i(x - y_i))

    This is `fedavg` by another name: y_i are the parameters of client i after a step of its
    optimizer on each of its batches, and the mean is weighted by the numbers of examples.
    `personalize` adapts x to clients.

    Args:
      loss: see `fedavg`.
      client_optimizer: from optax. Its state is reset for each client in each round.
      server_optimizer: from optax. The paper's step size epsilon is ``optax.sgd(epsilon)``, 0.1 to
        1 in its experiments; it also proposes Adam. Default: ``optax.sgd(1.0)``.
      aggregator: from `fax.aggregators`. Default: the mean above.
      vectorize: the number of clients that a device works on at once; see `fedavg`.

    Returns:
      The algorithm, with the states and metrics of `fedavg`.

    Raises:
      ValueError: as `fedavg`.

    References:
      Nichol, Achiam and Schulman, On first-order meta-learning algorithms, arXiv:1803.02999. Jiang
      et al., Improving federated learning personalization via model agnostic meta learning,
      arXiv:1909.12488.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2 / 2
      >>> algorithm = fax.algorithms.reptile(loss, optax.sgd(1.0), optax.sgd(0.25))
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(3)}})
      >>> cohort = next(fax.data.cohorts(data, clients=1, batch_size=3))
      >>> state, _ = algorithm.round(algorithm.init(jnp.zeros(())), cohort)
      >>> print(algorithm.params(state))
      0.25
    """
    name = "fax.algorithms.reptile"
    return averaging(name, loss, client_optimizer, server_optimizer, aggregator, vectorize)


def averaging(
    name: str,
    loss: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None,
    aggregator: Aggregator | None,
    vectorize: int | None,
    mu: Any = None,
) -> Algorithm:
    """The algorithm of `fedavg`, with a proximal term if there is a ``mu``."""
    arguments(name, loss, client_optimizer=client_optimizer)

    def client(server: Server, own: None, data: Client) -> ClientResult:
        x = server.params
        correct = None if mu is None else proximal(x, mu)
        trained = local_steps(loss, client_optimizer, x, data, server.model_state, correct=correct)
        return ClientResult.of(trained, server)

    return federated(
        name, loss, client, server_optimizer, aggregator=aggregator, vectorize=vectorize
    )
