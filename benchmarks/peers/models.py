"""The models and a local step in plain JAX, for the handwritten programs.

Convolutions are slices and one matrix product: in a loop on CPUs, XLA's own convolution is tens of
times slower.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from peers import workloads


def logits(params: Any, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Scores of the classes. With a key, dropout is active in models that have it."""
    convolutions = [layer for layer in params if layer["w"].ndim == 4]
    dense = params[len(convolutions) :]
    before, last = None, None
    if convolutions:
        if key is not None:
            before, last = jax.random.split(key)
        h = x.reshape(-1, workloads.SIDE, workloads.SIDE, 1)
        for layer in convolutions:
            h = jax.nn.relu(convolve(layer, h))
        x = dropout(workloads.DROPOUT[0], pool(h), before)
    h = x.reshape(len(x), -1)
    for layer in dense[:-1]:
        h = jax.nn.relu(h @ layer["w"] + layer["b"])
    return dropout(workloads.DROPOUT[1], h, last) @ dense[-1]["w"] + dense[-1]["b"]


def convolve(layer: Any, h: jax.Array) -> jax.Array:
    rows, columns, _, channels = layer["w"].shape
    height, width = h.shape[1] - rows + 1, h.shape[2] - columns + 1
    patches = [h[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)]
    return jnp.concatenate(patches, -1) @ layer["w"].reshape(-1, channels) + layer["b"]


def pool(h: jax.Array) -> jax.Array:
    n, height, width, channels = h.shape
    return h.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))


def dropout(rate: float, h: jax.Array, key: jax.Array | None) -> jax.Array:
    if key is None:
        return h
    return h * jax.random.bernoulli(key, 1 - rate, h.shape) / (1 - rate)


def losses(params: Any, x: jax.Array, y: jax.Array, key: jax.Array | None) -> jax.Array:
    """The cross-entropy of each example."""
    return -jnp.sum(
        jax.nn.one_hot(y, workloads.CLASSES) * jax.nn.log_softmax(logits(params, x, key)), -1
    )


def step(params: Any, key: jax.Array, x: jax.Array, y: jax.Array, mask: jax.Array) -> tuple:
    """A step of SGD on a batch whose mask is 0 for padding. Also returns the next key."""
    use = None
    if params[0]["w"].ndim == 4:  # the others need no random numbers
        key, use = jax.random.split(key)

    def mean(params):
        return jnp.sum(losses(params, x, y, use) * mask) / jnp.maximum(jnp.sum(mask), 1)

    gradient = jax.grad(mean)(params)
    return jax.tree.map(lambda p, g: p - workloads.CLIENT_RATE * g, params, gradient), key


def server_optimizer() -> optax.GradientTransformation:
    return optax.adam(
        workloads.SERVER_RATE,
        b1=workloads.SERVER_B1,
        b2=workloads.SERVER_B2,
        eps=workloads.SERVER_EPS,
    )


def server_step(params: Any, state: Any, gradient: Any) -> tuple:
    """A step of the server's optimizer."""
    updates, state = server_optimizer().update(gradient, state, params)
    return optax.apply_updates(params, updates), state
