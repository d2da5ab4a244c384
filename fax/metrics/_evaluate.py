"""Evaluation as a federated program: on the examples of all clients, or of each client."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from fax import _arguments, _functions
from fax.data._check_examples import check_federated
from fax.data._protocol import FederatedData
from fax.metrics._classification import Metric
from fax.metrics._names import Metrics, named_metrics
from fax.metrics._packing import Prepared
from fax.metrics._programs import NON_FINITE, warn_if_recompiled
from fax.metrics._runs import run_batches, run_personal

PyTree = Any
Apply = Callable[[PyTree, Any], jax.Array]


def evaluate(
    apply: Apply,
    params: PyTree,
    data: FederatedData | Prepared,
    metrics: Metrics,
    *,
    batch_size: int | None = None,
    placement: str = "clients",
) -> dict[str, Any]:
    """Evaluates a model on the examples of all clients, all with equal weights.

    Examples of different clients are packed into the same batches, so small clients cost no more
    than large ones, and only one shape is compiled. Each device along the mesh axes of
    ``placement`` has one batch at a time.

    Counts and other integers are exact, up to 63 bits. Floats are summed with the precision of
    float32 or better, even if the metric returns half precision.

    Args:
      apply: ``apply(params, batch) -> scores``, such as that of a `fax.models.Model`. The same
        function and metrics are compiled only once. A function defined in the call, such as a
        lambda, is compiled in each call. So define it once, outside of loops.
      params: the model's parameters.
      data: the clients. `fax.data.split` holds out clients for evaluation. For repeated evaluation
        pass what `fax.metrics.prepare` returns for them.
      metrics: by name, functions ``metric(batch, scores)`` that return a statistic for each
        example: a `Mean` or `Sum` with leaves [batch, ...]. Those of `fax.metrics`, or your own.
        Names can stand for metrics without arguments, ``["accuracy", "f1"]``.
      batch_size: the largest number of examples in a batch. Default: 256.
      placement: the placement over whose mesh axes batches are spread.

    Returns:
      The results of the metrics, by name, as NumPy numbers or arrays; and ``"non_finite"``, the
      number of examples with a score of NaN or +inf (-inf is a valid score, for the impossible).

    Raises:
      ValueError: if ``apply``, ``params`` or a metric cannot be used, there is no metric, one is
        named ``"non_finite"``, or ``batch_size`` is not a positive int.
      DataError: if a client has no examples, other features than the first client, or labels that
        are out of range. The message names the client and the feature.

    Example:

      >>> data = fax.data.InMemory(
      ...     {
      ...         "ann": {"x": jnp.eye(3), "y": jnp.arange(3)},
      ...         "bob": {"x": jnp.eye(1, 3), "y": jnp.array([1])},
      ...     }
      ... )
      >>> apply = lambda params, batch: batch["x"] @ params
      >>> results = fax.metrics.evaluate(
      ...     apply, jnp.eye(3), data, {"accuracy": fax.metrics.Accuracy()}
      ... )
      >>> print(results["accuracy"])
      0.75
    """
    totals = _Totals()
    where = "fax.metrics.evaluate"
    _check_order(where, apply, params, data)
    _arguments.text(where, "placement", placement, "the name of a placement")
    named = named_metrics(where, metrics)
    warn_if_recompiled(where, apply, named)
    for stats, _ in run_batches(where, apply, params, data, named, batch_size, placement, False):
        totals.add(stats)
    return totals.results(named)


def evaluate_clients(
    apply: Apply,
    params: PyTree,
    data: FederatedData | Prepared,
    metrics: Metrics,
    *,
    personal: bool = False,
    batch_size: int | None = None,
    placement: str = "clients",
) -> dict[str, Any]:
    """Evaluates one model on each client's examples, or each client's own model.

    For a global model, batches contain examples of different clients, as in
    `fax.metrics.evaluate`. With ``personal=True``, each device along the mesh axes of ``placement``
    evaluates different clients, one at a time.

    Args:
      apply: ``apply(params, batch) -> scores``.
      params: the model's parameters. If ``personal``, leaves have a leading axis [clients], in
        the order of ``data.client_ids()``.
      data: the clients, or what `fax.metrics.prepare` returns for them.
      metrics: by name; see `fax.metrics.evaluate`.
      personal: whether each client has its own model.
      batch_size: the largest number of examples in a batch. Default: 256.
      placement: the placement over whose mesh axes batches or clients are spread.

    Returns:
      The results of the metrics, by name, as NumPy arrays [clients, ...] in the order of
      ``data.client_ids()``; and ``"non_finite"``, see `fax.metrics.evaluate`.

    Raises:
      ValueError: as in `fax.metrics.evaluate`; with ``personal=True``, also if a leaf of ``params``
        does not have a row for each client.
      DataError: as in `fax.metrics.evaluate`.

    Example:

      >>> data = fax.data.InMemory(
      ...     {
      ...         "ann": {"x": jnp.eye(3), "y": jnp.arange(3)},
      ...         "bob": {"x": jnp.eye(1, 3), "y": jnp.array([1])},
      ...     }
      ... )
      >>> apply = lambda params, batch: batch["x"] @ params
      >>> metrics = {"accuracy": fax.metrics.Accuracy()}
      >>> fax.metrics.evaluate_clients(apply, jnp.eye(3), data, metrics)["accuracy"]
      array([1., 0.])
      >>> own = jnp.stack([jnp.eye(3), jnp.roll(jnp.eye(3), 1, axis=1)])
      >>> fax.metrics.evaluate_clients(apply, own, data, metrics, personal=True)["accuracy"]
      array([1., 1.])
    """
    where = "fax.metrics.evaluate_clients"
    _check_order(where, apply, params, data)
    _arguments.flag(where, "personal", personal)
    _arguments.text(where, "placement", placement, "the name of a placement")
    named = named_metrics(where, metrics)
    warn_if_recompiled(where, apply, named)
    totals = _Totals(len(data))
    run = run_personal if personal else run_batches
    for stats, positions in run(where, apply, params, data, named, batch_size, placement, True):
        totals.add(stats, positions)
    return totals.results(named)


class _Totals:
    """Statistics of all clients together, or of each client, summed on the host in 64 bits."""

    def __init__(self, clients: int | None = None) -> None:
        self.clients = clients
        self.stats: Any = None

    def add(self, stats: PyTree, positions: np.ndarray | None = None) -> None:
        """Adds statistics, which have a leading axis of clients if positions are passed."""
        if self.clients is None:
            self.stats = stats if self.stats is None else jax.tree.map(np.add, self.stats, stats)
            return
        if self.stats is None:
            shape = (self.clients,)
            self.stats = jax.tree.map(lambda x: np.zeros(shape + x.shape[1:], x.dtype), stats)
        jax.tree.map(lambda total, x: np.add.at(total, positions, x), self.stats, stats)

    def results(self, metrics: Mapping[str, Metric]) -> dict[str, Any]:
        assert self.stats is not None
        return {name: self.stats[name].result() for name in (*metrics, NON_FINITE)}


def _check_order(where: str, apply: Any, params: Any, data: Any) -> None:
    """Checks the first arguments, whose order is easily confused."""
    form = {2: "apply(params, batch)"}
    order = f" The order is {where.rpartition('.')[2]}(apply, params, data, metrics)."
    try:
        _functions.function(where, "apply", apply, form)
        _arguments.arrays(f"{where}: params", params, keys=True)
        if not isinstance(data, Prepared):
            check_federated(where, "data", data)
    except ValueError as error:
        raise type(error)(f"{error}{order}") from None
