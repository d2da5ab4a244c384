"""The arrays of a pytree as a checkpoint has them: a list, and what each of them is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_leaves_with_path

from fax import _arguments

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What a leaf of a pytree is.

    Attributes:
      name: its path.
      shape: of the array. That of a random key is the shape of its data.
      dtype: the name of its dtype.
      spec: over which mesh axes its dimensions are spread, or None if it is not on a mesh.
      weak: whether it has a weak type, as a number of Python has.
      key: the implementation of a random key, or None.
      host: what it is if it is not an array of JAX, and has to stay so: ``"array"`` or ``"scalar"``
        of NumPy, or a ``"number"`` of Python. None otherwise.
    """

    name: str
    shape: list[int]
    dtype: str
    spec: list | None = None
    weak: bool = False
    key: str | None = None
    host: str | None = None

    def __str__(self) -> str:
        return f"{'random keys ' if self.key else ''}{self.dtype}{self.shape}"


def split(tree: PyTree, prefix: str, *, keep_host: bool = False) -> tuple[list[Leaf], list[Any]]:
    """What the leaves of a pytree are, and their arrays without random keys and Python numbers.

    Args:
      tree: the pytree.
      prefix: of the leaves' names.
      keep_host: whether numbers and arrays of NumPy keep all their bits, of which JAX by default
        drops those beyond 32. They are copied, for they may change while they are written.

    Raises:
      TypeError: if a leaf is not a number or an array of numbers.
    """
    leaves, arrays = [], []
    for path, x in tree_leaves_with_path(tree):
        if keep_host and not isinstance(x, jax.Array):
            leaf, x = _on_host(f"{prefix}{keystr(path)}", x)
            leaves.append(leaf)
            arrays.append(x)
            continue
        key = None
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            key, x = str(jax.random.key_impl(x)), jax.random.key_data(x)
        weak = bool(jax.typeof(x).weak_type)
        if not isinstance(x, jax.Array):
            x = np.asarray(x, jax.typeof(x).dtype)
        elif jax.process_count() > 1 and x.is_fully_addressable:
            x = np.asarray(x)  # each process has the same
        name = f"{prefix}{keystr(path)}"
        leaves.append(Leaf(name, list(x.shape), x.dtype.name, _spec(x), weak, key))
        arrays.append(x)
    return leaves, arrays


def _on_host(name: str, x: Any) -> tuple[Leaf, np.ndarray]:
    own = np.array(x)
    if not (own.dtype == bool or jnp.issubdtype(own.dtype, jnp.number)):
        raise TypeError(f"{name} is {_arguments.shown(x)}")
    scalar = "scalar" if isinstance(x, np.generic) else "number"
    kind = "array" if isinstance(x, np.ndarray) else scalar
    return Leaf(name, list(own.shape), own.dtype.name, host=kind), own


def template(leaf: Leaf, like: Any = None) -> Any:
    """What a checkpoint's array is restored to: on the mesh in scope if it was on one."""
    dtype, shape = jnp.dtype(leaf.dtype), tuple(leaf.shape)
    sharding = sharding_of(leaf, like)
    if sharding is None or leaf.weak:
        return np.empty(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def whole(leaf: Leaf, x: Any, like: Any = None) -> Any:
    """A leaf of a state from a restored array."""
    if leaf.host is not None:
        own = np.array(x)
        return own if leaf.host == "array" else own[()] if leaf.host == "scalar" else own.item()
    if leaf.weak:
        x = jax.jit(_weak, out_shardings=sharding_of(leaf, like))(x)
    return jax.random.wrap_key_data(x, impl=leaf.key) if leaf.key else jnp.asarray(x)


def _weak(x: jax.Array) -> jax.Array:
    """An array of a weak type, as it comes from numbers of Python. No dtype makes one."""
    weak = jnp.full(x.shape, x.dtype.type(0).item())
    return weak.at[...].set(x) if weak.dtype == x.dtype else x


def difference(saved: Sequence[Leaf], given: Sequence[Leaf]) -> str | None:
    """The first leaf in which the arrays of two states differ, in a sentence, or None."""
    there = {leaf.name: leaf for leaf in saved}
    for leaf in given:
        own = there.pop(leaf.name, None)
        if own is None:
            return f"the checkpoint has no {leaf.name}, which is {leaf} in state"
        if (own.shape, own.dtype, own.key) != (leaf.shape, leaf.dtype, leaf.key):
            return f"{leaf.name} is {own} in the checkpoint, but {leaf} in state"
    if there:
        own = next(iter(there.values()))
        return f"the checkpoint has {own.name}, {own}, which state does not have"
    return None


def _spec(x: Any) -> list | None:
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    return [list(axes) if isinstance(axes, tuple) else axes for axes in sharding.spec]


def sharding_of(leaf: Leaf, like: Any) -> NamedSharding | None:
    """The sharding on the mesh in scope, or on that of ``like``. None if it was on no mesh.

    A dimension is not spread over axes that the mesh does not have, or that do not divide it.
    """
    if leaf.spec is None:
        return None
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        own = getattr(like, "sharding", None)
        if not isinstance(own, NamedSharding) or not isinstance(own.mesh, Mesh):
            return None
        mesh = own.mesh
    spec: list[Any] = []
    for size, axes in zip(leaf.shape, leaf.spec):
        names = [axes] if isinstance(axes, str) else list(axes or ())
        parts = int(np.prod([mesh.shape.get(name, 0) for name in names]))
        spec.append(tuple(names) if names and parts and size % parts == 0 else None)
    spec = [axes[0] if axes is not None and len(axes) == 1 else axes for axes in spec]
    return NamedSharding(mesh, PartitionSpec(*spec))
