"""Training of a transformer on slices of a data center, in several ways: programs and arguments.

Nothing is run, so parameters and data are only shapes with shardings, on a mesh with three axes:
`replicas`, of which each is a slice; and within a slice `data`, over which batches and parameters
are split, and `model`, over which heads, hidden units and the vocabulary are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from workloads import drjax

import fax

PyTree = Any
QUERIES = 256  # at a time, in attention
INNER = optax.adamw(3e-4, weight_decay=0.1)
OUTER = optax.sgd(0.4, momentum=0.9, nesterov=True)


class Model(NamedTuple):
    """A decoder. Its parameters are float32, and it computes in bfloat16."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head: int  # size
    vocabulary: int

    def specs(self) -> PyTree:
        """How parameters are split."""
        into, out = P(None, "data", "model"), P(None, "model", "data")
        layers = dict(q=into, k=into, v=into, o=out, gate=into, up=into, down=out)
        return dict(
            embedding=P("data", "model"),
            layers=dict(**layers, norm_1=P(), norm_2=P()),
            norm=P(),
            output=P("data", "model"),
        )

    def shapes(self) -> PyTree:
        n, width, hidden = self.layers, self.width, self.hidden
        queries, keys = self.heads * self.head, self.kv_heads * self.head
        layers = dict(
            q=(n, width, queries),
            k=(n, width, keys),
            v=(n, width, keys),
            o=(n, queries, width),
            gate=(n, width, hidden),
            up=(n, width, hidden),
            down=(n, hidden, width),
            norm_1=(n, width),
            norm_2=(n, width),
        )
        return dict(
            embedding=(self.vocabulary, width),
            layers=layers,
            norm=(width,),
            output=(width, self.vocabulary),
        )

    def params(self) -> PyTree:
        """The parameters on the mesh in scope, each replica's split over its devices."""
        return jax.tree.map(shaped, self.shapes(), self.specs(), is_leaf=is_shape)

    def size(self) -> int:
        """The number of parameters."""
        return sum(map(int, map(np.prod, jax.tree.leaves(self.shapes(), is_leaf=is_shape))))


def is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def shaped(shape: tuple[int, ...], spec: P, dtype: Any = jnp.float32) -> Any:
    sharding = NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


# The model


def losses(model: Model, rows: Any, params: PyTree, tokens: jax.Array) -> jax.Array:
    """The mean loss of each sequence of a batch, which is split over the mesh axes ``rows``."""

    def half(x):
        return x.astype(jnp.bfloat16)

    def split(x, *axes):
        return lax.with_sharding_constraint(x, P(rows, *axes))

    def norm(x, scale):
        x = x.astype(jnp.float32)
        return half(x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * (1 + scale))

    @jax.checkpoint
    def block(x, w):
        h = norm(x, w["norm_1"])
        q, k, v = (split(h @ half(w[name]), None, "model") for name in ("q", "k", "v"))
        q, k, v = (y.reshape(*y.shape[:2], -1, model.head) for y in (q, k, v))
        attended = split(attention(rotated(q), rotated(k), v), None, "model")
        x = split(x + attended @ half(w["o"]))
        h = norm(x, w["norm_2"])
        h = jax.nn.silu(h @ half(w["gate"])) * (h @ half(w["up"]))
        return split(x + split(h, None, "model") @ half(w["down"])), None

    # Vectors are split, not the vocabulary, because libtpu fails to split a lookup over it.
    table = lax.with_sharding_constraint(half(params["embedding"]), P(None, "model"))
    x = split(split(table[tokens[:, :-1]], None, "model"))
    x, _ = lax.scan(block, x, params["layers"])
    scores = split(norm(x, params["norm"]) @ half(params["output"]), None, "model")
    scores = scores.astype(jnp.float32)
    # A sum over a comparison stays on the devices that have a part of the vocabulary.
    right = jnp.arange(model.vocabulary) == tokens[:, 1:, None]
    chosen = jnp.sum(jnp.where(right, scores, 0), -1)
    return jnp.mean(jax.nn.logsumexp(scores, -1) - chosen, -1)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention, for some of the queries at a time."""
    length = q.shape[1]
    size = min(QUERIES, length)

    @jax.checkpoint
    def some(start):
        own = lax.dynamic_slice_in_dim(q, start, size, 1)
        seen = start + jnp.arange(size)[:, None] >= jnp.arange(length)
        return jax.nn.dot_product_attention(own, k, v, mask=seen[None, None])

    found = lax.map(some, jnp.arange(0, length, size))  # [parts, batch, size, heads, head]
    return jnp.moveaxis(found, 0, 1).reshape(len(q), length, -1)


def rotated(x: jax.Array) -> jax.Array:
    """Rotary position embeddings of [batch, length, heads, size]."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] / 10_000 ** (jnp.arange(half) / half)
    cos, sin = (f(angles)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


# Ways to train it


class Work(NamedTuple):
    """What every way has to do.

    Attributes:
      model: the transformer.
      replicas: their number.
      batch: the number of sequences of a replica in a step.
      length: tokens in a sequence.
      steps: H, the number of steps in a period.
      cohort: of the same kind with one sequence in a batch, made while no mesh is in scope.
    """

    model: Model
    replicas: int
    batch: int
    length: int
    steps: int
    cohort: fax.data.Cohort


def work(model: Model, *, replicas: int, batch: int, length: int, steps: int) -> Work:
    """Call it without a mesh in scope."""
    tokens = np.zeros((1, length + 1), np.int32)
    data = fax.data.InMemory({str(n): {"tokens": tokens} for n in range(replicas)})
    options = dict(sampler="stream", max_steps=steps, placement="replicas", resident=False)
    with fax.data.cohorts(data, replicas, 1, **options) as cohorts:
        return Work(model, replicas, batch, length, steps, next(cohorts))


Program = tuple[Callable, tuple, int]  # how many steps one call takes


def data_parallel(work: Work) -> Program:
    """One model for all. Its gradient is summed over all slices in every step."""
    rows = "replicas", "data"

    def step(params, state, tokens):
        def mean(params):
            return jnp.mean(losses(work.model, rows, params, tokens))

        loss, gradient = jax.value_and_grad(mean)(params)
        moves, state = INNER.update(gradient, state, params)
        return optax.apply_updates(params, moves), state, loss

    params = work.model.params()
    state = fax.sharding.eval_shape(INNER.init, params)
    tokens = shaped((work.replicas * work.batch, work.length + 1), P(rows), jnp.int32)
    fn = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*as_before((params, state)), None))
    return fn, (params, state, tokens), 1


def as_before(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.sharding, tree)


def with_fax(make: Callable, work: Work, **options: Any) -> Program:
    """A round of an algorithm, one period."""

    def loss(params, batch, key):
        return losses(work.model, "data", params, batch["tokens"])

    algorithm = make(
        loss,
        INNER,
        OUTER,
        replicas=work.replicas,
        steps=work.steps,
        sharding=work.model.specs(),
        **options,
    )
    state = fax.sharding.eval_shape(algorithm.init, work.model.params())
    return jax.jit(algorithm.round, donate_argnums=0), (state, cohort(work)), work.steps


def cohort(work: Work) -> fax.data.Cohort:
    """The shapes of a cohort. It is one of a stream, so it is known to have no padding."""

    def full(x):
        if x.ndim < 3:  # not of single examples
            return shaped(x.shape, P("replicas"), x.dtype)
        shape = *x.shape[:2], work.batch, *x.shape[3:]
        return shaped(shape, P("replicas", None, "data"), x.dtype)

    return jax.tree.map(full, work.cohort)


def with_drjax(work: Work) -> Program:
    """DiLoCo as MaxText has it: a step of all replicas, after which every H-th time they meet."""

    def inner(params, state, tokens):
        def mean(params):
            return jnp.mean(losses(work.model, "data", params, tokens))

        loss, gradient = jax.value_and_grad(mean)(params)
        moves, state = INNER.update(gradient, state, params)
        return optax.apply_updates(params, moves), state, loss

    @drjax.program(placements={"replicas": work.replicas})
    def step(number, outer, momentum, rows, states, tokens):
        rows, states, losses = drjax.map_fn(inner, (rows, states, tokens))

        def meet(outer, momentum, rows):
            delta = optax.tree.sub(outer, drjax.reduce_mean(rows))
            moves, momentum = OUTER.update(delta, momentum, outer)
            outer = optax.apply_updates(outer, moves)
            return outer, momentum, drjax.broadcast(outer)

        def go_on(outer, momentum, rows):
            return outer, momentum, rows

        due = number % work.steps == 0
        outer, momentum, rows = lax.cond(due, meet, go_on, outer, momentum, rows)
        return number + 1, outer, momentum, rows, states, drjax.reduce_mean(losses)

    def on_replicas(x):
        spec = P("replicas", *x.sharding.spec)
        return shaped((work.replicas, *x.shape), spec, x.dtype)

    params = work.model.params()
    momentum, state = fax.sharding.eval_shape(lambda p: (OUTER.init(p), INNER.init(p)), params)
    rows, states = jax.tree.map(on_replicas, (params, state))
    spec = P("replicas", "data")
    tokens = shaped((work.replicas, work.batch, work.length + 1), spec, jnp.int32)
    kept = shaped((), P(), jnp.int32), params, momentum, rows, states
    fn = jax.jit(step, donate_argnums=range(5), out_shardings=(*as_before(kept), None))
    return fn, (*kept, tokens), 1


def streaming(work: Work, **options: Any) -> Program:
    return with_fax(fax.algorithms.streaming_diloco, work, **options)


DRJAX = "DiLoCo, DrJAX"
WAYS: dict[str, Callable[..., Program]] = {
    "data-parallel": data_parallel,
    "DiLoCo": functools.partial(with_fax, fax.algorithms.diloco),
    DRJAX: with_drjax,
    "Streaming": functools.partial(streaming, aggregator=fax.aggregators.mean()),
    "Streaming, 4 bits": streaming,
}
