"""The types of placed values and of their rows, shardings included."""

from __future__ import annotations

from jax.core import ShapedArray
from jax.sharding import AxisType, PartitionSpec


def placed_aval(row: ShapedArray, placement: str, size: int) -> ShapedArray:
    """The type of ``size`` rows, one for each participant.

    On a mesh with an Explicit axis of the placement's name the rows are spread over it.
    """
    mesh = row.sharding.mesh
    explicit = (n for n, t in zip(mesh.axis_names, mesh.axis_types) if t == AxisType.Explicit)
    spread = placement in explicit and size % mesh.shape[placement] == 0
    spec = PartitionSpec(placement if spread else None, *row.sharding.spec)
    return row.update(shape=(size, *row.shape), sharding=row.sharding.update(spec=spec))


def row_aval(placed: ShapedArray) -> ShapedArray:
    """The type of one participant's row."""
    spec = PartitionSpec(*placed.sharding.spec[1:])
    return placed.update(shape=placed.shape[1:], sharding=placed.sharding.update(spec=spec))
