"""Which device, and so which process, holds the row of each participant."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fax import _arguments, _compat
from fax._placement import Placement, PlacementError
from fax.sharding._mesh import laid_out, named_in_layout, num_shards, split_axes


class RowSharding(NamedTuple):
    """How the rows of a placement are spread over devices."""

    name: str | None
    mesh: Mesh | None
    axes: tuple[str, ...]

    @property
    def num_shards(self) -> int:
        return 1 if self.mesh is None else num_shards(self.axes, self.mesh.abstract_mesh)

    def sharding(self, n: int) -> NamedSharding | None:
        if self.mesh is None:
            return None
        return NamedSharding(
            self.mesh, PartitionSpec(() if n % self.num_shards else self.axes or ())
        )

    def own_rows(self, where: str, n: int) -> np.ndarray:
        """The rows on this process's devices, in ascending order."""
        sharding = self.sharding(n)
        if jax.process_count() == 1 or sharding is None:
            return np.arange(n)
        if n % self.num_shards:
            raise PlacementError(
                f"{where}: {n} participants cannot be divided evenly over the {self.num_shards} "
                f"devices along {listed(self.axes)}. A single process would copy their rows to "
                "all devices, but processes do not send each other the rows that they load. Use a "
                f"multiple of {self.num_shards}."
            )
        indices = sharding.addressable_devices_indices_map((n,)).values()
        starts = sorted({rows.start or 0 for (rows,) in filter(None, indices)})
        return (np.array(starts)[:, None] + np.arange(n // self.num_shards)).reshape(-1)

    def owners(self, n: int) -> dict[int, list[int]]:
        """The processes that load each row."""
        sharding = self.sharding(n)
        assert sharding is not None
        owners: dict[int, set[int]] = {}
        device: Any
        for device, index in sharding.devices_indices_map((n,)).items():
            for row in range(n)[index[0] if index else slice(None)]:
                owners.setdefault(row, set()).add(device.process_index)
        return {row: sorted(processes) for row, processes in owners.items()}

    def put(self, leaf: Any, n: int, own: np.ndarray) -> Any:
        sharding = self.sharding(n)
        if isinstance(leaf, jax.ShapeDtypeStruct) or (
            self.mesh is not None and _compat.is_described(self.mesh.devices.flat[0])
        ):
            dtype = jax.typeof(leaf).dtype
            return jax.ShapeDtypeStruct((n, *leaf.shape[1:]), dtype, sharding=sharding)
        if jax.process_count() == 1 or sharding is None:
            return jax.device_put(leaf, sharding)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = self.put(jax.random.key_data(leaf), n, own)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        # A result computed under the mesh is on all of its devices.
        local = np.asarray(leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf)

        def rows(index):
            first = np.searchsorted(own, index[0].start or 0)
            return local[first : first + n // self.num_shards]

        return jax.make_array_from_callback((n, *local.shape[1:]), sharding, rows)


def row_sharding_in_scope(where: str, placement: str | None) -> RowSharding:
    """Returns how the rows of a placement are spread over the mesh in scope."""
    if placement is not None:
        what = "the name of a placement"
        _arguments.text(where, "placement", placement, what, error=PlacementError)
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:
        raise PlacementError(
            f"{where} was called in a function that JAX traces. Load and place data outside "
            "jax.jit and fax.program, and pass them as arguments."
        ) from None
    several = jax.process_count() > 1
    if mesh.empty:
        if several:
            raise PlacementError(
                f"{where}: this is one of {jax.process_count()} processes and no mesh is in scope. "
                "Use jax.set_mesh(fax.sharding.make_mesh(clients=-1)). The mesh determines which "
                "rows belong to which process."
            )
        return RowSharding(placement, None, ())
    absent = set(range(jax.process_count())) - {d.process_index for d in mesh.devices.flat}
    if absent:
        raise PlacementError(
            f"{where}: the mesh in scope has no device of process {listed(sorted(absent))}. Use "
            "devices of all processes, as fax.sharding.make_mesh does."
        )
    name = _name(where, mesh) if placement is None else placement
    axes = split_axes(laid_out((Placement(name, 1),))[0])
    if several and not axes:
        raise PlacementError(
            f"{where}: the mesh in scope has the axes {listed(mesh.axis_names)}, but none for "
            f"{name!r}. Its rows would have to be on all devices, but processes do not send each "
            "other the rows that they load. Name an axis after the placement, or use "
            "fax.sharding.layout."
        )
    return RowSharding(name, mesh, axes)


def _name(where: str, mesh: Mesh) -> str:
    """The only placement in the layout or mesh."""
    candidates = named_in_layout() or list(mesh.axis_names)
    if len(candidates) == 1:
        return candidates[0]
    raise PlacementError(
        f"{where} needs placement=, because it could be any of {listed(candidates)}."
    )


def listed(items: Any) -> str:
    return ", ".join(map(str, items))


def positive(where: str, n: Any) -> int:
    return _arguments.count(where, "n", n, what="the number of participants", error=PlacementError)
