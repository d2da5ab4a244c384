"""Mime and MimeLite: clients take the steps of a central optimizer whose statistics stand still."""

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
from fax.algorithms._averaging import (
    FedAvgState,
    aggregate,
    check_private,
    moved,
    next_model_state,
    rows_of,
    strong,
    with_rows,
)
from fax.algorithms._checks import arguments, guarded
from fax.algorithms._local_old import (
    Local,
    full_gradient,
    mean_gradient,
    metrics_of,
    no_tally,
)
from fax.data import Client, Cohort

PyTree = Any
_SENT = "gradients for the optimizer's statistics are averaged over clients"


def mime(
    loss: Callable,
    base_optimizer: optax.GradientTransformation,
    server_learning_rate: Any = 1.0,
    *,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """Mime: local steps that mimic a central optimizer's, corrected for drift.

    The server has parameters x and the statistics s of an optimizer, such as its momentum. In a
    round the clients i of the cohort first send their gradients at x, each over all of its batches,
    and c is their mean, weighted by the numbers of examples n_i. Then every client starts from x,
    and takes a step on each of its batches b, of gradient g_i(y; b) at y:

        y_i <- y_i + U(g_i(y_i; b) - g_i(x; b) + c, s)

    U is the optimizer's update with statistics that stay what they are. Then

        s' = V(c, s)        x' = x + server_learning_rate sum_i n_i (y_i - x) / sum_i n_i

    where V is what c at x makes of the optimizer's statistics.

    U is ``base_optimizer.update(gradient, s, y)[0]``: a step sees its own gradient as optax's do,
    Adam's in the second moment, too, and so does FedJAX's.

    Args:
      loss: see `fax.algorithms.fedavg`.
      base_optimizer: from optax. With ``optax.sgd`` it has no statistics, and Mime is like SVRG.
      server_learning_rate: 1 in the paper; it may be traced.
      aggregator: from `fax.aggregators`, what makes one update of all y_i - x. Default: the mean
        above. Gradients are not sent through it, so that it cannot be a private one.
      vectorize: how many clients one device works on at once; see `fax.algorithms.fedavg`.

    Returns:
      The algorithm. ``init(params, model_state=None)`` makes a `FedAvgState`, whose ``optimizer``
      is s. Metrics and the model's state are as of `fax.algorithms.fedavg`. A batch costs three
      gradients, and a round goes through the batches twice, all of its epochs.

    Raises:
      ValueError: if ``server_learning_rate`` is negative or ``aggregator`` private, and as
        `fax.algorithms.fedavg`.

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
    """MimeLite: `mime` without the correction for drift, in a single pass.

    Every client i of the cohort starts from the server's parameters x, and takes a step on each of
    its batches b with the statistics s of the server's optimizer, which stay what they are:

        y_i <- y_i + U(g_i(y_i; b), s)

    The rest is Mime's: s' = V(c, s), where c is the mean of the clients' gradients at x. With
    ``optax.sgd`` for an optimizer, which has no statistics, it is federated averaging.

    Args:
      loss: see `fax.algorithms.fedavg`.
      base_optimizer: from optax.
      server_learning_rate: 1 in the paper; it may be traced.
      aggregator: from `fax.aggregators`, what makes one update of all y_i - x. Default: the mean,
        weighted by the numbers of examples. Gradients are not sent through it, so that it cannot be
        a private one.
      vectorize: how many clients one device works on at once; see `fax.algorithms.fedavg`.

    Returns:
      The algorithm, with states and metrics as of `fax.algorithms.mime`. A batch costs two
      gradients.

    Raises:
      ValueError: as `fax.algorithms.mime`.

    References:
      As of `fax.algorithms.mime`.

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
    caller: str,
    loss: Callable,
    base_optimizer: optax.GradientTransformation,
    server_learning_rate: Any,
    aggregator: Aggregator | None,
    vectorize: int | None,
    lite: bool,
) -> Algorithm:
    _arguments.number(caller, "server_learning_rate", server_learning_rate, least=0)
    aggregator = arguments(caller, loss, aggregator, vectorize, base_optimizer=base_optimizer)
    check_private(caller, aggregator, _SENT)

    def init(params: PyTree, model_state: PyTree = None) -> FedAvgState:
        params, model_state = jax.tree.map(strong, (params, model_state))
        own = None if aggregator is None else aggregator.init(params)
        return FedAvgState(params, base_optimizer.init(params), model_state, own)

    def gradient_of(x: PyTree, model_state: PyTree, client: Client) -> PyTree:
        return full_gradient(loss, x, model_state, client)[0]

    def local(x: PyTree, s: PyTree, c: PyTree, model_state: PyTree, client: Client) -> Local:
        def one(carry: tuple, batch: PyTree, mask: jax.Array, key: jax.Array) -> tuple:
            y, own_state, tally = carry
            gradient, (new, own_state) = mean_gradient(loss, y, own_state, batch, mask, key)
            if not lite:
                at_x, _ = mean_gradient(loss, x, model_state, batch, mask, key)
                gradient = jax.tree.map(lambda g, h, c: g - h + c, gradient, at_x, c)
            updates, _ = base_optimizer.update(gradient, s, y)
            y = optax.apply_updates(y, updates)
            return y, own_state, jax.tree.map(jnp.add, tally, new)

        start = (x, model_state, no_tally(loss, x, model_state, client))
        y, own_state, tally = client.scan(one, start)
        return Local(jax.tree.map(jnp.subtract, y, x), own_state, tally)

    def local_lite(x: PyTree, s: PyTree, model_state: PyTree, client: Client) -> tuple:
        return local(x, s, None, model_state, client), gradient_of(x, model_state, client)

    def round(state: FedAvgState, cohort: Cohort) -> tuple[FedAvgState, dict[str, jax.Array]]:
        at_once = vectorize or cohort.vectorize

        @fax.program(clients=cohort.size)
        def mean_update(
            x: PyTree, s: PyTree, model_state: PyTree, aggregator_state: PyTree, cohort: Cohort
        ) -> tuple:
            def each(fn: Callable, *shared: PyTree) -> Any:
                # Under jax.checkpoint gradients of a round do not store steps.
                shared = fax.broadcast((*shared, model_state))
                return fax.map(jax.checkpoint(fn), *shared, cohort.clients(), vectorize=at_once)

            if lite:
                sent, gradients = each(local_lite, x, s)
                c = fax.mean(gradients, weights=cohort.num_examples)
            else:
                c = fax.mean(each(gradient_of, x), weights=cohort.num_examples)
                sent = each(local, x, s, c)
            update, aggregator_state, more = aggregate(
                aggregator, sent.update, aggregator_state, cohort
            )
            mean_state = fax.mean(sent.model_state, weights=cohort.num_examples)
            return update, c, mean_state, aggregator_state, {**metrics_of(sent.tally), **more}

        update, c, mean_state, aggregator_state, metrics = mean_update(
            state.params,
            state.optimizer,
            state.model_state,
            rows_of(state.aggregator, cohort),
            cohort,
        )
        _, statistics = base_optimizer.update(c, state.optimizer, state.params)
        state = FedAvgState(
            moved(state.params, update, server_learning_rate),
            statistics,
            next_model_state(mean_state, state.model_state),
            with_rows(state.aggregator, aggregator_state, cohort),
        )
        return state, metrics

    return (guarded(caller, loss, FedAvgState, init, round, lambda state: state.params))
