"""Error feedback: clients remember what compression lost of their updates, and send it later."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import fax._operators as operators
from fax import _arguments
from fax.aggregators._aggregator import (
    Aggregator,
    Metrics,
    PerClient,
    PyTree,
    Transformation,
    as_transformation,
    of_floats,
)
from fax.aggregators._encoding import cast_saturating
from fax.aggregators._norms import difference, wide
from fax.aggregators._per_client import all_finite, each, each_present, rows_after


class ErrorFeedbackState(NamedTuple):
    """The state of `error_feedback`.

    Attributes:
      memory: `PerClient`, what each client has not sent yet.
      inner: the state of the inner transformation.

    Example:

      >>> part = fax.aggregators.error_feedback(fax.aggregators.top_k(1), num_clients=2)
      >>> part.init(jnp.zeros(3)).memory.rows.shape
      (2, 3)
    """

    memory: PerClient
    inner: PyTree


def error_feedback(
    transformation: Transformation | Aggregator,
    *,
    num_clients: int,
    decay: float | jax.Array = 1.0,
) -> Transformation:
    """Adds to each update what the transformation lost of the client's earlier updates.

    With a client's update u and its memory m, which starts at zero, the transformation T sends

        sent = T(β m + u),    m' = β m + u - sent

    With β = 1, what a client has sent in all rounds and its memory add up to its updates: what is
    not sent now is sent later, so that a biased compression has no lasting bias. With β < 1 old
    errors fade, which helps if clients take part rarely and their memories are out of date.

    The memory takes into account what T sends, and nothing that follows in a chain. So everything
    that compresses belongs inside, as in
    ``error_feedback(chain(top_k(0.01), e3m0()), num_clients=n)``. Whatever may leave clients out,
    such as `non_finite`, belongs inside or before.

    A client of weight zero keeps its memory as it is, to the bit. So does a client whose new memory
    would not be finite: such an update is sent, but not remembered.

    Args:
      transformation: T. It may be a `chain` of transformations alone.
      num_clients: the number of clients in the data. The state has a memory for each of them, a
        copy of the model in at least float32.
      decay: β, from 0 to 1. It may be traced.

    Returns:
      The transformation. Its state is an `ErrorFeedbackState`. Its metrics are those of T.

    Raises:
      ValueError: if ``transformation`` is not a transformation, or ``num_clients`` or ``decay`` is
        out of range; when used, if a leaf does not hold real floats.

    References:
      Seide et al., 1-bit stochastic gradient descent and its application to data-parallel
      distributed training of speech DNNs, Interspeech 2014. Stich et al., Sparsified SGD with
      memory, arXiv:1809.07599. Karimireddy et al., Error feedback fixes SignSGD and other gradient
      compression schemes, arXiv:1901.09847.

    Example:

      >>> part = fax.aggregators.error_feedback(fax.aggregators.top_k(1), num_clients=2)
      >>> @fax.program(clients=2)
      ... def sent(updates, state):
      ...     return part.update(updates, jnp.ones(2), state, jax.random.key(0))
      >>> state = part.init(jnp.zeros(3))
      >>> updates, _, state, _ = sent(jnp.array([[1.0, -3.0, 2.0], [0.0, 0.0, 4.0]]), state)
      >>> updates
      Array([[ 0., -3.,  0.],
             [ 0.,  0.,  4.]], dtype=float32)
      >>> state.memory.rows
      Array([[1., 0., 2.],
             [0., 0., 0.]], dtype=float32)
    """
    caller = "fax.aggregators.error_feedback"
    transformation = as_transformation("error_feedback", transformation)
    num_clients = _arguments.count(caller, "num_clients", num_clients)
    _arguments.number(caller, "decay", decay, least=0, most=1)

    def init(params: PyTree) -> ErrorFeedbackState:
        return ErrorFeedbackState(memory_of(num_clients, params), transformation.init(params))

    def update(
        updates: PyTree, weights: jax.Array, state: ErrorFeedbackState, key: jax.Array
    ) -> tuple[PyTree, jax.Array, ErrorFeedbackState, Metrics]:
        memory = state.memory.rows

        def remind(update: PyTree, memory: PyTree, decay: jax.Array) -> tuple[PyTree, PyTree]:
            total = optax.tree.add_scale(optax.tree.cast_like(update, memory), decay, memory)
            total = optax.tree.cast_like(total, memory)
            return total, jax.tree.map(_in_dtype_of, total, update)

        totals, short = each_present(remind, updates, weights, memory, operators.broadcast(decay))
        sent, weights, inner, metrics = transformation.update(short, weights, state.inner, key)
        rows = memory_after(weights, each(difference, totals, sent), memory)
        return sent, weights, ErrorFeedbackState(PerClient(rows), inner), metrics

    return of_floats("error_feedback", Transformation(init, update, transformation.format))


def _in_dtype_of(total: jax.Array, update: jax.Array) -> jax.Array:
    """A sum in the dtype of the update. Whatever is too large for that dtype is sent later."""
    short = cast_saturating(total, update.dtype)
    return jnp.where(jnp.isfinite(total), short, total.astype(update.dtype))


def memory_of(num_clients: int, params: PyTree) -> PerClient:
    """Memories of zeros."""
    return PerClient(
        jax.tree.map(lambda x: jnp.zeros((num_clients, *jnp.shape(x)), wide(x)), params)
    )


def memory_after(weights: jax.Array, left: PyTree, memory: PyTree) -> PyTree:
    """The memories after a round: what is left, if a client took part and that is finite."""

    def remembers(weight: jax.Array, left: PyTree) -> jax.Array:
        return (weight != 0) & all_finite(left)

    return rows_after(each(remembers, weights, left), left, memory)
