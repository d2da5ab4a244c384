"""PAPA: a population of models that are pushed toward their average, and averaged at the end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fax
from fax import _arguments, _functions, _keys
from fax.aggregators import Aggregator, PerClient
from fax.aggregators._aggregator import all_bits
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._averaging import averaged, next_model_state, strong
from fax.algorithms._checks import arguments, check_private, guarded, warn_of_copies
from fax.algorithms._replicas import (
    Replica,
    inner_steps,
    mean_of_states,
    mean_update,
    mixed,
    models,
    population,
    pushed,
    sent_metrics,
    soup,
    taking_part,
    types_of_row,
)
from fax.algorithms._round_parts import Part, rounds

PyTree = Any


class PAPAState(NamedTuple):
    """The state of `papa`, `papa_all` and `papa_2`.

    Attributes:
      replicas: a `PerClient` of what the replicas keep, leaves [replicas, ...].
      model_state: the mean of what the models have besides parameters, for the soup, or None.
      aggregator: the state of the aggregator, or None.
      averages: how often the models were averaged, int32.
    """

    replicas: PerClient
    model_state: PyTree
    aggregator: PyTree
    averages: jax.Array


def papa(
    loss: Callable,
    inner_optimizer: optax.GradientTransformation,
    *,
    replicas: int,
    alpha: Any = 0.99,
    steps: int | None = 10,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """PAPA, population parameter averaging: models are slowly pushed toward their average.

    Each model i of a population trains separately, and after every ``steps`` steps

        w_i' = α w_i + (1 - α) mean_j w_j

    At the end only their average, a model soup, is kept. The push is slow enough for the models to
    stay diverse, and keeps them close enough for their average to be good.

    Model i trains on row i of the cohort; see `diloco`. In the paper all models see the same data,
    each with its own order and augmentation, so all rows have the same examples. A model without
    examples between two averages, or whose ``num_examples`` is 0, does not count in the mean and
    is not pushed. What is not finite in w_i is replaced by the mean, which the aggregator
    `fax.aggregators.non_finite` keeps finite.

    Args:
      loss: see `fax.algorithms.fedavg`.
      inner_optimizer: from optax, for the models. Its states are never averaged.
      replicas: the number of models.
      alpha: α, from 0 to 1, or a schedule, a function of the number of averages so far. The
        paper's .99 is for training from scratch; .9995 is for fine-tuning. If the learning rate
        decays, the authors' code scales 1 - α with it:
        ``lambda averages: 1 - 0.01 * rate(steps * (averages + 1)) / peak``, with the inner
        optimizer's schedule ``rate`` and its largest rate ``peak``.
      steps: a divisor of the number of batches in a cohort. None: all of them.
      aggregator: from `fax.aggregators`; it averages the w_i. Default: the plain mean. It cannot be
        private, because the soup is the plain mean in any case.
      vectorize: the number of models that a device works on at once; see `diloco`.

    Returns:
      The algorithm. ``init(params, model_state=None)`` makes its `PAPAState`, of models that start
      equal. With ``fax.aggregators.PerClient(rows)``, leaves [replicas, ...], each starts from its
      own row, as in the paper. ``params`` is the soup mean_i w_i. Metrics are those of `diloco`.

    Raises:
      ValueError: if an argument is out of range; when a round is traced, if the cohort has another
        number of replicas, or a number of batches that ``steps`` does not divide.

    References:
      Jolicoeur-Martineau et al., PopulAtion Parameter Averaging (PAPA), arXiv:2304.03094.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2
      >>> algorithm = fax.algorithms.papa(loss, optax.adam(0.01), replicas=2)
      >>> data = fax.data.InMemory({"model 0": {"x": jnp.ones(9)}, "model 1": {"x": jnp.zeros(9)}})
      >>> rounds = fax.data.cohorts(
      ...     data, 2, batch_size=3, sampler="stream", max_steps=20, placement="replicas"
      ... )
      >>> state = algorithm.init(fax.aggregators.PerClient(jnp.array([0.3, 0.7])))
      >>> state, metrics = jax.jit(algorithm.round)(state, next(rounds))
      >>> algorithm.params(state).shape, state.averages
      ((), Array(2, dtype=int32))
    """
    where = "fax.algorithms.papa"
    if callable(alpha):
        _functions.function(where, "alpha", alpha, {1: "alpha(averages)"})
    else:
        _arguments.number(where, "alpha", alpha, least=0, most=1)
    aggregator = arguments(where, loss, aggregator, vectorize, inner_optimizer=inner_optimizer)

    def push(state: PAPAState, here: jax.Array, key: jax.Array | None) -> tuple:
        rows = state.replicas.rows
        mean, _, own, metrics = mean_update(
            *(aggregator, rows.params, here, None, state.aggregator, key),
            model_states=rows.model_state,
        )
        model_state = mean_of_states(rows, here, None, state.model_state)
        share = alpha(state.averages) if callable(alpha) else alpha

        def mix(here: jax.Array, own: Replica, params: PyTree, model_state: PyTree) -> Replica:
            before = own.params, own.model_state
            new = optax.tree.where(here, pushed(before, (params, model_state), share), before)
            return Replica(new[0], own.optimizer, new[1])

        sent = fax.broadcast(mean), fax.broadcast(model_state)
        rows = fax.map(mix, here, rows, *sent, vectorize=replicas)
        return PAPAState(PerClient(rows), model_state, own, state.averages + 1), metrics

    return _population(where, loss, inner_optimizer, replicas, steps, aggregator, vectorize, push)


def papa_all(
    loss: Callable,
    inner_optimizer: optax.GradientTransformation,
    *,
    replicas: int,
    steps: int | None = None,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """PAPA-all: from time to time, all models of a population are replaced by their average.

        w_i' = mean_j w_j

    Args:
      loss, inner_optimizer, replicas, aggregator, vectorize: see `papa`.
      steps: the inner steps between averages. Default: one round. The paper's 5 epochs are a round
        of ``fax.data.cohorts(..., epochs=5)``.

    Returns:
      The algorithm, which is `papa` with ``alpha=0``.

    Raises:
      ValueError: as `papa`.

    References:
      Jolicoeur-Martineau et al., PopulAtion Parameter Averaging (PAPA), arXiv:2304.03094.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2
      >>> algorithm = fax.algorithms.papa_all(loss, optax.adam(0.01), replicas=2)
    """
    return papa(
        loss,
        inner_optimizer,
        replicas=replicas,
        alpha=0,
        steps=steps,
        aggregator=aggregator,
        vectorize=vectorize,
    )


def papa_2(
    loss: Callable,
    inner_optimizer: optax.GradientTransformation,
    *,
    replicas: int,
    steps: int | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """PAPA-2: from time to time, every model is replaced by the average of a random pair.

        w_i' = (w_a + w_b) / 2,   with a random pair a ≠ b for each i

    This collects all models, so communication and memory are proportional to their number. Pairs
    are drawn among the models that take part; with only one, nothing happens.

    Args:
      loss, inner_optimizer, replicas, vectorize: see `papa`.
      steps: the inner steps between averages. Default: one round.

    Returns:
      The algorithm; see `papa`.

    Raises:
      ValueError: as `papa`.

    References:
      Jolicoeur-Martineau et al., PopulAtion Parameter Averaging (PAPA), arXiv:2304.03094.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2
      >>> algorithm = fax.algorithms.papa_2(loss, optax.adam(0.01), replicas=5)
    """
    where = "fax.algorithms.papa_2"
    if _arguments.count(where, "replicas", replicas) < 2:
        raise ValueError(f"{where}: replicas is {replicas}, expected at least 2, for pairs.")

    def push(state: PAPAState, here: jax.Array, key: jax.Array) -> tuple:
        rows = state.replicas.rows
        present, *everyone = fax.collect((here, rows.params, rows.model_state))
        enough = jnp.sum(present) > 1
        keys = jax.vmap(functools.partial(_keys.derive, key, _keys.Use.PAIR))(jnp.arange(replicas))
        a, b = jax.vmap(functools.partial(pair, present))(keys)
        one, other = (jax.tree.map(lambda x, of=of: x[of], everyone) for of in (a, b))
        pairs = fax.distribute(mixed(one, other, 0.5))

        def mix(here: jax.Array, own: Replica, of_pair: list) -> Replica:
            # A model that does not take part does not change, whatever is drawn.
            params, model_state = optax.tree.where(
                here & enough, of_pair, [own.params, own.model_state]
            )
            return Replica(params, own.optimizer, next_model_state(model_state, own.model_state))

        rows = fax.map(mix, here, rows, pairs, vectorize=replicas)
        model_state = mean_of_states(rows, here & enough, None, state.model_state)
        bits = all_bits((rows.params, averaged(rows.model_state)))
        metrics = sent_metrics({"clients/bits": bits}, here, enough)
        return PAPAState(PerClient(rows), model_state, None, state.averages + 1), metrics

    return _population(where, loss, inner_optimizer, replicas, steps, None, vectorize, push, True)


def pair(here: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two different indices of models that take part; all pairs are equally likely."""
    draws = jnp.where(here, jax.random.uniform(key, here.shape), -1)
    _, (a, b) = jax.lax.top_k(draws, 2)
    return a, b


def _population(
    where: str,
    loss: Callable,
    inner_optimizer: optax.GradientTransformation,
    replicas: int,
    steps: int | None,
    aggregator: Aggregator | None,
    vectorize: int | None,
    push: Callable,
    draws: bool = False,
) -> Algorithm:
    """Models that train separately, and after every ``steps`` steps run ``push``."""
    replicas = _arguments.count(where, "replicas", replicas)
    steps = None if steps is None else _arguments.count(where, "steps", steps)
    arguments(where, loss, None, vectorize, inner_optimizer=inner_optimizer)
    check_private(where, aggregator, "the soup is the mean of the models")

    def init(params: PyTree, model_state: PyTree = None) -> PAPAState:
        state = start(params, model_state, None)
        rows = state.replicas.rows.params
        warn_of_copies(where, inner_optimizer, types_of_row(rows))
        own = None if aggregator is None else aggregator.init(soup(rows, replicas))
        return state._replace(aggregator=own)

    def start(params: PyTree, model_state: PyTree, own: PyTree) -> PAPAState:
        rows = population(where, params, inner_optimizer, model_state, replicas)
        return PAPAState(rows, jax.tree.map(strong, model_state), own, jnp.int32(0))

    def part(state: PAPAState, part: Part) -> tuple:
        state, metrics = inner_steps(
            loss, inner_optimizer, state, part.batches, part.first, vectorize
        )
        state, sent = push(state, taking_part(part.batches), part.key)
        return state, (metrics, fax.sum(metrics), sent)

    def params(state: PAPAState) -> PyTree:
        return soup(state.replicas.rows.params, replicas)

    round = rounds(where, start, replicas, steps, part, keyed=draws or aggregator is not None)
    return guarded(where, loss, PAPAState, init, round, params, models)
