"""Federated averaging: the server takes the clients' mean update for a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from fax.aggregators import Aggregator
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._averaging import averaging
from fax.algorithms._checks import arguments
from fax.algorithms._local import Local, difference, train
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
    its own optimizer on each of its batches, and ends with y_i. The server takes the negative mean
    of the updates, weighted by the numbers of examples n_i, for a gradient:

        D = sum_i n_i (y_i - x) / sum_i n_i        x' = server_optimizer(x, gradient = -D)

    With SGD of rate 1, the default, x' = x + D: federated averaging. With momentum, Adam, Yogi
    or Adagrad it is FedAvgM, FedAdam, FedYogi or FedAdagrad.

    Args:
      loss: ``loss(params, batch, key)``, per-example losses of shape [batch], or a pair of these
        and a dict of per-example metrics of the same shape. It sees padded batches; the mask is
        applied to what it returns. A loss that looks at several examples together, such as batch
        statistics or a contrastive loss, has to leave out padding itself: if it has a parameter
        ``mask``, it is called with ``mask=``, bool [batch], False for padding. For a model with
        state that is not trained:
        ``loss(params, model_state, batch, key) -> (losses, metrics, model_state)``.
      client_optimizer: from optax; its state starts anew at each client and round.
      server_optimizer: from optax. Default: ``optax.sgd(1.0)``.
      aggregator: from `fax.aggregators`, what makes D of the updates. A transformation stands for
        a chain of it. Default: the mean above.
      vectorize: how many clients one device works on at once; see ``batch_size`` of
        `fax.map`. Default: what the cohort says, or 1 on CPU.

    Returns:
      The algorithm. ``init(params, model_state=None)`` makes its `FedAvgState`. A round's metrics
      are means over the cohort's examples, each taken before the step that its batch is used in:
      ``"loss"`` and those of the loss function by their names; and as ``"clients/loss"`` and so on,
      arrays [clients], over the examples of each client. The new model state is
      the mean of the clients' weighted by n_i; leaves that are not floats stay what they were.
      The state shares no memory with ``params``, so that a jitted round may donate it.

    Raises:
      ValueError: if an argument is not what it should be, and in ``init``, if a leaf of ``params``
        is not an array of floats; in a round, if the loss is not one number for each example.

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
    server_optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer
    return local_steps(
        "fax.algorithms.fedavg",
        loss,
        client_optimizer,
        server_optimizer,
        aggregator,
        vectorize,
    )


def local_steps(
    caller: str,
    loss: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation,
    aggregator: Aggregator | None,
    vectorize: int | None,
) -> Algorithm:
    """The algorithm of `fedavg`, for ``caller``."""
    aggregator = arguments(
        caller,
        loss,
        aggregator,
        vectorize,
        client_optimizer=client_optimizer,
        server_optimizer=server_optimizer,
    )

    def local(params: PyTree, model_state: PyTree, client: Client) -> Local:
        trained = train(loss, client_optimizer, params, model_state, client)
        return difference(trained, params)

    return averaging(caller, loss, local, server_optimizer, aggregator, vectorize)
