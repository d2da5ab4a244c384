"""DiLoCo: replicas take many inner steps each, then an outer optimizer takes one step for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import fax
from fax import _arguments, _functions
from fax.aggregators import Aggregator, PerClient
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._averaging import next_model_state, strong
from fax.algorithms._checks import arguments, check_averaged_state, guarded, warn_of_copies
from fax.algorithms._crossing import check_specs, sharded, specs_of
from fax.algorithms._replicas import (
    Replica,
    identical,
    inner_steps,
    mean_of_states,
    mean_update,
    models,
    taking_part,
)
from fax.algorithms._round_parts import Part, rounds
from fax.sharding._types import as_before

PyTree = Any


class Clock(NamedTuple):
    """The position in a schedule of outer steps.

    Attributes:
      since: the inner steps since the last outer step, int32.
      outer_steps: the outer steps so far, int32.
    """

    since: jax.Array
    outer_steps: jax.Array


class DiLoCoState(NamedTuple):
    """The state of `diloco` and `local_sgd`. A checkpoint needs all of it.

    Attributes:
      params: the outer parameters, the model to evaluate.
      optimizer: the state of the outer optimizer.
      replicas: a `PerClient` of what the replicas keep, leaves [replicas, ...].
      model_state: what the model has besides parameters, such as batch statistics, or None.
      aggregator: the state of the aggregator, or None.
      clock: the position in the schedule, if ``steps`` is one, or None.
    """

    params: PyTree
    optimizer: PyTree
    replicas: PerClient
    model_state: PyTree
    aggregator: PyTree = None
    clock: Clock | None = None


def diloco(
    loss: Callable,
    inner_optimizer: optax.GradientTransformation,
    outer_optimizer: optax.GradientTransformation | None = None,
    *,
    replicas: int,
    steps: int | Callable[[jax.Array], jax.Array] | None = None,
    weighted: bool = False,
    aggregator: Aggregator | None = None,
    sharding: PyTree = None,
    vectorize: int | None = None,
) -> Algorithm:
    """DiLoCo: distributed low-communication training, with an inner and an outer optimizer.

    Every replica i takes H steps of the inner optimizer on its own shard of the data, from the
    outer parameters θ to θ_i. Then one outer step is taken for all:

        Δ = mean_i (θ - θ_i)        θ' = outer_optimizer(θ, gradient = Δ)        θ_i' = θ'

    The replicas' optimizers keep their states from one outer step to the next. These must not hold
    copies of the parameters, to which the next step would return. If the outer optimizer is SGD
    with rate 1, this is `local_sgd`; with one replica it is Lookahead.

    Replica i is row i of the cohort: ``fax.data.cohorts(..., sampler="stream", max_steps=...,
    placement="replicas")`` gives it the same shard in every round. A replica without examples in
    the batches of an outer step, or whose ``num_examples`` is 0, does not count in the mean, and
    continues from its own θ_i. In the second case it has trained, but its update is ignored.

    Args:
      loss: see `fax.algorithms.fedavg`.
      inner_optimizer: from optax. Its schedules count the inner steps of all rounds.
      outer_optimizer: from optax; its schedules count outer steps. Default: Nesterov's,
        ``optax.sgd(0.7, momentum=0.9, nesterov=True)``.
      replicas: the number of replicas. All start from the same parameters.
      steps: H, a divisor of the number of batches in a cohort, so that a round takes one or more
        outer steps. Default: all batches of the round. Or a schedule, a function from the number
        of outer steps so far to H, which may be any number and extend over several rounds. Then
        each batch is checked for whether an outer step is due, and which replicas take part is
        decided once per round.
      weighted: whether the mean is weighted by ``num_examples``, the sizes of the shards.
      aggregator: from `fax.aggregators`; it computes -Δ from the updates θ_i - θ. Default: the
        mean. If it is a chain of transformations of which the last one has a `Format`, such as
        ``chain(e3m0())``, and replicas are spread evenly over several devices, they send each other
        bytes: 2, 4 or 8 bits for each number, as long as that is less than an all-reduce of float32
        would send, with up to 32, 16 or 8 replicas. The result is the same. A private one makes a
        release in each outer step, even if no replica takes part; see `fax.aggregators.releases`.
      sharding: a pytree like the parameters of `jax.sharding.PartitionSpec`, which says how each
        replica shards its parameters over Auto axes of the mesh. ``init`` shards the state in this
        way, even if ``params`` are on the host. Then each device of a replica sends a part of its
        own, even if they have the same parameters, and they gather the results. Only then are bytes
        sent, if replicas are sharded over Auto axes. Along Explicit axes the types say so, and it
        is done in any case, unless there is an ``aggregator``.
      vectorize: the number of replicas that a device works on at once; see `fax.map`. Default: the
        cohort's setting, or 1 on CPU.

    Returns:
      The algorithm. ``init(params, model_state=None)`` makes its `DiLoCoState`, and ``params`` are
      θ. A round's metrics are those of `fedavg`, with ``"replicas/..."`` for each replica;
      ``"replicas/bits"``, what each sends in the round, the statistics of its model included; and
      ``"outer_steps"``, the number of outer steps. Other metrics of the aggregator are means over
      the outer steps.

    Raises:
      ValueError: if ``replicas`` or ``steps`` is not a positive int; when a round is traced, if the
        cohort has another number of replicas, or a number of batches that ``steps`` does not
        divide.

    References:
      Douillard et al., DiLoCo: Distributed low-communication training of language models,
      arXiv:2311.08105.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2
      >>> algorithm = fax.algorithms.diloco(loss, optax.adamw(0.01), replicas=2, steps=5)
      >>> data = fax.data.InMemory({"shard 0": {"x": jnp.ones(9)}, "shard 1": {"x": jnp.zeros(9)}})
      >>> rounds = fax.data.cohorts(
      ...     data, 2, batch_size=3, sampler="stream", max_steps=20, placement="replicas"
      ... )
      >>> state = algorithm.init(jnp.zeros(()))
      >>> state, metrics = jax.jit(algorithm.round)(state, next(rounds))
      >>> metrics["outer_steps"], metrics["replicas/bits"]
      (Array(4., dtype=float32), Array([128., 128.], dtype=float32))
    """
    if outer_optimizer is None:
        outer_optimizer = optax.sgd(0.7, momentum=0.9, nesterov=True)
    where = "fax.algorithms.diloco"
    return outer_steps(
        where,
        loss,
        inner_optimizer,
        outer_optimizer,
        replicas,
        steps,
        weighted,
        aggregator,
        sharding,
        vectorize,
    )


def outer_steps(
    where: str,
    loss: Callable,
    inner_optimizer: optax.GradientTransformation,
    outer_optimizer: optax.GradientTransformation,
    replicas: int,
    steps: int | Callable[[jax.Array], jax.Array] | None,
    weighted: bool,
    aggregator: Aggregator | None,
    sharding: PyTree,
    vectorize: int | None,
) -> Algorithm:
    """The algorithm of `diloco`, for ``where``."""
    replicas = _arguments.count(where, "replicas", replicas)
    if callable(steps):
        _functions.function(where, "steps", steps, {1: "steps(outer_steps)"})
    elif steps is not None:
        steps = _arguments.count(where, "steps", steps)
    _arguments.flag(where, "weighted", weighted)
    specs = specs_of(where, sharding)
    aggregator = arguments(
        where,
        loss,
        aggregator,
        vectorize,
        inner_optimizer=inner_optimizer,
        outer_optimizer=outer_optimizer,
    )

    def init(params: PyTree, model_state: PyTree = None) -> DiLoCoState:
        check_averaged_state(where, aggregator, model_state)
        check_specs(where, specs, params)
        params, model_state = jax.tree.map(strong, (params, model_state))
        params = sharded(specs, params)
        warn_of_copies(where, inner_optimizer, params)
        return start(params, model_state, None if aggregator is None else aggregator.init(params))

    def start(params: PyTree, model_state: PyTree, own: PyTree) -> DiLoCoState:
        inner = sharded(specs, inner_optimizer.init(params))
        rows = identical(params, inner, model_state, replicas)
        clock = Clock(jnp.int32(0), jnp.int32(0)) if callable(steps) else None
        optimizer = sharded(specs, jax.tree.map(strong, outer_optimizer.init(params)))
        return DiLoCoState(params, optimizer, rows, model_state, own, clock)

    def outer_step(
        state: DiLoCoState, here: jax.Array, n: jax.Array, key: jax.Array | None
    ) -> tuple[DiLoCoState, dict[str, jax.Array]]:
        """Takes an outer step with the replicas that take part."""
        rows, weights = state.replicas.rows, n if weighted else None
        updates = fax.map(optax.tree.sub, rows.params, fax.broadcast(state.params))
        mean, heard, aggregator_state, metrics = mean_update(
            *(aggregator, updates, here, weights, state.aggregator, key, specs),
            model_states=rows.model_state,
        )
        delta = optax.tree.scale(-1, mean)
        moves, optimizer = outer_optimizer.update(delta, state.optimizer, state.params)
        new = optax.apply_updates(state.params, moves), optimizer
        params, optimizer = optax.tree.where(heard, new, (state.params, state.optimizer))
        model_state = mean_of_states(rows, here, weights, state.model_state)

        def adopt(here: jax.Array, own: Replica, params: PyTree, model_state: PyTree) -> Replica:
            new = params, next_model_state(model_state, own.model_state)
            params, model_state = optax.tree.where(here, new, (own.params, own.model_state))
            return Replica(params, own.optimizer, model_state)

        sent = fax.broadcast(params), fax.broadcast(model_state)
        rows = fax.map(adopt, here, rows, *sent, vectorize=replicas)
        clock = state.clock and Clock(jnp.int32(0), state.clock.outer_steps + 1)
        rows = PerClient(rows)
        state = DiLoCoState(params, optimizer, rows, model_state, aggregator_state, clock)
        return state, metrics

    def part(state: DiLoCoState, part: Part) -> tuple:
        state, metrics = inner_steps(
            loss, inner_optimizer, state, part.batches, part.first, vectorize, specs
        )
        n = part.cohort.num_examples
        if not callable(steps):
            state, sent = outer_step(state, taking_part(part.batches), n, part.key)
            return state, (metrics, fax.sum(metrics), sent)
        here = taking_part(part.cohort)
        assert state.clock is not None
        clock = Clock(state.clock.since + 1, state.clock.outer_steps)

        def due(state: DiLoCoState) -> tuple:
            return outer_step(state, here, n, part.key)

        def wait(state: DiLoCoState) -> tuple:
            # `jax.eval_shape` returns no sharding if some mesh axes are Auto and some Explicit.
            jaxpr, shapes = jax.make_jaxpr(lambda x: due(x)[1], return_shape=True)(state)
            zeros = [as_before(jnp.zeros(x.shape, x.dtype), x) for x in jaxpr.out_avals]
            return state, jax.tree.unflatten(jax.tree.structure(shapes), zeros)

        state = state._replace(clock=clock)
        due_now = clock.since >= steps(clock.outer_steps)
        state, sent = lax.cond(due_now, due, wait, state)
        return state, (metrics, None, sent)

    size = 1 if callable(steps) else steps
    round = rounds(where, start, replicas, size, part, keyed=aggregator is not None)
    return guarded(where, loss, DiLoCoState, init, round, lambda state: state.params, models)


def local_sgd(
    loss: Callable,
    inner_optimizer: optax.GradientTransformation,
    *,
    replicas: int,
    steps: int | Callable[[jax.Array], jax.Array] | None = None,
    weighted: bool = False,
    aggregator: Aggregator | None = None,
    sharding: PyTree = None,
    vectorize: int | None = None,
) -> Algorithm:
    """Local SGD: after every H local steps, the replicas' parameters are replaced by their mean.

        θ_i takes H steps of the optimizer on shard i;        θ_i' = mean_j θ_j

    The replicas' optimizers keep their states. This is `diloco` with SGD of rate 1 as the outer
    optimizer, with the same arguments, metrics and state. With a schedule for ``steps`` it is
    post-local SGD: ``lambda averages: jnp.where(averages < 1000, 1, 16)`` averages after every
    step at first.

    Args:
      loss: see `fax.algorithms.fedavg`.
      inner_optimizer: from optax, for the replicas.
      replicas: the number of replicas. All start from the same parameters.
      steps: H, or a schedule; see `diloco`. Default: all batches of the round.
      weighted: whether the mean is weighted by ``num_examples``, the sizes of the shards.
      aggregator: from `fax.aggregators`; it averages the replicas' updates since the last mean.
        Default: the mean.
      sharding: how each replica shards its parameters; see `diloco`.
      vectorize: the number of replicas that a device works on at once; see `diloco`.

    Returns:
      The algorithm. ``init(params, model_state=None)`` makes its `DiLoCoState`.

    Raises:
      ValueError: as `diloco`.

    References:
      Stich, Local SGD converges fast and communicates little, arXiv:1805.09767. Lin et al., Don't
      use large mini-batches, use local SGD, arXiv:1808.07217.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2 / 2
      >>> algorithm = fax.algorithms.local_sgd(loss, optax.sgd(0.5), replicas=2, steps=2)
      >>> data = fax.data.InMemory({"shard 0": {"x": jnp.ones(9)}, "shard 1": {"x": jnp.zeros(9)}})
      >>> rounds = fax.data.cohorts(
      ...     data, 2, batch_size=3, sampler="stream", max_steps=2, placement="replicas"
      ... )
      >>> state, metrics = algorithm.round(algorithm.init(jnp.zeros(())), next(rounds))
      >>> algorithm.params(state)  # the mean of 0.75 and 0
      Array(0.375, dtype=float32)
    """
    caller = "fax.algorithms.local_sgd"
    return outer_steps(
        caller,
        loss,
        inner_optimizer,
        optax.sgd(1.0),
        replicas,
        steps,
        weighted,
        aggregator,
        sharding,
        vectorize,
    )
