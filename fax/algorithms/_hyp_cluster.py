"""Hypothesis-based clustering: several models, of which each client trains the one that fits it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    check_model_state,
    next_model_state,
    server_step,
    strong,
)
from fax.algorithms._checks import arguments, guarded
from fax.algorithms._clients import is_per_client
from fax.algorithms._clients import gather_rows as rows_of
from fax.algorithms._clients import scatter_rows as with_rows
from fax.algorithms._clusters import best_model, check_models, one_model
from fax.algorithms._local_old import Tally, metrics_of, train
from fax.data import Client, Cohort

PyTree = Any


class HypClusterState(NamedTuple):
    """The server's state.

    Attributes:
      params: the clusters' models, leaves [num_clusters, ...].
      optimizer: the states of the server's optimizer, leaves [num_clusters, ...].
      model_state: what the models have besides parameters, leaves [num_clusters, ...], or None.
      aggregator: the state of the aggregator for each cluster, a tuple; of a private one there is
        one state for all; or None.
    """

    params: PyTree
    optimizer: PyTree
    model_state: PyTree
    aggregator: PyTree


class _Sent(NamedTuple):
    """What a client sends: for each cluster an update and a weight, zero but for its own."""

    updates: list[PyTree]
    weights: list[jax.Array]
    model_state: PyTree
    tally: Tally
    choice: jax.Array


def hyp_cluster(
    loss: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    num_clusters: int,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """Federated clustering by hypotheses (HypCluster, IFCA).

    The server has models x_1 ... x_k. In a round each client i of the cohort picks the one with
    the least mean loss over all of its batches, trains it as a client of `fedavg` does, and the
    server averages the updates of each cluster:

        c_i = argmin_j F_i(x_j)        y_i = local steps from x_{c_i}
        D_j = sum_{i: c_i = j} n_i (y_i - x_j) / sum_{i: c_i = j} n_i
        x_j' = server_optimizer(x_j, gradient = -D_j)

    A model that nobody picks stays as it is, and so does its optimizer, unless the aggregator is
    private. With one cluster it is `fedavg`. Models that are alike at the start stay alike, for all
    clients pick the first: see `hyp_cluster_start` for a good start.

    Args:
      loss: see `fedavg`.
      client_optimizer: from optax; its state starts anew at each client and round.
      server_optimizer: from optax, with a state for each cluster. Default: ``optax.sgd(1.0)``.
      num_clusters: k, how many models there are.
      aggregator: as for `fedavg`. It works for one cluster after the other, and is given updates
        and weights that are zero for the clients of other clusters: one that does not go by
        weights, such as a plain median, would count them. A private one is given the updates of
        all clusters as one, that of a client in its own cluster's place: a client changes it by no
        more than its norm, so that a round is one release, whatever clusters clients choose.
        Models that nobody picks move by the noise alone. All divide by the same m, the size of the
        cohort or ``expected_clients``, which makes the step of a cluster as small as its share.
      vectorize: as for `fedavg`.

    Returns:
      The algorithm. ``init(params, model_state=None)`` takes leaves [num_clusters, ...] and makes
      a `HypClusterState`; ``params(state)`` has the same leaves, of which `hyp_cluster_choice` says
      which is whose. Metrics are those of `fedavg`, and ``"clients/cluster"``, int32 [clients], and
      ``"clusters/examples"`` [num_clusters]. Those of an aggregator that are not ``"clients/..."``
      have a leading axis [num_clusters], but for a private one, of which ``"clients/bits"`` counts
      the places of all clusters. How many clients picked which is a metric, and as all metrics not
      private.

    Raises:
      ValueError: if ``num_clusters`` is not a positive int, and in ``init`` if a leaf has no row
        for each cluster or all clusters have the same model.

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
      >>> algorithm.params(state).round(2)
      Array([-1.,  1.], dtype=float32)
    """
    caller = "fax.algorithms.hyp_cluster"
    k = _arguments.count(caller, "num_clusters", num_clusters)
    server_optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer
    aggregator = arguments(
        caller,
        loss,
        aggregator,
        vectorize,
        client_optimizer=client_optimizer,
        server_optimizer=server_optimizer,
    )
    private = aggregator is not None and aggregator.private

    def init(params: PyTree, model_state: PyTree = None) -> HypClusterState:
        check_models(params, model_state, k)
        check_model_state("hyp_cluster", aggregator, model_state)
        params, model_state = jax.tree.map(strong, (params, model_state))
        own = None
        if aggregator is not None:
            models = [one_model(params, j) for j in range(k)]
            own = aggregator.init(models) if private else tuple(map(aggregator.init, models))
        return HypClusterState(params, jax.vmap(server_optimizer.init)(params), model_state, own)

    def local(params: PyTree, model_state: PyTree, client: Client) -> _Sent:
        choice = best_model(loss, params, model_state, client)
        before = one_model(params, choice)
        trained = train(loss, client_optimizer, before, one_model(model_state, choice), client)
        update = jax.tree.map(jnp.subtract, trained.params, before)
        mine = [choice == j for j in range(k)]
        updates = [_where(own, update, jax.tree.map(jnp.zeros_like, update)) for own in mine]
        # Floats, so that they are added up over devices together with the rest.
        count = client.num_examples.astype(trained.tally.examples.dtype)
        weights = [jnp.where(own, count, 0) for own in mine]
        return _Sent(updates, weights, trained.model_state, trained.tally, choice)

    def round(
        state: HypClusterState, cohort: Cohort
    ) -> tuple[HypClusterState, dict[str, jax.Array]]:
        @fax.program(clients=cohort.size)
        def work(params: PyTree, model_state: PyTree, own: PyTree, cohort: Cohort) -> tuple:
            sent = fax.map(
                jax.checkpoint(local),
                fax.broadcast(params),
                fax.broadcast(model_state),
                cohort.clients(),
                vectorize=vectorize or cohort.vectorize,
            )
            if private:
                update, after, more = aggregate(aggregator, sent.updates, own, cohort)
            else:
                update, after, each = zip(
                    *(
                        aggregate(aggregator, updates, own and own[j], cohort, weights, j)
                        for j, (updates, weights) in enumerate(zip(sent.updates, sent.weights))
                    )
                )
                more = _of_clusters(each, sent.choice)
            mean_state = [
                fax.mean(sent.model_state, weights=weights, where=sent.choice == j)
                for j, weights in enumerate(sent.weights)
            ]
            examples = jnp.stack(fax.sum(sent.weights))
            metrics = {**metrics_of(sent.tally), **more}
            return _stack(update), _stack(mean_state), after, examples, sent.choice, metrics

        before = rows_of(state.aggregator, cohort)
        update, mean_state, own, examples, choice, metrics = work(
            state.params, state.model_state, before, cohort
        )
        params, optimizer = jax.vmap(lambda *args: server_step(server_optimizer, *args))(
            update, state.optimizer, state.params
        )
        found = examples > 0
        after = own if private else None
        if aggregator is not None and not private:
            after = tuple(
                _of_members(choice == j, found[j], *pair) for j, pair in enumerate(zip(own, before))
            )
        if not private:
            params = _where(found, params, state.params)
            optimizer = _where(found, optimizer, state.optimizer)
        new = HypClusterState(
            params,
            optimizer,
            _where(found, next_model_state(mean_state, state.model_state), state.model_state),
            with_rows(state.aggregator, after, cohort),
        )
        return new, {**metrics, "clients/cluster": choice, "clusters/examples": examples}

    return Algorithm(
        *guarded(caller, loss, HypClusterState, init, round, lambda state: state.params)
    )


def _stack(models: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *x: jnp.stack(x), *models)


def _where(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Chooses along leading axes, those of the condition."""

    def one(new, old):
        shape = condition.shape + (1,) * (jnp.ndim(new) - condition.ndim)
        return jnp.where(condition.reshape(shape), new, old)

    return jax.tree.map(one, new, old)


def _of_members(mine: jax.Array, found: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """The state of a cluster's aggregator, as it was for clients of others."""

    def one(old, new):
        return _where(mine if isinstance(old, PerClient) else found, new, old)

    return jax.tree.map(one, old, new, is_leaf=is_per_client)


def _of_clusters(metrics: Sequence[dict], choice: jax.Array) -> dict[str, jax.Array]:
    """What aggregators say, each client's from its own cluster's."""
    together = {}
    for name in metrics[0]:
        values = [own[name] for own in metrics]
        together[name] = jnp.stack(values)
        if name.startswith("clients/"):
            together[name] = values[0]
            for j, own in enumerate(values):
                together[name] = jnp.where(choice == j, own, together[name])
    return together
