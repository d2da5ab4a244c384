"""TPUs that are not there: their compiler needs no device, only a description of the devices."""

from __future__ import annotations

import math
import os
import re
from typing import Any, NamedTuple

from jax.experimental import topologies

from fax import _arguments, _extras
from fax._placement import PlacementError

_WHERE = "fax.sharding.topology"


class _Generation(NamedTuple):
    """How many dimensions a slice has, and at most how many chips."""

    dimensions: int
    most_chips: int


_GENERATIONS = {
    "v2": _Generation(2, 256),
    "v3": _Generation(2, 1024),
    "v4": _Generation(3, 4096),
    "v5e": _Generation(2, 256),
    "v5p": _Generation(3, 8960),
    "v6e": _Generation(2, 256),
    "tpu7x": _Generation(3, 9216),
}

# What libtpu looks for before it describes anything. On a machine without a TPU it would ask the
# network, and only one process at a time could load it.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def topology(name: str, *, slices: int = 1) -> list[Any]:  # type checkers do not know jax.Device
    """Describes the devices of TPUs that this machine does not have.

    A mesh of these devices is good for compiling: `fax.inspect.report` says what a program will
    cost there, on any x86 machine with libtpu. Nothing can be put on them, or run on them. So make
    data and states before the mesh is in scope, or describe them with `jax.eval_shape`.

    Args:
      name: the generation and the number of chips in each dimension of a slice: "v5e:4x4",
        "v5p:4x4x4". Generations are v2, v3, v5e and v6e, with two dimensions, and v4, v5p and
        tpu7x, with three. A chip is one device, except that it is two in v2, v3 and tpu7x.
      slices: how many such slices, which are connected by the data center's network.

    Returns:
      The devices, for ``fax.sharding.make_mesh(devices=...)``, which lays the first axes across
      slices.

    Raises:
      PlacementError: if there is no such TPU.
      ModuleNotFoundError: if libtpu is not installed. ``pip install 'fax-jax[tpu]'`` installs it.
      RuntimeError: if libtpu cannot be loaded, for example because another process uses this
        machine's TPU.

    Example:

      >>> devices = fax.sharding.topology("v5e:4x4", slices=2)  # doctest: +SKIP
      >>> mesh = fax.sharding.make_mesh(devices=devices, clients=-1)  # doctest: +SKIP
      >>> mesh.size  # doctest: +SKIP
      32
    """
    generation = _generation(name)
    _arguments.count(_WHERE, "slices", slices, error=PlacementError)
    if "TPU_LIBRARY_PATH" not in os.environ:
        _extras.require(_WHERE, "libtpu", "tpu")
    # JAX sets this variable on import if the machine has no TPU.
    if os.environ.get("TPU_SKIP_MDS_QUERY"):
        for variable, value in _ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if generation == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip are one device
    try:
        found = topologies.get_topology_desc(topology_name=name, platform="tpu", **options)
    except RuntimeError as error:
        if "INVALID_ARGUMENT" in str(error):
            raise PlacementError(f"{_WHERE}: name is {name!r}, but libtpu says: {error}") from error
        raise RuntimeError(
            f"{_WHERE}: libtpu cannot be loaded: {error} If another process uses this machine's "
            "TPU, set ALLOW_MULTIPLE_LIBTPU_LOAD=1 in the environment before Python starts."
        ) from error
    return list(found.devices)


def _generation(name: Any) -> str:
    """Checks the name of a topology, and returns the generation of its chips."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name) if isinstance(name, str) else None
    generation = _GENERATIONS.get(found[1]) if found else None
    if found is None or generation is None:
        examples = [f"{known}:{'x'.join('4' * g.dimensions)}" for known, g in _GENERATIONS.items()]
        raise PlacementError(
            f"{_WHERE}: name is {_arguments.shown(name)}, expected a generation and the number of "
            f"chips in each dimension, as in {', '.join(examples)}."
        )
    sizes = [int(size) for size in found[2].split("x")]
    if len(sizes) != generation.dimensions or not 1 <= math.prod(sizes) <= generation.most_chips:
        raise PlacementError(
            f"{_WHERE}: name is {name!r}, but a slice of {found[1]} has {generation.dimensions} "
            f"dimensions and from 1 to {generation.most_chips:,} chips. For more chips, pass "
            "slices=."
        )
    return found[1]
