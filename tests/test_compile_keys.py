"""What was compiled is found again for the same equations under the same settings only."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

import fax

KEY = jax.random.key(3)


@pytest.fixture
def compilations(caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        yield lambda: [r.message for r in caplog.records if "Compiling" in r.getMessage()]


def test_calling_twice_compiles_once(compilations):
    @fax.program(clients=3)
    def train(params, data):
        def step(params, _):
            def loss(p, row):
                return jnp.sum(jax.nn.relu(p - row) ** 2)

            grads = fax.map(jax.grad(loss), fax.broadcast(params), data)
            return params - 0.1 * fax.mean(grads), None

        return jax.lax.scan(step, params, None, length=4)[0]

    params, data = np.ones(2), np.arange(6.0).reshape(3, 2)
    first = train(params, data)
    before = len(compilations())
    assert before > 0
    np.testing.assert_array_equal(train(params, data), first)
    train(params + 1, data)
    assert len(compilations()) - before <= 1  # the addition


def test_the_rounds_of_a_gradient_compile_once_outside_of_jit(compilations):
    @fax.program(clients=3)
    def mean_loss(params, data):
        losses = fax.map(lambda p, row: jnp.sum((p - row) ** 2), fax.broadcast(params), data)
        return fax.mean(losses)

    params, data = np.ones(2), np.arange(6.0).reshape(3, 2)
    gradient = jax.grad(mean_loss)(params, data)
    before = len(compilations())
    np.testing.assert_array_equal(jax.grad(mean_loss)(params, data), gradient)
    assert len(compilations()) == before > 0


def test_numbers_of_numpy_and_callbacks_do_not_compile_anew(compilations):
    def look(x):
        pass

    @fax.program(clients=3)
    def program(rate, x):
        jax.debug.callback(look, x)
        return rate * fax.sum(x)

    x = np.arange(3.0)
    assert program(np.float64(0.5), x) == 1.5
    before = len(compilations())
    assert program(np.float64(2.0), x) == 6.0
    assert len(compilations()) == before > 0


# Settings


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


def test_parameters_of_zero_and_of_minus_zero_differ():
    """As attributes of calls of `jax.ffi` can."""
    filled_p = Primitive("filled")
    filled_p.def_abstract_eval(lambda x, value: x)
    full = mlir.lower_fun(lambda x, value: jnp.full_like(x, value), multiple_results=False)
    mlir.register_lowering(filled_p, full)
    for value in 0.0, -0.0, np.float32(0.0), np.float32(-0.0):
        program = fax.program(clients=2)(lambda x, v=value: filled_p.bind(fax.max(x), value=v))
        assert np.signbit(program(np.ones(2))) == np.signbit(value)


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


class Settings:
    """An object of a class of one's own, so that every call of a program traces it again."""

    scale = 2.0


def test_what_every_trace_makes_anew_compiles_once(compilations):
    """Constants, policies, callbacks and rules that are equal to those of the trace before."""
    settings, seen = Settings(), []

    @jax.custom_batching.custom_vmap
    def double(x):
        return settings.scale * x

    double.def_vmap(lambda size, batched, x: (settings.scale * x, True))

    @fax.program(clients=3)
    def program(x, power):
        def note(x, start=0.5, *, calls=None):
            return note(x, start, calls=calls - 1) if calls else seen.append(float(x) + start)

        def client(x):
            jax.debug.callback(lambda x: note(x, calls=1), x)
            keep = jax.checkpoint_policies.save_only_these_names("powers")
            powers = jax.checkpoint(lambda x: x ** (1 + np.arange(power)), policy=keep)
            shape = jax.ShapeDtypeStruct((), x.dtype)
            called = jax.pure_callback(lambda x: x - power, shape, x)
            return jnp.sum(jax.jit(lambda x: x * np.ones(power))(powers(x))) + double(x) + called

        return fax.sum(fax.map(client, x))

    x = np.arange(3.0)
    assert program(x, 2) == 3 + 5 + 6 - 3
    for power, again in ((2, False), (3, True)):
        before = len(compilations())
        program(x, power)
        assert (len(compilations()) > before) == again
    jax.effects_barrier()
    assert sorted(seen) == [0.5] * 3 + [1.5] * 3 + [2.5] * 3


def with_callback(note, x):
    """Calls a program that is made anew, as is its callback."""

    @fax.program(clients=3)
    def program(x):
        def client(x):
            jax.debug.callback(note, x)
            return x

        return fax.sum(fax.map(client, x))

    program(x)
    jax.effects_barrier()


def test_callbacks_with_attributes():
    def of_callback():
        def note(x):
            note.seen.append(x)

        note.seen = []
        with_callback(note, x)
        return len(note.seen)

    def set_by_callback():
        def note(x):
            note.last = x

        with_callback(note, x)
        return hasattr(note, "last")

    def of_function_that_is_called():
        def count():
            count.number += 1

        count.number = 0
        with_callback(lambda _: count(), x)
        return count.number

    x = np.arange(3.0)
    for run in of_callback, set_by_callback, of_function_that_is_called:
        assert run() == run() > 0


def test_callbacks_that_are_named_like_functions_of_jax():
    x = np.arange(3.0)
    for _ in range(2):
        seen = []

        @functools.wraps(jax.nn.standardize)
        def note(x, seen=seen):
            seen.append(float(x))

        with_callback(note, x)
        assert sorted(seen) == [0, 1, 2]
        seen.clear()  # now it is equal to the next one, but not the same


def test_callbacks_assign_to_their_own_variables():
    def counted(x):
        count = 0

        def note(_):
            def one_more():
                nonlocal count
                count += 1

            one_more()

        with_callback(note, x)
        return count

    x = np.arange(3.0)
    assert [counted(x), counted(x)] == [3, 3]


def test_variables_of_callbacks_that_change_afterwards(compilations):
    """The second callback has what the first one had at first, the third what it has now."""
    seen, x = [], np.arange(3.0)

    def scaled(by, then):
        with_callback(lambda x: seen.append(by * float(x)), x)
        by = then

    for by, then, compiles in [(2.0, 5.0, True), (2.0, 2.0, True), (2.0, 3.0, False)]:
        before = len(compilations())
        scaled(by, then)
        assert (len(compilations()) > before) == compiles
        assert sorted(seen) == [0, 2, 4]
        seen.clear()
