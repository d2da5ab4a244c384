"""Adaptive personalized federated learning: clients mix local models with the server's."""

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
from fax.algorithms._exchange import ClientResult, Server, State
from fax.algorithms._federated import federated
from fax.algorithms._loss import batch_gradient, batch_loss, no_metrics
from fax.algorithms._metrics import with_personal
from fax.data import Client

PyTree = Any


_NO_SCALAR = (
    "alpha_optimizer, which defaults to client_optimizer, does not work on alpha, a scalar. If "
    "client_optimizer depends on the leaves of the parameters, as with optax.multi_transform or "
    "optax.masked, pass another optimizer for alpha, such as alpha_optimizer=optax.sgd(0.1)."
)


class Personal(NamedTuple):
    """What a client of `apfl` keeps: its local model and its share in the mixture.

    Attributes:
      params: v, its local model.
      alpha: the share of the local model in the mixture, from 0 to 1, in at least float32.
      started: whether it has taken a step. Until then, its local model is the server's.
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
    the global model, m_i = alpha_i v_i + (1 - alpha_i) w. In a round it starts from the server's w.
    On each of its batches it takes these steps, where f is the mean loss of the batch:

        w_i     <- w_i - rate grad f(w_i)
        v_i     <- v_i - rate alpha_i grad f(m_i)
        alpha_i <- alpha_i - rate <v_i - w_i, grad f(m_i)>,  clipped to [0, 1]

    All three use the values from before the step. The second line has the derivative of f(m_i) with
    respect to v_i; FedJAX leaves out its factor alpha_i. The server averages the w_i as `fedavg`
    does, so the global model is that of `fedavg` with the same arguments, for any alphas.

    Args:
      loss: see `fedavg`. A model's state comes from training w_i. The mixture is trained with the
        same state, and should be evaluated with it.
      client_optimizer: from optax, for w_i and v_i. Its states are reset for each client in each
        round.
      server_optimizer: from optax. Default: ``optax.sgd(1.0)``.
      num_clients: the number of clients in the data, ``len(data)``.
      alpha: the initial value for every client, from 0 to 1.
      alpha_optimizer: from optax, for alpha_i, a scalar. Default: ``client_optimizer``. With
        ``optax.set_to_zero()`` alpha is constant.
      aggregator: as for `fedavg`, for the updates of w. A private one protects w, and what other
        clients see. It does not protect v_i and alpha_i, which stay with their client.
      vectorize: as for `fedavg`.

    Returns:
      The algorithm. ``init(params, model_state=None)`` makes its `State`, whose ``clients`` are
      `Personal`. A client's local model is the server's until its first step.
      ``params(state)`` is the global model, and ``models(state)`` are the mixtures, leaves
      [num_clients, ...], which `fax.metrics.evaluate_clients` evaluates with ``personal=True``. If
      so many models do not fit in memory, see `ClientStore`. Metrics are those of `fedavg` for the
      global model; ``"personal/..."``, the same for the mixtures; and ``"clients/alpha"`` after the
      round.

    Raises:
      ValueError: if ``num_clients`` is not a positive int or ``alpha`` is not from 0 to 1; in a
        round, if the cohort has more clients.

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
        # Steps of alpha are small, and one number more takes no memory.
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
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
            metrics = optax.tree.add(metrics, with_personal("apfl", seen, seen_by_own, "alpha"))
            states = tuple(state for _, state in moves)
            return (w, v, jnp.clip(alpha, 0, 1)), states, model_state_of_w, metrics

        w, model_state = server.params, server.model_state
        optimizers = (client_optimizer, client_optimizer, alpha_optimizer)
        start = (w, optax.tree.where(own.started, own.params, w), own.alpha)
        states = tuple(optimizer.init(x) for optimizer, x in zip(optimizers, start))
        nothing = no_metrics(loss, w, data, model_state)
        (w, v, alpha), _, model_state, metrics = data.scan(
            step, (start, states, model_state, with_personal("apfl", nothing, nothing))
        )
        update = optax.tree.sub(w, server.params)
        own = Personal(v, alpha, own.started | jnp.any(data.mask))
        return ClientResult(update, {**metrics, "alpha": alpha}, model_state, own=own)

    def models(state: State) -> PyTree:
        def mixture(own: Personal) -> PyTree:
            w = state.params
            return _mixture(optax.tree.where(own.started, own.params, w), own.alpha, w)

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


def _mixture(v: PyTree, alpha: jax.Array, w: PyTree) -> PyTree:
    def mix(v, w):
        share = alpha.astype(w.dtype)
        return share * v + (1 - share) * w

    return jax.tree.map(mix, v, w)
