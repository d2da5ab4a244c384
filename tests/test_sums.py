"""Sums in float32 that stay accurate, however many participants there are.

Equal rows are the hard case: all roundings of their running total may go in one direction.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh, put

import fax

N = 1_000_000
LIMIT = 1e-6
# Numbers whose running totals round up, down, and by half a unit.
ROW = np.array([0.1, 1 / 3, 1 + 2**-23, 2 - 2**-23, 3e-30], np.float32)
BATCH_SIZES = (1, 7, 16, 1000, N)


def error(got, expected):
    """The largest relative error, of float32 against float64."""
    assert got.dtype == jnp.float32
    return np.max(np.abs(np.asarray(got, np.float64) / expected - 1))


@pytest.mark.parametrize("vectorize", BATCH_SIZES)
def test_sums_of_a_million_equal_rows(vectorize):
    """Reduced in all ways, with the gradient of what is broadcast and a JVP, in one program."""

    @fax.program(clients=N)
    def program(p, x, weights, where):
        one = fax.map(lambda p, x: (p * x, x), fax.broadcast(p), x, vectorize=vectorize)
        y, scalar = one
        return {
            "sum": fax.sum(y),
            "mean": fax.mean(y),
            "scalar": fax.mean(scalar),
            "masked": fax.sum(y, where=where),
            "weighted": fax.mean(y, weights=weights),
            "of weights": fax.mean(scalar, weights=weights, where=where),
        }

    @jax.jit
    def everything(p, x, weights, where):
        values, pull = jax.vjp(lambda p: program(p, x, weights, where), p)
        moved = jax.jvp(lambda p: program(p, x, weights, where), (p,), (p,))[1]
        cotangent = jax.tree.map(jnp.zeros_like, values) | {"sum": jnp.ones_like(p)}
        return values, pull(cotangent)[0], moved

    third = np.float32(1 / 3)
    args = ROW, np.full(N, third), np.full(N, np.float32(0.3)), np.arange(N) % 4 != 1
    values, gradient, moved = everything(*args)
    exact = np.float64(ROW * third)
    expected = {
        "sum": N * exact,
        "mean": exact,
        "scalar": np.float64(third),
        "masked": N * 3 // 4 * exact,
        "weighted": exact,
        "of weights": np.float64(third),
    }
    for name, value in expected.items():
        assert error(values[name], value) <= LIMIT, name
    assert error(gradient, N * np.float64(third)) <= LIMIT
    for name in "sum", "mean", "masked", "weighted":
        assert error(moved[name], expected[name]) <= LIMIT, name


@pytest.mark.parametrize("vectorize", [1, 1000, 100_003])
def test_weighted_rows(vectorize):
    """All at once they are a product of a vector and a matrix, which XLA adds up one by one."""
    n, tenth = 100_003, np.float32(0.1)

    @fax.program(clients=n)
    def program(x, weights):
        y = fax.map(lambda x: x, x, vectorize=vectorize)
        return fax.mean(y, weights=weights), fax.mean(x, weights=weights)

    means = jax.jit(program)(np.broadcast_to(ROW, (n, ROW.size)), np.full(n, tenth))
    for mean in means:
        assert error(mean, np.float64(ROW)) <= LIMIT


@pytest.mark.parametrize("vectorize", [1, 7])
def test_ones_are_counted_beyond_the_integers_of_float32(vectorize):
    n = 2**24 + 1000

    @fax.program(clients=n)
    def program(x):
        return fax.sum(fax.map(lambda x: x, x, vectorize=vectorize)), fax.sum(x)

    mapped, plain = jax.jit(program)(jnp.ones(n, jnp.float32))
    assert mapped == n
    assert plain == n


def test_an_eager_call_and_one_of_short_floats():
    @fax.program(clients=100_000)
    def program(x):
        y = fax.map(jnp.negative, x, vectorize=3)
        return fax.sum(y), fax.sum(y.astype(jnp.float32))

    x = jnp.full(100_000, 0.1, jnp.bfloat16)
    short, wide = program(x)
    exact = -100_000 * np.float64(x[0])
    assert error(wide, exact) <= LIMIT
    assert short == jnp.asarray(exact, jnp.bfloat16)


def test_complex_and_long_floats():
    n = 100_000

    @fax.program(clients=n)
    def program(z, x):
        return tuple(fax.sum(fax.map(jnp.negative, y, vectorize=1)) for y in (z, x))

    z, x = jax.jit(program)(jnp.full(n, 0.1 - 0.3j, jnp.complex64), jnp.full(n, 0.1))
    assert z.dtype == jnp.complex64
    assert error(z.real, -n * np.float64(np.float32(0.1))) <= LIMIT
    assert error(z.imag, n * np.float64(np.float32(0.3))) <= LIMIT
    np.testing.assert_allclose(x, -0.1 * n, rtol=1e-15)


@pytest.mark.parametrize("clients", [N, N + 1])
def test_on_two_devices(clients):
    @fax.program(clients=clients)
    def program(x, w):
        y = fax.map(lambda x: x, x, vectorize=1)
        return fax.mean(y), fax.mean(y, weights=w), fax.sum(x)

    tenth = np.float32(0.1)
    with jax.set_mesh(mesh(clients=2)):
        x = jnp.full(clients, tenth)
        x = put(x, "clients") if clients % 2 == 0 else x
        mean, weighted, total = jax.jit(program)(x, 3 * x)
    assert error(mean, np.float64(tenth)) <= LIMIT
    assert error(weighted, np.float64(tenth)) <= LIMIT
    assert error(total, clients * np.float64(tenth)) <= LIMIT


@pytest.mark.parametrize(("n", "vectorize"), [(4097, 1), (20 * 16, 16)])
def test_large_arrays(n, vectorize):
    """They have a second accumulator for many batches, or beside batches of many rows."""

    @fax.program(clients=n)
    def program(p, x):
        return fax.sum(fax.map(lambda p, x: p * x, fax.broadcast(p), x, vectorize=vectorize))

    p, third = np.linspace(1, 2, 5000, dtype=np.float32), np.float32(1 / 3)
    total = jax.jit(program)(p, jnp.full(n, third))
    assert error(total, n * np.float64(p * third)) <= LIMIT


def test_a_sum_is_within_the_bound_of_its_terms():
    """Of unequal rows of both signs the error is relative to the sum of their sizes."""
    x = np.random.default_rng(0).normal(size=(50_000, 3)).astype(np.float32)
    x *= 10.0 ** np.random.default_rng(1).integers(-6, 6, (50_000, 1))

    def total(vectorize):
        @fax.program(clients=len(x))
        def program(x):
            return fax.sum(fax.map(lambda x: x, x, vectorize=vectorize))

        return jax.jit(program)(x)

    for vectorize in 1, 40:
        off = np.abs(np.asarray(total(vectorize), np.float64) - x.sum(0, dtype=np.float64))
        assert np.all(off <= LIMIT * np.abs(x).sum(0, dtype=np.float64))


@functools.cache
def sum_and_mean(vectorize):
    @fax.program(clients=400)
    def program(x):
        y = fax.map(lambda x: x, x, vectorize=vectorize)
        return fax.sum(y), fax.mean(-y)

    return jax.jit(program)


@pytest.mark.parametrize("vectorize", [1, 5, 16])
@pytest.mark.parametrize("at", [0, 200, 399])
def test_infinities_and_nan_stay_what_they_are(vectorize, at):
    """Columns: an infinity, two of opposite signs, NaN, too large a sum, and just not too large."""
    x = np.ones((400, 5), np.float32)
    x[at, 0] = np.inf
    x[at, 1], x[at - 1, 1] = np.inf, -np.inf
    x[at, 2] = np.nan
    x[:, 3] = np.finfo(np.float32).max / 300
    x[:, 4] = np.finfo(np.float32).max / 401
    for y, sign in zip(jax.device_get(sum_and_mean(vectorize)(x)), (1, -1), strict=True):
        np.testing.assert_array_equal(y[:4], sign * np.array([np.inf, np.nan, np.nan, np.inf]))
        assert np.isfinite(y[4])


def test_integers_are_exact():
    @fax.program(clients=10_000)
    def program(x):
        return fax.sum(fax.map(lambda x: x, x, vectorize=1))

    x = np.full(10_000, 2**31 - 1)
    assert jax.jit(program)(x) == 10_000 * (2**31 - 1)


def test_a_short_sum_has_one_accumulator():
    """No more is carried, or computed, than what was there before: sixteen terms need no help."""

    def carried(n, vectorize, size):
        @fax.program(clients=n)
        def program(p, x):
            sent = fax.broadcast(p)
            return fax.sum(fax.map(lambda p, x: p * x, sent, x, vectorize=vectorize))

        arguments = np.ones(size, np.float32), np.ones(n, np.float32)
        text = jax.jit(program).lower(*arguments).as_text()
        return text.count("is_finite")

    assert carried(16, 1, 3) == 0
    assert carried(17, 1, 3) == 1
    assert carried(4096, 1, 257) == 0  # as large as a model
    assert carried(4096, 1, 256) == 1
    assert carried(4097, 1, 257) == 1
    assert carried(16 * 16, 16, 3) == 0
    assert carried(17 * 16, 16, 5000) == 1


def test_gradients_of_short_floats_are_divided_in_float32():
    """257 is no bfloat16, and would be rounded to 256."""
    mean = fax.program(clients=257)(fax.mean)
    gradient = jax.jit(jax.grad(lambda x: mean(x).astype(jnp.float32)))
    found = np.asarray(gradient(np.zeros(257, jnp.bfloat16)))
    assert (found == jnp.bfloat16(1 / 257)).all()


def test_results_have_the_dtypes_of_jnp():
    """Bools and short integers do not wrap around, and masks do not change that."""
    x = {
        "bool": np.arange(300) % 2 > 0,
        "int8": np.arange(300).astype(np.int8),
        "bfloat16": np.linspace(1, 2, 300).astype(jnp.bfloat16),
    }
    where = np.arange(300) % 3 > 0

    @fax.program(clients=300)
    def program(x, where):
        return [f(x, where=own) for f in (fax.sum, fax.mean) for own in (None, where)]

    def plain(x, where):
        ways = [(f, own) for f in (jnp.sum, jnp.mean) for own in (None, where)]
        return [{name: f(leaf, where=own) for name, leaf in x.items()} for f, own in ways]

    for found, expected in zip(*jax.jit(lambda *args: (program(*args), plain(*args)))(x, where)):
        assert found.keys() == expected.keys()
        for one, other in zip(found.values(), expected.values()):
            assert one.dtype == other.dtype
            np.testing.assert_allclose(np.asarray(one, float), np.asarray(other, float), rtol=2**-8)


def test_a_mean_is_zero_if_weights_add_up_to_zero():
    mean = fax.program(clients=2)(lambda x, w: fax.mean(x, weights=w))
    value, gradient = jax.value_and_grad(mean)(np.array([5.0, 3.0]), np.array([1.0, -1.0]))
    assert value == 0
    assert not np.asarray(gradient).any()
