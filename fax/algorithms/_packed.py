"""The mean of rounded updates, whose bits replicas send each other instead of float32.

A transformation such as `fax.aggregators.e3m0` returns numbers that fit in four bits. Every replica
encodes its own, as many to a byte as fit, and gathers the bytes of all others. Then it decodes
those of one replica after the other and adds them up in float32. The mean is the same as if float32
were sent.

With n replicas an all-gather of b bits sends (n - 1) b bits for each number and replica, and an
all-reduce of float32 sends 64 (n - 1) / n. So this is done if n b is at most 64.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.tree_util import tree_flatten_with_path, tree_leaves, tree_unflatten

import fax
from fax._placement import resolve, scope
from fax.aggregators._aggregator import Aggregator, Format, Transformation
from fax.aggregators._per_client import each
from fax.algorithms._crossing import Crossing
from fax.algorithms._layers import name_of
from fax.sharding._mesh import num_shards, other_axes, split_axes

PyTree = Any

_MOST_BITS = 64  # of all replicas for a number: about what an all-reduce of float32 sends
_BYTE = 8  # bits
# TPUs have rows of 128 numbers, and take long to compile parts of long vectors that begin within a
# row. So leaves of at least so many bytes begin with one.
_ROW, _LARGE = 128, 4096


class Replicas(NamedTuple):
    """The replicas in scope.

    Attributes:
      size: how many there are.
      axes: the mesh axes that they are spread over.
      devices: how many devices there are along these.
      inside: the mesh axes of more than one device within a replica.
    """

    size: int
    axes: tuple[str, ...]
    devices: int
    inside: list[str]


def _replicas() -> Replicas:
    group, mesh = resolve(None, "fax.algorithms"), jax.sharding.get_abstract_mesh()
    axes = () if jax.config.jax_disable_jit else split_axes(group, mesh)
    return Replicas(group.size, axes, num_shards(axes, mesh), other_axes(axes, mesh))


def sent_in_bytes(aggregator: Aggregator, updates: PyTree, once: Crossing) -> Transformation | None:
    """The transformation whose results replicas send as bytes before they are averaged, if any.

    Args:
      aggregator: the user's.
      updates: placed.
      once: how they are sharded over the devices of a replica, which has to be known.
    """
    rounding = aggregator.transformation
    if rounding is None or rounding.format is None:
        return None
    replicas = _replicas()
    fits = replicas.size * rounding.format.bits <= _MOST_BITS
    # If replicas are not spread evenly, all devices already have all of them.
    spread = replicas.devices > 1 and replicas.size % replicas.devices == 0
    names = [name_of(path) for path, _ in tree_flatten_with_path(updates)[0]]
    known = not replicas.inside or all(once.spec(name) is not None for name in names)
    return rounding if fits and spread and known else None


class Packing(NamedTuple):
    """How the codes of a leaf become bytes, on one device.

    Attributes:
      shape: of the codes there, without the rows.
      bits: of a code: 2, 4 or 8.
      axis: the axis that is cut into as many parts as a byte has codes; a byte gets one code from
        each part. None if no axis has such a size: then the codes are flattened first.
    """

    shape: tuple[int, ...]
    bits: int
    axis: int | None

    def pack(self, codes: jax.Array) -> jax.Array:
        """Rows of codes as rows of bytes."""
        if self.axis is None:
            codes = codes.reshape(len(codes), -1)
            codes = jnp.pad(codes, ((0, 0), (0, -codes.shape[1] % self.codes)))
        parts = jnp.split(codes, self.codes, 1 + (self.axis or 0))
        shifted = [part << self.bits * place for place, part in enumerate(parts)]
        return functools.reduce(jnp.bitwise_or, shifted).reshape(len(codes), -1)

    def unpack(self, packed: jax.Array) -> jax.Array:
        """The codes of one row."""
        axis = self.axis or 0
        if self.axis is not None:
            part = self.shape[axis] // self.codes
            packed = packed.reshape(*self.shape[:axis], part, *self.shape[axis + 1 :])
        places, mask = range(0, _BYTE, self.bits), 2**self.bits - 1
        codes = jnp.concatenate([packed >> place & mask for place in places], axis)
        if self.axis is not None:
            return codes
        return codes[: math.prod(self.shape)].reshape(self.shape)

    @property
    def codes(self) -> int:
        """How many codes are in a byte."""
        return _BYTE // self.bits

    @property
    def nbytes(self) -> int:
        return -(-math.prod(self.shape) // self.codes)


class Buffer:
    """What a device sends: one array of bytes, so that there is one collective.

    Args:
      sizes: of its parts, in bytes.
    """

    def __init__(self, sizes: list[int]):
        self._sizes = sizes
        large = [[k] for k, size in enumerate(sizes) if size >= _LARGE]
        small = [k for k, size in enumerate(sizes) if size < _LARGE]
        # The parts in each piece. A large one is alone.
        self._pieces = [*large, small] if small else large
        self._lengths = [sum(sizes[k] for k in piece) for piece in self._pieces]
        self._width = _ROW if large else self._lengths[0]
        self._rows = [-(-length // self._width) for length in self._lengths]

    @property
    def nbytes(self) -> int:
        return sum(self._rows) * self._width

    def join(self, parts: list[jax.Array]) -> jax.Array:
        """The buffers [n, rows, width] of n rows of bytes for each part."""
        pieces = []
        for piece, length, rows in zip(self._pieces, self._lengths, self._rows):
            joined = jnp.concatenate([parts[k] for k in piece], 1)
            padded = jnp.pad(joined, ((0, 0), (0, rows * self._width - length)))
            pieces.append(padded.reshape(-1, rows, self._width))
        return jnp.concatenate(pieces, 1)

    def split(self, buffer: jax.Array) -> list[jax.Array]:
        """The parts of one buffer."""
        parts: dict[int, jax.Array] = {}
        pieces = jnp.split(buffer, list(itertools.accumulate(self._rows))[:-1])
        for piece, length, x in zip(self._pieces, self._lengths, pieces):
            ends = list(itertools.accumulate(self._sizes[k] for k in piece))[:-1]
            parts |= dict(zip(piece, jnp.split(x.reshape(-1)[:length], ends)))
        return [parts[k] for k in range(len(parts))]


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
    replicas, mesh = _replicas(), jax.sharding.get_abstract_mesh()
    paths, treedef = tree_flatten_with_path(rows)
    specs = [once.spec(name_of(path)) or PartitionSpec() for path, _ in paths]
    packings = [
        _packing(format.bits, x.shape[1:], spec, mesh) for spec, (_, x) in zip(specs, paths)
    ]
    dtypes = [x.dtype for _, x in paths]
    widest = np.result_type(np.float32, *dtypes)
    of_leaf = jax.eval_shape(format.encode, jax.ShapeDtypeStruct((1,), widest))[1]
    scales_nbytes = widest.itemsize * (of_leaf.size * len(packings) + 1)  # and a weight
    buffer = Buffer([*(own.nbytes for own in packings), scales_nbytes])

    def encode(row: PyTree, weight: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        made = [format.encode(x) for x in tree_leaves(lax.stop_gradient(row))]
        scales = [*(scale for _, scale in made), lax.stop_gradient(weight)]
        flat = jnp.concatenate([x.astype(widest).reshape(-1) for x in scales])
        return [codes for codes, _ in made], flat

    def gather(codes: list[jax.Array], scales: jax.Array) -> jax.Array:
        """On one device, from its replicas' rows to the bytes of all replicas."""
        tail = lax.bitcast_convert_type(scales, jnp.uint8).reshape(len(scales), -1)
        parts = [*(own.pack(x) for own, x in zip(packings, codes)), tail]
        return lax.all_gather(buffer.join(parts), replicas.axes, tiled=True)

    def decode(gathered: jax.Array) -> list[jax.Array]:
        """On one device, from the bytes of all replicas to the mean."""

        def part(i: Any) -> tuple[list[jax.Array], jax.Array]:
            """What a replica contributes to the totals."""
            *packed, last = buffer.split(lax.dynamic_index_in_dim(gathered, i, keepdims=False))
            numbers = lax.bitcast_convert_type(last.reshape(-1, widest.itemsize), widest)
            own_scales, share = numbers[:-1].reshape(-1, *of_leaf.shape), numbers[-1]
            values = [
                format.decode(own.unpack(x), scale.astype(dtype)) * share.astype(dtype)
                for own, x, scale, dtype in zip(packings, packed, own_scales, dtypes)
            ]
            return [jnp.where(share != 0, x, 0) for x in values], share

        # As in `fax.mean`, the replicas of a device are added up first. So the result is the same.
        count = replicas.size // replicas.devices

        def of_device(i: Any) -> tuple[list[jax.Array], jax.Array]:
            return _sum(lambda k: part(i * count + k), count)

        totals, total = _sum(of_device, replicas.devices)
        return [x / jnp.where(total != 0, total, 1).astype(x.dtype) for x in totals]

    codes, scales = each(encode, rows, weights)
    split = [PartitionSpec(replicas.axes, *spec) for spec in specs]
    inside = PartitionSpec(None, tuple(replicas.inside) or None)
    on_devices = functools.partial(
        jax.shard_map,
        axis_names={*mesh.axis_names}.difference(mesh.manual_axes),
        check_vma=False,
    )
    # In two maps, so that replicas can go on while the bytes are in flight.
    gathered = on_devices(gather, in_specs=(split, PartitionSpec(replicas.axes)), out_specs=inside)(
        codes, scales
    )
    means = on_devices(decode, in_specs=(inside,), out_specs=specs)(gathered)
    bits = 8 * buffer.nbytes * num_shards(replicas.inside, mesh)
    mean = _with_derivatives(tree_unflatten(treedef, means), rows, weights)
    return mean, jnp.full(replicas.size, bits, jnp.float32)


def _sum(term: Callable[[Any], PyTree], count: int) -> PyTree:
    """term(0) + term(1) + ... + term(count - 1), in this order."""

    def add(i: jax.Array, total: PyTree) -> PyTree:
        return jax.tree.map(jnp.add, total, term(i))

    return term(0) if count == 1 else lax.fori_loop(1, count, add, term(0))


def _with_derivatives(mean: PyTree, rows: PyTree, weights: jax.Array) -> PyTree:
    """The mean, with the derivatives of `fax.mean` of the rows."""
    group = resolve(None, "fax.algorithms")

    @jax.custom_jvp
    def known(mean: PyTree, rows: PyTree, weights: jax.Array) -> PyTree:
        del rows, weights
        return mean

    def of_float32(rows: PyTree, weights: jax.Array) -> PyTree:
        with scope((group,)):  # JAX runs the rule after the program was traced
            return fax.mean(rows, weights=weights, where=weights != 0)

    @known.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[PyTree, PyTree]:
        return primals[0], jax.jvp(of_float32, primals[1:], tangents[1:])[1]

    return known(mean, rows, weights)


def _packing(bits: int, shape: tuple[int, ...], spec: PartitionSpec, mesh: Any) -> Packing:
    entries = [() if e is None else e if isinstance(e, tuple) else (e,) for e in spec]
    shards = [num_shards(entry, mesh) for entry in entries] + [1] * (len(shape) - len(entries))
    local = tuple(size // count for size, count in zip(shape, shards))
    even = (axis for axis, size in enumerate(local) if size % (_BYTE // bits) == 0)
    return Packing(local, bits, next(even, None))
