"""What a map is lowered to: equal maps share a trace, and nothing is copied without need."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fax
from fax.lowering import _schedule

N = 5
X, P = jnp.arange(1.0, N + 1), np.float64(0.25)


@pytest.fixture
def schedules(monkeypatch):
    """Collects a line for each time that the schedule of a map is traced."""
    traced = []

    def run(client, this, *args):
        traced.append(str(this.outputs))
        return original(client, this, *args)

    original = _schedule.run
    monkeypatch.setattr(_schedule, "run", run)
    return traced


def unrolled(numbers):
    """A program with a round for each number, in a loop of Python."""

    @fax.program(clients=N)
    def program(p, x):
        for number in numbers:
            steps = fax.map(lambda p, x, k=number: jnp.sin(k * p * x), fax.broadcast(p), x)
            p = p + fax.mean(steps)
        return p

    return program


def by_hand(numbers, p, x):
    for number in numbers:
        p = p + jnp.sin(number * p * x).mean()
    return p


@pytest.mark.parametrize(("numbers", "traces"), [([0.5] * 6, 2), ([0.5, 1.5] * 3, 4)])
def test_equal_maps_of_a_module_share_a_trace(schedules, numbers, traces):
    """The second one is traced to be shared; most maps are the only one of their kind."""
    found = jax.jit(unrolled(numbers))(P, X)
    np.testing.assert_allclose(found, by_hand(numbers, P, X), rtol=1e-12)
    assert len(schedules) == traces


def test_those_of_a_gradient_too(schedules):
    numbers = [0.5] * 6
    gradient, expected = (
        jax.jit(jax.grad(fn))(P, X)
        for fn in (unrolled(numbers), lambda p, x: by_hand(numbers, p, x))
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-12)
    assert len(schedules) == 5  # also the last forward map, whose sum is not needed


def test_maps_that_differ_in_their_settings_do_not(schedules):
    """Equal equations, which draw other numbers under another setting of JAX."""
    key = jax.random.key(3)

    def draw(key):
        return jax.random.uniform(key, (5,))

    @fax.program(clients=N)
    def program(key):
        found = []
        for partitionable in (True, False, True, False):
            with jax.threefry_partitionable(partitionable):
                found.append(fax.mean(fax.map(draw, fax.broadcast(key))))
        return found

    found = jax.jit(program)(key)
    for numbers, partitionable in zip(found, (True, False, True, False), strict=True):
        with jax.threefry_partitionable(partitionable):
            np.testing.assert_allclose(numbers, draw(key), rtol=1e-12)
    assert not np.any(found[0] == found[1])
    assert len(schedules) == 4


@pytest.fixture
def with_lines():
    """Lets JAX keep the lines of the source, which tests do without to save time."""
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 10)
    yield
    jax.config.update("jax_traceback_in_locations_limit", limit)


@pytest.mark.usefixtures("with_lines")
def test_profiles_show_the_lines_and_scopes_of_equal_functions():
    def named(name):
        def client(x):
            with jax.named_scope(name):
                return jnp.cos(x)

        return client

    alike = [
        lambda x: jnp.sin(x),
        lambda x: jnp.sin(x),
    ]

    @fax.program(clients=N)
    def program(x):
        functions = [*map(named, ("one", "two")), *alike] * 2
        return [fax.sum(fax.map(fn, x)) for fn in functions]

    text = jax.jit(program).lower(X).as_text(debug_info=True)
    lines = set(re.findall(r'test_lowering\.py":(\d+)', text))
    assert {str(fn.__code__.co_firstlineno) for fn in alike} <= lines
    assert {"one/cos", "two/cos"} <= set(re.findall(r"\b(?:one|two)/cos\b", text))


@pytest.mark.parametrize("vectorize", [1, 2, N])
def test_rows_that_a_client_returns_unchanged_are_not_copied(vectorize):
    @fax.program(clients=N)
    def program(p, x):
        fn = fax.map(lambda p, x: (x, p * x), fax.broadcast(p), x, vectorize=vectorize)
        return fn[0], fax.sum(fn[1])

    lowered = jax.jit(program).lower(P, X)
    assert "dynamic_update_slice" not in lowered.as_text()
    rows, total = lowered.compile()(P, X)
    np.testing.assert_array_equal(rows, X)
    np.testing.assert_allclose(total, P * X.sum(), rtol=1e-12)


# Accumulators


def small_sums(n, vectorize=1):
    """A program with totals of different shapes and dtypes, of a number of each client."""

    def client(x):
        return {
            "scalar": x,
            "bias": x * np.arange(1, 4, dtype=np.float32),
            "matrix": x * np.arange(2, 8, dtype=np.float32).reshape(2, 3),
            "complex": x * np.complex64(1 + 2j),
            "count": jnp.int32(1),
            "large": x * np.ones(257, np.float32),
        }

    return fax.program(clients=n)(lambda x: fax.sum(fax.map(client, x, vectorize=vectorize)))


@pytest.mark.parametrize("vectorize", [1, 3])
def test_small_totals_share_accumulators_except_on_cpu(vectorize, monkeypatch):
    x = np.random.default_rng(0).random(1000).astype(np.float32)
    traced = jax.jit(small_sums(len(x), vectorize)).trace(x)
    # What is lost in a move is checked once for float32, and for both parts of complex numbers. On
    # CPU it is checked for each of the three totals.
    for platform, count in ("tpu", 3), ("cpu", 5):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("is_finite") == count
    with monkeypatch.context() as patched:
        accumulators = _schedule.Accumulators
        patched.setattr(_schedule, "Accumulators", lambda *args: accumulators(*args[:-1], False))
        lowered = jax.jit(small_sums(len(x), vectorize)).lower(x)
    assert lowered.as_text().count("is_finite") == 3
    found, total = lowered.compile()(x), x.sum(dtype=np.float64)
    np.testing.assert_allclose(found["scalar"], total, rtol=1e-6)
    np.testing.assert_allclose(found["bias"], total * np.arange(1, 4), rtol=1e-6)
    np.testing.assert_allclose(found["matrix"], total * np.arange(2, 8).reshape(2, 3), rtol=1e-6)
    np.testing.assert_allclose(found["complex"], total * (1 + 2j), rtol=1e-6)
    np.testing.assert_allclose(found["large"], np.full(257, total), rtol=1e-4)
    assert found["count"] == len(x)


def test_totals_that_may_be_sharded_do_not():
    """Joining them would gather each of them on all devices, for every client."""
    x = np.ones(200, np.float32)
    for mesh, pairs in ({"clients": 8}, 3), ({"clients": 4, "model": 2}, 5):
        with jax.set_mesh(fax.sharding.make_mesh(**mesh)):
            traced = jax.jit(small_sums(len(x))).trace(x)
            text = traced.lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("is_finite") == pairs
        assert ("concatenate" in text) == (pairs == 3)
