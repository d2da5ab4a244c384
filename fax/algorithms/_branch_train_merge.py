"""Branch-Train-Merge: experts train on separate domains, and are then merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fax
from fax import _arguments, _functions
from fax.aggregators import PerClient
from fax.algorithms._averaging import next_model_state
from fax.algorithms._checks import arguments, check_state, guarded
from fax.algorithms._loss import told_of_padding
from fax.algorithms._replicas import Replica, inner_steps, models, population, soup
from fax.algorithms._round_parts import Part, rounds

PyTree = Any
_WHERE = "fax.algorithms.branch_train_merge"


class BranchTrainMergeState(NamedTuple):
    """The state of `branch_train_merge`: the experts and the prior of their domains.

    Attributes:
      replicas: a `PerClient` of what the experts keep, leaves [replicas, ...].
      prior: p(D = j), the prior probability of each expert's domain, [replicas]. It starts uniform.
        Set another with ``state._replace(prior=...)``.
    """

    replicas: PerClient
    prior: jax.Array


class BranchTrainMerge(NamedTuple):
    """Branch-Train-Merge as pure functions: those of an `Algorithm` and more.

    Attributes:
      init: ``init(params, model_state=None) -> state``. All experts branch from ``params``, or
        each from a row of ``fax.aggregators.PerClient(rows)``.
      round: ``round(state, cohort) -> (state, metrics)``. Expert i trains on row i, and sends
        nothing.
      params: ``params(state)``, the merged model: the experts' mean, weighted by the prior.
      models: ``models(state)``, the parameters of the experts, leaves [replicas, ...].
      branch: ``branch(state, weights) -> state``. With weights [replicas], all experts restart from
        that mixture of experts; with weights [replicas, replicas], expert i restarts from the
        mixture of row i. Weights are divided by their sums. Optimizer states are reset.
      posterior: ``posterior(state, batch, key) -> p(D = j | example)``, [batch, replicas]. The
        losses must be the negative log-likelihoods, in nats, of what is known of the examples, such
        as the text so far.
      ensemble: ``ensemble(state, apply, inputs, weights=None) -> log-probabilities`` of the mixture
        of the experts' predictions. ``apply(params, inputs)``, or for models with state
        ``apply(params, model_state, inputs)``, returns scores [batch, ..., classes]. Weights are
        [replicas] or [batch, replicas], such as posteriors. Default: the prior.
    """

    init: Callable[..., BranchTrainMergeState]
    round: Callable[..., tuple[BranchTrainMergeState, dict[str, jax.Array]]]
    params: Callable[[BranchTrainMergeState], PyTree]
    models: Callable[[BranchTrainMergeState], PyTree]
    branch: Callable[..., BranchTrainMergeState]
    posterior: Callable[..., jax.Array]
    ensemble: Callable[..., jax.Array]

    def __repr__(self) -> str:
        return "BranchTrainMerge(branch_train_merge)"


def branch_train_merge(
    loss: Callable,
    inner_optimizer: optax.GradientTransformation,
    *,
    replicas: int,
    vectorize: int | None = None,
) -> BranchTrainMerge:
    """Branch-Train-Merge: experts branch, train without communication, and are merged.

    Experts j branch from a model, or a mixture of experts, and each trains on its own domain D_j.
    Then either their parameters are averaged, θ = sum_j w_j θ_j, or their predictions:

        p(y | x) = sum_j p(y | x, θ_j) p(D = j | x),
        p(D = j | x) = p(x | D = j) p(D = j) / sum_k p(x | D = k) p(D = k)

    where p(x | D = j) is the probability that expert j assigns to the text x so far, and p(D = j)
    is a prior: uniform, or the mean of the posteriors of earlier texts.

    Args:
      loss: see `fax.algorithms.fedavg`.
      inner_optimizer: from optax, for the experts.
      replicas: the number of experts. Expert i is row i of the cohort; see `diloco`.
      vectorize: the number of experts that a device works on at once; see `diloco`.

    Returns:
      The algorithm, a `BranchTrainMerge`. Metrics are those of `diloco`, with zero bits.

    Raises:
      ValueError: if ``replicas`` is not a positive int, the cohort has another number of rows, or
        weights have the wrong shape.

    References:
      Li et al., Branch-Train-Merge: Embarrassingly parallel training of expert language models,
      arXiv:2208.03306. Gururangan et al., DEMix layers, arXiv:2108.05036, for the posterior.

    Example:

      >>> import optax
      >>> def apply(params, x):
      ...     return x[:, None] * params
      >>> def loss(params, batch, key):
      ...     logits = apply(params, batch["x"])
      ...     return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
      >>> forest = fax.algorithms.branch_train_merge(loss, optax.sgd(1.0), replicas=2)
      >>> one, zero = jnp.ones(9, int), jnp.zeros(9, int)
      >>> domains = {"a": {"x": jnp.ones(9), "y": one}, "b": {"x": jnp.ones(9), "y": zero}}
      >>> rounds = fax.data.cohorts(
      ...     fax.data.InMemory(domains), 2, batch_size=3, sampler="stream", max_steps=4,
      ...     placement="replicas",
      ... )
      >>> state, metrics = forest.round(forest.init(jnp.zeros(2)), next(rounds))
      >>> bool(jnp.abs(forest.params(state)).max() < 1e-6)  # they have learned the opposite
      True
      >>> seen = {"x": jnp.ones(1), "y": jnp.ones(1, int)}
      >>> weights = forest.posterior(state, seen, jax.random.key(0))
      >>> bool(weights[0, 0] > 0.8)
      True
      >>> jnp.exp(forest.ensemble(state, apply, seen["x"], weights)).argmax()
      Array(1, dtype=int32)
    """
    replicas = _arguments.count(_WHERE, "replicas", replicas)
    arguments(_WHERE, loss, None, vectorize, inner_optimizer=inner_optimizer)
    program = fax.program(replicas=replicas)

    def init(params: PyTree, model_state: PyTree = None) -> BranchTrainMergeState:
        rows = population(_WHERE, params, inner_optimizer, model_state, replicas)
        return BranchTrainMergeState(rows, jnp.full(replicas, 1 / replicas))

    def part(state: BranchTrainMergeState, part: Part) -> tuple:
        state, metrics = inner_steps(
            loss, inner_optimizer, state, part.batches, part.first, vectorize
        )
        return state, (metrics, None, {"replicas/bits": jnp.zeros(replicas, jnp.float32)})

    def branch(state: BranchTrainMergeState, weights: jax.Array) -> BranchTrainMergeState:
        check_state(_WHERE, "branch", BranchTrainMergeState, state)
        weights = jnp.asarray(weights)
        if weights.shape not in ((replicas,), (replicas, replicas)):
            raise _weights_error("branch", weights, f"({replicas},) or ({replicas}, {replicas})")
        shares = weights / weights.sum(-1, keepdims=True)

        def one(params: PyTree, model_state: PyTree, own: PyTree) -> Replica:
            return Replica(params, inner_optimizer.init(params), next_model_state(model_state, own))

        @program
        def start(rows: Replica, shares: jax.Array) -> Replica:
            models = rows.params, rows.model_state
            if shares.ndim == 1:
                sent = fax.broadcast(fax.mean(models, weights=shares))
            else:  # each from its own mixture, for which the server needs all experts
                sent = fax.distribute(
                    jax.tree.map(
                        lambda x: jnp.tensordot(shares, x, 1).astype(x.dtype), fax.collect(models)
                    )
                )
            return fax.map(one, *sent, rows.model_state)

        return state._replace(replicas=PerClient(start(state.replicas.rows, shares)))

    def posterior(state: BranchTrainMergeState, batch: PyTree, key: jax.Array) -> jax.Array:
        check_state(_WHERE, "posterior", BranchTrainMergeState, state)
        _arguments.key(_WHERE, "key", key)

        @program
        def likelihoods(rows: Replica, batch: PyTree, key: jax.Array) -> jax.Array:
            def own(expert: Replica, batch: PyTree, key: jax.Array) -> jax.Array:
                inputs = () if expert.model_state is None else (expert.model_state,)
                real = jnp.ones(len(jax.tree.leaves(batch)[0]), bool)
                out = told_of_padding(loss, real)(expert.params, *inputs, batch, key)
                return -(out[0] if isinstance(out, tuple) else out)

            return fax.collect(fax.map(own, rows, fax.broadcast(batch), fax.broadcast(key)))

        logs = likelihoods(state.replicas.rows, batch, key).T
        return jax.nn.softmax(logs + jnp.log(state.prior), axis=-1)

    def ensemble(
        state: BranchTrainMergeState,
        apply: Callable,
        inputs: PyTree,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        check_state(_WHERE, "ensemble", BranchTrainMergeState, state)
        forms = {2: "apply(params, inputs)", 3: "apply(params, model_state, inputs)"}
        _functions.function(_WHERE, "apply", apply, forms)
        weights = state.prior if weights is None else jnp.asarray(weights)
        if weights.ndim not in (1, 2) or weights.shape[-1] != replicas:
            raise _weights_error("ensemble", weights, f"({replicas},) or (batch, {replicas})")

        @program
        def mixture(rows: Replica, inputs: PyTree, weights: jax.Array) -> jax.Array:
            def own(expert: Replica, inputs: PyTree, weights: jax.Array) -> jax.Array:
                state = () if expert.model_state is None else (expert.model_state,)
                chances = jax.nn.softmax(apply(expert.params, *state, inputs))
                return chances * weights.reshape(-1, *[1] * (chances.ndim - 1))

            shares = fax.distribute(weights / weights.sum(0))
            return fax.sum(fax.map(own, rows, fax.broadcast(inputs), shares))

        return jnp.log(mixture(state.replicas.rows, inputs, weights.T))

    def params(state: BranchTrainMergeState) -> PyTree:
        return soup(state.replicas.rows.params, replicas, state.prior)

    def start(params: PyTree, model_state: PyTree, own: None) -> BranchTrainMergeState:
        return init(params, model_state)

    round = rounds(_WHERE, start, replicas, None, part, keyed=False)
    checked = guarded(_WHERE, loss, BranchTrainMergeState, init, round, params, models)
    return BranchTrainMerge(
        checked.init, checked.round, checked.params, models, branch, posterior, ensemble
    )


def _weights_error(name: str, weights: jax.Array, expected: str) -> ValueError:
    return ValueError(
        f"{_WHERE}: {name} got weights of shape {weights.shape}, expected {expected}: one weight "
        "for each expert."
    )
