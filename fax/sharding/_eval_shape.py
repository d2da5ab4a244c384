"""Types of results with their shardings, without computing anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fax import _arguments
from fax._placement import PlacementError

_WHERE = "fax.sharding.eval_shape"


def eval_shape(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Evaluates the types of a function's results, like `jax.eval_shape`, with their shardings.

    On a mesh whose devices are those of a `topology`, a state cannot be computed. This describes
    one: ``fax.sharding.eval_shape(algorithm.init, params)``, where parameters may be split over
    some axes of the mesh. Their moments in an optimizer are then split in the same way, and rows of
    replicas over the replicas' axis. `fax.inspect.report` takes it in place of the state.

    It follows JAX's rules for Explicit axes, whatever the axes of the mesh in scope are. So a
    function that multiplies matrices that are split may have to say how the result is.

    Args:
      fn: the function, such as ``algorithm.init``.
      *args: its arguments: pytrees of arrays, or of `jax.ShapeDtypeStruct` with or without a
        `NamedSharding` on the mesh. Without one, an argument is on all devices.
      **kwargs: the same, by name.

    Returns:
      The pytree of results, as `jax.ShapeDtypeStruct`. Without a mesh, without shardings.

    Raises:
      PlacementError: if ``fn`` cannot be called.

    Example:

      >>> mesh = fax.sharding.make_mesh(model=-1)
      >>> split = jax.sharding.NamedSharding(mesh, jax.P("model"))
      >>> weights = jax.ShapeDtypeStruct((64, 3), "float32", sharding=split)
      >>> with jax.set_mesh(mesh):
      ...     moments = fax.sharding.eval_shape(jnp.zeros_like, weights)
      >>> moments.shape, moments.sharding.spec
      ((64, 3), P('model', None))
    """
    if not callable(fn):
        raise PlacementError(f"{_WHERE}: fn is {_arguments.shown(fn)}, expected a function.")
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.eval_shape(fn, *args, **kwargs)
    explicit = (AxisType.Explicit,) * len(mesh.axis_names)
    twin = Mesh(mesh.devices, mesh.axis_names, axis_types=explicit)
    args, kwargs = jax.tree.map(lambda x: typed(x, twin), (args, kwargs))
    with jax.set_mesh(twin):
        found = jax.eval_shape(fn, *args, **kwargs)
    return jax.tree.map(lambda x: typed(x, mesh), found)


def typed(x: Any, mesh: Mesh, spec: PartitionSpec | None = None) -> Any:
    """The type of an array on a mesh, split as before, or else by ``spec``, or on all devices.

    What is not an array, such as a static argument, remains as it is.
    """
    if not isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return x
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding) and dict(sharding.mesh.shape) == dict(mesh.shape):
        spec = sharding.spec
    aval = jax.typeof(x)
    sharding = NamedSharding(mesh, spec or PartitionSpec())
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding, weak_type=aval.weak_type)
