"""Norms, limits and scales over the whole range of floats, with what is not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fax
from fax import aggregators as a
from fax.aggregators._norms import cast_toward_zero, l1_norm, l2_norm

KEY = jax.random.key(0)
QUICKLY = {"xla_backend_optimization_level": 0}
DTYPES = [jnp.float32, jnp.float16, jnp.bfloat16]


def everything(dtype, rows=60, size=9):
    """Updates of all magnitudes that a dtype has, and the extremes of them."""
    rng, info = np.random.default_rng(0), jnp.finfo(dtype)
    low, high = np.log2(float(info.smallest_subnormal)), np.log2(float(info.max))
    x = 2.0 ** rng.uniform(low, high, (rows, 1)) * 2.0 ** rng.uniform(-12, 0, (rows, size))
    x = np.minimum(x, float(info.max)) * rng.choice([-1, 1], x.shape)
    extremes = [info.max, info.tiny, info.smallest_subnormal, 0.0, float(info.max) / 2 + 1, 1.0]
    x[: len(extremes)] = np.array([float(e) for e in extremes])[:, None]
    x[6:9] = 0
    x[6:9, 3] = float(info.max), float(info.tiny), 1.0
    x[9, ::2], x[10, 0] = 0, float(info.smallest_subnormal)
    return {"b": x[:, 0].astype(dtype), "w": x[:, 1:].reshape(rows, 2, -1).astype(dtype)}


def exact(tree):
    """In float64: each client's numbers."""
    return np.concatenate(
        [np.asarray(x).astype(np.float64).reshape(len(x), -1) for x in tree.values()],
        1,
    )


LIMITS = [1.2e-38, 1e-30, 1e-7, 0.1, 1.0, 3.0, 1e30, 3.4e38]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_update_is_longer_than_the_limit(dtype):
    """Whatever its numbers, jitted and not, one client at a time and side by side."""
    tree = everything(dtype)
    clients = len(tree["b"])

    def clip(tree, limit, at_once=None):
        tree = fax.map(lambda x: x, tree, vectorize=at_once)
        return a.clip_by_norm(limit).update(tree, jnp.ones(clients), (), KEY)[0]

    def program(at_once):
        return fax.program(clients=clients)(functools.partial(clip, at_once=at_once))

    runs = [
        jax.jit(program(1), compiler_options=QUICKLY),
        jax.jit(jax.vmap(program(None), in_axes=(None, 0)), compiler_options=QUICKLY),
    ]
    limits = np.asarray(LIMITS, np.float32)
    found = [exact(runs[0](tree, limit)) for limit in limits]
    many = jax.device_get(runs[1](tree, limits))
    found += [exact(jax.tree.map(lambda x, i=i: x[i], many)) for i in range(len(limits))]
    found += [exact(program(None)(tree, limits[4]))]
    u, size = exact(tree), np.linalg.norm(exact(tree), axis=1)
    normal = np.where(np.abs(u) < np.finfo(np.float32).tiny, 0, u)
    steps = float(jnp.finfo(dtype).smallest_subnormal) * 3  # of all numbers together, at the most
    for limit, x in zip([*limits, *limits, limits[4]], found, strict=True):
        norms, limit = np.linalg.norm(x, axis=1), float(limit)
        assert (norms <= limit).all(), limit
        inside = size <= limit * (1 - 1e-5)
        np.testing.assert_array_equal(x[inside], normal[inside])
        lost = limit * max(2e-5, float(jnp.finfo(dtype).eps)) + max(steps, 4e-38)
        assert (norms[~inside] >= limit - lost).all(), limit
        assert (x * u >= 0).all()


@pytest.mark.always("float16")
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_update_can_pass_a_private_sum(dtype):
    tree, limits = everything(dtype), np.asarray(LIMITS, np.float32)

    @fax.program(clients=3)
    def round(row, limit):
        sent = jax.tree.map(lambda x: jnp.stack([x * 0, x, x * jnp.nan]), row)
        weights = jnp.array([1.0, 5.0, 0.0])
        like = jax.tree.map(jnp.zeros_like, row)
        one = dict(expected_clients=1)
        ftrl = a.dp_ftrl(limit, 0.0, num_clients=3, separation=1, participations=1, key=KEY, **one)
        private = {
            "gaussian": a.gaussian(limit, 0.0, key=KEY, **one),
            "adaptive": a.gaussian(limit, 0.0, quantile=0.5, count_noise=1.0, key=KEY, **one),
            "behind non_finite": a.chain(a.non_finite(), a.gaussian(limit, 0.0, key=KEY, **one)),
            "dp_ftrl": ftrl,
            "laplace": a.laplace(limit, 0.0, key=KEY, **one),
        }
        return {
            name: aggregator.aggregate(sent, weights, aggregator.init(like), KEY)[0]
            for name, aggregator in private.items()
        }

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def each(tree, limits):
        def of_all_rows(limit):
            return jax.lax.map(lambda row: round(row, limit), tree)

        return jax.lax.map(of_all_rows, limits)

    found = each(tree, limits)
    for name, sums in jax.device_get(found).items():
        for i, limit in enumerate(limits):
            x = exact(jax.tree.map(lambda x, i=i: x[i], sums))
            norms = np.linalg.norm(x, 1 if name == "laplace" else 2, axis=1)
            if dtype == jnp.float32:  # what is released in a shorter dtype is rounded once more
                assert (norms <= float(limit)).all(), (name, limit)
            assert (norms <= float(limit) * 1.004 + 1e-7).all(), (name, limit)
            assert norms[0] > 0 or limit < 1e-3, (name, limit)


def test_eight_updates_one_of_them_an_attack():
    """The case that was found: 1.25e37 came out."""
    private = a.gaussian(1.0, 1.0, key=KEY)
    state = private.init(jnp.zeros(3, jnp.float32))
    round = fax.program(clients=8)(lambda u: private.aggregate(u, jnp.ones(8), state, KEY)[0])
    quiet = jax.jit(round)(jnp.zeros((8, 3), jnp.float32))
    attack = jax.jit(round)(jnp.zeros((8, 3), jnp.float32).at[3, 1].set(1e38))
    np.testing.assert_allclose(np.linalg.norm(attack - quiet), 1 / 8, rtol=1e-5)


def test_what_is_not_finite():
    """Clipping leaves it so, and private sums leave it out, of the count that adapts, too."""
    u = jnp.array([[3.0, 4.0], [jnp.inf, 1.0], [jnp.nan, 1.0], [0.0, 0.5]], jnp.float32)
    clip = fax.program(clients=4)(lambda u: a.clip_by_norm(1.0).update(u, jnp.ones(4), (), KEY)[0])
    found = np.asarray(jax.jit(clip)(u))
    assert np.isfinite(found).all(1).tolist() == [True, False, False, True]
    private = a.gaussian(1.0, 0.0, quantile=0.5, count_noise=1e-9, key=KEY)
    round = fax.program(clients=4)(
        lambda u, w: private.aggregate(u, w, private.init(u[0]), KEY)[:2]
    )
    found = jax.jit(round)(u, jnp.ones(4))
    expected = jax.jit(round)(u, jnp.array([1.0, 0.0, 0.0, 1.0]))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_array_equal(x, y)
        assert np.isfinite(x).all()


def test_norms_of_many_numbers():
    """Rounding is as small as the limit is made for, where a plain loop would stop adding."""
    x = np.full(3 * 2**23, 1.3, np.float32)
    found = jax.jit(lambda x: [(n.value, n.size, n.error) for n in (l2_norm(x), l1_norm(x))])(x)
    wide = x.astype(np.float64)
    for (value, _, error), true in zip(found, (np.linalg.norm(wide), wide.sum())):
        assert abs(value / true - 1) < error < 1e-4


def test_casts_round_toward_zero():
    rng = np.random.default_rng(0)
    x = 2.0 ** rng.uniform(-30, 15.9, 5000).astype(np.float32) * rng.choice([-1, 1], 5000)
    x = np.concatenate([x, [1, -65504, 1e-30]]).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=1)
    def cast(x, dtype):
        found = cast_toward_zero(x, dtype)
        away = jnp.nextafter(found, jnp.sign(x).astype(dtype) * jnp.inf)
        slope = jax.grad(lambda x: cast_toward_zero(x, dtype).astype(x.dtype))(x[0])
        return found, away, slope

    for dtype in (jnp.float16, jnp.bfloat16):
        found, away, slope = jax.device_get(cast(x, dtype))
        assert found.dtype == dtype
        assert (np.abs(found.astype(np.float64)) <= np.abs(x.astype(np.float64))).all()
        assert (np.abs(away.astype(np.float64)) >= np.abs(x.astype(np.float64))).all()
        assert slope == 1


# The norm that adapts


def test_the_norm_stays_if_nobody_counts_and_grows_again_from_zeros():
    clip = a.chain(a.non_finite(), a.adaptive_clip(initial_clip_norm=0.1, learning_rate=2.0))

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    @fax.program(clients=3)
    def rounds(value, state):
        def round(state, _):
            _, state, metrics = clip.aggregate(fax.broadcast(value), jnp.ones(3), state, KEY)
            return state, metrics

        return jax.lax.scan(round, state, length=200)

    start = clip.init(jnp.zeros(2, jnp.float32))
    state, metrics = rounds(jnp.full(2, jnp.nan, jnp.float32), start)
    assert state == start
    assert not metrics["clipped"].any()
    state, metrics = rounds(jnp.zeros(2, jnp.float32), start)
    norm = jax.tree.leaves(state)[0]
    assert norm == np.finfo(np.float32).tiny
    state, _ = rounds(jnp.full(2, 3.0, jnp.float32), state)
    assert 0.5 < jax.tree.leaves(state)[0] < 20


# What else scales


SCALES = [-90, 0, 40, 80, 120]
LINEAR = {
    "drive": a.chain(a.drive()),
    "e3m0": a.chain(a.e3m0()),
    "e4m3": a.chain(a.e4m3()),
    "hadamard": a.chain(a.hadamard(a.uniform_quantization(4))),
    "int8": a.chain(a.int8()),
    "krum": a.krum(1),
    "multi_krum": a.multi_krum(1, 2),
    "power_sgd": a.power_sgd(1, num_clients=7),
    "terngrad": a.chain(a.terngrad()),
    "top_k": a.chain(a.top_k(0.5, values=a.drive())),
    "uniform_quantization": a.chain(a.uniform_quantization(4)),
}


ROUNDED = {
    "power_sgd": dict(rtol=2e-5),
    "again": dict(rtol=1e-3, atol=1e-5),
    "rfa": dict(rtol=1e-5),
}
# What these do, `krum`, and encodings made of them do.
PARTS = ("drive", "multi_krum", "uniform_quantization")


@pytest.mark.always("others")
@pytest.mark.parametrize(
    "names", [sorted(LINEAR.keys() - PARTS), PARTS], ids=["others", "their parts"]
)
def test_scaled_updates_have_scaled_means(names):
    """By powers of two, so that all numbers but the exponents are the same, to the bit."""
    rng = np.random.default_rng(0)
    u = jnp.asarray(rng.normal(size=(7, 4, 3)), jnp.float32)
    w = jnp.asarray(rng.integers(1, 4, 7), jnp.float32)

    @fax.program(clients=7)
    def round(scale):
        sent = fax.map(lambda x: x * scale, u)
        aggregators = {name: LINEAR[name] for name in names}
        rows = {n: one.aggregate(sent, w, one.init(u[0]), KEY) for n, one in aggregators.items()}
        found = {n: x for n, (x, _, _) in rows.items()}
        if "power_sgd" in names:
            q = rows["power_sgd"][1]
            found["again"] = LINEAR["power_sgd"].aggregate(sent, w, q, KEY)[0]
            rfa = a.geometric_median(4, smoothing=1e-3 * scale)
            found["rfa"] = rfa.aggregate(sent, w, (), KEY)[0]
        return found

    scales = 2.0 ** np.array(SCALES, np.float32)
    every = jax.jit(functools.partial(jax.lax.map, round), compiler_options=QUICKLY)
    found = jax.tree.map(lambda x: np.asarray(x, np.float64), every(scales))
    one = SCALES.index(0)
    for i, scale in enumerate(scales.astype(np.float64)):
        for name, x in found.items():
            assert np.isfinite(x[i]).all(), name
            assert x[i].any(), name
            errors = ROUNDED.get(name, dict(rtol=0))
            np.testing.assert_allclose(x[i] / scale, x[one], err_msg=name, **errors)


@functools.partial(jax.jit, compiler_options=QUICKLY)
@fax.program(clients=2)
def encoded(u):
    parts = [a.drive(), a.e3m0(), a.terngrad(), a.uniform_quantization(4)]
    return [part.update(u, jnp.ones(2), (), KEY)[0] for part in parts]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_encodings_of_what_is_not_finite_say_so(value):
    u = np.ones((2, 7), np.float32)
    u[1, 1] = value
    for x in jax.device_get(encoded(u)):
        assert np.isfinite(x[0]).all()
        assert np.isnan(x[1]).all()


def test_the_largest_numbers_stay_finite():
    for dtype in DTYPES:
        u = np.zeros((2, 7), dtype)
        u[0], u[1, 1] = jnp.finfo(dtype).max, -jnp.finfo(dtype).max
        for x in encoded(u):
            assert np.isfinite(np.asarray(x, np.float64)).all()
