"""Hypothesis-based clustering: each client trains the one of several models that fits it best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fax
from fax import _arguments, _keys
from fax.aggregators import Aggregator, PerClient
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._averaging import mean_state
from fax.algorithms._checks import arguments, check_trained, check_whole
from fax.algorithms._clients import is_per_client
from fax.algorithms._clusters import best_model, check_models, one_model
from fax.algorithms._exchange import ClientResult, Received, Server, State
from fax.algorithms._federated import federated
from fax.algorithms._local import local_steps
from fax.algorithms._loss import examples_of
from fax.data import Client

PyTree = Any


def hyp_cluster(
    loss: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    num_clusters: int,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """Federated clustering (HypCluster, IFCA): several models, one for each kind of client.

    The server has models x_1 ... x_k. In a round each client i of the cohort picks the one with
    the least mean loss over all of its batches, and trains it as a client of `fedavg` does. The
    server averages the updates of each cluster:

        c_i = argmin_j F_i(x_j)        y_i = local steps from x_{c_i}
        D_j = sum_{i: c_i = j} n_i (y_i - x_j) / sum_{i: c_i = j} n_i
        x_j' = server_optimizer(x_j, gradient = -D_j)

    A model that no client picks does not change, nor does its optimizer, unless the aggregator is
    private. With one cluster it is `fedavg`. Models must differ at the start, otherwise all clients
    pick the first; `hyp_cluster_start` makes good ones.

    Args:
      loss: see `fedavg`.
      client_optimizer: from optax. Its state is reset for each client in each round.
      server_optimizer: from optax, with a state for each cluster. Default: ``optax.sgd(1.0)``.
      num_clusters: k, the number of models.
      aggregator: as for `fedavg`. It aggregates each cluster separately. The updates and weights of
        clients in other clusters are zero; an aggregator that ignores weights, such as a plain
        median, would count them. A private one gets the updates of all clusters as one update, in
        which only the part of the client's own cluster is not zero. A client changes it by no more
        than its norm, so a round is one release, whichever clusters clients pick. Models that no
        client picks move by the noise alone. All are divided by the same m, the size of the cohort
        or ``expected_clients``, so the step of a cluster is proportional to its share of clients.
      vectorize: as for `fedavg`.

    Returns:
      The algorithm. ``init(params, model_state=None)`` takes leaves [num_clusters, ...] and makes
      its `State`, whose ``optimizer`` and ``model_state`` have such leaves, too; ``aggregator`` is
      a tuple with a state for each cluster, or a single state if it is private. ``models(state)``
      are the clusters' models; `hyp_cluster_choice` says which of them fits a client.
      ``params(state)`` is their mean, for clients that cannot choose. Metrics are those of
      `fedavg`; ``"clients/cluster"``, int32 [clients]; and ``"clusters/examples"``, [num_clusters].
      Metrics of the aggregator other than ``"clients/..."`` have a leading axis [num_clusters]. If
      it is private, they do not, and ``"clients/bits"`` counts the parts of all clusters. Metrics
      are not private, including how many clients picked which cluster.

    Raises:
      ValueError: if ``num_clusters`` is not a positive int; in ``init``, if a leaf does not have a
        row for each cluster, or all clusters have the same model.

    References:
      Mansour et al., Three approaches for personalization with applications to federated learning,
      arXiv:2002.10619. Ghosh et al., An efficient framework for clustered federated learning,
      arXiv:2006.04088.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2
      >>> data = fax.data.InMemory({str(i): {"x": jnp.full(2 + i, (-1) ** i)} for i in range(3)})
      >>> rounds = fax.data.cohorts(data, clients=3, batch_size=3)
      >>> algorithm = fax.algorithms.hyp_cluster(loss, optax.sgd(0.1), num_clusters=2)
      >>> state = algorithm.init(jnp.array([-0.1, 0.1]))
      >>> for _ in range(40):
      ...     state, metrics = jax.jit(algorithm.round)(state, next(rounds))
      >>> algorithm.models(state).round(2)
      Array([-1.,  1.], dtype=float32)
    """
    name = "fax.algorithms.hyp_cluster"
    check_whole(name, loss)
    k = _arguments.count(name, "num_clusters", num_clusters)
    server_optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer
    optimizers = {"client_optimizer": client_optimizer, "server_optimizer": server_optimizer}
    aggregator = arguments(name, loss, aggregator, **optimizers)
    private = aggregator is not None and aggregator.private
    of_each = optax.GradientTransformation(
        jax.vmap(server_optimizer.init),
        lambda gradient, state, params: jax.vmap(server_optimizer.update)(gradient, state, params),
    )

    def client(server: Server, own: None, data: Client) -> ClientResult:
        choice = best_model(loss, server.params, server.model_state, data)
        before, model_state = one_model((server.params, server.model_state), choice)
        trained = local_steps(loss, client_optimizer, before, data, model_state)
        update = optax.tree.sub(trained.params, before)
        mine = [choice == j for j in range(k)]
        updates = [_where(own, update, optax.tree.zeros_like(update)) for own in mine]
        # Floats, so that they are summed over devices together with the rest.
        count = data.num_examples.astype(examples_of(trained.metrics).dtype)
        weights = [jnp.where(own, count, 0) for own in mine]
        return ClientResult(
            updates,
            {**trained.metrics, "cluster": choice},
            weight=_Weight(data.num_examples, choice, weights),
            extra=None if private else trained.model_state,
        )

    def server(state: State, received: Received, step: Callable) -> tuple[State, dict]:
        results = received.results
        after = step(_stack(received.update))
        examples = jnp.stack(fax.sum(results.weight.of_clusters))
        if not private:
            found = examples > 0
            means = [
                mean_state(
                    results.extra,
                    one_model(state.model_state, j),
                    weights,
                    (results.weight.choice == j) & received.finite,
                )
                for j, weights in enumerate(results.weight.of_clusters)
            ]
            new = after.params, after.optimizer
            params, optimizer = _where(found, new, (state.params, state.optimizer))
            after = after._replace(params=params, optimizer=optimizer, model_state=_stack(means))
        return after, {"clusters/examples": examples}

    algorithm = federated(
        name,
        loss,
        client,
        of_each,
        server=server,
        models=lambda state: state.params,
        params=lambda state: jax.tree.map(lambda x: jnp.mean(x, 0, dtype=x.dtype), state.params),
        aggregator=_of_clusters(aggregator, k),
        vectorize=vectorize,
    )

    def init(params: PyTree, model_state: PyTree = None) -> State:
        check_trained(f"{name}: init: params", params)
        check_models(f"{name}: init", params, model_state, k)
        return algorithm.init(params, model_state)

    return algorithm._replace(init=init)


class _Weight(NamedTuple):
    """The weights of a client's updates.

    Attributes:
      of_all: the number of examples.
      choice: the index of the client's cluster.
      of_clusters: for each cluster the number of examples, zero except for the client's own.
    """

    of_all: jax.Array
    choice: jax.Array
    of_clusters: list[jax.Array]


def _of_clusters(aggregator: Aggregator | None, k: int) -> Aggregator:
    """Aggregates a list of updates, one for each cluster: separately, or as one if private."""
    private = aggregator is not None and aggregator.private

    def init(params: PyTree) -> PyTree:
        models = [one_model(params, j) for j in range(k)]
        if aggregator is None:
            return None
        return aggregator.init(models) if private else tuple(map(aggregator.init, models))

    def aggregate(updates: list, weight: _Weight, state: PyTree, key: jax.Array) -> tuple:
        if aggregator is None:
            means = [
                fax.mean(own, weights=weights) for own, weights in zip(updates, weight.of_clusters)
            ]
            return means, None, {}
        if private:
            return aggregator.aggregate(updates, weight.of_all, state, key)
        made = [
            aggregator.aggregate(*own, _keys.derive(key, _keys.Use.CLUSTER, j))
            for j, own in enumerate(zip(updates, weight.of_clusters, state))
        ]
        update, after, metrics = zip(*made)
        after = tuple(
            _of_members(weight.choice == j, fax.sum(weight.of_clusters[j]) > 0, new, old)
            for j, (new, old) in enumerate(zip(after, state))
        )
        return list(update), after, _metrics_of_clusters(metrics, weight.choice)

    return Aggregator(init, aggregate, private=private)


def _stack(models: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *x: jnp.stack(x), *models)


def _where(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`jnp.where` along the leading axes, those of the condition."""

    def one(new, old):
        shape = condition.shape + (1,) * (jnp.ndim(new) - condition.ndim)
        return jnp.where(condition.reshape(shape), new, old)

    return jax.tree.map(one, new, old)


def _of_members(mine: jax.Array, found: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """The state of a cluster's aggregator, unchanged for clients of other clusters."""

    def one(old, new):
        return _where(mine if isinstance(old, PerClient) else found, new, old)

    return jax.tree.map(one, old, new, is_leaf=is_per_client)


def _metrics_of_clusters(metrics: Sequence[dict], choice: jax.Array) -> dict[str, jax.Array]:
    """The metrics of the clusters' aggregators, for each client those of its own cluster."""
    together = {}
    for name in metrics[0]:
        values = [own[name] for own in metrics]
        together[name] = jnp.stack(values)
        if name.startswith("clients/"):
            together[name] = values[0]
            for j, own in enumerate(values):
                together[name] = jnp.where(choice == j, own, together[name])
    return together
