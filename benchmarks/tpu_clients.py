"""Client functions for looking at schedules on TPUs: a round of federated averaging for each.

Nothing is run, so parameters and data are only shapes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import fax
import fax.aggregators
import fax.models

PyTree = Any
RATE = 0.1


class Task(NamedTuple):
    """The shapes of a model's parameters and of a batch, and the loss of a batch."""

    params: PyTree
    batch: PyTree
    loss: Callable[[PyTree, PyTree], jax.Array]


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def dense(widths: Sequence[int], batch: int = 20) -> Task:
    """Dense layers with ReLU between them. Two widths are logistic regression."""
    params = [dict(w=shape(*pair), b=shape(pair[1])) for pair in itertools.pairwise(widths)]

    def loss(params, data):
        x = data["x"]
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return cross_entropy(x @ params[-1]["w"] + params[-1]["b"], data["y"])

    data = dict(x=shape(batch, widths[0]), y=shape(batch, dtype=jnp.int32))
    return Task(params, data, loss)


def cross_entropy(scores: jax.Array, y: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(scores), y[..., None], -1)
    return -jnp.mean(chosen)


def model(name: str, x: jax.ShapeDtypeStruct, y: Sequence[int], **options: Any) -> Task:
    """A model of `fax.models`."""
    made = fax.models.create(name, **options)

    def loss(params, data):
        return jnp.mean(made.loss(params, data, jax.random.key(0))[0])

    params = jax.eval_shape(made.init, jax.random.key(0))
    return Task(params, dict(x=x, y=shape(*y, dtype=jnp.int32)), loss)


def transformer(width: int, layers: int, tokens: int, length: int = 128, batch: int = 4) -> Task:
    """A decoder with tied embeddings, whose layers are in a loop and under `jax.checkpoint`."""
    heads, many = 8, (layers, width)
    blocks = dict(
        qkv=shape(*many, 3 * width),
        out=shape(*many, width),
        up=shape(*many, 4 * width),
        down=shape(layers, 4 * width, width),
        norm1=shape(*many),
        norm2=shape(*many),
    )
    params = dict(embedding=shape(tokens, width), blocks=blocks)

    def norm(x, scale):
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * (1 + scale)

    @jax.checkpoint
    def block(x, w):
        q, k, v = jnp.split(
            (norm(x, w["norm1"]) @ w["qkv"]).reshape(*x.shape[:2], heads, -1), 3, axis=-1
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(width // heads)
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e30))
        x = x + jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape) @ w["out"]
        return x + jax.nn.gelu(norm(x, w["norm2"]) @ w["up"]) @ w["down"], None

    def loss(params, data):
        x = params["embedding"][data["x"][:, :-1]]
        x, _ = lax.scan(block, x, params["blocks"])
        return cross_entropy(x @ params["embedding"].T, data["x"][:, 1:])

    return Task(params, dict(x=shape(batch, length + 1, dtype=jnp.int32)), loss)


TASKS = {
    "logistic": lambda: dense((784, 62)),
    "dense": lambda: dense((784, 200, 200, 62)),
    "MLP 1 M": lambda: dense((1024, 920, 62)),
    "MLP 2 M": lambda: dense((1024, 1800, 62)),
    "MLP 3.5 M": lambda: dense((1024, 3200, 62)),
    "MLP 4.4 M": lambda: dense((1024, 4096, 62)),
    "MLP 17 M": lambda: dense((2048, 8192, 62)),
    "EMNIST CNN": lambda: model("emnist_conv", shape(20, 28, 28, 1), (20,)),
    "ResNet-18": lambda: model("resnet18", shape(20, 32, 32, 3), (20,), num_classes=100),
    "Shakespeare LSTM": lambda: model("shakespeare_lstm", shape(4, 80, dtype=jnp.int32), (4, 80)),
    "Stack Overflow LSTM": lambda: model(
        "stackoverflow_lstm", shape(16, 20, dtype=jnp.int32), (16, 20)
    ),
    "transformer 10 M": lambda: transformer(320, 8, 2048),
    "transformer 100 M": lambda: transformer(768, 12, 16384),
}
# Rounds that are more than local training and a mean, by what comes after the task's name.
GRADIENT, DRIVE, POWER_SGD = ", gradient", ", DRIVE", ", PowerSGD"
EXTRAS = (GRADIENT, DRIVE, POWER_SGD)
AGGREGATORS = {
    DRIVE: lambda: fax.aggregators.chain(fax.aggregators.drive()),
    POWER_SGD: lambda: fax.aggregators.power_sgd(2),
}


def round_of(
    name: str, clients: int, steps: int, **how: Any
) -> tuple[Callable, tuple[PyTree, PyTree]]:
    """A round of federated averaging, and the shapes of its arguments.

    Args:
      name: of a task, and possibly one of the extras.
      clients: how many there are.
      steps: the local steps of each.
      **how: arguments of `fax.map`.
    """
    extra = next((each for each in EXTRAS if name.endswith(each)), "")
    task = TASKS[name.removesuffix(extra)]()

    def client(params, data):
        def step(y, batch):
            gradient = jax.grad(task.loss)(y, batch)
            return jax.tree.map(lambda y, g: y - RATE * g, y, gradient), None

        return jax.tree.map(jnp.subtract, lax.scan(step, params, data)[0], params)

    @fax.program(clients=clients)
    def averaged(params, data):
        fn = jax.checkpoint(client) if extra == GRADIENT else client
        updates = fax.map(fn, fax.broadcast(params), data, **how)
        if extra in AGGREGATORS:
            aggregator, weights = AGGREGATORS[extra](), jnp.ones(clients)
            state, key = aggregator.init(params), jax.random.key(0)
            update = aggregator.aggregate(updates, weights, state, key)[0]
        else:
            update = fax.mean(updates)
        return jax.tree.map(jnp.add, params, update)

    def squared(params, data):
        return sum(jnp.sum(x * x) for x in jax.tree.leaves(averaged(params, data)))

    data = jax.tree.map(lambda x: shape(clients, steps, *x.shape, dtype=x.dtype), task.batch)
    return (jax.grad(squared) if extra == GRADIENT else averaged), (task.params, data)
