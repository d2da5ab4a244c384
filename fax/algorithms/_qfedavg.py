"""q-FedAvg: clients with a larger loss get a larger weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

import fax
from fax import _arguments
from fax.aggregators import Aggregator
from fax.aggregators._norms import widened
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._checks import arguments, check_private
from fax.algorithms._exchange import ClientResult, Received, Server, State
from fax.algorithms._federated import federated
from fax.algorithms._local import local_steps
from fax.algorithms._loss import batch_loss
from fax.data import Client


def qfedavg(
    loss: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    q: Any,
    lipschitz: Any,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """q-FedAvg: fair federated averaging, which minimizes the sum of a power of clients' losses.

    It minimizes the sum of F_k(x)^(q+1) / (q + 1) over clients k, where F_k is a client's mean
    loss. Every client of the cohort computes F_k at the server's parameters x. Then it takes a step
    of its optimizer on each of its batches, from x to y_k:

        u_k = L (x - y_k)        h_k = q F_k^(q-1) ‖u_k‖^2 + L F_k^q
        D = - sum_k F_k^q u_k / sum_k h_k        x' = server_optimizer(x, gradient = -D)

    L is the Lipschitz constant of the gradient of F_k, and h_k bounds that of F_k^(q+1) / (q + 1).
    With q = 0, this is `fedavg` with equal weights. The larger q is, the more equal losses become.

    Losses are measured in units of their mean in the last round, which does not change D. Otherwise
    F_k^q would vanish for small losses, or be infinite for large ones: with q = 15, those below
    0.003 or above 370. In the first round the unit is 1.

    Args:
      loss: see `fedavg`. If F_k is negative for any client, the model becomes NaN.
      client_optimizer, server_optimizer, vectorize: as for `fedavg`.
      q: at least 0; the paper tries 0.001 to 15. It may be traced.
      lipschitz: L, positive; 1 over the learning rate that is best for q = 0. It may be traced.
      aggregator: from `fax.aggregators`, for the updates -F_k^q u_k / h_k, with weights h_k, in
        which F_k^q is in the unit. Default: their mean, D. It cannot be private: a private one
        gives all clients equal weights.

    Returns:
      The algorithm, with the metrics of `fedavg`. In its `State`, ``server`` is the unit of losses.

    Raises:
      ValueError: if ``q`` or ``lipschitz`` is out of range or ``aggregator`` is private; also as
        `fedavg`.

    References:
      Li et al., Fair resource allocation in federated learning, arXiv:1905.10497, Algorithm 2.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2 / 2
      >>> data = fax.data.InMemory({str(x): {"x": jnp.full(2, x)} for x in (0.0, 0.1, 1.0)})
      >>> for q in (0, 9):  # the mean over clients, and nearly minimax
      ...     algorithm = fax.algorithms.qfedavg(loss, optax.sgd(0.1), q=q, lipschitz=10.0)
      ...     rounds = fax.data.cohorts(data, clients=3, batch_size=2)
      ...     state, _ = fax.algorithms.many_rounds(algorithm, algorithm.init(0.0), rounds, 300)
      ...     print(f"{algorithm.params(state):.2f}")
      0.37
      0.50
    """
    name = "fax.algorithms.qfedavg"
    _arguments.number(name, "q", q, least=0)
    _arguments.number(name, "lipschitz", lipschitz, above=0)
    arguments(name, loss, client_optimizer=client_optimizer)
    check_private(name, aggregator, "clients send weights that depend on their losses")

    def client(server: Server, own: None, data: Client) -> ClientResult:
        def measure(total: Any, batch: Any, mask: jax.Array, key: jax.Array) -> Any:
            _, (metrics, _) = batch_loss(loss, x, batch, mask, key, state)
            return optax.tree.add(total, metrics["loss"])

        x, state = server.params, server.model_state
        trained = local_steps(loss, client_optimizer, x, data, state)
        nothing = optax.tree.zeros_like(trained.metrics["loss"])
        seen = data.scan(measure, nothing, first=len(data.mask))  # after the keys of the steps
        f = seen.total / jnp.maximum(seen.weight, 1)
        some = f != 0  # negative powers of 0 are infinite
        safe = jnp.where(some, jnp.where(f < 0, jnp.nan, f), 1)
        relative = safe / lax.stop_gradient(server.state)
        power = jnp.where(some, relative**q, jnp.where(jnp.equal(q, 0), 1.0, 0.0))
        update = optax.tree.sub(trained.params, x)
        square = lipschitz**2 * optax.tree.norm(widened(update), squared=True)
        bound = lipschitz + jnp.where(some, q * square / safe, 0)  # h_k is F_k^q times this
        weight = jnp.where(seen.weight > 0, power * bound, 0)
        update = optax.tree.cast_like(optax.tree.scale(lipschitz / bound, update), x)
        return ClientResult(update, trained.metrics, trained.model_state, weight, extra=seen)

    def server(state: State, received: Received, step: Callable) -> tuple[State, dict]:
        seen = fax.sum(received.results.extra, where=received.finite)
        mean = seen.total / jnp.maximum(seen.weight, 1)
        unit = jnp.where(jnp.isfinite(mean) & (mean > 0), mean, state.server)
        return step(received.update)._replace(server=unit.astype(state.server.dtype)), {}

    def unit_of(params: Any) -> jax.Array:
        return jnp.ones((), jnp.result_type(jnp.float32, *jax.tree.leaves(params)))

    return federated(
        *(name, loss, client, server_optimizer),
        server=server,
        server_state=unit_of,
        aggregator=aggregator,
        vectorize=vectorize,
    )
