"""What a program will cost, read from what XLA compiles it to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from fax import _arguments
from fax.inspect import _table
from fax.inspect._abstract import on_described_devices
from fax.inspect._collectives import Collective, collectives
from fax.inspect._cycles import CLOCKS_GHZ, cycles
from fax.inspect._flops import flops
from fax.inspect._groups import Devices
from fax.inspect._hlo import parse
from fax.inspect._padding import Padding, padding

_WHERE = "fax.inspect.report"


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory that a compiled program takes up on each device.

    Attributes:
      argument_bytes: of the arguments, a device's part of them.
      output_bytes: of the results.
      aliased_bytes: of results that take the place of donated arguments.
      temporary_bytes: of everything in between.
    """

    argument_bytes: int
    output_bytes: int
    aliased_bytes: int
    temporary_bytes: int

    @property
    def peak_bytes(self) -> int:
        """What has to fit into a device's memory: arguments, other results, and temporary."""
        return self.argument_bytes + self.output_bytes - self.aliased_bytes + self.temporary_bytes


@dataclasses.dataclass(frozen=True)
class Report:
    """What one call of a compiled program costs. `report` makes it, and printing it shows a table.

    Attributes:
      device_kind: the kind of the devices, such as "TPU v5 lite" for v5e.
      num_devices: how many devices run the program.
      num_slices: how many TPU slices these are in.
      mesh_shape: the size of each mesh axis, by name. Empty for a program on one device.
      memory: on each device.
      collectives: what devices send to each other, in the order of the compiled program.
      flops: floating-point operations of matrix products and convolutions on each device, two for
        each multiplication and addition. Of branches, the most expensive one. Some products are
        elementwise ones and sums to the compiler, which are not counted: those of two vectors and,
        on TPU, of a matrix with a vector.
      cycles: of each device, by the compiler's estimate: the sum over all fusions that it has
        estimated. Collectives and waiting for memory are not in it. Of branches, the most expensive
        one. None if the compiler estimates nothing, as on CPU and GPU.
      seconds: the cycles at the clock of the device, or None.
      unknown_loops: whether there are loops in these figures whose number of trips is unknown until
        they run. They count as one trip.
      padding: of the cohorts among the arguments, or None.
    """

    device_kind: str
    num_devices: int
    num_slices: int
    mesh_shape: Mapping[str, int]
    memory: Memory
    collectives: tuple[Collective, ...]
    flops: int
    cycles: int | None
    seconds: float | None
    unknown_loops: bool
    padding: Padding | None

    def over(self, axis: str) -> tuple[Collective, ...]:
        """The collectives over a mesh axis, and possibly over others at once."""
        return tuple(each for each in self.collectives if axis in each.axes)

    @property
    def between_slices(self) -> tuple[Collective, ...]:
        """The collectives that cross TPU slices."""
        return tuple(each for each in self.collectives if each.between_slices)

    def __str__(self) -> str:
        return _table.of(self)


def report(fn: Any, *args: Any, **kwargs: Any) -> Report:
    """Compiles a function, and says what one call of it will cost, without running it.

    It reads the program that XLA would run: the memory on each device, every collective by mesh
    axis, dtype, bytes and how often it runs, floating-point operations, and on TPU the compiler's
    estimate of the cycles. Loops count with their trips.

    The devices may exist only in a description, `fax.sharding.topology`. Under a mesh of such
    devices, arguments are placed as fax would place them: cohorts row by row, and everything else
    on all devices, unless it has a sharding on the mesh. `fax.sharding.place` places other rows.
    A program that does not fit into the devices' memory is not compiled; XLA's error says how much
    it needs.

    Args:
      fn: a function, also a jitted one with donated or static arguments, or what its ``lower`` or
        ``compile`` returns. A compiled function of several devices needs its mesh in scope if no
        argument or result has a sharding on it.
      *args: its arguments: arrays, `jax.ShapeDtypeStruct` or pytrees of these. Data are not needed,
        and not read, except for the mask of a `fax.data.Cohort`.
      **kwargs: the same, by name.

    Returns:
      The report, which prints as a table.

    Raises:
      ValueError: if ``fn`` cannot be called, a function that is already compiled gets arguments,
        the mesh is unknown, or it is unclear over which axis a cohort is spread.

    Example:

      >>> @fax.program(clients=8)
      ... def mean(x, rows):
      ...     return fax.mean(fax.map(lambda x, row: x * row, fax.broadcast(x), rows))
      >>> x, rows = (jax.ShapeDtypeStruct(shape, "float32") for shape in [(5,), (8, 5)])
      >>> with jax.set_mesh(fax.sharding.make_mesh(clients=-1)):
      ...     found = fax.inspect.report(mean, x, rows)
      >>> [(c.operation, c.dtype, c.bytes, c.count) for c in found.over("clients")]
      [('all-reduce', 'float32', 20, 1)]
      >>> found.memory.output_bytes
      20
    """
    stage = isinstance(fn, jax.stages.Lowered | jax.stages.Compiled)
    if not stage and not callable(fn):
        raise ValueError(
            f"{_WHERE}: fn is {_arguments.shown(fn)}, expected a function, or one that jax.jit has "
            "lowered or compiled."
        )
    if stage and (args or kwargs):
        raise ValueError(
            f"{_WHERE}: fn is a {type(fn).__name__} function, which already has its arguments. "
            "Pass it alone, or pass a function with arguments."
        )
    rows = padding((args, kwargs))
    if not stage:
        args, kwargs = on_described_devices(_WHERE, (args, kwargs))
        fn = (fn if isinstance(fn, jax.stages.Wrapped) else jax.jit(fn)).lower(*args, **kwargs)
    compiled = fn.compile() if isinstance(fn, jax.stages.Lowered) else fn
    return _read(compiled, rows)


def _read(compiled: Any, rows: Padding | None) -> Report:
    module = parse(compiled.as_text())
    mesh, devices = _devices(compiled, module.num_partitions)
    memory = compiled.memory_analysis()
    work, time = flops(module), cycles(module)
    unknown = work.unknown_loops or (time is not None and time.unknown_loops)
    clock = CLOCKS_GHZ.get(devices[0].device_kind)
    found = () if mesh is None else collectives(module, Devices(mesh, module.num_partitions))
    return Report(
        device_kind=devices[0].device_kind,
        num_devices=len(devices),
        num_slices=len({getattr(device, "slice_index", 0) for device in devices}),
        mesh_shape={} if mesh is None else dict(mesh.shape),
        memory=Memory(
            argument_bytes=memory.argument_size_in_bytes,
            output_bytes=memory.output_size_in_bytes,
            aliased_bytes=memory.alias_size_in_bytes,
            temporary_bytes=memory.temp_size_in_bytes,
        ),
        collectives=found,
        flops=work.value,
        cycles=time.value if time else None,
        seconds=time.value / clock / 1e9 if time and clock else None,
        unknown_loops=unknown or any(each.unknown_loops for each in found),
        padding=rows,
    )


def _devices(compiled: Any, num_partitions: int) -> tuple[Mesh | None, list[Any]]:
    """The mesh that a compiled function runs on, if it is known, and its devices."""
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    own = shardings[0].device_set if shardings else None
    in_scope = jax.sharding.get_mesh()
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
    for mesh in (in_scope, *meshes):
        if isinstance(mesh, Mesh) and not mesh.empty and own in (None, set(mesh.devices.flat)):
            return mesh, list(mesh.devices.flat)
    if num_partitions > 1:
        raise ValueError(
            f"{_WHERE}: fn is compiled for {num_partitions} devices, but neither its arguments nor "
            "its results say which mesh they are in. Call report under jax.set_mesh(mesh)."
        )
    return None, list(own or jax.devices()[:1])
