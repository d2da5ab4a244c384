"""The types of placed values and of their rows, shardings included."""

from __future__ import annotations

import jax
from jax.core import ShapedArray
from jax.sharding import AxisType, PartitionSpec, reshard


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


def gather_rows(x: jax.Array) -> jax.Array:
    """All rows on every device, if an Explicit mesh axis spreads them."""
    sharding = jax.typeof(x).sharding
    if sharding.spec[0] is None:
        return x
    return reshard(x, sharding.update(spec=PartitionSpec(None, *sharding.spec[1:])))


def spread_rows(x: jax.Array, placement: str) -> jax.Array:
    """The rows where the type of a placed value says that they are."""
    aval = jax.typeof(x)
    wanted = placed_aval(row_aval(aval), placement, aval.shape[0]).sharding
    return x if wanted == aval.sharding else reshard(x, wanted)
