"""Arguments for devices that are not there: shapes, dtypes and shardings without values."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec

from fax import _compat
from fax._placement import PlacementError
from fax.data._cohort import Cohort, Gathered
from fax.sharding._eval_shape import typed
from fax.sharding._row_sharding import row_sharding_in_scope


def on_described_devices(where: str, tree: Any) -> Any:
    """Arrays as types with a sharding on the mesh in scope, if no one can use its devices.

    Cohorts are spread over the axis of their placement, everything else is on all devices, and what
    has a sharding on the mesh keeps it. Without such a mesh, arguments remain as they are.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty or not _compat.is_described(mesh.devices.flat[0]):
        return tree

    def of_cohort(cohort: Cohort) -> Cohort:
        before = cohort.mask.ndim - 3  # axes before that of the clients: rounds
        spec = PartitionSpec(*[None] * before, *_rows(where, cohort.mask.shape[before]))
        typed_rows = jax.tree.map(lambda x: typed(x, mesh, spec), cohort)
        own = cohort.batches
        if isinstance(own, Gathered):
            shared = PartitionSpec(own.axes)
            examples = jax.tree.map(lambda x: typed(x, mesh, shared), own.examples)
            batches = dataclasses.replace(typed_rows.batches, examples=examples)
            typed_rows = dataclasses.replace(typed_rows, batches=batches)
        return typed_rows

    return jax.tree.map(
        lambda x: of_cohort(x) if isinstance(x, Cohort) else typed(x, mesh),
        tree,
        is_leaf=lambda x: isinstance(x, Cohort),
    )


def _rows(where: str, n: int) -> PartitionSpec:
    """How the rows of the only placement in scope are spread."""
    try:
        sharding = row_sharding_in_scope(where, None).sharding(n)
    except PlacementError:
        axes = jax.sharding.get_mesh().axis_names
        raise PlacementError(
            f"{where}: a cohort could be spread over any of the mesh axes {', '.join(axes)}. Say "
            f"which with fax.sharding.layout, as in fax.sharding.layout(clients={axes[0]!r})."
        ) from None
    assert sharding is not None  # there is a mesh
    return sharding.spec
