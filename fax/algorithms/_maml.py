"""Meta-learning: parameters that adapt to a client in a few steps, and that adaptation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

import fax
from fax import _arguments
from fax.aggregators import Aggregator
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._averaging import strong
from fax.algorithms._checks import arguments, check_cohort, check_whole
from fax.algorithms._exchange import ClientResult, Server
from fax.algorithms._federated import federated
from fax.algorithms._local import local_gradient, local_steps
from fax.algorithms._loss import examples_of
from fax.data import Client, Cohort

PyTree = Any


def maml(
    loss: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation,
    *,
    query: str = "query",
    first_order: bool = False,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """Model-agnostic meta-learning (MAML, Per-FedAvg): parameters that adapt well to each client.

    A client's examples are of two kinds: support examples adapt the parameters, and query examples
    evaluate the result. In a round every client i of the cohort starts from the server's
    parameters x, takes a step of its optimizer on the support examples of each of its batches, and
    ends with y_i(x). Its meta-gradient G_i is the gradient of the mean loss q_i of its query
    examples, differentiated through the steps:

        y <- client_optimizer(y, gradient = grad f_i(y; batch))
        G_i = d q_i(y_i(x)) / dx        or, to first order,    G_i = grad q_i(y_i)
        x' = server_optimizer(x, gradient = mean_i G_i)

    The mean counts each client that has query examples once, as in the papers: a client is a task.
    A batch without support examples does not move y. `personalize` adapts x to a client.

    To differentiate through the steps, a client stores their intermediate values. With
    ``jax.checkpoint(loss)`` in place of the loss it stores only the parameters of each step.

    Args:
      loss: see `fedavg`. Its batches contain the feature ``query``.
      client_optimizer: from optax, ``optax.sgd(inner_learning_rate)`` in the papers. Its state is
        reset for each client in each round, and is differentiated through.
      server_optimizer: from optax.
      query: the name of a bool feature of the examples: True for query examples, False for support
        examples.
      first_order: whether to treat the local steps as a constant shift (FOMAML, Per-FedAvg (FO)).
        This needs no second derivatives of the loss.
      aggregator: from `fax.aggregators`, for the updates -G_i. Default: the mean above.
      vectorize: the number of clients that a device works on at once; see `fedavg`.

    Returns:
      The algorithm, with the states of `fedavg`. Metrics are those of the query examples after the
      local steps. The model's state is passed through the local steps, but not differentiated; the
      new one is the mean of the clients' states, weighted by examples.

    Raises:
      ValueError: in a round, if examples have no bool feature ``query``; also as `fedavg`.

    References:
      Finn, Abbeel and Levine, Model-agnostic meta-learning for fast adaptation of deep networks,
      arXiv:1703.03400. Fallah, Mokhtari and Ozdaglar, Personalized federated learning: a
      meta-learning approach, arXiv:2002.07948, with one local update in each round.

    Example:

      >>> import optax
      >>> def loss(params, batch, key):
      ...     return (batch["x"] - params) ** 2 / 2
      >>> algorithm = fax.algorithms.maml(loss, optax.sgd(0.5), optax.sgd(1.0))
      >>> query = jnp.array([False, False, True])
      >>> data = fax.data.InMemory(
      ...     {
      ...         "ann": {"x": jnp.array([1.0, 3.0, 2.0]), "query": query},
      ...         "bob": {"x": jnp.array([4.0, 4.0, 4.0]), "query": query},
      ...     }
      ... )
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=3)
      >>> state = algorithm.init(jnp.zeros(()))
      >>> for _ in range(100):
      ...     state, metrics = jax.jit(algorithm.round)(state, next(rounds))
      >>> print(f"{algorithm.params(state):.2f}")
      3.00
      >>> adapt = fax.algorithms.personalize(loss, optax.sgd(0.5), query="query")
      >>> cohort = next(rounds)
      >>> own = adapt(algorithm.params(state), cohort)
      >>> print(own[jnp.argsort(cohort.positions)].round(2))
      [2.5 3.5]
    """
    name = "fax.algorithms.maml"
    _arguments.text(name, "query", query, "the name of a feature")
    _arguments.flag(name, "first_order", first_order)
    optimizers = {"client_optimizer": client_optimizer, "server_optimizer": server_optimizer}
    arguments(name, loss, **optimizers)

    def client(server: Server, own: None, data: Client) -> ClientResult:
        support, queries = _split(name, data, query)

        def adapted(x: PyTree) -> tuple[PyTree, PyTree]:
            trained = local_steps(loss, client_optimizer, x, support, server.model_state)
            return trained.params, trained.model_state

        def through(y: PyTree) -> tuple[PyTree]:
            return (y,)

        if first_order:
            y, model_state = adapted(server.params)
        else:
            y, through, model_state = jax.vjp(adapted, server.params, has_aux=True)
        gradient, metrics = local_gradient(loss, y, queries, model_state)
        (meta_gradient,) = through(gradient)
        examples = examples_of(metrics)
        weight = (examples > 0).astype(examples.dtype)
        return ClientResult(optax.tree.scale(-1, meta_gradient), metrics, model_state, weight)

    return federated(
        name, loss, client, server_optimizer, aggregator=aggregator, vectorize=vectorize
    )


def personalize(
    loss: Callable,
    client_optimizer: optax.GradientTransformation,
    *,
    query: str | None = None,
    vectorize: int | None = None,
) -> Callable[..., PyTree]:
    """Adapts a model to each client by local steps, for evaluation.

    Args:
      loss: see `fedavg`.
      client_optimizer: from optax; it takes a step on each of a client's batches. After `maml`, use
        the same client optimizer.
      query: the name of a bool feature of the examples; those where it is True are left out.
        Default: all examples are used.
      vectorize: the number of clients that a device works on at once; see `fedavg`.

    Returns:
      ``adapt(params, cohort, model_state=None) -> params``, a pure function. It returns leaves
      [clients, ...] in the order of ``cohort.positions``, which is not that of the data; see the
      example.

    Raises:
      ValueError: when adapting, if examples have no bool feature ``query``, or the loss is not one
        number for each example.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2 / 2
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(3)}, "bob": {"x": jnp.zeros(2)}})
      >>> adapt = fax.algorithms.personalize(loss, optax.sgd(0.5))
      >>> cohort = next(fax.data.cohorts(data, clients=len(data), batch_size=3))
      >>> own = adapt(jnp.zeros(()), cohort)[jnp.argsort(cohort.positions)]
      >>> print(own)  # for evaluate_clients(..., personal=True)
      [0.5 0. ]
    """
    caller = "fax.algorithms.personalize"
    check_whole(caller, loss)
    arguments(caller, loss, None, vectorize, client_optimizer=client_optimizer)
    if query is not None:
        _arguments.text(caller, "query", query, "the name of a feature")

    def local(params: PyTree, model_state: PyTree, data: Client) -> PyTree:
        if query is not None:
            data, _ = _split(caller, data, query)
        return local_steps(loss, client_optimizer, params, data, model_state).params

    def adapt(params: PyTree, cohort: Cohort, model_state: PyTree = None) -> PyTree:
        check_cohort(f"{caller}: adapt", cohort)

        @fax.program(clients=cohort.size)
        def adapted(params: PyTree, model_state: PyTree, cohort: Cohort) -> PyTree:
            return fax.map(
                local,
                fax.broadcast(params),
                fax.broadcast(model_state),
                cohort.clients(),
                vectorize=vectorize or cohort.vectorize,
            )

        params, model_state = jax.tree.map(strong, (params, model_state))
        return adapted(params, model_state, cohort)

    return adapt


def _split(caller: str, client: Client, query: str) -> tuple[Client, Client]:
    """The client with only its support examples, and with only its query examples."""
    batches = client.batches
    if not isinstance(batches, Mapping) or query not in batches:
        found = sorted(batches) if isinstance(batches, Mapping) else type(batches).__name__
        raise ValueError(
            f"{caller}: the examples have no feature {query!r}, but {found}. Expected a bool for "
            "each example, True for a query and False for support. If it has another name, pass "
            "query=."
        )
    asked = batches[query]
    if asked.dtype != bool or asked.shape != client.mask.shape:
        raise ValueError(
            f"{caller}: feature {query!r} is {asked.dtype}{list(asked.shape[2:])} for each "
            "example, expected bool[]: True for a query, False for support."
        )
    return (
        dataclasses.replace(client, mask=client.mask & ~asked),
        dataclasses.replace(client, mask=client.mask & asked),
    )
