"""Adaptive personalized federated learning: clients mix models of their own with the server's."""

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
    check_model_state,
    next_model_state,
    server_step,
    strong,
)
from fax.algorithms._checks import arguments, guarded
from fax.algorithms._clients import gather_rows as rows_of
from fax.algorithms._clients import scatter_rows as with_rows
from fax.algorithms._local_old import Tally, mean_loss, metrics_of, no_tally
from fax.data import Client, Cohort

PyTree = Any


class Personal(NamedTuple):
    """What a client keeps.

    Attributes:
      params: v, its local model.
      alpha: how much of it there is in its mixture, from 0 to 1.
      started: whether it took part in a round. Its local model is the server's until then.
    """

    params: PyTree
    alpha: jax.Array
    started: jax.Array


class APFLState(NamedTuple):
    """The server's state, and the clients'.

    Attributes:
      params: w, the global model.
      optimizer: the state of the server's optimizer.
      model_state: what the model has besides parameters, or None.
      aggregator: the state of the aggregator, or None.
      clients: `Personal`, leaves [num_clients, ...].
    """

    params: PyTree
    optimizer: PyTree
    model_state: PyTree
    aggregator: PyTree
    clients: PerClient


class _Sent(NamedTuple):
    update: PyTree
    model_state: PyTree
    tally: Tally
    personal: Personal


def apfl(
    loss: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    num_clients: int,
    alpha: float = 0.5,
    alpha_optimizer: optax.GradientTransformation | None = None,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """Adaptive personalized federated learning (APFL).

    Client i keeps a local model v_i and a number alpha_i, and uses the mixture of the local and
    the global model, m_i = alpha_i v_i + (1 - alpha_i) w. In a round it starts from the server's w
    and does, on each of its batches, with f the mean loss of the batch,

        w_i     <- w_i - rate grad f(w_i)
        v_i     <- v_i - rate alpha_i grad f(m_i)
        alpha_i <- alpha_i - rate <v_i - w_i, grad f(m_i)>,  kept within [0, 1]

    all three from what they were before the step. The second line is the derivative of f(m_i) by
    v_i, of which FedJAX leaves out alpha_i. The server averages the w_i as `fedavg` does, so that
    the global model is that of `fedavg` with the same arguments, whatever the alphas.

    Args:
      loss: see `fedavg`. A model's state is the global model's: it is made by w_i, and the mixture
        is trained and to be evaluated with it.
      client_optimizer: from optax, of w_i and v_i; its states start anew at each client and round.
      server_optimizer: from optax. Default: ``optax.sgd(1.0)``.
      num_clients: how many clients the data have.
      alpha: of every client at the start, from 0 to 1.
      alpha_optimizer: from optax, of alpha_i, a scalar. Default: the client's. With
        ``optax.set_to_zero()`` alpha stays what it is.
      aggregator: as for `fedavg`, of the updates of w. What a private one promises is about w, and
        about what all clients but one get to see: v_i and alpha_i are a client's own.
      vectorize: as for `fedavg`.

    Returns:
      The algorithm. ``init(params, model_state=None)`` makes its `APFLState`. A client's local
      model is the server's until it takes part for the first time. ``params(state)`` are the
      mixtures, leaves [num_clients, ...], to be evaluated by `fax.metrics.evaluate_clients` with
      ``personal=True``; the global model is ``state.params``. Where so many models do not fit, see
      `ClientStore`. Metrics are those of `fedavg` for the global model, ``"personal/..."`` the same
      for the mixtures, and ``"clients/alpha"`` after the round.

    Raises:
      ValueError: if ``num_clients`` is not a positive int or ``alpha`` not from 0 to 1; and in a
        round if the cohort is of more clients.

    References:
      Deng et al., Adaptive personalized federated learning, arXiv:2003.13461.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2
      >>> algorithm = fax.algorithms.apfl(loss, optax.sgd(0.1), num_clients=2)
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(3)}, "bob": {"x": jnp.zeros(3)}})
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=3)
      >>> state = algorithm.init(jnp.zeros(()))
      >>> for _ in range(200):
      ...     state, metrics = jax.jit(algorithm.round)(state, next(rounds))
      >>> print(state.params.round(2), algorithm.params(state).round(2))
      0.5 [1. 0.]
    """
    caller = "fax.algorithms.apfl"
    _arguments.count(caller, "num_clients", num_clients)
    _arguments.number(caller, "alpha", alpha, least=0, most=1)
    server_optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer
    alpha_optimizer = client_optimizer if alpha_optimizer is None else alpha_optimizer
    aggregator = arguments(
        caller,
        loss,
        aggregator,
        vectorize,
        client_optimizer=client_optimizer,
        server_optimizer=server_optimizer,
        alpha_optimizer=alpha_optimizer,
    )

    def init(params: PyTree, model_state: PyTree = None) -> APFLState:
        check_model_state("fax.algorithms.apfl", aggregator, model_state)
        params, model_state = jax.tree.map(strong, (params, model_state))
        own = None if aggregator is None else aggregator.init(params)
        dtype = jnp.result_type(*jax.tree.leaves(params))
        _check_alpha_optimizer(caller, alpha_optimizer, dtype)
        everyone = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (num_clients, *x.shape)),
            Personal(params, jnp.asarray(alpha, dtype), jnp.zeros((), bool)),
        )
        optimizer = server_optimizer.init(params)
        return APFLState(params, optimizer, model_state, own, PerClient(everyone))

    def local(params: PyTree, model_state: PyTree, own: Personal, client: Client) -> _Sent:
        def step(carry, batch, mask, key):
            (w, v, alpha), states, model_state, tally = carry

            def global_loss(w):
                return mean_loss(loss, w, model_state, batch, mask, key)

            def personal_loss(v, alpha):
                return mean_loss(loss, _mixture(v, alpha, w), model_state, batch, mask, key)

            w_gradient, (seen, model_state_of_w) = jax.grad(global_loss, has_aux=True)(w)
            (v_gradient, alpha_gradient), (seen_by_own, _) = jax.grad(
                personal_loss, (0, 1), has_aux=True
            )(v, alpha)
            moves = [
                optimizer.update(gradient, state, x)
                for optimizer, gradient, state, x in zip(
                    optimizers, (w_gradient, v_gradient, alpha_gradient), states, (w, v, alpha)
                )
            ]
            w, v, alpha = (
                optax.apply_updates(x, move) for x, (move, _) in zip((w, v, alpha), moves)
            )
            tally = jax.tree.map(jnp.add, tally, _both(seen, seen_by_own))
            states = tuple(state for _, state in moves)
            return (w, v, jnp.clip(alpha, 0, 1)), states, model_state_of_w, tally

        optimizers = (client_optimizer, client_optimizer, alpha_optimizer)
        v = _local_model(own, params)
        start = (params, v, own.alpha)
        states = tuple(optimizer.init(x) for optimizer, x in zip(optimizers, start))
        nothing = no_tally(loss, params, model_state, client)
        (w, v, alpha), _, model_state, tally = client.scan(
            step, (start, states, model_state, _both(nothing, nothing))
        )
        update = jax.tree.map(jnp.subtract, w, params)
        return _Sent(update, model_state, tally, Personal(v, alpha, jnp.ones((), bool)))

    def round(state: APFLState, cohort: Cohort) -> tuple[APFLState, dict[str, jax.Array]]:
        @fax.program(clients=cohort.size)
        def work(
            params: PyTree, model_state: PyTree, own: PyTree, clients: Personal, cohort: Cohort
        ) -> tuple:
            sent = fax.map(
                jax.checkpoint(local),
                fax.broadcast(params),
                fax.broadcast(model_state),
                clients,
                cohort.clients(),
                vectorize=vectorize or cohort.vectorize,
            )
            update, own, more = aggregate(aggregator, sent.update, own, cohort)
            mean_state = fax.mean(sent.model_state, weights=cohort.num_examples)
            metrics = {**metrics_of(sent.tally), "clients/alpha": sent.personal.alpha, **more}
            return update, mean_state, own, sent.personal, metrics

        before = rows_of(state, cohort)
        update, mean_state, own, clients, metrics = work(
            state.params, state.model_state, before.aggregator, before.clients.rows, cohort
        )
        params, optimizer = server_step(server_optimizer, update, state.optimizer, state.params)
        model_state = next_model_state(mean_state, state.model_state)
        after = APFLState(params, optimizer, model_state, own, PerClient(clients))
        return with_rows(state, after, cohort), metrics

    def params(state: APFLState) -> PyTree:
        def mixture(own: Personal) -> PyTree:
            return _mixture(_local_model(own, state.params), own.alpha, state.params)

        return jax.vmap(mixture)(state.clients.rows)

    return (guarded(caller, loss, APFLState, init, round, params))


def _check_alpha_optimizer(
    caller: str, optimizer: optax.GradientTransformation, dtype: Any
) -> None:
    """Checks that the optimizer works on a scalar: one made for the parameters' leaves may not."""
    try:
        jax.eval_shape(optimizer.init, jax.ShapeDtypeStruct((), dtype))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{caller}: alpha_optimizer, which is client_optimizer if it is not given, does not "
            "work on alpha, a scalar. Where client_optimizer is made for the leaves of the "
            "parameters, as by optax.multi_transform or optax.masked, pass another one for alpha, "
            "as in alpha_optimizer=optax.sgd(0.1)."
        ) from error


def _local_model(own: Personal, params: PyTree) -> PyTree:
    return jax.tree.map(lambda v, w: jnp.where(own.started, v, w), own.params, params)


def _mixture(v: PyTree, alpha: jax.Array, w: PyTree) -> PyTree:
    def mix(v, w):
        share = alpha.astype(w.dtype)
        return share * v + (1 - share) * w

    return jax.tree.map(mix, v, w)


def _both(seen: Tally, seen_by_own: Tally) -> Tally:
    """One tally of the global model's metrics and those of the mixture, over the same examples."""
    own = {f"personal/{name}": total for name, total in seen_by_own.sums.items()}
    if taken := own.keys() & seen.sums.keys():
        raise ValueError(
            f"apfl: loss returned a metric {min(taken)!r}, which is what the mixture's is called. "
            "Call it something else."
        )
    return Tally({**seen.sums, **own}, seen.examples)
