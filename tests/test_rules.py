"""Operators in the rules of custom_jvp and its like, which run after the program has ended.

Every program here is f(w) = 3 w; its rules use operators, too. Called in programs of another
size and under transformations, they still mean the placement that they were written under.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_batching import custom_vmap

import fax


def threefold(w):
    return fax.sum(fax.broadcast(w))


@fax.program(clients=3)
def with_jvp(w):
    @jax.custom_jvp
    def f(w):
        return threefold(w)

    f.defjvp(lambda primals, tangents: (f(*primals), threefold(*tangents)))
    return f(w)


@fax.program(clients=3)
def with_vjp(w):
    @jax.custom_vjp
    def f(w):
        return threefold(w)

    f.defvjp(lambda w: (f(w), None), lambda _, cotangent: (threefold(cotangent),))
    return f(w)


@fax.program(clients=3)
def with_vmap(w):
    @custom_vmap
    def f(w):
        return threefold(w)

    @f.def_vmap
    def _(size, batched, w):
        return threefold(w), True

    return f(w)


@fax.program(regions=1, clients=3)
def in_a_client_function(w):
    def region(w):
        @jax.custom_jvp
        def f(w):
            return threefold(w)

        f.defjvp(lambda primals, tangents: (f(*primals), threefold(*tangents)))
        return f(w)

    rows = fax.map(region, fax.broadcast(w, placement="regions"), placement="regions")
    return fax.sum(rows, placement="regions")


PROGRAMS = [with_jvp, with_vjp, in_a_client_function]


def inside(fn):
    """Calls a function in a program of another size."""
    return fax.program(clients=5)(fn)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("context", [lambda fn: fn, jax.jit, inside])
def test_gradients(program, context):
    value, gradient = context(jax.value_and_grad(program))(2.0)
    assert (value, gradient) == (6, 3)


@pytest.mark.parametrize("program", [with_jvp, in_a_client_function])
@pytest.mark.parametrize("context", [lambda fn: fn, jax.jit, inside])
def test_forward_mode_and_second_derivatives(program, context):
    assert context(lambda w: jax.jvp(program, (w,), (1.0,)))(2.0) == (6, 3)
    assert context(jax.grad(lambda w: jax.grad(lambda w: program(w) ** 2)(w)))(2.0) == 18


@pytest.mark.parametrize("program", [*PROGRAMS, with_vmap])
@pytest.mark.parametrize("context", [lambda fn: fn, jax.jit, inside])
def test_vmap(program, context):
    ws = jnp.arange(4.0)
    np.testing.assert_array_equal(context(jax.vmap(program))(ws), 3 * ws)


def test_the_scope_outside_is_undisturbed():
    jax.grad(with_vjp)(2.0)
    assert fax.placements() == {}


def test_reductions_with_jit_disabled():
    rows = jnp.array([1.0, jnp.nan, 3.0])
    reduce = fax.program(clients=3)(lambda x: (fax.max(x), fax.min(x), fax.sum(x), fax.mean(x)))
    with jax.disable_jit():
        assert np.isnan(reduce(rows)).all()
        np.testing.assert_array_equal(reduce(rows.at[1].set(2.0)), [3, 1, 6, 2])


def test_movement_with_jit_disabled():
    rows = jnp.array([1.0, 2.0, 3.0])
    there_and_back = fax.program(clients=3)(lambda x: fax.collect(fax.distribute(2 * x) + x))
    with jax.disable_jit():
        np.testing.assert_array_equal(there_and_back(rows), 3 * rows)
