"""Error feedback: clients remember what a compression of their updates lost, and send it later."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fax._operators as operators
from fax import _arguments
from fax.aggregators._aggregator import (
    Aggregator,
    Metrics,
    PerClient,
    Transformation,
    as_transformation,
    each,
    each_present,
    rows_after,
)
from fax.aggregators._leaves import check_floats, saturated
from fax.aggregators._norms import difference, wide

PyTree = Any


class ErrorFeedbackState(NamedTuple):
    """The state of `error_feedback`.

    Attributes:
      memory: `PerClient`, what clients have not sent yet.
      inner: the state of the transformation.
    """

    memory: PerClient
    inner: PyTree


def error_feedback(
    transformation: Transformation | Aggregator,
    *,
    num_clients: int,
    decay: float | jax.Array = 1.0,
) -> Transformation:
    """Adds to each update what the transformation lost of the client's updates before.

    Of a client's update u and its memory m, which starts at zero, the transformation T sends

        sent = T(β m + u),    m' = β m + u - sent

    With β = 1, what a client sent in all rounds and its memory add up to its updates: what is not
    sent now is sent later, so that a biased compression has no lasting bias. With β < 1 old errors
    fade, which helps where memories are out of date when they are sent.

    The memory knows what T sends, and nothing of what follows in a chain. So all that compresses
    belongs inside, as in ``error_feedback(chain(top_k(0.01), e3m0()), num_clients=n)``, and what
    may leave clients out, such as `non_finite`, before it or inside.

    A client of weight zero keeps its memory as it is, to the bit. So does one whose memory would
    not be finite any more: such an update is sent, but not remembered.

    Args:
      transformation: T. Or a `chain` of transformations alone.
      num_clients: the size of the population, for its memories: a copy of the model for each
        client, in at least float32.
      decay: β, from 0 to 1. It may be traced.

    Returns:
      The transformation, whose state is `ErrorFeedbackState`. Its metrics are those of T.

    Raises:
      TypeError: if T is not a transformation.
      ValueError: if ``num_clients`` or ``decay`` is out of range; when used, if a leaf does not
        hold floats.

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
    _arguments.number(caller, "decay", decay, least=0)
    if _arguments.concrete(decay) and decay > 1:
        raise ValueError(f"{caller}: decay is {decay!r:.80}, expected a number from 0 to 1.")

    def init(params: PyTree) -> ErrorFeedbackState:
        check_floats("error_feedback", params)
        return ErrorFeedbackState(memory_of(num_clients, params), transformation.init(params))

    def update(
        updates: PyTree, weights: jax.Array, state: ErrorFeedbackState, key: jax.Array
    ) -> tuple[PyTree, jax.Array, ErrorFeedbackState, Metrics]:
        check_floats("error_feedback", updates)
        memory = state.memory.rows

        def wanted(update: PyTree, memory: PyTree, decay: Any) -> tuple[PyTree, PyTree]:
            total = jax.tree.map(lambda u, m: decay * m + u.astype(m.dtype), update, memory)
            total = jax.tree.map(lambda x, m: x.astype(m.dtype), total, memory)
            return total, jax.tree.map(told, total, update)

        total, asked = each_present(wanted, updates, weights, memory, operators.broadcast(decay))
        sent, weights, inner, metrics = transformation.update(asked, weights, state.inner, key)
        left = each(lambda *rows: jax.tree.map(difference, *rows), total, sent)
        rows = remembered(weights, left, memory)
        return sent, weights, ErrorFeedbackState(PerClient(rows), inner), metrics

    return Transformation(init, update)


def told(total: jax.Array, update: jax.Array) -> jax.Array:
    """A sum in the dtype of the update. What is too large for that is remembered."""
    short = saturated(total, update.dtype)
    return jnp.where(jnp.isfinite(total), short, total.astype(update.dtype))


def memory_of(num_clients: int, params: PyTree) -> PerClient:
    """Memories of zeros."""
    return PerClient(
        jax.tree.map(lambda x: jnp.zeros((num_clients, *jnp.shape(x)), wide(x)), params)
    )


def remembered(weights: jax.Array, left: PyTree, memory: PyTree) -> PyTree:
    """The memories after a round: what is left, of the clients that took part and are finite."""

    def is_finite(weight: jax.Array, left: PyTree) -> jax.Array:
        finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(left)]
        return (weight != 0) & jnp.all(jnp.stack([jnp.bool_(True), *finite]))

    return rows_after(each(is_finite, weights, left), left, memory)
