"""Sparsification: a client sends its largest coordinates, and remembers the others."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fax import _arguments
from fax.aggregators._aggregator import Metrics, PerClient, Transformation, all_bits, each
from fax.aggregators._leaves import bits_of, check_floats, split, wide

PyTree = Any


def top_k(k: int | float, num_clients: int | None = None) -> Transformation:
    """Sends the k coordinates of the largest magnitude, with error feedback.

    Of a client's update u and its memory m, which starts at zero:

        sent = Top_k(u + m),    m' = u + m - sent

    so that what is not sent now is sent later: over all rounds of a client, what was sent and its
    memory add up to its updates. Without a memory the update is biased, and what is never among
    the largest is never learned. The k are of the whole update, for which they are the best
    approximation: ‖sent - u‖^2 <= (1 - k / d) ‖u‖^2; layers get what their magnitudes deserve. Of
    equal magnitudes the first ones are sent. Derivatives pass through what is sent.

    A client sends the values, and for each its position in ceil(log2 d) bits, or the whole update
    where that is shorter.

    Args:
      k: an int, how many coordinates; or a float up to 1, which fraction of them, at least one.
      num_clients: the size of the population, for its memories: a copy of the model for each
        client, in at least float32. None: no error feedback.

    Returns:
      The transformation. With a memory, its state is `PerClient`. Its metric ``"clients/bits"`` is
      what each client sends.

    Raises:
      ValueError: if ``k`` or ``num_clients`` is out of range; in ``init``, if ``k`` is more than
        there are coordinates; if a leaf does not hold floats.

    References:
      Stich et al., Sparsified SGD with memory, arXiv:1809.07599. Karimireddy et al., Error feedback
      fixes SignSGD and other gradient compression schemes, arXiv:1901.09847.

    Example:

      >>> compress = fax.aggregators.top_k(1, num_clients=2)
      >>> @fax.program(clients=2)
      ... def sent(updates, state):
      ...     return compress.update(updates, jnp.ones(2), state, jax.random.key(0))
      >>> state = compress.init(jnp.zeros(3))
      >>> updates, _, state, _ = sent(jnp.array([[1.0, -3.0, 2.0], [0.0, 0.0, 4.0]]), state)
      >>> updates
      Array([[ 0., -3.,  0.],
             [ 0.,  0.,  4.]], dtype=float32)
      >>> state.rows
      Array([[1., 0., 2.],
             [0., 0., 0.]], dtype=float32)
    """
    if isinstance(k, float):
        if not 0 < k <= 1:
            raise ValueError(
                f"fax.aggregators.top_k: k is {k!r}, expected a fraction, above 0.0 and up to 1.0, "
                "or an int, the number of coordinates."
            )
    else:
        _arguments.count("fax.aggregators.top_k", "k", k)
    if num_clients is not None:
        _arguments.count("fax.aggregators.top_k", "num_clients", num_clients)

    def count(size: int) -> int:
        if isinstance(k, float):
            return min(size, max(1, round(k * size)))
        if k > size:
            raise ValueError(
                f"fax.aggregators.top_k: k is {k}, but an update has {size} coordinates. A "
                "fraction of them is a float, as in top_k(0.01)."
            )
        return k

    def init(params: PyTree) -> PyTree:
        check_floats("top_k", params)
        count(sum(np.size(x) for x in jax.tree.leaves(params)))
        if num_clients is None:
            return ()
        return PerClient(
            jax.tree.map(
                lambda x: jnp.zeros((num_clients, *jnp.shape(x)), wide(jnp.result_type(x))), params
            )
        )

    def client(update: list[jax.Array], memory: list[jax.Array] | None) -> tuple:
        wanted = update if memory is None else [u + m for u, m in zip(update, memory)]
        chosen = _largest(wanted, count(sum(x.size for x in wanted)))
        sent = [jnp.where(c, x, 0).astype(u.dtype) for c, x, u in zip(chosen, wanted, update)]
        position = math.ceil(math.log2(sum(x.size for x in update)))
        bits = sum(jnp.sum(c) * (bits_of(u.dtype) + position) for c, u in zip(chosen, update))
        memory = None if memory is None else [x - s for x, s in zip(wanted, sent)]
        return sent, memory, jnp.asarray(bits, jnp.float32)

    def update(
        updates: PyTree, weights: jax.Array, state: PyTree, key: jax.Array
    ) -> tuple[PyTree, jax.Array, PyTree, Metrics]:
        check_floats("top_k", updates)
        leaves, treedef = jax.tree.flatten(updates)
        memory = None if num_clients is None else jax.tree.leaves(state.rows)
        sent, memory, bits = each(client, leaves, memory)
        if memory is not None:
            state = PerClient(jax.tree.unflatten(treedef, memory))
        metrics = {"clients/bits": jnp.minimum(bits, all_bits(updates))}
        return jax.tree.unflatten(treedef, sent), weights, state, metrics

    return Transformation(init, update)


def _largest(leaves: list[jax.Array], k: int) -> list[jax.Array]:
    """Which k coordinates have the largest magnitude in all leaves together."""
    dtype = jnp.result_type(*leaves)
    size = jnp.concatenate([lax.stop_gradient(jnp.abs(x)).ravel().astype(dtype) for x in leaves])
    chosen = jnp.zeros(size.shape, bool).at[lax.top_k(size, k)[1]].set(True)
    parts = split(chosen, [x.size for x in leaves])
    return [part.reshape(x.shape) for part, x in zip(parts, leaves)]
