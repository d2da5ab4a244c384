"""Streaming DiLoCo: sends one fragment of the parameters at a time, with a delay and in 4 bits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

import fax
from fax import _arguments, _keys
from fax.aggregators import Aggregator, PerClient, chain, e3m0
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._averaging import strong
from fax.algorithms._checks import arguments, check_averaged_state, guarded, warn_of_copies
from fax.algorithms._crossing import check_specs, sharded, specs_of
from fax.algorithms._fragments import Fragment, check_fragments, cut, paste, pick
from fax.algorithms._in_flight import Sending, events_of, receive, send
from fax.algorithms._layers import Piece
from fax.algorithms._replicas import (
    Replica,
    identical,
    inner_steps,
    mean_of_states,
    mean_update,
    models,
    pushed,
    taking_part,
)
from fax.algorithms._round_parts import Part, between, rounds

PyTree = Any
_WHERE = "fax.algorithms.streaming_diloco"


class Received(NamedTuple):
    """What was received of a fragment.

    Attributes:
      update: -Δ, the leaves of a fragment, or the parts of them that it has, by their paths.
      heard: whether there is an update, bool.
    """

    update: dict[str, jax.Array]
    heard: jax.Array


class StreamingDiLoCoState(NamedTuple):
    """The state of `streaming_diloco`. A checkpoint needs all of it.

    Attributes:
      params: the outer parameters, the model to evaluate.
      optimizers: for each fragment, the state of the outer optimizer.
      replicas: a `PerClient` of what the replicas keep, leaves [replicas, ...].
      model_state: what the model has besides parameters, such as batch statistics, or None: the
        replicas' mean when the last fragment was sent.
      aggregators: for each fragment, the state of the aggregator.
    """

    params: PyTree
    optimizers: tuple[PyTree, ...]
    replicas: PerClient
    model_state: PyTree
    aggregators: tuple[PyTree, ...]


def streaming_diloco(
    loss: Callable,
    inner_optimizer: optax.GradientTransformation,
    outer_optimizer: optax.GradientTransformation | None = None,
    *,
    replicas: int,
    steps: int,
    fragments: int | Callable[[str], int] | Sequence[Sequence[Piece]],
    tau: int = 1,
    alpha: Any = 0.5,
    weighted: bool = False,
    aggregator: Aggregator | None = None,
    sharding: PyTree = None,
    vectorize: int | None = None,
) -> Algorithm:
    """Streaming DiLoCo: averages fragments of the parameters one after the other, in 4 bits.

    The parameters are split into fragments p = 0, ..., P - 1. Replica i takes steps t = 1, 2, ...
    of the inner optimizer, and fragment p is sent every H steps, at (t - t_p) mod H = 0. The result
    lands τ steps later, and replicas mix it with their own:

        sent at t:          Δ_p = mean_i (θ_p - θ_ip)
        landing at t + τ:   θ_p = outer_optimizer(θ_p, gradient = Δ_p)
        and then:           θ_ip = α θ_ip + (1 - α) θ_p

    In the meantime nothing waits for the sum over replicas, so a compiler can overlap it with the
    steps. With one fragment, τ = 0 and α = 0 this is `diloco`, except for the rounding.

    The offsets are t_p = floor(p H / P) + ceil(H / P) - τ: those of the paper, floor(p H / P), with
    the same number of steps added to all, such that the last fragment lands at the end of a period
    of H steps. If τ = ceil(H / P), some are zero; then an update, which is zero, is also sent at
    t = 0. If τ > ceil(H / P), this would be less than zero for some. Then they are
    t_p = 1 + floor(p (H - τ - 1) / (P - 1)), from the first step of a period to τ steps before its
    end. So all fragments land in the period in which they are sent, and nothing is in flight when a
    round ends.

    As in `diloco`, replica i trains on row i of the cohort. A replica without examples in a period
    of H steps, or whose ``num_examples`` is 0, is neither sent nor mixed, and continues from its
    own parameters. What is not finite in θ_ip is replaced by θ_p when it lands. The model's state
    is sent with the last fragment.

    Args:
      loss: see `fax.algorithms.fedavg`.
      inner_optimizer: from optax. Its schedules count the inner steps of all rounds.
      outer_optimizer: from optax, with a state for each fragment. Default: Nesterov's,
        ``optax.sgd(0.4, momentum=0.9, nesterov=True)``.
      replicas: the number of replicas. All start from the same parameters.
      steps: H, a divisor of the number of batches in a cohort. It need not be a multiple of the
        number of fragments.
      fragments: their number P: layer number l is in fragment l mod P, the paper's strided
        pattern, whether layers are stacked or not; `layer_fragments` says what a layer is, and has
        other patterns. Or a function from the path of a leaf, such as ``"blocks/3/kernel"``, to p.
        Or for each fragment the paths of its leaves or subtrees, or ``(path, axis, indices)`` for
        some indices along an axis, such as ``("layers", 0, range(4))`` for four of the layers that
        are stacked in all leaves of ``layers``.
      tau: τ, the number of steps from sending to landing, less than ``steps``.
      alpha: α, the share of its own parameters that a replica keeps, from 0 to 1.
      weighted: whether the mean is weighted by ``num_examples``, the sizes of the shards.
      aggregator: from `fax.aggregators`; it computes -Δ_p from the updates θ_ip - θ_p. Default:
        ``chain(e3m0())``, which rounds them to four bits, sends these, and sums in float32; see
        `diloco` for when bits are sent. Without rounding: ``mean()``. A private one makes a release
        for each fragment in each period, even if no replica takes part, and all of them count; see
        `fax.aggregators.releases`.
      sharding: how each replica shards its parameters; see `diloco`.
      vectorize: the number of replicas that a device works on at once; see `diloco`.

    Returns:
      The algorithm. ``init(params, model_state=None)`` makes its `StreamingDiLoCoState`. ``params``
      are the outer parameters θ. Metrics are those of `diloco`; ``"outer_steps"`` counts each
      fragment that was sent.

    Raises:
      ValueError: if an argument is out of range; in ``init``, if fragments do not cover the
        parameters, overlap or are empty, or if it is ambiguous what the layers are; when a round is
        traced, if the cohort has another number of replicas, or a number of batches that ``steps``
        does not divide.

    References:
      Douillard et al., Streaming DiLoCo with overlapping communication, arXiv:2501.18512.

    Example:

      >>> import optax
      >>> def loss(params, batch, key):
      ...     return (batch["x"] * params["scale"].sum() - params["shift"]) ** 2
      >>> algorithm = fax.algorithms.streaming_diloco(
      ...     loss, optax.adamw(0.01), replicas=2, steps=5, fragments=2
      ... )
      >>> data = fax.data.InMemory({"shard 0": {"x": jnp.ones(9)}, "shard 1": {"x": jnp.zeros(9)}})
      >>> rounds = fax.data.cohorts(
      ...     data, 2, batch_size=3, sampler="stream", max_steps=10, placement="replicas"
      ... )
      >>> state = algorithm.init({"scale": jnp.ones(4), "shift": jnp.zeros(())})
      >>> state, metrics = jax.jit(algorithm.round)(state, next(rounds))
      >>> metrics["outer_steps"], metrics["replicas/bits"]  # 2 (4 * 4 + 32) + 2 (4 + 32)
      (Array(4., dtype=float32), Array([168., 168.], dtype=float32))
    """
    replicas = _arguments.count(_WHERE, "replicas", replicas)
    steps = _arguments.count(_WHERE, "steps", steps)
    expected = f"an int from 0 to {steps - 1}, below steps={steps}"
    tau = _arguments.count(_WHERE, "tau", tau, least=0, most=steps - 1, expected=expected)
    fragments = check_fragments(_WHERE, fragments)
    _arguments.number(_WHERE, "alpha", alpha, least=0, most=1)
    _arguments.flag(_WHERE, "weighted", weighted)
    specs = specs_of(_WHERE, sharding)
    if outer_optimizer is None:
        outer_optimizer = optax.sgd(0.4, momentum=0.9, nesterov=True)
    aggregator = arguments(
        _WHERE,
        loss,
        aggregator,
        vectorize,
        inner_optimizer=inner_optimizer,
        outer_optimizer=outer_optimizer,
    )
    mean = chain(e3m0()) if aggregator is None else aggregator
    cut_up = functools.partial(cut, _WHERE, fragments)

    def init(params: PyTree, model_state: PyTree = None) -> StreamingDiLoCoState:
        check_averaged_state(_WHERE, aggregator, model_state)
        check_specs(_WHERE, specs, params)
        params, model_state = jax.tree.map(strong, (params, model_state))
        params = sharded(specs, params)
        warn_of_copies(_WHERE, inner_optimizer, params)
        own = tuple(mean.init(pick(params, part)) for part in cut_up(params))
        return start(params, model_state, own)

    def start(params: PyTree, model_state: PyTree, own: tuple) -> StreamingDiLoCoState:
        inner = sharded(specs, inner_optimizer.init(params))
        parts = [pick(params, part) for part in cut_up(params)]
        return StreamingDiLoCoState(
            params,
            tuple(jax.tree.map(strong, outer_optimizer.init(part)) for part in parts),
            identical(params, inner, model_state, replicas),
            model_state,
            own,
        )

    def update_of(
        p: int,
        part: Fragment,
        state: StreamingDiLoCoState,
        here: jax.Array,
        n: jax.Array,
        key: jax.Array,
    ) -> tuple[Received, PyTree, PyTree, dict[str, jax.Array]]:
        """What is sent of a fragment, the states of the aggregator and the model, and metrics."""
        rows, weights = state.replicas.rows, n if weighted else None

        def change(params: PyTree, outer: dict) -> dict:
            return optax.tree.sub(pick(params, part), outer)

        updates = fax.map(change, rows.params, fax.broadcast(pick(state.params, part)))
        last = p == len(state.optimizers) - 1
        update, heard, own, metrics = mean_update(
            mean,
            updates,
            here,
            weights,
            state.aggregators[p],
            key,
            specs,
            by_leaf=aggregator is None,
            model_states=rows.model_state if last else None,
        )
        model_state = state.model_state
        if last:
            model_state = mean_of_states(rows, here, weights, model_state)
        return Received(update, heard), own, model_state, metrics

    def land(
        p: int, part: Fragment, state: StreamingDiLoCoState, landing: Received, here: jax.Array
    ) -> StreamingDiLoCoState:
        before = pick(state.params, part), state.optimizers[p]
        delta = optax.tree.scale(-1, landing.update)
        moves, optimizer = outer_optimizer.update(delta, before[1], before[0])
        new = optax.apply_updates(before[0], moves), optimizer
        outer, optimizer = optax.tree.where(landing.heard, new, before)

        def mix(here: jax.Array, own: Replica, outer: dict, model_state: PyTree) -> Replica:
            params = pick(own.params, part)
            new = pushed(params, outer, alpha), own.model_state
            if p == len(state.optimizers) - 1:
                new = new[0], pushed(own.model_state, model_state, alpha)
            before = params, own.model_state
            params, model_state = optax.tree.where(here & landing.heard, new, before)
            return Replica(paste(own.params, part, params), own.optimizer, model_state)

        sent = fax.broadcast(outer), fax.broadcast(state.model_state)
        rows = fax.map(mix, here, state.replicas.rows, *sent, vectorize=replicas)
        return state._replace(
            params=paste(state.params, part, outer),
            optimizers=_with(state.optimizers, p, optimizer),
            replicas=PerClient(rows),
        )

    def period(state: StreamingDiLoCoState, part: Part) -> tuple:
        fragments = cut_up(state.params)
        here = taking_part(part.batches)
        assert part.key is not None
        keys = [_keys.derive(part.key, _keys.Use.FRAGMENT, p) for p in range(len(fragments))]
        sending: dict[int, Sending] = {}
        landing: dict[int, Received] = {}
        begin, trained, sent_metrics = 0, [], []

        def arrived(state: StreamingDiLoCoState, p: int, sums: tuple) -> StreamingDiLoCoState:
            landing[p], own, model_state, metrics = sums
            sent_metrics.append(metrics)
            if p == len(fragments) - 1:
                state = state._replace(model_state=model_state)
            return state._replace(aggregators=_with(state.aggregators, p, own))

        def received(
            state: StreamingDiLoCoState, trained: list, due: list[int]
        ) -> tuple[StreamingDiLoCoState, list]:
            """Receives fragments. What comes next cannot begin before, nor be sent with them."""
            if due:
                own = [sending.pop(p) for p in due]
                results, (rows, trained) = receive(own, (state.replicas, trained))
                state = state._replace(replicas=rows)
                for p, sums in zip(due, results):
                    state = arrived(state, p, sums)
            return state, trained

        events = events_of(steps, len(fragments), tau)
        for event in events:
            if event.step > begin:
                batches = between(part.batches, begin, event.step)
                state, metrics = inner_steps(
                    loss, inner_optimizer, state, batches, part.first + begin, vectorize, specs
                )
                begin = event.step
                trained.append(metrics)
            due = [p for p in event.landing if p in sending]
            state, trained = received(state, trained, due)
            # Whether others are sent before these land. A compiler could send all of them late.
            others = any(event.step < each.step < event.step + tau for each in events if each.sent)
            for p in event.sent:
                args = p, fragments[p], state, here, part.cohort.num_examples, keys[p]
                if tau and others:
                    sending[p], rows = send(update_of, *args, before=state.replicas)
                    state = state._replace(replicas=rows)
                elif tau:
                    sending[p], _ = send(update_of, *args)
                else:
                    state = arrived(state, p, update_of(*args))
            for p in event.landing:
                state = land(p, fragments[p], state, landing.pop(p), here)
        metrics = fax.map(total, *trained)
        return state, (metrics, fax.sum(metrics), total(*sent_metrics))

    round = rounds(_WHERE, start, replicas, steps, period, keyed=True)
    return guarded(
        _WHERE, loss, StreamingDiLoCoState, init, round, lambda state: state.params, models
    )


def total(*trees: PyTree) -> PyTree:
    """The sum of pytrees, leaf by leaf."""
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *trees)


def _with(values: tuple, number: int, value: Any) -> tuple:
    return (*values[:number], value, *values[number + 1 :])
