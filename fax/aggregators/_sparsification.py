"""Sparsification: a client sends its largest coordinates."""

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
    Transformation,
    all_bits,
    as_transformation,
    each,
    each_present,
)
from fax.aggregators._leaves import bits_of, check_floats, split

PyTree = Any

_WHERE = "fax.aggregators.top_k"


def top_k(
    k: int | float,
    *,
    per: str | int = "update",
    values: Transformation | Aggregator | None = None,
) -> Transformation:
    """Sends the k coordinates of the largest magnitude.

    By default these are of the whole update, for which they are the best approximation:
    ‖sent - u‖^2 <= (1 - k / d) ‖u‖^2, and layers get what their magnitudes deserve. With
    ``per="leaf"`` they are the k largest of each leaf, and with ``per=4096`` those of each chunk of
    4096 numbers in a row, of which the last one of a leaf may be shorter. Chunks are quicker, their
    positions take fewer bits, and no layer is left out. Of equal magnitudes the first ones are
    sent. Derivatives pass through what is sent.

    What is never among the largest is never learned: the update is biased. With `error_feedback` it
    is sent later.

    A client sends the values, and for each its position among d coordinates in ceil(log2 d) bits,
    or the whole update where that is shorter.

    Args:
      k: an int, how many coordinates, or all of a leaf or chunk that has fewer; or a float up to 1,
        which fraction of them, at least one.
      per: of what: ``"update"``, ``"leaf"``, or an int, the size of chunks.
      values: how the values are sent: a transformation, such as `e3m0`, or a `chain` of
        transformations alone. It sees nothing but the values: an array [chunks, k] for each leaf,
        or one [1, k] with ``per="update"``. Its ``"clients/bits"`` are those of the values.

    Returns:
      The transformation. Its metric ``"clients/bits"`` is what each client sends.

    Raises:
      TypeError: if ``values`` is not a transformation.
      ValueError: if ``k`` or ``per`` is out of range; in ``init``, if ``k`` is more than there are
        coordinates in an update; if a leaf does not hold floats.

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
    if isinstance(k, float):
        if not 0 < k <= 1:
            raise ValueError(
                f"{_WHERE}: k is {k!r}, expected a fraction, above 0.0 and up to 1.0, or an int, "
                "the number of coordinates."
            )
    else:
        k = _arguments.count(_WHERE, "k", k)
    if isinstance(per, str) and per not in ("update", "leaf"):
        raise ValueError(
            f"{_WHERE}: per is {per!r}, expected 'update', 'leaf', or an int, the size of chunks."
        )
    if not isinstance(per, str):
        per = _arguments.count(_WHERE, "per", per)
        if not isinstance(k, float) and k > per:
            raise ValueError(f"{_WHERE}: k is {k}, but a chunk has per={per} coordinates.")
    inner = None if values is None else as_transformation("top_k", values)

    def count(size: int) -> int:
        return min(size, max(1, round(k * size)) if isinstance(k, float) else k)

    def groups_of(leaves: list) -> list[_Group]:
        """What is chosen from, of leaves of a single client: all numbers, or those of each leaf."""
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
                f"{_WHERE}: k is {k}, but an update has {total} coordinates. A fraction of them is "
                "a float, as in top_k(0.01)."
            )
        dtype = jnp.result_type(*(x.dtype for x in leaves)) if leaves else None
        return [_Group(total, total, count(total), 0, dtype)] if total else []

    def init(params: PyTree) -> PyTree:
        check_floats("top_k", params)
        groups = groups_of(jax.tree.leaves(jax.eval_shape(lambda: params)))
        if inner is None:
            return ()
        return inner.init([jnp.zeros((group.chunks, group.k), group.dtype) for group in groups])

    def update(
        updates: PyTree, weights: jax.Array, state: PyTree, key: jax.Array
    ) -> tuple[PyTree, jax.Array, PyTree, Metrics]:
        check_floats("top_k", updates)
        leaves, treedef = jax.tree.flatten(updates)
        like = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in leaves]
        groups = groups_of(like)

        def choose(leaves: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
            flat = [x.reshape(-1) for x in leaves if x.size]
            flat = [jnp.concatenate(flat)] if flat and per == "update" else flat
            found = [group.choose(x) for group, x in zip(groups, flat)]
            bits: Any = sum(group.sent * group.position_bits for group in groups)
            if inner is None and per == "update":
                bits += sum(_value_bits(like, positions) for _, positions in found)
            elif inner is None:
                bits += sum(group.sent * bits_of(group.dtype) for group in groups)
            values, positions = map(list, zip(*found)) if found else ([], [])
            return values, positions, jnp.asarray(bits, jnp.float32)

        def put(values: list[jax.Array], positions: list[jax.Array]) -> list[jax.Array]:
            flat = [group.put(*own) for group, *own in zip(groups, values, positions)]
            if flat and per == "update":
                flat = split(flat[0], [size for x in like if (size := math.prod(x.shape))])
            parts, sent = iter(flat), []
            for x in like:
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

    return Transformation(init, update)


class _Group(NamedTuple):
    """A vector in chunks, of each of which the largest numbers are sent.

    Attributes:
      size: of the vector.
      chunk: the size of chunks; the last one may be shorter.
      k: how many are sent of each.
      last: how many are sent of one that is shorter.
      dtype: of the numbers.
    """

    size: int
    chunk: int
    k: int
    last: int
    dtype: Any

    @property
    def chunks(self) -> int:
        return -(-self.size // self.chunk)

    @property
    def counts(self) -> np.ndarray:
        counts = np.full((self.chunks, 1), self.k)
        if self.size % self.chunk:
            counts[-1] = self.last
        return counts

    @property
    def sent(self) -> int:
        return int(self.counts.sum())

    @property
    def position_bits(self) -> int:
        return math.ceil(math.log2(self.chunk))

    def choose(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The numbers of the largest magnitude and their positions in chunks, [chunks, k] each."""
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


def _value_bits(leaves: list, positions: jax.Array) -> Any:
    """The bits of the numbers at positions in all leaves together, in their own dtypes."""
    ends = np.cumsum([math.prod(x.shape) for x in leaves])
    bits = [bits_of(x.dtype) for x in leaves]
    total: Any = positions.size * bits[0]
    for end, more in zip(ends, np.diff(bits)):
        if more:
            total += int(more) * jnp.sum(positions >= end)
    return total
