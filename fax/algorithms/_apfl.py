"""Adaptive personalized federated learning: clients mix models of their own with the server's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fax import _arguments
from fax.aggregators import Aggregator
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._checks import arguments, check_scalar_optimizer
from fax.algorithms._federated import ClientResult, Server, State, federated
from fax.algorithms._loss import Metrics, batch_gradient, batch_loss, no_metrics
from fax.data import Client

PyTree = Any


_NO_SCALAR = (
    "alpha_optimizer, which is client_optimizer if it is not given, does not work on alpha, a "
    "scalar. Where client_optimizer is made for the leaves of the parameters, as by "
    "optax.multi_transform or optax.masked, pass another one for alpha, as in "
    "alpha_optimizer=optax.sgd(0.1)."
)


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
      The algorithm. ``init(params, model_state=None)`` makes its `State`, whose ``clients`` are
      `Personal`. A client's local model is the server's until it takes part for the first time.
      ``params(state)`` is the global model, and ``models(state)`` are the mixtures, leaves
      [num_clients, ...], to be evaluated by `fax.metrics.evaluate_clients` with ``personal=True``.
      Where so many models do not fit, see `ClientStore`. Metrics are those of `fedavg` for the
      global model, ``"personal/..."`` the same for the mixtures, and ``"clients/alpha"`` after the
      round.

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
      >>> print(algorithm.params(state).round(2), algorithm.models(state).round(2))
      0.5 [1. 0.]
    """
    name = "fax.algorithms.apfl"
    _arguments.number(name, "alpha", alpha, least=0, most=1)
    alpha_optimizer = client_optimizer if alpha_optimizer is None else alpha_optimizer
    arguments(name, loss, client_optimizer=client_optimizer, alpha_optimizer=alpha_optimizer)

    def personal(params: PyTree) -> Personal:
        dtype = jnp.result_type(*jax.tree.leaves(params))
        check_scalar_optimizer(name, alpha_optimizer, _NO_SCALAR, dtype)
        return Personal(params, jnp.asarray(alpha, dtype), jnp.zeros((), bool))

    def client(server: Server, own: Personal, data: Client) -> ClientResult:
        def step(carry, batch, mask, key):
            (w, v, alpha), states, model_state, metrics = carry

            def personal_loss(v, alpha):
                return batch_loss(loss, _mixture(v, alpha, w), batch, mask, key, model_state)

            w_gradient, (seen, model_state_of_w) = batch_gradient(
                loss, w, batch, mask, key, model_state
            )
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
            metrics = optax.tree.add(metrics, _both(seen, seen_by_own))
            states = tuple(state for _, state in moves)
            return (w, v, jnp.clip(alpha, 0, 1)), states, model_state_of_w, metrics

        w, model_state = server.params, server.model_state
        optimizers = (client_optimizer, client_optimizer, alpha_optimizer)
        start = (w, _local_model(own, w), own.alpha)
        states = tuple(optimizer.init(x) for optimizer, x in zip(optimizers, start))
        nothing = no_metrics(loss, w, data, model_state)
        (w, v, alpha), _, model_state, metrics = data.scan(
            step, (start, states, model_state, _both(nothing, nothing))
        )
        update = optax.tree.sub(w, server.params)
        own = Personal(v, alpha, jnp.ones((), bool))
        return ClientResult(update, {**metrics, "alpha": alpha}, model_state, own=own)

    def models(state: State) -> PyTree:
        def mixture(own: Personal) -> PyTree:
            return _mixture(_local_model(own, state.params), own.alpha, state.params)

        assert state.clients is not None
        return jax.vmap(mixture)(state.clients.rows)

    return federated(
        name,
        loss,
        client,
        server_optimizer,
        client_state=personal,
        num_clients=num_clients,
        models=models,
        aggregator=aggregator,
        vectorize=vectorize,
    )


def _local_model(own: Personal, params: PyTree) -> PyTree:
    return jax.tree.map(lambda v, w: jnp.where(own.started, v, w), own.params, params)


def _mixture(v: PyTree, alpha: jax.Array, w: PyTree) -> PyTree:
    def mix(v, w):
        share = alpha.astype(w.dtype)
        return share * v + (1 - share) * w

    return jax.tree.map(mix, v, w)


def _both(seen: Metrics, seen_by_own: Metrics) -> Metrics:
    """The global model's metrics, and those of the mixture over the same examples."""
    own = {f"personal/{name}": total for name, total in seen_by_own.items()}
    if taken := ({*own, "alpha"} & seen.keys()):
        raise ValueError(
            f"apfl: loss returned a metric {min(taken)!r}, which is what one of apfl's is called. "
            "Call it something else."
        )
    return {**seen, **own}
