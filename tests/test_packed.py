"""The bits that replicas send each other: the same means as in float32, to the bit."""

import contextlib
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import meshes
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import fax
from fax import aggregators as a
from fax.algorithms import _packed, _replicas

N = 4
AGGREGATORS = {
    "e3m0": a.chain(a.e3m0()),
    "int8": a.chain(a.clip_by_norm(20.0), a.int8()),
    "e4m3": a.chain(a.e4m3()),
    "error_feedback": a.chain(a.error_feedback(a.uniform_quantization(3), num_clients=N)),
    "16 levels": a.chain(a.uniform_quantization(16)),
    "256 levels": a.chain(a.uniform_quantization(256)),
}
BITS = {"e3m0": 4, "int8": 8, "e4m3": 8, "error_feedback": 2, "16 levels": 4, "256 levels": 8}
SCALES = dict.fromkeys(("error_feedback", "16 levels", "256 levels"), 2)  # of a leaf
SHAPES = {"s": (), "w": (5, 7)}


def mean_of(aggregator, updates, here, n, specs=None, by_leaf=False):
    """The mean update, the state of the aggregator and the metrics, as algorithms compute them."""

    @fax.program(replicas=len(here))
    def mean(updates, here, n):
        one = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), updates)
        key = jax.random.key(1)
        return _replicas.mean_update(
            aggregator, updates, here, n, aggregator.init(one), key, specs, by_leaf
        )

    return mean(updates, here, n)


def in_float32(monkeypatch):
    monkeypatch.setattr(_replicas, "sent_in_bytes", lambda *_: None)


def rows(shapes=SHAPES, n=N):
    rng = np.random.default_rng(0)
    return {k: np.asarray(rng.normal(size=(n, *s)), np.float32) for k, s in shapes.items()}


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("devices", "names"),
    [
        (4, ("int8", "error_feedback")),
        pytest.param(2, tuple(AGGREGATORS), marks=pytest.mark.long),
        pytest.param(4, tuple(AGGREGATORS), marks=pytest.mark.long),
    ],
)
def test_means_are_those_of_float32_to_the_bit(devices, names, monkeypatch):
    """With weights, and a replica that is lost."""
    updates, here = rows(), np.array([True, True, False, True])
    updates["w"][2] = np.nan
    n = np.array([3, 1, 2, 7], np.float32)

    def means(*args):
        return {name: mean_of(AGGREGATORS[name], *args) for name in names}

    with jax.set_mesh(meshes.mesh(replicas=devices)):
        compiled = jax.jit(means).lower(updates, here, n).compile()
        found, report = compiled(updates, here, n), fax.inspect.report(compiled)
        in_float32(monkeypatch)
        expected = jax.jit(lambda *args: means(*args))(updates, here, n)
    assert_same({k: x[:3] for k, x in found.items()}, {k: x[:3] for k, x in expected.items()})
    assert all(np.asarray(x).any() for own in found.values() for x in jax.tree.leaves(own[0]))

    # One collective for each: the bytes, a scale for each leaf, and a weight.
    gathers = [c for c in report.collectives if "uint8" in c.dtype]
    size = {2: 9 + 1, 4: 18 + 1, 8: 35 + 1}
    sizes = [size[BITS[name]] + 4 * (2 * SCALES.get(name, 1) + 1) for name in names]
    assert {c.operation for c in gathers} == {"all-gather"}
    assert sorted(c.bytes for c in gathers) == sorted(N // devices * x for x in sizes)
    assert all(c.bytes <= 8 * 4 for c in report.collectives if "uint8" not in c.dtype)
    for name, nbytes in zip(names, sizes):
        bits = np.where(here, 8.0 * nbytes, 0)
        np.testing.assert_array_equal(found[name][3]["replicas/bits"], bits)


@pytest.mark.long
def test_derivatives_are_those_of_float32(monkeypatch):
    """With respect to updates and weights, where the update of a lost replica is NaN."""
    updates, here = {"w": rows()["w"]}, np.array([True, True, False, True])
    updates["w"][2] = np.nan
    n = np.array([3, 1, 2, 7], np.float32)

    def loss(updates, n):
        found = [mean_of(AGGREGATORS[name], updates, here, n)[0] for name in ("e3m0", "int8")]
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(found))

    with jax.set_mesh(meshes.mesh(replicas=4)):
        found = jax.jit(jax.value_and_grad(loss, (0, 1)))(updates, n)
        in_float32(monkeypatch)
        expected = jax.jit(jax.value_and_grad(lambda *args: loss(*args), (0, 1)))(updates, n)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(x).all()
        assert np.asarray(x).any()
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.always("explicit-e3m0")
@pytest.mark.parametrize(
    ("kind", "name"), [("auto", "e3m0"), ("explicit", "e3m0"), ("auto", "16 levels")]
)
def test_each_device_of_a_replica_sends_its_own_part(kind, name, monkeypatch):
    """Leaves are sharded over `model`, and what crosses also over `data`. Large ones have rows."""
    shapes = {"in": (4, 6), "norm": (3,), "out": (8, 2)}
    specs = {"in": P(None, "model"), "norm": P(), "out": P("model")}
    here, n = np.ones(2, bool), np.ones(2, np.float32)
    monkeypatch.setattr(_packed, "_LARGE", 3)
    monkeypatch.setattr(_packed, "_ROW", 4)
    with jax.set_mesh(meshes.mesh(kind, replicas=2, data=2, model=2)):
        updates = {k: meshes.put(x, "replicas", *specs[k]) for k, x in rows(shapes, 2).items()}

        def mean(updates, here, n):
            own = specs if kind == "auto" else None
            return mean_of(AGGREGATORS[name], updates, here, n, specs=own, by_leaf=True)

        compiled = jax.jit(mean).lower(updates, here, n).compile()
        found, report = compiled(updates, here, n), fax.inspect.report(compiled)
        in_float32(monkeypatch)
        expected = jax.jit(lambda *x: mean(*x))(updates, here, n)
    assert_same(found[:3], expected[:3])
    over = report.over("replicas")
    (gather,) = [c for c in over if "uint8" in c.dtype]
    assert (gather.operation, gather.axes) == ("all-gather", ("replicas",))
    # A fourth of 24 numbers in a row of 4 bytes, a fourth of 16 and all of the other 3 in another
    # one, and one or two scales of three leaves and a weight.
    assert gather.bytes == 4 + (2 + 2) + 4 * (3 * SCALES.get(name, 1) + 1)
    np.testing.assert_array_equal(found[3]["replicas/bits"], [4 * 8 * gather.bytes] * 2)
    for name, shape in {"in": (4, 3), "out": (4, 2)}.items():
        assert found[0][name].sharding.shard_shape(shapes[name]) == shape


def test_a_replica_at_a_time_is_decoded(monkeypatch):
    """The memory is that of the bytes and of the mean, in rows as TPUs have them."""
    shape = {"w": (64, 1024)}
    size = 4 * 64 * 1024
    updates = {"w": jax.ShapeDtypeStruct((16, 64, 1024), jnp.float32)}
    arguments = updates, np.ones(16, bool), np.ones(16, np.float32)
    mean = functools.partial(mean_of, AGGREGATORS["e3m0"])
    with jax.set_mesh(meshes.mesh(replicas=4)):
        found = fax.inspect.report(mean, *arguments)
        in_float32(monkeypatch)
        before = fax.inspect.report(lambda *x: mean(*x), *arguments)
    # The codes of 4 replicas, their bytes, those of all 16, and totals of a device and of all.
    more = found.memory.temporary_bytes - before.memory.temporary_bytes
    assert more < (4 / 4 + 2 * 4 / 8 + 16 / 8 + 4) * size
    (gather,) = [c for c in found.collectives if "uint8" in c.dtype]
    assert gather.bytes == 4 * (math.prod(shape["w"]) // 2 + 128)


@pytest.mark.parametrize(
    ("name", "n", "axes", "packed"),
    [
        ("e3m0", 16, {"replicas": 4}, True),
        ("e3m0", 18, {"replicas": 2}, False),  # an all-reduce sends less
        ("int8", 8, {"replicas": 4}, True),
        ("int8", 10, {"replicas": 2}, False),
        ("2 bits", 32, {"replicas": 2}, True),
        ("2 bits", 34, {"replicas": 2}, False),
        ("257 levels", 4, {"replicas": 4}, False),
        ("entropy coded", 4, {"replicas": 4}, False),
        ("e3m0", 6, {"replicas": 4}, False),  # not spread evenly
        ("e3m0", 4, {}, False),
        ("e3m0", 4, {"replicas": 2, "model": 2}, False),  # the compiler decides what is where
        ("mean", 4, {"replicas": 4}, False),
        ("clipped later", 4, {"replicas": 4}, False),
    ],
)
def test_bytes_are_sent_where_that_is_less(name, n, axes, packed):
    others = {
        "mean": a.mean(),
        "clipped later": a.chain(a.e3m0(), a.clip_by_norm(1.0)),
        "2 bits": a.chain(a.uniform_quantization(4)),
        "257 levels": a.chain(a.uniform_quantization(257)),
        "entropy coded": a.chain(a.uniform_quantization(4, entropy_coded=True)),
    }
    mean = functools.partial(mean_of, {**AGGREGATORS, **others}[name])
    with jax.set_mesh(meshes.mesh(**axes)) if axes else contextlib.nullcontext():
        jaxpr = jax.make_jaxpr(mean)({"w": jnp.ones((n, 8))}, jnp.ones(n, bool), jnp.ones(n))
    assert ("all_gather" in str(jaxpr)) == packed


@pytest.mark.parametrize(("name", "packed"), [("16 levels", False), ("e3m0", True)])
def test_rounded_updates_of_half_precision_are_added_up_in_float32(name, packed):
    """Those of `e3m0` are float32 themselves."""
    mean = functools.partial(mean_of, AGGREGATORS[name])
    updates = {"w": jnp.ones((4, 8), jnp.bfloat16)}
    with jax.set_mesh(meshes.mesh(replicas=4)):
        jaxpr = jax.make_jaxpr(mean)(updates, jnp.ones(4, bool), jnp.ones(4))
    assert ("all_gather" in str(jaxpr)) == packed


def test_what_is_sent_has_to_be_divisible():
    specs = {"w": P(None, ("model",))}
    mean = functools.partial(mean_of, AGGREGATORS["e3m0"], specs=specs)
    message = "for 'w', but what is sent of it at once has size 3 along axis 1, which is not a mult"
    with (
        jax.set_mesh(meshes.mesh(replicas=2, model=2)),
        pytest.raises(ValueError, match=message),
    ):
        jax.eval_shape(mean, {"w": jnp.ones((2, 4, 3))}, jnp.ones(2, bool), jnp.ones(2))


# Formats

FORMATS = {"e3m0": a.e3m0, "e4m3": a.e4m3, "int8": a.int8} | {
    f"{k} levels": functools.partial(a.uniform_quantization, k) for k in (3, 16, 256)
}


@functools.cache
def rounded(name):
    """A leaf as it is sent, and what is decoded after it was encoded once more."""
    part = FORMATS[name]()

    @jax.jit
    @fax.program(clients=1)
    def both(x, seed):
        sent = part.update(x[None], jnp.ones(1), (), jax.random.key(seed))[0][0]
        return sent, part.format.decode(*part.format.encode(sent))

    return both


SIZE = 24
VALUES = st.lists(st.floats(-1, 1, width=32, allow_subnormal=False), min_size=SIZE, max_size=SIZE)


def padded(*values):
    return np.pad(np.array(values), (0, SIZE - len(values)))


@pytest.mark.always(
    *(f"{name}-float{bits}" for name in ("e3m0", "e4m3", "int8") for bits in (32, 64)),
    *("3 levels-float32", "256 levels-float64"),
)
@pytest.mark.parametrize(
    ("name", "dtype"), list(itertools.product(FORMATS, ["float32", "float64"]))
)
def test_formats_lose_nothing(name, dtype):
    @given(VALUES, st.integers(-90, 90), st.integers(0, 99))
    def check(values, exponent, seed):
        x = np.asarray(values) * 2.0**exponent
        x = np.where(np.abs(x) < 1e-30, 0, x).astype(dtype)
        sent, again = jax.device_get(rounded(name)(x, seed))
        assert sent.dtype == again.dtype == dtype
        np.testing.assert_array_equal(sent, again)

    check()
    for bad in (np.nan, np.inf):
        sent, again = rounded(name)(padded(1, bad).astype(dtype), 0)
        assert np.isnan(sent).all()
        assert np.isnan(again).all()
    for size in (3e38, 2e-38, 0.999 * np.finfo(dtype).max):
        x = (size * padded(1, -0.7, 0.1)).astype(dtype)
        sent, again = jax.device_get(rounded(name)(x, 0))
        np.testing.assert_array_equal(sent, again)
        np.testing.assert_allclose(sent[0], x[0], rtol=0.07)


def test_e4m3_is_the_nearest_8_bit_float():
    x = np.random.default_rng(0).normal(size=SIZE).astype(np.float32)
    x *= np.float32(4) ** -(np.arange(SIZE) % 6)
    sent, _ = rounded("e4m3")(x, 0)
    scale = 2 ** np.floor(np.log2(np.abs(x).max())) / 128
    expected = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_array_equal(sent, expected)


def test_int8_is_unbiased_and_between_neighbors():
    x = np.array([1.0, -0.3, 0.011, 0.002, -0.7, 0], np.float32)
    draws = jax.vmap(rounded("int8"), (None, 0))(x, np.arange(4000))[0]
    draws = np.asarray(draws, np.float64)
    step = np.abs(draws[0, 0]) / 127
    assert 0 <= 1 / 127 - step <= 2.0**-15 / 127
    below = np.floor(x / step)
    assert set(np.round(draws / step - below).ravel()) == {0, 1}
    np.testing.assert_allclose(draws.mean(0), x, atol=4 * step / 2 / np.sqrt(4000))
    np.testing.assert_array_equal(np.round(draws[:, 0] / step), 127)
