"""Branches and loops of participants that are sharded over mesh axes of their own.

The devices along the placement must agree on them, for there is a collective over `model`
inside, and one that some devices do not reach is one that the others wait for.
"""

import functools
import itertools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from cases import points
from jax import lax
from jax.sharding import PartitionSpec
from meshes import mesh, put
from test_transformations import assert_close

import fax

SIZES = (8, 7)


def layer(p, x):
    """Sharded over `model`: XLA needs a collective for the result."""
    hidden = lax.with_sharding_constraint(jnp.tanh(x @ p), PartitionSpec("model"))
    return hidden @ p.T


def plain_layer(p, x):
    return jnp.tanh(x @ p) @ p.T


def branch(layer, p, x):
    return lax.cond(x[0] > 0, lambda x: layer(p, x), lambda x: layer(2 * p, x), x)


def one_of_three(layer, p, x):
    which = jnp.int32(3 * jnp.abs(x[0]))
    return lax.switch(which, [lambda x: x, lambda x: layer(p, x), lambda x: -layer(p, x)], x)


def steps(layer, p, x):
    """As many steps as the data ask for, between none and about ten."""

    def wanted(state):
        return (jnp.sum(state[0] ** 2) > 0.1 * jnp.abs(x[0])) & (state[1] < 10)

    return lax.while_loop(wanted, lambda s: (0.8 * layer(p, s[0]), s[1] + 1), (x, 0))[0]


def pairs(layer, p, x):
    """Two loops at once: `jax.vmap` makes one of them that has a condition for each."""
    return jax.vmap(lambda x: steps(layer, p, x))(jnp.stack([x, x[::-1]])).sum(0)


def deep(layer, p, x):
    """A branch in a loop in a checkpointed, jitted function, and a loop in a branch."""

    def step(x, _):
        return lax.cond(x[1] > 0, lambda x: layer(p, x), lambda x: x - 0.1, x), None

    x = jax.checkpoint(jax.jit(lambda x: lax.scan(step, x, None, length=3)[0]))(x)
    return lax.cond(
        x[0] > 0, lambda x: lax.fori_loop(0, 2, lambda _, x: layer(p, x), x), jnp.sin, x
    )


def by_hand(layer, p, x):
    """A branch inside of the client's own `jax.shard_map`, around its own collective."""
    if layer is plain_layer:
        return lax.cond(x[0] > 0, lambda x: layer(p, x), jnp.sin, x)

    def work(p, x):
        return lax.cond(x[0] > 0, lambda x: lax.psum(plain_layer(p, x), "model"), jnp.sin, x)

    own = PartitionSpec
    split = jax.shard_map(
        work, in_specs=(own(None, "model"), own()), out_specs=own(), axis_names={"model"}
    )
    return split(p, x)


def doubled(layer, p, x):
    """Loops that end only for those who are in their branch."""

    def grown(x):
        return lax.while_loop(lambda x: x[0] < 10, lambda x: 2 * x + 0 * layer(p, x), x)

    def shrunk(x):
        def step(x, _):
            return lax.while_loop(lambda x: x[0] < -0.01, lambda x: x / 2, x), None

        return jax.checkpoint(lambda x: lax.scan(step, x, None, length=2)[0])(x)

    return lax.cond(x[0] > 0, grown, lambda x: lax.cond(x[0] < -0.2, shrunk, lambda x: -x, x), x)


def outputs(client, n, vectorize, layer):
    """The rows and their mean, by fax or, without a batch size, in the plain way."""

    def work(p, x):
        return client(layer, p, x)

    @fax.program(clients=n)
    def program(p, d):
        y = fax.map(work, fax.broadcast(p), d, vectorize=vectorize)
        return fax.mean(y), y

    def plainly(p, d):
        y = lax.map(lambda x: work(p, x), d)  # under jax.vmap a branch may never end
        return y.mean(0), y

    return program if vectorize else plainly


def both(client, *how):
    """Values and, where there are, gradients."""
    fn = outputs(client, *how)
    if client in (steps, pairs, doubled):
        return jax.jit(fn)

    def loss(p, d):
        return sum(jnp.sum(y**2) for y in fn(p, d))

    return jax.jit(lambda p, d: (fn(p, d), jax.grad(loss, (0, 1))(p, d)))


CLIENTS = branch, one_of_three, steps, pairs, doubled, deep, by_hand
WAYS = (8, 1), (7, 1), (8, 2)  # the number of clients, and how many are vectorized
# Vectorized, both branches are taken in JAX, too, and some loops of `doubled` never end.
ALL = [
    (client, *way)
    for client, way in itertools.product(CLIENTS, WAYS)
    if (client, way) != (doubled, (8, 2))
]
# What `branch` and `steps` do by themselves is in `deep`, and in `pairs` and `doubled`.
SOME = [
    (one_of_three, 7, 1),
    (pairs, 7, 1),
    (doubled, 7, 1),
    (deep, 8, 2),
    (by_hand, 8, 1),
]


def check(cases):
    for client, n, vectorize in cases:
        p, d = points(2, 4, seed=1), points(n, 2, seed=2)
        want = expected(client, n)
        with jax.set_mesh(mesh(clients=4, model=2)):
            assert_close(both(client, n, vectorize, layer)(put(p, None, "model"), d), want)
    print("all agree")


@functools.cache
def expected(client, n):
    p, d = points(2, 4, seed=1), points(n, 2, seed=2)
    return jax.device_get(both(client, n, None, plain_layer)(p, d))


@pytest.mark.parametrize("cases", ["SOME", pytest.param("ALL", marks=pytest.mark.long)])
def test_branches_that_differ_between_devices_are_right_and_do_not_hang(cases):
    """In a process of its own, for a test that hangs could not fail."""
    done = subprocess.run(
        [sys.executable, "-c", f"import conftest, test_mesh_branches as t; t.check(t.{cases})"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("all agree\n")


def compiled(client, *args, **axes):
    p, d = points(2, 4, seed=1), points(8, 2, seed=2)

    @fax.program(clients=8)
    def program(p, d, *args):
        return fax.mean(fax.map(client, fax.broadcast(p), d, *map(fax.broadcast, args)))

    on = mesh(**axes)
    with jax.set_mesh(on):
        lowered = jax.jit(program).lower(put(p, None, "model"), put(d, "clients"), *args)
        return fax.inspect.report(lowered).over("clients")


def test_branches_on_what_all_share_need_no_agreement():
    def asks(p, x, go):
        return lax.cond(go, lambda x: layer(p, x), lambda x: x, x)

    def loops(p, x):
        return lax.fori_loop(0, 3, lambda _, x: layer(p, x), x)

    def sure(p, x):
        return lax.cond(jnp.sum(p) > 0, lambda x: layer(p, x), lambda x: x, x)

    def twice(p, x):
        return lax.cond(
            lax.cond(p[0, 0] > 0, jnp.sum, jnp.max, p) > 0, lambda x: layer(p, x), jnp.sin, x
        )

    for client, args in (asks, (jnp.array(True),)), (loops, ()), (sure, ()), (twice, ()):
        (total,) = compiled(client, *args, clients=4, model=2)
        assert total.operation == "all-reduce"


def test_branches_of_clients_on_one_device_each_need_no_agreement():
    (total,) = compiled(lambda p, x: branch(layer, p, x), clients=8, model=1)
    assert total.operation == "all-reduce"


def test_branches_on_what_differs_need_one_bit_of_agreement():
    found = compiled(lambda p, x: branch(layer, p, x), clients=4, model=2)
    assert sorted(c.bytes for c in found) == [4, 16]


@pytest.mark.parametrize("n", SIZES)
def test_a_branch_is_taken_by_those_who_want_it(n):
    """With one participant at a time and no other axes, `cond` stays a branch on every device."""
    p, d = points(2, 4, seed=1), points(n, 2, seed=2)
    program = outputs(branch, n, 1, plain_layer)
    with jax.set_mesh(mesh(clients=4)):
        text = jax.jit(program).lower(p, d).compile().as_text()
    assert " conditional(" in text
