"""Clusters of clients: which model fits a client best, and which models to start from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.tree_util import keystr, tree_leaves_with_path

import fax
from fax import _arguments, _keys
from fax.algorithms._averaging import strong
from fax.algorithms._checks import arguments, check_cohort, check_trained, check_whole
from fax.algorithms._local import local_steps
from fax.algorithms._loss import batch_loss, examples_of, no_metrics
from fax.data import Client, Cohort
from fax.metrics import Mean

PyTree = Any


def hyp_cluster_choice(
    loss: Callable,
    params: PyTree,
    cohort: Cohort,
    model_state: PyTree = None,
    *,
    vectorize: int | None = None,
) -> jax.Array:
    """Chooses for each client the `hyp_cluster` model with the least mean loss on its batches.

    To evaluate the chosen models, take a cohort of all clients, sort the choices into the order of
    the data, and pass ``jax.tree.map(lambda x: x[choice], params)`` to
    `fax.metrics.evaluate_clients` with ``personal=True``. The examples used for the choice can
    differ from those used for evaluation.

    Args:
      loss: see `fedavg`.
      params: ``models(state)`` of `hyp_cluster`, leaves [num_clusters, ...].
      cohort: the clients.
      model_state: the models' states, leaves [num_clusters, ...], if they have any.
      vectorize: as for `fedavg`.

    Returns:
      The index of each client's cluster, int32 [clients], in the order of the cohort. A model whose
      loss is NaN is not chosen.

    Raises:
      ValueError: if a leaf has no leading axis of clusters.

    Example:

      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(3)}, "bob": {"x": jnp.zeros(3)}})
      >>> cohort = next(fax.data.cohorts(data, clients=2, batch_size=3))
      >>> params = jnp.array([0.1, 0.8])
      >>> chosen = fax.algorithms.hyp_cluster_choice(loss, params, cohort)
      >>> in_order = jnp.zeros(2, int).at[cohort.positions].set(chosen)
      >>> params[in_order]  # one model for each client, in the order of the data
      Array([0.8, 0.1], dtype=float32)
    """
    caller = "fax.algorithms.hyp_cluster_choice"
    check_whole(caller, loss)
    arguments(caller, loss, None, vectorize)
    check_cohort(caller, cohort)
    check_models(caller, params, model_state, None)

    @fax.program(clients=cohort.size)
    def choose(params: PyTree, model_state: PyTree, cohort: Cohort) -> jax.Array:
        return fax.map(
            lambda *args: best_model(loss, *args),
            fax.broadcast(params),
            fax.broadcast(model_state),
            cohort.clients(),
            vectorize=vectorize or cohort.vectorize,
        )

    return choose(params, model_state, cohort)


def hyp_cluster_start(
    loss: Callable,
    client_optimizer: optax.GradientTransformation,
    params: PyTree,
    cohort: Cohort,
    key: jax.Array,
    model_state: PyTree = None,
    *,
    num_clusters: int,
    vectorize: int | None = None,
) -> tuple[PyTree, PyTree]:
    """Makes diverse models for `hyp_cluster` to start from, by k-means++ on clients' models.

    A random client of the cohort trains ``params`` into the first model. For each further model,
    fax takes the client whose loss under the best of the models so far is largest, and lets it
    train ``params``. No client is taken twice, and one whose loss is NaN only if no other is left.

    Args:
      loss: see `fedavg`.
      client_optimizer: from optax.
      params: the parameters of one model, from which all clients start.
      cohort: the clients to choose from.
      key: a random key.
      model_state: the state of that model, if it has one.
      num_clusters: the number of models to make.
      vectorize: as for `fedavg`.

    Returns:
      The parameters and the model state, or None, with leaves [num_clusters, ...], for ``init``.

    Raises:
      ValueError: if the cohort has fewer than ``num_clusters`` clients.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2
      >>> data = fax.data.InMemory({str(i): {"x": jnp.full(3, i % 2)} for i in range(6)})
      >>> cohort = next(fax.data.cohorts(data, clients=6, batch_size=3, epochs=50))
      >>> params, _ = fax.algorithms.hyp_cluster_start(
      ...     loss, optax.sgd(0.1), jnp.array(0.5), cohort, jax.random.key(0), num_clusters=2
      ... )
      >>> jnp.sort(params).round(2)
      Array([0., 1.], dtype=float32)
    """
    caller = "fax.algorithms.hyp_cluster_start"
    check_whole(caller, loss)
    arguments(caller, loss, None, vectorize, client_optimizer=client_optimizer)
    check_trained(f"{caller}: params", params)
    check_cohort(caller, cohort)
    _arguments.key(caller, "key", key)
    k = _arguments.count(caller, "num_clusters", num_clusters)
    if k > cohort.size:
        raise ValueError(
            f"{caller}: num_clusters={k}, but the cohort has {cohort.size} clients, "
            "and each makes one model. Pass a larger cohort."
        )

    @fax.program(clients=cohort.size)
    def start(params: PyTree, model_state: PyTree, cohort: Cohort, first: jax.Array) -> PyTree:
        def of_chosen(params, model_state, chosen, client, number):
            def make(_):
                trained = local_steps(loss, client_optimizer, params, client, model_state)
                return trained.params, trained.model_state

            nothing = optax.tree.zeros_like(jax.eval_shape(make, None))
            return lax.cond(number == chosen, make, lambda _: nothing, None)

        def mean(params, model_state, client):
            params, model_state = jax.tree.map(lambda x: x[None], (params, model_state))
            return _mean_losses(loss, params, model_state, client)[0]

        def step(carry, _):
            chosen, best, taken = carry
            at_once = vectorize or cohort.vectorize
            sent = fax.broadcast((params, model_state, chosen))
            made = fax.map(of_chosen, *sent, cohort.clients(), fax.index(), vectorize=at_once)
            one = jax.tree.map(
                lambda x, like: x.astype(like.dtype), fax.sum(made), (params, model_state)
            )
            losses = fax.map(mean, *fax.broadcast(one), cohort.clients(), vectorize=at_once)
            best = jnp.minimum(best, fax.collect(losses).astype(best.dtype))
            taken = taken.at[chosen].set(True)
            known = jnp.where(jnp.isnan(best), jnp.finfo(best.dtype).min, best)
            worst = jnp.argmax(jnp.where(taken, -jnp.inf, known))
            return (worst.astype(chosen.dtype), best, taken), one

        carry = (first, jnp.full(cohort.size, jnp.inf), jnp.zeros(cohort.size, bool))
        return lax.scan(step, carry, length=k)[1]

    first = jax.random.randint(_keys.derive(key, _keys.Use.START), (), 0, cohort.size, jnp.int32)
    params, model_state = jax.tree.map(strong, (params, model_state))
    return start(params, model_state, cohort, first)


def _mean_losses(loss: Callable, params: PyTree, model_state: PyTree, client: Client) -> jax.Array:
    """The mean loss of each cluster's model over all batches of a client, [num_clusters]."""

    def step(total, batch, mask, key):
        def one(model):
            params, model_state = model
            return batch_loss(loss, params, batch, mask, key, model_state)[1][0]["loss"]

        # One after the other, so that only one model's activations are in memory.
        return optax.tree.add(total, lax.map(one, lax.stop_gradient((params, model_state))))

    first, first_state = one_model((params, model_state), 0)
    dtype = examples_of(no_metrics(loss, first, client, first_state)).dtype
    nothing = jnp.zeros(len(jax.tree.leaves(params)[0]), dtype)
    total = client.scan(step, Mean(nothing, nothing))
    return total.total / jnp.maximum(total.weight, 1)


def best_model(loss: Callable, params: PyTree, model_state: PyTree, client: Client) -> jax.Array:
    losses = _mean_losses(loss, params, model_state, client)
    return jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses)).astype(jnp.int32)


def one_model(models: PyTree, j: Any) -> PyTree:
    """One of several models."""
    return jax.tree.map(lambda x: x[j], models)


def check_models(where: str, params: PyTree, model_state: PyTree, k: int | None) -> None:
    """Checks that there is a model for each cluster, and that they are not all the same."""
    for name, tree in (("params", params), ("model_state", model_state)):
        for path, leaf in tree_leaves_with_path(tree):
            shape = jnp.shape(leaf)
            k = shape[0] if k is None and shape else k
            if not shape or shape[0] != k:
                raise ValueError(
                    f"{where}: {name}{keystr(path)} has shape {shape}, expected a leading axis "
                    f"of {k or 'the'} clusters. fax.algorithms.hyp_cluster_start makes different "
                    "models from one."
                )
    leaves = jax.tree.leaves(params)
    if (
        k
        and k > 1
        and _arguments.concrete(leaves)
        and all(np.all(x == x[:1]) for x in map(np.asarray, leaves))
    ):
        raise ValueError(
            f"{where}: all {k} clusters have the same params, so every client would choose "
            "the first. fax.algorithms.hyp_cluster_start makes different models from one."
        )
