"""FedPer and FedBN: federated averaging where a part of the model stays with each client."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import optax

from fax.aggregators import Aggregator
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._checks import arguments
from fax.algorithms._fedavg import averaging
from fax.algorithms._personal import personal_parts


def fedper(
    loss: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    personal: str | Sequence[str] | Callable[[str], bool],
    num_clients: int,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """FedPer: federated averaging of base layers, with personal layers on top of them.

    Each client trains the shared parameters u and its own v_i together, sends the update of u, and
    keeps v_i. This is `fedavg` with the loss

        personal_parts(loss, personal, client_optimizer, num_clients=num_clients)

    Use `personal_parts` itself for algorithms other than `fedavg`, or another optimizer for v_i.

    Args:
      loss: see `fedavg`.
      client_optimizer: from optax, for both parts, with a separate state for each.
      server_optimizer: from optax. Default: ``optax.sgd(1.0)``.
      personal: what stays with clients, such as ``"head"``; see ``parts`` of `personal_parts`.
      num_clients: the number of clients in the data, ``len(data)``.
      aggregator: as for `fedavg`, for the updates of u.
      vectorize: as for `fedavg`.

    Returns:
      The algorithm, as described in `personal_parts`. Metrics are those of `fedavg`.

    Raises:
      ValueError: as `personal_parts` and `fedavg`.

    References:
      Arivazhagan et al., Federated learning with personalization layers, arXiv:1912.00818. In the
      paper, the v_i start at random. Here, all start from those passed to ``init``.

    Example:

      >>> import optax
      >>> def loss(params, batch, key):
      ...     return (params["base"] * params["head"] - batch["x"]) ** 2 / 2
      >>> algorithm = fax.algorithms.fedper(loss, optax.sgd(0.1), personal="head", num_clients=2)
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(3)}, "bob": {"x": -jnp.ones(3)}})
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=3)
      >>> state = algorithm.init({"base": jnp.ones(()), "head": jnp.zeros(())})
      >>> state, _ = fax.algorithms.many_rounds(algorithm, state, rounds, 200)
      >>> models = algorithm.models(state)
      >>> print((models["base"] * models["head"]).round(2))
      [ 1. -1.]
    """
    name = "fax.algorithms.fedper"
    arguments(name, loss, client_optimizer=client_optimizer)
    loss = personal_parts(loss, personal, client_optimizer, num_clients=num_clients)
    return averaging(name, loss, client_optimizer, server_optimizer, aggregator, vectorize)


def fedbn(
    loss: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    num_clients: int,
    layers: str | Sequence[str] | Callable[[str], bool] | None = None,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """FedBN: federated averaging where batch normalization stays with each client.

    It is `fedper` whose personal layers are the batch norms: their scales and biases, which are
    parameters, and their means and variances, which are in the model's state. It helps if the
    features of clients are shifted or scaled differently, as with images from different cameras.
    With it, models with batch norms can also be trained with a private aggregator.

    Args:
      loss: ``loss(params, model_state, batch, key, mask) -> (losses, metrics, model_state)``; see
        `fedavg`.
      client_optimizer: as for `fedper`.
      server_optimizer: from optax. Default: ``optax.sgd(1.0)``.
      num_clients: the number of clients in the data, ``len(data)``.
      layers: which layers stay with clients, such as ``"*/norm_?"``; see ``parts`` of
        `personal_parts`. Default: the layers that have statistics.
      aggregator: as for `fedavg`, for the updates of the other layers.
      vectorize: as for `fedavg`.

    Returns:
      The algorithm, as described in `personal_parts`. `personal_state` returns the clients'
      statistics. Metrics are those of `fedavg`.

    Raises:
      ValueError: as `personal_parts` and `fedavg`.

    References:
      Li et al., FedBN: federated learning on non-IID features via local batch normalization,
      arXiv:2102.07623.

    Example:

      >>> import optax
      >>> def loss(params, model_state, batch, key, mask):
      ...     mean = jnp.mean(batch["x"], where=mask)
      ...     scores = (batch["x"] - mean) * params["norm"]["scale"] + params["out"]
      ...     statistics = jax.tree.map(lambda old: (old + mean) / 2, model_state)
      ...     return (scores - 1) ** 2, {}, statistics
      >>> algorithm = fax.algorithms.fedbn(loss, optax.sgd(0.1), num_clients=2)
      >>> data = fax.data.InMemory({n: {"x": n + jnp.arange(3.0)} for n in (0, 10)})
      >>> params = {"norm": {"scale": jnp.ones(())}, "out": jnp.zeros(())}
      >>> state = algorithm.init(params, {"norm": {"mean": jnp.zeros(())}})
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=3)
      >>> state, _ = fax.algorithms.many_rounds(algorithm, state, rounds, 200)
      >>> print(state.params["out"].round(2), fax.algorithms.personal_state(state)["norm"]["mean"])
      1.0 [ 1. 11.]
    """
    name = "fax.algorithms.fedbn"
    arguments(name, loss, client_optimizer=client_optimizer)
    loss = personal_parts(loss, layers, client_optimizer, num_clients=num_clients)
    return averaging(name, loss, client_optimizer, server_optimizer, aggregator, vectorize)
