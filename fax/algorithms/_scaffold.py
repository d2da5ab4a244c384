"""SCAFFOLD: control variates take the drift out of local steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fax
from fax import _arguments
from fax.aggregators import Aggregator, PerClient
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._averaging import (
    aggregate,
    check_private,
    moved,
    next_model_state,
    rows_of,
    strong,
    with_rows,
)
from fax.algorithms._checks import arguments, guarded
from fax.algorithms._local import Local, difference, metrics_of, train
from fax.data import Client, Cohort

PyTree = Any


class ScaffoldState(NamedTuple):
    """The state of SCAFFOLD.

    Attributes:
      params: the server's model x.
      control: the server's control variate c, like ``params``.
      client_controls: those of all clients, c_i, leaves [num_clients, ...].
      model_state: what the model has besides parameters, or None.
      aggregator: the state of the aggregator, or None.
    """

    params: PyTree
    control: PyTree
    client_controls: PerClient
    model_state: PyTree
    aggregator: PyTree = None


def scaffold(
    loss: Callable,
    client_learning_rate: Any,
    server_learning_rate: Any = 1.0,
    *,
    num_clients: int,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """SCAFFOLD: local SGD corrected by the difference of a client's gradient from everyone's.

    Client i of a population of N keeps a control variate c_i between rounds, an estimate of its own
    gradient, and the server keeps their mean c. In a round every client of the cohort S, of n
    clients, starts from the server's parameters x, takes K_i steps of SGD, one on each of its
    batches, and ends with y_i. g_i(y) is the gradient of the batch's mean loss:

        y_i <- y_i - client_learning_rate (g_i(y_i) - c_i + c)
        c_i' = c_i - c + (x - y_i) / (K_i client_learning_rate)        (option II)
        x' = x + server_learning_rate mean_S(y_i - x)
        c' = c + n/N mean_S(c_i' - c_i)

    Both means count each client once, as the paper's do: what is minimised is the mean over clients
    of their losses f_i, whereas FedAvg's weighs them by their examples. K_i is the number of the
    client's own steps, without padding. A client without any keeps its c_i. All control variates
    start at 0, so that the first round is FedAvg's.

    Args:
      loss: see `fax.algorithms.fedavg`.
      client_learning_rate: of the local SGD; it may be traced. There is no other optimizer, for
        c_i' is the mean of the client's gradients if steps are those of SGD with one rate only.
      server_learning_rate: of the server; it may be traced.
      num_clients: N, the size of the population, ``len(data)``.
      aggregator: from `fax.aggregators`, what makes one update of all y_i - x; its weights are 1.
        Default: the mean above. Control variates are not sent through it, so that it cannot be a
        private one.
      vectorize: how many clients one device works on at once; see `fax.algorithms.fedavg`.

    Returns:
      The algorithm. ``init(params, model_state=None)`` makes its `ScaffoldState`, which has the
      size of N + 2 models. Metrics and the model's state are as of `fax.algorithms.fedavg`.

    Raises:
      ValueError: if ``client_learning_rate`` is not positive, ``server_learning_rate`` negative,
        ``num_clients`` no int of at least 1, or ``aggregator`` private; in a round, if its cohort
        is larger than the population, or the loss is not one number for each example. Clients
        beyond ``num_clients`` make the parameters NaN.

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
    caller = "fax.algorithms.scaffold"
    _arguments.number(caller, "client_learning_rate", client_learning_rate, above=0)
    _arguments.number(caller, "server_learning_rate", server_learning_rate, least=0)
    num_clients = _arguments.count(caller, "num_clients", num_clients)
    aggregator = arguments(caller, loss, aggregator, vectorize)
    check_private(caller, aggregator, "changes of control variates are averaged over clients")

    def init(params: PyTree, model_state: PyTree = None) -> ScaffoldState:
        params, model_state = jax.tree.map(strong, (params, model_state))
        rows = jax.tree.map(lambda x: jnp.zeros((num_clients, *x.shape), x.dtype), params)
        own = None if aggregator is None else aggregator.init(params)
        control = jax.tree.map(jnp.zeros_like, params)
        return ScaffoldState(params, control, PerClient(rows), model_state, own)

    def local(
        x: PyTree, c: PyTree, c_i: PyTree, model_state: PyTree, client: Client
    ) -> tuple[Local, PyTree]:
        def corrected(gradient: PyTree, own: PyTree) -> PyTree:
            return jax.tree.map(lambda g, c_i, c: g - c_i + c, gradient, c_i, c)

        sgd = optax.sgd(client_learning_rate)
        sent = difference(train(loss, sgd, x, model_state, client, corrected), x)
        steps = jnp.sum(jnp.any(client.mask, axis=1))  # K_i

        def next_control(c_i: jax.Array, c: jax.Array, update: jax.Array) -> jax.Array:
            scale = (jnp.maximum(steps, 1) * client_learning_rate).astype(update.dtype)
            return jnp.where(steps > 0, c_i - c - update / scale, c_i)

        return sent, jax.tree.map(next_control, c_i, c, sent.update)

    def round(state: ScaffoldState, cohort: Cohort) -> tuple[ScaffoldState, dict[str, jax.Array]]:
        if cohort.size > num_clients:
            raise ValueError(
                f"{caller}: a cohort of {cohort.size} clients, but num_clients={num_clients}. "
                "It is the size of the whole population, len(data)."
            )

        @fax.program(clients=cohort.size)
        def mean_update(
            x: PyTree,
            c: PyTree,
            c_i: PyTree,
            model_state: PyTree,
            aggregator_state: PyTree,
            cohort: Cohort,
        ) -> tuple:
            sent, new_c_i = fax.map(
                jax.checkpoint(local),  # so that gradients of a round do not store steps
                fax.broadcast(x),
                fax.broadcast(c),
                c_i,
                fax.broadcast(model_state),
                cohort.clients(),
                vectorize=vectorize or cohort.vectorize,
            )
            update, aggregator_state, more = aggregate(
                aggregator,
                sent.update,
                aggregator_state,
                cohort,
                weights=jnp.ones_like(cohort.num_examples),
            )
            change = fax.mean(jax.tree.map(jnp.subtract, new_c_i, c_i))
            mean_state = fax.mean(sent.model_state, weights=cohort.num_examples)
            metrics = {**metrics_of(sent.tally), **more}
            return update, change, new_c_i, mean_state, aggregator_state, metrics

        update, change, rows, mean_state, aggregator_state, metrics = mean_update(
            state.params,
            state.control,
            rows_of(state.client_controls, cohort).rows,
            state.model_state,
            rows_of(state.aggregator, cohort),
            cohort,
        )
        share = cohort.size / num_clients
        state = ScaffoldState(
            moved(state.params, update, server_learning_rate),
            moved(state.control, change, share),
            with_rows(state.client_controls, PerClient(rows), cohort),
            next_model_state(mean_state, state.model_state),
            with_rows(state.aggregator, aggregator_state, cohort),
        )
        return state, metrics

    return Algorithm(*guarded(caller, loss, ScaffoldState, init, round, lambda state: state.params))
