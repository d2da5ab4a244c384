"""Lookups by client functions that are sharded over two axes of a mesh. XLA aborts at some."""

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import fax
from fax.lowering import _pipeline

CLIENTS, WORDS, WIDTH, BATCH, LENGTH = 4, 12, 8, 4, 3


def shard(x, *spec):
    return jax.lax.with_sharding_constraint(x, P(*spec)) if jax.typeof(x).sharding.mesh else x


def loss(table, words, sharded):
    """Of a model that predicts each word from the one before: the words are over ``model``."""
    split = shard if sharded else lambda x, *spec: x
    table, words = split(table, "model", "data"), split(words, "data")
    scores = split(jnp.tanh(table[words[:, :-1]]) @ table.T, "data", None, "model")
    chosen = jnp.take_along_axis(scores, words[:, 1:, None], axis=2)[..., 0]
    return jnp.mean(jax.nn.logsumexp(scores, -1) - chosen)


def gradients(table, words, sharded=True, vectorize=None):
    @fax.program(clients=CLIENTS)
    def all_of(table, words):
        own = jax.value_and_grad(lambda table, words: loss(table, words, sharded))
        return fax.map(own, fax.broadcast(table), words, vectorize=vectorize)

    return all_of(table, words)


@pytest.fixture(scope="module")
def arguments():
    rng = np.random.default_rng(0)
    return rng.normal(size=(WORDS, WIDTH)), rng.integers(0, WORDS, (CLIENTS, BATCH, LENGTH + 1))


@pytest.mark.parametrize("vectorize", [1, 2])
def test_tables_may_be_sharded_over_one_axis_and_indices_over_another(arguments, vectorize):
    own = jax.value_and_grad(lambda table, words: loss(table, words, sharded=False))
    expected = jax.jit(jax.vmap(own, (None, 0)))(*arguments)
    with jax.set_mesh(meshes.mesh(clients=2, data=2, model=2)):
        found = jax.jit(lambda *x: gradients(*x, vectorize=vectorize))(*arguments)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9)


def test_lookups_in_loops_and_branches_are_found(arguments):
    def walk(table, words):
        """Each word leads to the next, by its first score; in a branch, a loop and a call."""

        def step(at, _):
            scores = shard(jnp.take(table, at, axis=0), "data")
            return jnp.argmax(scores, -1), scores.sum()

        def go(words):
            return jax.lax.scan(step, shard(words[:, 0], "data"), None, 2)[1]

        table = shard(table, "model")
        return jax.lax.cond(words[0, 0] >= 0, jax.checkpoint(go), lambda _: jnp.zeros(2), words)

    @jax.jit
    @fax.program(clients=CLIENTS)
    def run(table, words):
        return fax.map(walk, fax.broadcast(table), words)

    with jax.set_mesh(meshes.mesh(clients=2, data=2, model=2)):
        found = run(*arguments)
    table, words = arguments
    for row, own in zip(np.asarray(found), words, strict=True):
        at, expected = own[:, 0], []
        for _ in range(2):
            expected.append(table[at].sum())
            at = table[at].argmax(-1)
        np.testing.assert_allclose(row, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("axes", "spec", "changes"),
    [
        (dict(clients=2, data=2, model=2), None, True),
        (dict(clients=2, data=2, model=2), ("model",), True),
        (dict(clients=2, data=2, model=2), (None, "model"), False),  # as a table is left alone
        (dict(clients=2, model=2), None, False),  # XLA can split it
    ],
)
def test_tables_are_whole_only_where_xla_would_abort(arguments, axes, spec, changes, monkeypatch):
    def look_up(table, words):
        return jnp.sin((table if spec is None else shard(table, *spec))[words]).sum()

    @fax.program(clients=CLIENTS)
    def gradients(table, words):
        return fax.map(jax.grad(look_up), fax.broadcast(table), words)

    def text():
        return jax.jit(lambda *x: gradients(*x)).lower(*arguments).as_text()

    with jax.set_mesh(meshes.mesh(**axes)):
        found = text()
        monkeypatch.setattr(_pipeline, "with_whole_tables", lambda jaxpr: jaxpr)
        assert (found != text()) == changes
