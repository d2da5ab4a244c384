"""Evaluation as a federated program: of all clients' examples together, or of each client's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from fax import _arguments
from fax.data._check import federated
from fax.data._cohorts import cohorts
from fax.data._features import Reader
from fax.data._protocol import DataError, FederatedData
from fax.data._views import map as map_clients
from fax.metrics._classes import Metric, limits_of
from fax.metrics._programs import (
    NON_FINITE,
    notice,
    scores_of,
    stats_of_clients,
    stats_of_rows,
    values,
)
from fax.metrics._rows import Check, Layout, Prepared, Rows, batch_size_of
from fax.sharding._spread import spread_in_scope

PyTree = Any
Apply = Callable[[PyTree, Any], jax.Array]
Metrics = Mapping[str, Metric]
Named = tuple[tuple[str, Metric], ...]

# Rounds that may be under way on the devices while the host prepares another.
_AHEAD = 2
# How many clients with models of their own come to the devices together.
_TOGETHER = 64


def evaluate(
    apply: Apply,
    params: PyTree,
    data: FederatedData | Prepared,
    metrics: Metrics,
    *,
    batch_size: int | None = None,
    placement: str = "clients",
) -> dict[str, Any]:
    """Evaluates a model on the examples of all clients, each of which counts the same.

    The examples come in batches that cross the borders of clients, one for each device along the
    mesh axes of ``placement`` at a time, so that small clients cost no more than large ones, and
    there is one shape to compile.

    Counts and other integers are exact, up to 63 bits. Floats are added up to the precision of
    float32 or better, those of half precision too.

    Args:
      apply: ``apply(params, batch) -> scores``, such as that of a `fax.models.Model`. The same
        function and metrics are compiled once. A function that is written in the call is a new one
        each time, and compiled each time: define it once, outside of the loop.
      params: the model's parameters.
      data: the clients; for those that training has not seen see `fax.data.split`. To evaluate on
        the same ones again and again, what `fax.metrics.prepare` made of them.
      metrics: by name, ``metric(batch, scores)``, which returns a statistic of each example: a
        `Mean` or `Sum` with leaves [batch, ...]. Functions, and those of `fax.metrics`.
      batch_size: the most examples a device works on at once. Default: 256.
      placement: the placement whose mesh axes batches are spread over.

    Returns:
      The metrics' results, by name: NumPy numbers, or arrays; and ``"non_finite"``, the number of
      examples that have a score which is NaN or +inf (-inf is the score of what is impossible).

    Raises:
      ValueError: if an argument is something else, there is no metric, one is named
        ``"non_finite"`` or returns something else, or ``batch_size`` is not a positive int.
      DataError: if a client has no or other examples than the rest, or labels out of range (the
        message names client and feature).

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
    notice(where, apply, metrics)
    for stats, _ in _run(where, apply, params, data, metrics, batch_size, placement, False):
        totals.add(stats)
    return totals.results(metrics)


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
    """Evaluates a model on each client's examples, or each client's own model.

    A global model is evaluated in batches that cross the borders of clients, as by
    `fax.metrics.evaluate`. Models of clients' own are evaluated client by client, each device along
    the mesh axes of ``placement`` for others.

    Args:
      apply: ``apply(params, batch) -> scores``.
      params: the model's parameters. If ``personal``, leaves have a leading axis [clients], in
        the order of ``data.client_ids()``.
      data: the clients, or what `fax.metrics.prepare` made of them.
      metrics: by name; see `fax.metrics.evaluate`.
      personal: whether each client has a model of its own.
      batch_size: the most examples a device works on at once. Default: 256.
      placement: the placement whose mesh axes the work is spread over.

    Returns:
      The metrics' results, by name: NumPy arrays [clients, ...], in the order of
      ``data.client_ids()``; and ``"non_finite"``, see `fax.metrics.evaluate`.

    Raises:
      ValueError: as `fax.metrics.evaluate`, and if a leaf of ``params`` has no row for each client.
      DataError: as `fax.metrics.evaluate`.

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
    notice(where, apply, metrics)
    totals = _Totals(len(data))
    run = _run_personal if personal else _run
    for stats, positions in run(where, apply, params, data, metrics, batch_size, placement, True):
        totals.add(stats, positions)
    return totals.results(metrics)


class _Totals:
    """Statistics added up on the host, in 64 bits, of everybody or of each client."""

    def __init__(self, clients: int | None = None):
        self.clients, self.stats = clients, None

    def add(self, stats: PyTree, positions: np.ndarray | None = None) -> None:
        """Adds statistics of 64 bits: of everybody, or with a leading axis, of clients."""
        if self.clients is None:
            self.stats = stats if self.stats is None else jax.tree.map(np.add, self.stats, stats)
            return
        if self.stats is None:
            shape = (self.clients,)
            self.stats = jax.tree.map(lambda x: np.zeros(shape + x.shape[1:], x.dtype), stats)
        jax.tree.map(lambda total, x: np.add.at(total, positions, x), self.stats, stats)

    def results(self, metrics: Metrics) -> dict[str, Any]:
        assert self.stats is not None
        return {name: self.stats[name].result() for name in (*metrics, NON_FINITE)}


def _run(where, apply, params, data, metrics, batch_size, placement, each):
    """Statistics of rows of examples: of all, or of each client, with their positions."""
    named = _named(where, data, metrics)
    spread = spread_in_scope(where, placement)
    params = jax.tree.map(jnp.asarray, params)
    if isinstance(data, Prepared):
        data.check_use(where, batch_size, spread)
        layout = data.layout
        check = _labels_in_range(apply, params, layout.reader, named)
        for client_id, extremes in data.extremes:
            check(client_id, extremes)
        all_rows: Iterable[Rows] = data.rows
    else:
        layout = Layout(where, data, batch_size, spread)
        all_rows = layout.rows(_labels_in_range(apply, params, layout.reader, named))
    slots = layout.slots if each else None

    def fetched(stats, first):
        stats = values(stats)
        if not each:
            return stats, None
        # A row's last slots may be nobody's: they are zeros then, which the last client gets.
        positions = np.minimum(first[:, None] + np.arange(layout.slots), len(layout.ids) - 1)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stats)
        return flat, positions.reshape(-1)

    under_way: deque = deque()
    for rows, first in zip(all_rows, layout.first):
        stats = stats_of_rows(apply, named, slots, placement, params, rows)
        under_way.append((stats, first))
        if len(under_way) > _AHEAD:
            yield fetched(*under_way.popleft())
    while under_way:
        yield fetched(*under_way.popleft())


# What is checked on the host


def _check_order(where: str, apply: Any, params: Any, data: Any) -> None:
    """Checks the first arguments, which are easily swapped."""
    form = {2: "apply(params, batch)"}
    order = f" The order is {where.rpartition('.')[2]}(apply, params, data, metrics)."
    try:
        _arguments.function(where, "apply", apply, form)
        _arguments.arrays(f"{where}: params", params, keys=True)
        if not isinstance(data, Prepared):
            federated(where, "data", data)
    except ValueError as error:
        raise type(error)(f"{error}{order}") from None


def _named(where: str, data: FederatedData | Prepared, metrics: Metrics) -> Named:
    if not len(data):
        raise DataError(f"{where}: data has no clients.")
    if not isinstance(metrics, Mapping) or not metrics:
        raise ValueError(
            f"{where}: metrics is {metrics!r:.80}, expected a mapping from names to metrics, such "
            "as {'accuracy': fax.metrics.Accuracy()}."
        )
    if NON_FINITE in metrics:
        raise ValueError(
            f"{where}: metrics has the name {NON_FINITE!r}, which is that of the number of "
            "examples whose scores are NaN or infinite. Choose another."
        )
    for name, metric in metrics.items():
        if not callable(metric) or isinstance(metric, type):
            raise ValueError(
                f"{where}: metric {name!r} is {metric!r:.80}, expected a function of a batch and "
                "scores, such as fax.metrics.Accuracy()."
            )
        _arguments.function(where, f"metric {name!r}", metric, {2: "metric(batch, scores)"})
    return tuple(metrics.items())


def _labels_in_range(apply: Apply, params: PyTree, reader: Reader, metrics: Named) -> Check:
    """A check of clients' labels, to be made when they are read."""
    features = reader.features
    batch = {name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in features.items()}
    scores = scores_of.eval_shape(apply, params, batch)
    if len(getattr(scores, "shape", ())) < 2:  # no classes: metrics say so that need some
        return lambda client_id, examples: examples
    limits: dict[str, int] = {}
    for name, metric in metrics:
        for feature, limit in limits_of(metric, scores.shape[-1]).items():
            if feature not in features:
                raise DataError(
                    f"metric {name!r} needs the feature {feature!r}, but clients have "
                    f"{sorted(features)}. Name another one, or make it by fax.data.map."
                )
            limits[feature] = min(limit, limits.get(feature, limit))

    def check(client_id, examples):
        for feature, limit in limits.items():
            labels = np.asarray(examples.get(feature, ()))
            if labels.size and labels.dtype.kind in "iu":
                low, high = labels.min(), labels.max()
                if low < 0 or high >= limit:
                    bad = low if low < 0 else high
                    raise DataError(
                        f"client {client_id!r}, feature {feature!r} has {bad}, expected numbers "
                        f"from 0 to {limit - 1}: there are {limit} of them, by the model's scores "
                        "or the metric."
                    )
        return examples

    return check


# Models of clients' own


def _run_personal(where, apply, params, data, metrics, batch_size, placement, each):
    """Statistics of clients, each of its own model, with their positions."""
    named = _named(where, data, metrics)
    if isinstance(data, Prepared):
        raise ValueError(
            f"{where}: personal=True takes clients one by one, and not what fax.metrics.prepare "
            "made of them. Pass the data themselves."
        )
    batch_size = batch_size_of(where, batch_size)
    clients = len(data)
    params = jax.tree.map(jnp.asarray, params)
    for path, leaf in tree_leaves_with_path(params):
        if not leaf.ndim or len(leaf) != clients:
            raise ValueError(
                f"{where}: params{keystr(path)} has shape {leaf.shape}, expected a row for each of "
                f"the {clients} clients, as personal=True says. For one model of all clients leave "
                "it out."
            )
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
    reader = Reader(data, data.client_ids()[0])
    data = map_clients(data, _labels_in_range(apply, one, reader, named))
    counts = np.array([data.num_examples(i) for i in data.client_ids()])
    ways = spread_in_scope(where, placement).ways
    size = min(clients, -(-_TOGETHER // ways) * ways)
    # Clients of about the same length come together. The last ones are not fewer, some of them
    # come twice.
    order = np.argsort(-counts, kind="stable")
    groups = [min(start, clients - size) for start in range(0, clients, size)]
    batches = cohorts(
        data,
        size,
        min(batch_size, int(counts.max())),
        shuffle=False,
        sampler=lambda number: order[groups[number] : groups[number] + size].tolist(),
        resident=False,
        placement=placement,
        prefetch=1,
    )
    seen = np.zeros(clients, bool)
    with batches:
        for _ in groups:
            cohort = next(batches)
            stats = values(stats_of_clients(apply, named, placement, params, cohort))
            positions = np.asarray(cohort.positions)
            new = ~seen[positions]
            seen[positions] = True
            yield jax.tree.map(lambda x, new=new: x[new], stats), positions[new]
