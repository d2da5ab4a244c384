"""What was compiled is found again for the same equations under the same settings only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fax

KEY = jax.random.key(3)


def draw(partitionable):
    """Numbers of the same key and the same equations, which are others in the other setting."""
    with jax.threefry_partitionable(partitionable):
        return jax.random.uniform(KEY, (5,))


def at_the_server(partitionable):
    @fax.program(clients=3)
    def program(p):
        return fax.sum(fax.broadcast(p)) * draw(partitionable) / 3

    return program


def at_a_client(partitionable):
    @fax.program(clients=3)
    def program(p):
        return fax.mean(fax.map(lambda p: p * draw(partitionable), fax.broadcast(p)))

    return program


@pytest.mark.parametrize("program", [at_the_server, at_a_client])
def test_settings_of_equations_count(program):
    first, second = draw(True), draw(False)
    assert not np.any(first == second)
    for _ in range(2):
        for partitionable, expected in (True, first), (False, second):
            fn = program(partitionable)
            np.testing.assert_allclose(fn(1.0), expected, rtol=1e-14)
            gradient = jax.grad(lambda p, fn=fn: jnp.sum(fn(p)[2]))(1.0)
            np.testing.assert_allclose(gradient, expected[2], rtol=1e-14)


def test_settings_around_a_call_count():
    """As those of a user who changes them between two calls of one program."""

    @fax.program(clients=3)
    def program(key):
        return fax.mean(fax.map(lambda k: jax.random.uniform(k, (5,)), fax.broadcast(key)))

    for partitionable in True, False, True:
        with jax.threefry_partitionable(partitionable):
            found = program(KEY)
        np.testing.assert_allclose(found, draw(partitionable), rtol=1e-14)


def test_callbacks_without_a_module():
    """As of a function that `exec` makes, which JAX wraps in one of its own."""
    names = {"seen": []}
    exec("def note(x):\n    seen.append(float(x))", names)
    assert names["note"].__module__ is None

    @fax.program(clients=2)
    def program(x):
        return fax.map(lambda x: jax.debug.callback(names["note"], x), x)

    program(jnp.arange(2.0))
    jax.effects_barrier()
    assert sorted(names["seen"]) == [0, 1]
