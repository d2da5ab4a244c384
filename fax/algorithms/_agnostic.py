"""Agnostic federated averaging: domains with larger losses get larger weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import fax
from fax import _arguments
from fax.aggregators import Aggregator
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._checks import arguments
from fax.algorithms._exchange import ClientResult, Received, Server, State
from fax.algorithms._federated import federated
from fax.algorithms._local import local_steps
from fax.algorithms._loss import examples_of, no_metrics, per_example
from fax.data import Client

PyTree = Any
WHERE = "fax.algorithms.agnostic_fedavg"


class Domains(NamedTuple):
    """What the server of `agnostic_fedavg` keeps about the domains.

    Attributes:
      weights: lambda, [num_domains].
      window: the number of examples of each domain in the last rounds, [window, num_domains].
    """

    weights: jax.Array
    window: jax.Array


def agnostic_fedavg(
    loss: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    num_domains: int,
    domain_learning_rate: float,
    domain: str = "domain",
    domain_weights: Sequence[float] | None = None,
    domain_counts: Sequence[float] | None = None,
    window: int = 1,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """Agnostic federated averaging (AFL, AgnosticFedAvg): trains for the worst mixture of domains.

    Examples belong to domains, such as languages, whose proportions may change when the model is
    used. So it minimizes, over x, the maximum over mixtures lambda of sum_i lambda_i F_i(x), where
    F_i is the mean loss of domain i. In a round every client k counts its examples of each domain,
    N_i^k, and adds up their losses L_i^k at the server's parameters x. It trains on examples
    weighted by their domain, and its update has the weight beta^k:

        alpha_i = lambda_i / (mean of N_i over the last ``window`` rounds)
        beta^k = sum_i alpha_i N_i^k
        objective of a batch b of client k:  n_k / beta^k  mean_{j in b} alpha_{d_j} loss_j(y)
        D = sum_k beta^k (y^k - x) / sum_k beta^k        x' = server_optimizer(x, gradient = -D)

    Then the server updates lambda by exponentiated gradient ascent on the domains' mean losses:

        F_i = sum_k L_i^k / sum_k N_i^k        lambda_i' ~ lambda_i exp(domain_learning_rate F_i)

    With one domain it is `fedavg`. The paper divides the sum over a batch by beta^k, so steps get
    smaller the more batches a client has; the factor n_k and the mean avoid this. A domain without
    examples in a round keeps its weight, and also its counts if its window would be empty.

    Args:
      loss: see `fedavg`.
      client_optimizer: from optax. Its state is reset for each client in each round.
      server_optimizer: from optax. Default: ``optax.sgd(1.0)``.
      num_domains: the number of domains.
      domain_learning_rate: the step size of the exponentiated gradient. With 0, lambda is constant.
      domain: the feature that holds each example's domain, ints [batch] from 0 to
        ``num_domains - 1``. An example of another domain makes the model NaN.
      domain_weights: the initial lambda, numbers that add up to 1. Default: all equal.
      domain_counts: the numbers of examples of each domain to assume before the first round.
        Only their ratios matter in the first round. Default: 1 each.
      window: the number of rounds over which the numbers of examples are averaged.
      aggregator: as for `fedavg`; its weights are beta^k. It cannot be private, because the counts
        and losses of domains do not go through it.
      vectorize: as for `fedavg`.

    Returns:
      The algorithm. ``init(params, model_state=None)`` makes its `State`, whose ``server`` is
      `Domains`. Metrics are those of `fedavg`, unweighted; ``"domains/loss"``, F [num_domains],
      NaN for a domain without examples; and ``"domains/weight"``, the lambda of the round.

    Raises:
      ValueError: if an argument is out of range or ``aggregator`` is private; in a round, if the
        feature is missing or is not ints [batch].

    References:
      Mohri et al., Agnostic federated learning, arXiv:1902.00146. Ro et al.,
      Communication-efficient agnostic federated averaging, arXiv:2104.02748.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2
      >>> algorithm = fax.algorithms.agnostic_fedavg(
      ...     loss, optax.sgd(0.1), num_domains=2, domain_learning_rate=0.5
      ... )
      >>> common = {"x": jnp.ones(8), "domain": jnp.zeros(8, int)}
      >>> rare = {"x": jnp.zeros(1), "domain": jnp.ones(1, int)}
      >>> data = fax.data.InMemory({"ann": common, "bob": rare})
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=8)
      >>> state = algorithm.init(jnp.zeros(()))
      >>> for _ in range(100):
      ...     state, metrics = jax.jit(algorithm.round)(state, next(rounds))
      >>> print(round(float(algorithm.params(state)), 2))  # not 8/9, the mean of all examples
      0.5
    """
    _arguments.count(WHERE, "num_domains", num_domains)
    _arguments.count(WHERE, "window", window)
    start = _numbers("domain_weights", domain_weights, num_domains, 1 / num_domains)
    counts = _numbers("domain_counts", domain_counts, num_domains, 1.0)
    if _arguments.concrete(start) and (np.min(start) < 0 or abs(np.sum(start) - 1) > 1e-5):
        raise ValueError(
            f"{WHERE}: domain_weights is {domain_weights!r}, expected nonnegative numbers that "
            "add up to 1."
        )
    if _arguments.concrete(counts) and not np.all(np.asarray(counts) > 0):
        raise ValueError(f"{WHERE}: domain_counts is {domain_counts!r}, expected positive numbers.")
    _arguments.number(WHERE, "domain_learning_rate", domain_learning_rate, least=0)
    _arguments.text(WHERE, "domain", domain, "the name of a feature")
    arguments(WHERE, loss, client_optimizer=client_optimizer)

    def domains(params: PyTree) -> Domains:
        dtype = jnp.promote_types(jnp.result_type(*jax.tree.leaves(params)), jnp.float32)
        seen = jnp.tile(jnp.asarray(counts, dtype), (window, 1))
        return Domains(jnp.asarray(start, dtype), seen)

    def client(server: Server, own: None, data: Client) -> ClientResult:
        params, model_state = server.params, server.model_state
        alpha = server.state.weights / jnp.mean(server.state.window, 0)

        def measure(totals, batch, mask, key):
            values, _ = per_example(loss, params, model_state, batch, mask, key)
            number = _domain_of(batch, domain, mask)
            mine = mask[:, None] & (number[:, None] == jnp.arange(num_domains))
            strange = jnp.any(mask & ((number < 0) | (number >= num_domains)))
            losses = jnp.sum(jnp.where(mine, values["loss"][:, None], 0), 0, dtype)
            found = jnp.where(strange, jnp.nan, jnp.sum(mine, 0, dtype))
            return totals[0] + losses, totals[1] + found

        dtype = examples_of(no_metrics(loss, params, data, model_state)).dtype
        nothing = jnp.zeros(num_domains, dtype)
        losses, found = data.scan(measure, (nothing, nothing))
        # Not of `found`: an example of an unknown domain has to show, as NaN.
        finite = jnp.isfinite(losses).all()
        # Batches may hold each example several times, or only some of them.
        share = data.num_examples / jnp.maximum(jnp.sum(found), 1)
        losses, found = losses * share, found * share
        beta = jnp.sum(alpha.astype(dtype) * found)
        scale = jnp.where(beta == 0, 0, data.num_examples / jnp.where(beta == 0, 1, beta))

        def weights(batch: Mapping[str, jax.Array]) -> jax.Array:
            return (alpha * scale)[batch[domain]]

        trained = local_steps(
            loss, client_optimizer, params, data, model_state, example_weights=weights
        )
        return ClientResult.of(trained, server, weight=beta, extra=(losses, found, finite))

    def server(state: State, received: Received, step: Callable) -> tuple[State, dict]:
        losses, counts, finite = received.results.extra
        # `fax.aggregators.non_finite` may leave out clients whose loss is NaN.
        losses, counts = fax.sum((losses, counts), where=finite)
        before = state.server
        seen = counts != 0
        losses = losses / jnp.where(seen, counts, 1)
        weights = _ascend(before.weights, losses, seen, domain_learning_rate)
        window = jnp.concatenate([before.window[1:], counts[None]])
        window = jnp.where(jnp.any(window != 0, 0), window, before.window)
        after = Domains(weights, window.astype(before.window.dtype))
        metrics = {
            "domains/loss": jnp.where(seen, losses, jnp.nan),
            "domains/weight": before.weights,
        }
        return step(received.update)._replace(server=after), metrics

    return federated(
        WHERE,
        loss,
        client,
        server_optimizer,
        server=server,
        server_state=domains,
        not_private="losses and counts of domains are summed over clients",
        aggregator=aggregator,
        vectorize=vectorize,
    )


def _ascend(weights: jax.Array, losses: jax.Array, seen: jax.Array, rate: Any) -> jax.Array:
    """Exponentiated gradient ascent on the weights of the domains that have a loss."""
    exponents = rate * losses
    # Scale the largest factor to 1, so that nothing overflows. Ratios do not change.
    largest = lax.stop_gradient(jnp.max(jnp.where(seen & (weights > 0), exponents, -jnp.inf)))
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    moved = jnp.where(seen, weights * jnp.exp(jnp.where(seen, exponents - largest, 0)), 0)
    total, before = jnp.sum(moved), jnp.sum(jnp.where(seen, weights, 0))
    moved = moved * jnp.where(total == 0, 0, before / jnp.where(total == 0, 1, total))
    return jnp.where(seen, moved, weights).astype(weights.dtype)


def _domain_of(batch: Mapping[str, jax.Array], domain: str, mask: jax.Array) -> jax.Array:
    found = batch.get(domain) if isinstance(batch, Mapping) else None
    if found is None:
        features = ", ".join(map(repr, batch)) if isinstance(batch, Mapping) else type(batch)
        raise ValueError(
            f"{WHERE}: domain={domain!r} is not among the features of a batch, {features}. Use "
            "fax.data.map to add the domain of each example, or pass the feature's name."
        )
    if found.shape != mask.shape or not jnp.issubdtype(found.dtype, jnp.integer):
        raise ValueError(
            f"{WHERE}: feature {domain!r} is {found.dtype}{list(found.shape)} in a batch, expected "
            f"ints of shape {list(mask.shape)}: the domain of each example."
        )
    return found


def _numbers(name: str, given: Any, num_domains: int, default: float) -> Any:
    if given is None:
        return np.full(num_domains, default)
    return _arguments.numbers(WHERE, name, given, num_domains, "a number for each of num_domains")
