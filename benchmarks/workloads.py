"""What the core benchmark runs: data, client functions, and three ways to write a round.

The data and the cohorts are those of the comparison with the peers, `peers/workloads.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from peers.workloads import (
    BATCH,
    CLASSES,
    CLIENT_RATE,
    PIXELS,
    SERVER_B1,
    SERVER_B2,
    SERVER_EPS,
    SERVER_RATE,
    epoch_order,
    examples,
    sizes,
)

import fax

try:
    import drjax
except ImportError:
    drjax = None
logging.getLogger("absl").setLevel(logging.ERROR)  # DrJAX warns of a missing mesh at every call

PyTree = Any

# Padded sizes are multiples of these, so that few shapes are compiled.
STEPS_MULTIPLE = 5
ROWS_MULTIPLE = 4096

LOGISTIC = (PIXELS, CLASSES)
DENSE = (PIXELS, 200, 200, CLASSES)


# Data


class Batches(NamedTuple):
    """Batches of one client, or of several along a leading axis. The mask is 0 for padding."""

    x: Any  # float32 [..., steps, batch, pixels]
    y: Any  # int32 [..., steps, batch]
    mask: Any  # float32 [..., steps, batch]


def padded_shape(clients: Sequence[int]) -> tuple[int, int]:
    """The clients' rows in the pool and the steps of their longest epoch, rounded up."""
    counts = sizes()[clients]
    return _round_up(counts.sum(), ROWS_MULTIPLE), _round_up(
        _round_up(counts.max(), BATCH) // BATCH, STEPS_MULTIPLE
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-int(number) // multiple) * multiple


class Pool(NamedTuple):
    """All examples of a cohort, client after client, and unused rows at the end."""

    x: Any  # float32 [rows, pixels]
    y: Any  # int32 [rows]


class Order(NamedTuple):
    """The rows of the pool that are in each batch. The mask is 0 for padding."""

    rows: Any  # int32 [..., steps, batch]
    mask: Any  # float32 [..., steps, batch]


class Round(NamedTuple):
    """The data of a round: padded batches without a pool, or a pool and the order of its rows."""

    pool: Pool | None
    batches: Batches | Order  # [clients, steps, batch, ...]
    num_examples: Any  # float32 [clients]


def padded(number: int, clients: Sequence[int]) -> Round:
    """An epoch of each client, shuffled and padded on the host."""
    _, steps = padded_shape(clients)
    x = np.zeros((len(clients), steps * BATCH, PIXELS), np.float32)
    y = np.zeros((len(clients), steps * BATCH), np.int32)
    mask = np.zeros(y.shape, np.float32)
    for i, (client, order) in enumerate(shuffled(number, clients)):
        own_x, own_y = examples(client)
        x[i, : len(order)], y[i, : len(order)] = own_x[order], own_y[order]
        mask[i, : len(order)] = 1
    batches = Batches(*(a.reshape(len(clients), steps, BATCH, *a.shape[2:]) for a in (x, y, mask)))
    return Round(None, batches, sizes()[clients].astype(np.float32))


def picked(number: int, clients: Sequence[int]) -> Round:
    """The clients' examples, unpadded, and the order in which the device picks them."""
    pool_rows, steps = padded_shape(clients)
    pool = Pool(np.empty((pool_rows, PIXELS), np.float32), np.empty(pool_rows, np.int32))
    rows = np.zeros((len(clients), steps * BATCH), np.int32)
    mask = np.zeros(rows.shape, np.float32)
    start = 0
    for i, (client, order) in enumerate(shuffled(number, clients)):
        end = start + len(order)
        pool.x[start:end], pool.y[start:end] = examples(client)
        rows[i, : len(order)] = start + order
        mask[i, : len(order)] = 1
        start = end
    batches = Order(*(a.reshape(len(clients), steps, BATCH) for a in (rows, mask)))
    return Round(pool, batches, sizes()[clients].astype(np.float32))


PREPARATIONS = {"rows picked on the device": picked, "padded on the host": padded}


def shuffled(number: int, clients: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Each client and the order of its examples in this round."""
    for client in map(int, clients):
        yield client, epoch_order(number, client)


# Models and client functions


def init(widths: Sequence[int], seed: int = 0) -> list[dict[str, jax.Array]]:
    """The parameters of dense layers."""
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    return [
        {
            "w": jax.random.truncated_normal(key, -2, 2, (fan_in, fan_out)) / np.sqrt(fan_in),
            "b": jnp.zeros(fan_out),
        }
        for key, fan_in, fan_out in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def loss(params: PyTree, batch: Batches) -> jax.Array:
    """The mean cross-entropy of the examples that are not padding."""
    h = batch.x
    for layer in params[:-1]:
        h = jax.nn.relu(h @ layer["w"] + layer["b"])
    logits = h @ params[-1]["w"] + params[-1]["b"]
    losses = -jnp.sum(jax.nn.one_hot(batch.y, CLASSES) * jax.nn.log_softmax(logits), -1)
    return jnp.sum(losses * batch.mask) / jnp.maximum(jnp.sum(batch.mask), 1)


def epoch(params: PyTree, batches: PyTree, *, skip: bool, fetch: Callable | None = None) -> PyTree:
    """One epoch of SGD at a client. Returns its negative update, a gradient for the server.

    ``fetch`` converts a step's part of ``batches`` to `Batches`, if necessary. A step that is all
    padding changes nothing. With ``skip``, a branch skips it, which saves time if the function is
    not vectorized.
    """

    def step(params, batch):
        gradient = jax.grad(loss)(params, fetch(batch) if fetch else batch)
        return jax.tree.map(lambda p, g: p - CLIENT_RATE * g, params, gradient)

    def body(params, batch):
        if skip:
            return lax.cond(batch.mask[0] > 0, step, lambda p, _: p, params, batch), None
        return step(params, batch), None

    trained, _ = lax.scan(body, params, batches)
    return jax.tree.map(jnp.subtract, params, trained)


def local_steps(params: Sequence[Any], x: Any, *, rate: Any, steps: int) -> list[Any]:
    """The update from some steps of gradient descent at a client."""

    def loss(params):
        h = x
        for weight in params:
            h = jnp.tanh(h @ weight)
        return jnp.mean(h**2)

    def step(params, _):
        return [w - rate * g for w, g in zip(params, jax.grad(loss)(params), strict=True)], None

    if steps == 1:
        trained, _ = step(params, None)
    else:
        trained, _ = jax.lax.scan(step, params, length=steps)
    return [new - old for new, old in zip(trained, params, strict=True)]


# Three ways to write a round


@dataclasses.dataclass(frozen=True)
class Fax:
    """With fax's operators."""

    clients: int
    vectorize: int | None = None
    name = "fax"
    skips_padding = True

    def program(self, fn: Callable) -> Callable:
        return fax.program(clients=self.clients)(fn)

    def broadcast(self, server):
        return fax.broadcast(server)

    def mean(self, work, server, data, weights=None, where=None, between=lambda rows: rows):
        updates = fax.map(work, fax.broadcast(server), data, vectorize=self.vectorize)
        updates = between(updates)
        return fax.mean(updates, weights=weights, where=where)


@dataclasses.dataclass(frozen=True)
class DrJax:
    """With DrJAX's operators. It has no masks, so they are written out."""

    clients: int
    name = "DrJAX"
    skips_padding = False

    def program(self, fn: Callable) -> Callable:
        return drjax.program(placements={"clients": self.clients})(fn)

    def broadcast(self, server):
        return drjax.broadcast(server)

    def mean(self, work, server, data, weights=None, where=None, between=lambda rows: rows):
        updates = between(drjax.map_fn(work, (drjax.broadcast(server), data)))
        if where is not None:
            updates = drjax.map_fn(keep, (updates, where))
            weights = where.astype(jnp.float32)
        if weights is None:
            return drjax.reduce_mean(updates)
        return drjax.reduce_weighted_mean(updates, jax.tree.map(lambda _: weights, updates))


@dataclasses.dataclass(frozen=True)
class Vmap:
    """By hand, with `jax.vmap`."""

    clients: int
    name = "vmap"
    skips_padding = False

    def program(self, fn: Callable) -> Callable:
        return fn

    def broadcast(self, server):
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.clients, *x.shape)), server)

    def mean(self, work, server, data, weights=None, where=None, between=lambda rows: rows):
        updates = jax.vmap(work, in_axes=(None, 0), axis_size=self.clients)(server, data)
        updates = between(updates)
        if where is not None:
            updates = jax.vmap(keep)(updates, where)
            weights = where.astype(jnp.float32)
        if weights is None:
            return jax.tree.map(lambda u: jnp.mean(u, 0), updates)
        return jax.tree.map(lambda u: jnp.tensordot(weights, u, 1) / jnp.sum(weights), updates)


WAYS = (Fax, DrJax, Vmap) if drjax else (Fax, Vmap)
NAMES = ("fax", "DrJAX", "vmap")


def keep(update: PyTree, included: jax.Array) -> PyTree:
    """A client's update, or zeros if the client is left out."""
    return jax.tree.map(lambda u: jnp.where(included, u, 0), update)


def adam() -> optax.GradientTransformation:
    """The server's optimizer."""
    return optax.adam(SERVER_RATE, b1=SERVER_B1, b2=SERVER_B2, eps=SERVER_EPS)


def federated_averaging(way: Any) -> Callable:
    """A round: an epoch at every client, a mean weighted by examples, and a step of Adam."""

    @way.program
    def one_round(params, state, data):
        def pick(order):
            return Batches(data.pool.x[order.rows], data.pool.y[order.rows], order.mask)

        fetch = pick if data.pool else None
        work = functools.partial(epoch, skip=way.skips_padding, fetch=fetch)
        gradient = way.mean(work, params, data.batches, weights=data.num_examples)
        updates, state = adam().update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return one_round
