"""How evaluation goes through the data: batch by batch, or client by client for personal models."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from fax import _functions
from fax.data._client_reader import ClientReader
from fax.data._cohorts import cohorts
from fax.data._mapped import map as map_clients
from fax.data._protocol import DataError, Examples, FederatedData
from fax.metrics._classification import Metric, ignored_by, limits_of
from fax.metrics._packing import Check, PackedBatches, Packing, Prepared, batch_size_of
from fax.metrics._programs import (
    NON_FINITE,
    scores_of,
    stats_of_batches,
    stats_of_clients,
    to_host,
)
from fax.sharding._row_sharding import row_sharding_in_scope

PyTree = Any
Apply = Callable[[PyTree, Any], jax.Array]
Metrics = Mapping[str, Metric]
Named = tuple[tuple[str, Metric], ...]
Found = tuple[PyTree, np.ndarray | None]  # statistics, and the positions of their clients

# How many rounds may run on the devices while the host prepares another.
_AHEAD = 2
# How many clients with their own models are evaluated in one cohort.
_COHORT_SIZE = 64


def run_batches(
    where: str,
    apply: Apply,
    params: PyTree,
    data: FederatedData | Prepared,
    metrics: Metrics,
    batch_size: int | None,
    placement: str,
    each: bool,
) -> Iterator[Found]:
    """Statistics of batch after batch: of all clients together, or of ``each`` by position."""
    named = _checked_metrics(where, data, metrics)
    row_sharding = row_sharding_in_scope(where, placement)
    params = jax.tree.map(jnp.asarray, params)
    if isinstance(data, Prepared):
        packing = data._use(where, batch_size, row_sharding)
        check = _check_labels(apply, params, packing.reader, named)
        for client_id, extremes in data._extremes:
            check(client_id, extremes)
        batches: Iterable[PackedBatches] = data._batches
    else:
        packing = Packing(where, data, batch_size, row_sharding)
        batches = packing.batches(_check_labels(apply, params, packing.reader, named))
    slots = packing.slots if each else None

    def fetched(stats: PyTree, first: np.ndarray) -> Found:
        stats = to_host(stats)
        if not each:
            return stats, None
        # The last slots of a batch may be unused. Their zeros are added to the last client.
        positions = np.minimum(first[:, None] + np.arange(packing.slots), len(packing.ids) - 1)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stats)
        return flat, positions.reshape(-1)

    under_way: deque[tuple[PyTree, np.ndarray]] = deque()
    for packed, first in zip(batches, packing.first):
        stats = stats_of_batches(apply, named, slots, placement, params, packed)
        under_way.append((stats, first))
        if len(under_way) > _AHEAD:
            yield fetched(*under_way.popleft())
    while under_way:
        yield fetched(*under_way.popleft())


def run_personal(
    where: str,
    apply: Apply,
    params: PyTree,
    data: FederatedData | Prepared,
    metrics: Metrics,
    batch_size: int | None,
    placement: str,
    each: bool,
) -> Iterator[Found]:
    """Statistics of clients, each with its own model, and their positions."""
    named = _checked_metrics(where, data, metrics)
    if isinstance(data, Prepared):
        raise ValueError(
            f"{where}: personal=True evaluates clients one by one, and cannot use what "
            "fax.metrics.prepare returns. Pass the data themselves."
        )
    batch_size = batch_size_of(where, batch_size)
    clients = len(data)
    params = jax.tree.map(jnp.asarray, params)
    for path, leaf in tree_leaves_with_path(params):
        if not leaf.ndim or len(leaf) != clients:
            raise ValueError(
                f"{where}: params{keystr(path)} has shape {leaf.shape}, expected a row for each of "
                f"the {clients} clients, because of personal=True. Leave it out to evaluate one "
                "model on all clients."
            )
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
    reader = ClientReader(data, data.client_ids()[0])
    data = map_clients(data, _check_labels(apply, one, reader, named))
    counts = np.array([data.num_examples(i) for i in data.client_ids()])
    devices = row_sharding_in_scope(where, placement).num_shards
    size = min(clients, -(-_COHORT_SIZE // devices) * devices)
    # Clients of a cohort have about the same length. The last cohort repeats some clients, so that
    # all have the same size.
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
            stats = to_host(stats_of_clients(apply, named, placement, params, cohort))
            positions = np.asarray(cohort.positions)
            new = ~seen[positions]
            seen[positions] = True
            yield jax.tree.map(lambda x, new=new: x[new], stats), positions[new]


# Checks on the host


def _checked_metrics(where: str, data: FederatedData | Prepared, metrics: Metrics) -> Named:
    if not len(data):
        raise DataError(f"{where}: data has no clients.")
    if NON_FINITE in metrics:
        raise ValueError(
            f"{where}: metrics has the name {NON_FINITE!r}, which is used for the number of "
            "examples whose scores are NaN or infinite. Choose another name."
        )
    for name, metric in metrics.items():
        form = {2: "metric(batch, scores), such as fax.metrics.Accuracy()"}
        _functions.function(where, f"metric {name!r}", metric, form)
        try:
            hash(metric)
        except TypeError as error:
            raise ValueError(
                f"{where}: metric {name!r} cannot be hashed, and so not be compiled once for all "
                f"calls: {error}. Pass numbers of Python for its attributes, not arrays."
            ) from error
    return tuple(metrics.items())


def _check_labels(apply: Apply, params: PyTree, reader: ClientReader, metrics: Named) -> Check:
    """A check that a client's labels are in range, to be called when it is read."""
    features = reader.features
    batch = {name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in features.items()}
    scores = scores_of.eval_shape(apply, params, batch)
    shape: tuple[int, ...] = getattr(scores, "shape", ())
    num_classes = shape[-1] if len(shape) >= 2 else None  # metrics that need classes will raise
    limits: set[tuple[str, int, tuple[int, ...]]] = set()
    for name, metric in metrics:
        for feature, limit in limits_of(metric, num_classes).items():
            if feature not in features:
                raise DataError(
                    f"metric {name!r} needs the feature {feature!r}, but clients have "
                    f"{sorted(features)}. Pass another name, or add the feature with fax.data.map."
                )
            if limit is not None:
                limits.add((feature, limit, ignored_by(metric, feature)))

    def check(client_id: Any, examples: Examples) -> Examples:
        for feature, limit, ignored in sorted(limits):
            labels = np.asarray(examples.get(feature, ()))
            if labels.size and labels.dtype.kind in "iu":
                if labels.min() >= 0 and labels.max() < limit:
                    continue
                bad = labels[((labels < 0) | (labels >= limit)) & ~np.isin(labels, ignored)]
                if bad.size:
                    first = bad.min() if bad.min() < 0 else bad.max()
                    raise DataError(
                        f"client {client_id!r}, feature {feature!r} has {first}, expected numbers "
                        f"from 0 to {limit - 1}, according to the model's scores or the metric."
                    )
        return examples

    return check
