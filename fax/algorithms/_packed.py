"""The mean of rounded updates, of which replicas send each other the bits, and not float32.

A transformation such as `fax.aggregators.e3m0` returns numbers that fit in four bits. Every replica
encodes its own, two to a byte, and gathers the bytes of all others. Then it decodes one after the
other and adds them up in float32. The mean is the same as if they were sent in float32.

With n replicas an all-gather of b bits sends (n - 1) b bits for each number and replica, and an
all-reduce of float32 sends 64 (n - 1) / n. So this is done if n b is at most 64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.tree_util import tree_flatten_with_path, tree_leaves, tree_unflatten

import fax
from fax._placement import resolve
from fax.aggregators._aggregator import Aggregator, Format, Transformation
from fax.aggregators._per_client import each
from fax.algorithms._crossing import Crossing
from fax.algorithms._layers import name_of
from fax.sharding._mesh import num_shards, split_axes

PyTree = Any

_MOST_BITS = 64  # of all replicas for a number: about what an all-reduce of float32 sends
_HALF = 4  # bits of a byte


class Packing(NamedTuple):
    """How the codes of a leaf become bytes.

    Attributes:
      shape: of the leaf.
      axis: along which two neighbors share a byte. None if each has a byte of its own.
      flat: whether that is done with the flattened leaf.
      spec: the sharding of the bytes over Auto axes, or None if it is left to the compiler.
    """

    shape: tuple[int, ...]
    axis: int | None
    flat: bool
    spec: PartitionSpec | None

    def pack(self, codes: jax.Array) -> jax.Array:
        if self.axis is None:
            return codes
        if self.flat:
            codes = jnp.pad(codes.reshape(-1), (0, codes.size % 2))
        before, after = codes.shape[: self.axis], codes.shape[self.axis + 1 :]
        pairs = codes.reshape(*before, codes.shape[self.axis] // 2, 2, *after)
        low, high = (lax.index_in_dim(pairs, i, self.axis + 1, keepdims=False) for i in (0, 1))
        return low | high << _HALF

    def unpack(self, packed: jax.Array) -> jax.Array:
        if self.axis is None:
            return packed
        pairs = jnp.stack([packed & (2**_HALF - 1), packed >> _HALF], self.axis + 1)
        before, after = packed.shape[: self.axis], packed.shape[self.axis + 1 :]
        codes = pairs.reshape(*before, 2 * packed.shape[self.axis], *after)
        return codes[: math.prod(self.shape)].reshape(self.shape) if self.flat else codes

    def constrained(self, packed: jax.Array, rows: bool) -> jax.Array:
        """Bytes, or rows of them, with their sharding."""
        if self.spec is None:
            return packed
        spec = PartitionSpec(None, *self.spec) if rows else self.spec
        return lax.with_sharding_constraint(packed, spec)


def sent_in_bytes(aggregator: Aggregator) -> Transformation | None:
    """The transformation whose results replicas send as bytes before they are averaged, if any.

    Without a mesh whose devices share the replicas nothing is sent.
    """
    rounding = aggregator.transformation
    if rounding is None or rounding.format is None:
        return None
    replicas, devices = _replicas()
    fits = replicas * rounding.format.bits <= _MOST_BITS and replicas % devices == 0
    return rounding if fits and devices > 1 else None


def _replicas() -> tuple[int, int]:
    """How many replicas there are, and over how many devices they are spread."""
    replicas, mesh = resolve(None, "fax.algorithms"), jax.sharding.get_abstract_mesh()
    return replicas.size, num_shards(split_axes(replicas, mesh), mesh)


def mean_of_bytes(
    rows: PyTree, weights: jax.Array, format: Format, once: Crossing
) -> tuple[PyTree, jax.Array]:
    """`fax.mean`, without replicas of weight zero, of what is sent as bytes.

    Args:
      rows: placed, as a transformation with this format returns them.
      weights: placed.
      format: of the rows.
      once: how leaves are sharded over the devices of a replica.

    Returns:
      The mean, with the derivatives of `fax.mean`; and how many bits each replica sends, float
      [replicas].
    """
    paths, treedef = tree_flatten_with_path(rows)
    packings = [_packing(format.bits, name_of(path), x, once) for path, x in paths]
    dtypes = [x.dtype for _, x in paths]
    widest = np.result_type(np.float32, *dtypes)

    def encode(row: PyTree) -> tuple[list[jax.Array], jax.Array]:
        made = [format.encode(x) for x in tree_leaves(lax.stop_gradient(row))]
        packed = [own.pack(codes) for own, (codes, _) in zip(packings, made)]
        scales = jnp.stack([scale.astype(widest) for _, scale in made])
        sent = [own.constrained(x, rows=False) for own, x in zip(packings, packed)]
        return sent, lax.bitcast_convert_type(scales, jnp.uint8)

    sent, scales = each(encode, rows)
    bits = 8 * sum(math.prod(x.shape[1:]) for x in (*sent, scales))
    sent, scales, shares = fax.collect((sent, scales, lax.stop_gradient(weights)))
    sent = [own.constrained(x, rows=True) for own, x in zip(packings, sent)]
    scales = lax.bitcast_convert_type(scales, widest)

    def part(i: Any) -> tuple[list[jax.Array], jax.Array]:
        """What a replica contributes to the totals."""
        share, scale = shares[i], scales[i]
        present = share != 0
        values = [
            format.decode(own.unpack(packed[i]), scale[k].astype(dtype)) * share.astype(dtype)
            for k, (own, packed, dtype) in enumerate(zip(packings, sent, dtypes))
        ]
        return [jnp.where(present, x, 0) for x in values], share.astype(widest)

    # As in `fax.mean`, the replicas of a device are added up first, so that the result is the same.
    replicas, devices = _replicas()
    own = replicas // devices

    def of_device(i: Any) -> tuple[list[jax.Array], jax.Array]:
        return _sum(lambda k: part(i * own + k), own)

    totals, total = _sum(of_device, devices)
    means = [x / jnp.where(total != 0, total, 1).astype(x.dtype) for x in totals]
    mean = once.crossed(tree_unflatten(treedef, means))
    return _with_derivatives(mean, rows, weights), jnp.full(len(shares), bits, jnp.float32)


def _sum(term: Callable[[Any], PyTree], count: int) -> PyTree:
    """term(0) + term(1) + ... + term(count - 1), in this order."""

    def add(i: jax.Array, total: PyTree) -> PyTree:
        return jax.tree.map(jnp.add, total, term(i))

    return term(0) if count == 1 else lax.fori_loop(1, count, add, term(0))


@jax.custom_jvp
def _with_derivatives(mean: PyTree, rows: PyTree, weights: jax.Array) -> PyTree:
    """The mean, with the derivatives of `fax.mean` of the rows."""
    del rows, weights
    return mean


@_with_derivatives.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[PyTree, PyTree]:
    def mean(rows: PyTree, weights: jax.Array) -> PyTree:
        return fax.mean(rows, weights=weights, where=weights != 0)

    return primals[0], jax.jvp(mean, primals[1:], tangents[1:])[1]


def _packing(bits: int, name: str, rows: jax.Array, once: Crossing) -> Packing:
    shape, known = rows.shape[1:], once.spec(name)
    spec = PartitionSpec(*jax.typeof(rows).sharding.spec[1:]) if known is None else known
    mesh = jax.sharding.get_abstract_mesh()
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    entries += [(None,)] * (len(shape) - len(spec))
    shards = [num_shards([a for a in entry if a is not None], mesh) for entry in entries]
    local = [size // count for size, count in zip(shape, shards)]
    axis, flat = None, False
    if bits <= _HALF:
        axis = _axis_of_pairs(local)
        flat = axis is None and math.prod(shards) == 1
        axis = 0 if flat else axis
    left_open = once.explicit or known is None
    return Packing(shape, axis, flat, None if left_open else PartitionSpec() if flat else spec)


def _axis_of_pairs(local: Sequence[int]) -> int | None:
    """An axis along which pairs of neighbors are on the same device, or None.

    If the sharding is not known, that with the highest power of two is the most likely one.
    """
    twos = [size & -size for size in local]
    most = max(twos, default=1)
    return twos.index(most) if most > 1 else None
