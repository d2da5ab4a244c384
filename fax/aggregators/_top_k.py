"""Sparsification: clients send the largest coordinates of their updates."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fax import _arguments
from fax.aggregators._aggregator import (
    Aggregator,
    Metrics,
    PyTree,
    Transformation,
    all_bits,
    as_transformation,
    of_floats,
)
from fax.aggregators._encoding import bits_of, parts_of
from fax.aggregators._per_client import each, each_present

_CALLER = "fax.aggregators.top_k"


def top_k(
    k: int | float,
    *,
    per: str | int = "update",
    values: Transformation | Aggregator | None = None,
) -> Transformation:
    """Sends the k coordinates of the largest magnitude, and zeros for the others.

    By default these are the k largest of the whole update, which is the best approximation of it:
    ‖sent - u‖^2 <= (1 - k / d) ‖u‖^2. With ``per="leaf"`` they are the k largest of each leaf. With
    ``per=4096`` they are the k largest of each chunk of 4096 consecutive numbers of a leaf; the
    last chunk of a leaf may be shorter. Chunks are faster, their positions take fewer bits, and no
    layer is left out. Of equal magnitudes the first ones are sent. Derivatives pass through what is
    sent.

    The update is biased: coordinates that are never among the largest are never sent. With
    `error_feedback` they are sent later.

    A client sends the values, and the position of each among d coordinates in ceil(log2 d) bits, or
    the whole update if that takes fewer bits.

    Args:
      k: an int, the number of coordinates, or all of a leaf or chunk that has fewer; or a float up
        to 1, a fraction of the coordinates, at least one.
      per: what the k coordinates are chosen from: ``"update"``, ``"leaf"``, or an int, the size of
        chunks.
      values: how the values are sent: a transformation, such as `e3m0`, or a `chain` of
        transformations alone. It is applied to the values only: an array [chunks, k] for each leaf,
        or a single array [1, k] with ``per="update"``. Its ``"clients/bits"`` are those of the
        values.

    Returns:
      The transformation. Its metric ``"clients/bits"`` is how many bits each client sends.

    Raises:
      ValueError: if an argument is out of range, or ``values`` is not a transformation; in
        ``init``, if an update has fewer than ``k`` coordinates; when used, if a leaf does not hold
        real floats.

    References:
      Stich et al., Sparsified SGD with memory, arXiv:1809.07599. Sarfi et al., Communication
      efficient LLM pre-training with SparseLoCo, arXiv:2508.15706, for chunks.

    Example:

      >>> compress = fax.aggregators.top_k(1, per=2)
      >>> @fax.program(clients=2)
      ... def sent(updates):
      ...     return compress.update(updates, jnp.ones(2), (), jax.random.key(0))[0]
      >>> sent(jnp.array([[1.0, -3.0, 2.0, 1.0], [0.0, 0.0, 4.0, 5.0]]))
      Array([[ 0., -3.,  2.,  0.],
             [ 0.,  0.,  0.,  5.]], dtype=float32)
    """
    if not (isinstance(k, float) and 0 < k <= 1):
        expected = "an int of at least 1, or a fraction: a float above 0.0 and up to 1.0"
        k = _arguments.count(_CALLER, "k", k, expected=expected)
    if per not in ("update", "leaf"):
        expected = "'update', 'leaf', or an int of at least 1, the size of chunks"
        per = _arguments.count(_CALLER, "per", per, expected=expected)
        if not isinstance(k, float):
            _arguments.count(_CALLER, "k", k, most=per, expected=f"at most per={per}")
    inner = None if values is None else as_transformation("top_k", values, "values")

    def count(size: int) -> int:
        return min(size, max(1, round(k * size)) if isinstance(k, float) else k)

    def groups_of(leaves: list[Any]) -> list[_Group]:
        """What is chosen from, in the leaves of one client: the whole update, or each leaf."""
        sizes = [math.prod(x.shape) for x in leaves]
        if per != "update":
            full = [size if per == "leaf" else min(size, int(per)) for size in sizes]
            parts = zip(sizes, full, leaves)
            return [
                _Group(n, chunk, count(chunk), n % chunk and count(n % chunk), x.dtype)
                for n, chunk, x in parts
                if n
            ]
        total = sum(sizes)
        if not isinstance(k, float) and k > total:
            raise ValueError(
                f"{_CALLER}: k is {k}, but an update has {total} coordinates. For a fraction of "
                "them pass a float, as in top_k(0.01)."
            )
        dtype = jnp.result_type(*(x.dtype for x in leaves)) if leaves else None
        return [_Group(total, total, count(total), 0, dtype)] if total else []

    def init(params: PyTree) -> PyTree:
        groups = groups_of(jax.tree.leaves(jax.eval_shape(lambda: params)))
        if inner is None:
            return ()
        return inner.init([jnp.zeros((group.chunks, group.k), group.dtype) for group in groups])

    def update(
        updates: PyTree, weights: jax.Array, state: PyTree, key: jax.Array
    ) -> tuple[PyTree, jax.Array, PyTree, Metrics]:
        leaves, treedef = jax.tree.flatten(updates)
        types = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in leaves]
        groups = groups_of(types)

        def choose(leaves: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
            flat = [x.reshape(-1) for x in leaves if x.size]
            flat = [jnp.concatenate(flat)] if flat and per == "update" else flat
            found = [group.choose(x) for group, x in zip(groups, flat)]
            bits: Any = sum(group.sent * group.position_bits for group in groups)
            if inner is None and per == "update":
                bits += sum(_value_bits(types, positions) for _, positions in found)
            elif inner is None:
                bits += sum(group.sent * bits_of(group.dtype) for group in groups)
            values, positions = map(list, zip(*found)) if found else ([], [])
            return values, positions, jnp.asarray(bits, jnp.float32)

        def put(values: list[jax.Array], positions: list[jax.Array]) -> list[jax.Array]:
            flat = [group.put(*own) for group, *own in zip(groups, values, positions)]
            if flat and per == "update":
                flat = parts_of(flat[0], [size for x in types if (size := math.prod(x.shape))])
            parts, sent = iter(flat), []
            for x in types:
                part = next(parts) if math.prod(x.shape) else jnp.zeros(0, x.dtype)
                dtype = x.dtype if inner is None else part.dtype
                sent.append(part.reshape(x.shape).astype(dtype))
            return sent

        values, positions, bits = each_present(choose, leaves, weights)
        metrics: Metrics = {}
        if inner is not None:
            values, weights, state, metrics = inner.update(values, weights, state, key)
            bits = bits + metrics.get("clients/bits", all_bits(values))
        metrics = {**metrics, "clients/bits": jnp.minimum(bits, all_bits(updates))}
        sent = jax.tree.unflatten(treedef, each(put, values, positions))
        return sent, weights, state, metrics

    return of_floats("top_k", Transformation(init, update))


class _Group(NamedTuple):
    """A vector in chunks. The largest numbers of each chunk are sent.

    Attributes:
      size: of the vector.
      chunk: the size of chunks. The last one may be shorter.
      k: how many numbers of a chunk are sent.
      last: how many numbers of a shorter last chunk are sent.
      dtype: of the numbers.
    """

    size: int
    chunk: int
    k: int
    last: int
    dtype: Any

    @property
    def chunks(self) -> int:
        """The number of chunks."""
        return -(-self.size // self.chunk)

    @property
    def counts(self) -> np.ndarray:
        """How many numbers of each chunk are sent, [chunks, 1]."""
        counts = np.full((self.chunks, 1), self.k)
        if self.size % self.chunk:
            counts[-1] = self.last
        return counts

    @property
    def sent(self) -> int:
        """How many numbers are sent in all."""
        return int(self.counts.sum())

    @property
    def position_bits(self) -> int:
        """The number of bits of a position in a chunk."""
        return math.ceil(math.log2(self.chunk))

    def choose(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The numbers of the largest magnitudes, and their positions in chunks, [chunks, k]."""
        extra = self.chunks * self.chunk - self.size
        magnitude = jnp.pad(lax.stop_gradient(jnp.abs(x)), (0, extra), constant_values=-1)
        positions = lax.top_k(magnitude.reshape(self.chunks, self.chunk), self.k)[1]
        rows = jnp.pad(x, (0, extra)).reshape(self.chunks, self.chunk)
        values = jnp.take_along_axis(rows, positions, axis=1)
        return jnp.where(np.arange(self.k) < self.counts, values, 0), positions

    def put(self, values: jax.Array, positions: jax.Array) -> jax.Array:
        """The vector with these numbers, and zeros elsewhere."""
        values = jnp.where(np.arange(self.k) < self.counts, values, 0)
        rows = jnp.zeros((self.chunks, self.chunk), values.dtype)
        rows = rows.at[np.arange(self.chunks)[:, None], positions].set(values, unique_indices=True)
        return rows.reshape(-1)[: self.size]


def _value_bits(leaves: list[jax.ShapeDtypeStruct], positions: jax.Array) -> Any:
    """The bits of the numbers at these positions of the whole update, in the leaves' dtypes."""
    ends = np.cumsum([math.prod(x.shape) for x in leaves])
    bits = [bits_of(x.dtype) for x in leaves]
    total: Any = positions.size * bits[0]
    for end, more in zip(ends, np.diff(bits)):
        if more:
            total += int(more) * jnp.sum(positions >= end)
    return total
