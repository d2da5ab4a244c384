"""The devices that the command uses: all of them, and on CPU one for each core."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import jax

import fax.sharding
from fax import PlacementError
from fax.command import _processes
from fax.command._errors import mistakes


def connected(axes: Mapping[str, int], axis: str) -> Any:
    """The mesh of these axes, over the devices of all processes that a launcher has started."""
    _processes.connect()
    with mistakes():
        return mesh_of(axes, axis)


def mesh_of(axes: Mapping[str, int], axis: str) -> Any:
    """The mesh of these axes. Without any, all devices are along one axis."""
    sizes: dict[str, Any] = dict(axes) or {axis: -1}
    known = math.prod(size for size in sizes.values() if size != -1)
    count = None if -1 in sizes.values() else known
    processes = _processes.count() if jax.distributed.is_initialized() else 1
    with contextlib.suppress(PlacementError):  # JAX has already set up its devices
        fax.sharding.use_cpu_devices(count and max(count // processes, 1))
    devices = jax.devices()
    # Several processes have to take part with all of their devices.
    own = devices[:count] if count and processes == 1 else devices
    return fax.sharding.make_mesh(devices=own, **sizes)
