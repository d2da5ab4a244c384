"""The devices that the command uses: all of them, and on CPU one for each core."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import jax

import fax.sharding
from fax import PlacementError


def mesh_of(axes: Mapping[str, int], axis: str) -> Any:
    """The mesh of these axes. Without any, all devices are along one axis."""
    sizes: dict[str, Any] = dict(axes) or {axis: -1}
    known = math.prod(size for size in sizes.values() if size != -1)
    count = None if -1 in sizes.values() else known
    with contextlib.suppress(PlacementError):  # JAX has already set up its devices
        fax.sharding.use_cpu_devices(count)
    devices = jax.devices()
    return fax.sharding.make_mesh(devices=devices[:count] if count else devices, **sizes)
