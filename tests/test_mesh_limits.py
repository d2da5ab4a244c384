"""Effects, random keys and short types on meshes, and what fax says of what it cannot do."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from meshes import KINDS, mesh, mixed
from subsets import alike
from test_transformations import assert_close

import fax

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
BATCHES = pytest.mark.parametrize("vectorize", [1, 2])


# Effects


def calls_back(n, vectorize, seen):
    @fax.program(clients=n)
    def program(d):
        def client(x, number):
            jax.debug.callback(lambda i: seen.append(int(i)), number)
            return 2 * x

        return fax.sum(fax.map(client, d, fax.index(), vectorize=vectorize))

    return program


@BATCHES
@pytest.mark.parametrize("n", [3, 8, 13])
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("axes", [dict(clients=4), dict(data=1, clients=4, model=1)], ids=str)
def test_effects_run_once_for_each_participant(kind, axes, n, vectorize):
    seen = []
    program = calls_back(n, vectorize, seen)
    with jax.set_mesh(mesh(kind, **axes)):
        for run in program, jax.jit(program):
            assert run(np.ones(n)) == 2 * n
            jax.effects_barrier()
            assert sorted(seen) == list(range(n))
            seen.clear()


@EVERY_KIND
@pytest.mark.parametrize("n", [8, 13])
def test_effects_are_refused_where_axes_are_left_to_the_compiler(kind, n):
    with (
        jax.set_mesh(mesh(kind, clients=4, model=2)),
        pytest.raises(fax.PlacementError, match=r"over clients has effects.*compiler \(model\)"),
    ):
        calls_back(n, 1, [])(np.ones(n))


# Collectives over the placement


@pytest.mark.parametrize(
    "client",
    [
        lambda x: x * lax.axis_index("clients"),
        lambda x: lax.psum(x, "clients"),
        lambda x: lax.pmean(x, ("clients", "model")),
        lambda x: lax.all_gather(x, "clients"),
    ],
    ids=["axis_index", "psum", "pmean", "all_gather"],
)
@EVERY_KIND
def test_collectives_of_clients_are_refused(kind, client):
    @fax.program(clients=8)
    def program(d):
        return fax.map(client, d)

    with (
        jax.set_mesh(mesh(kind, clients=4, model=2)),
        pytest.raises(fax.PlacementError, match=r"fax\.index.*fax\.sum, fax\.mean, fax\.max"),
    ):
        jax.jit(program)(np.ones(8))


# Dtypes


def dtypes(n):
    rng = np.random.default_rng(n)
    d = {
        "bool": rng.uniform(size=n) > 0.5,
        "int32": rng.integers(-9, 9, n, dtype=np.int32),
        "uint8": rng.integers(0, 200, n, dtype=np.uint8),
        "bfloat16": rng.integers(-9, 9, (n, 2)).astype(jnp.bfloat16),
        "float16": rng.integers(-9, 9, n).astype(np.float16),
        "complex128": rng.integers(-9, 9, n) + 1j * rng.integers(-9, 9, n),
    }

    @fax.program(clients=n)
    def program(d, key):
        keys = fax.keys(key)
        real = {name: x for name, x in d.items() if name != "complex128"}
        rows = fax.map(lambda x: x, {**d, "keys": keys}, vectorize=2)
        bits = fax.map(lambda key: jax.random.bits(key, (2,)), rows["keys"])
        reduced = fax.sum(d), fax.mean(d), fax.max(real), fax.min(real), fax.sum(bits)
        return jax.random.key_data(rows.pop("keys")), rows, reduced, fax.max(real, where=d["bool"])

    return program, d


@functools.cache
def on_one_device(n):
    program, d = dtypes(n)
    return jax.device_get(jax.jit(program)(d, jax.random.key(3)))


@pytest.mark.always("13-first-explicit")
@pytest.mark.kinds(kind=mixed, n=alike)
@EVERY_KIND
@pytest.mark.parametrize("n", [3, 8, 13])
def test_dtypes_and_random_keys(kind, n):
    program, d = dtypes(n)
    key = jax.random.key(3)
    want = on_one_device(n)
    keys = jax.jit(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(n)))(key)
    assert_close(want[0], np.asarray(jax.random.key_data(keys)))
    for name in "int32", "uint8", "bfloat16":
        assert want[2][2][name].tolist() == d[name].max(0).tolist()
    with jax.set_mesh(mesh(kind, clients=4, model=2)):
        assert_close(jax.jit(program)(d, key), want)


# Meshes


def test_make_mesh_infers_a_size():
    made = fax.sharding.make_mesh(clients=-1, model=2)
    assert dict(made.shape) == {"clients": 4, "model": 2}
    assert set(made.axis_types) == {AxisType.Auto}
    assert made.devices.size == len(set(made.devices.flat)) == 8
    types = (AxisType.Explicit, AxisType.Auto)
    assert fax.sharding.make_mesh(clients=4, model=2, axis_types=types).axis_types == types
    half = fax.sharding.make_mesh(devices=jax.devices()[4:], clients=-1)
    assert set(half.devices.flat) == set(jax.devices()[4:])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(), "at least one axis"),
        (dict(clients=3), "sizes {'clients': 3} do not multiply to the number of devices, 8"),
        (dict(clients=-1, model=3), "'model': 3} do not multiply"),
        (dict(clients=4, model=1), "do not multiply"),
        (dict(clients=-1, model=-1), "only one of the sizes {'clients': -1, 'model': -1} can be"),
        (dict(clients=0), "clients is 0, expected an int of at least 1, or -1"),
        (dict(clients=-2), "clients is -2"),
        (dict(clients=True), "clients is True"),
        (dict(clients="8"), "clients is '8'"),
        (dict(clients=8.0), "clients is 8.0"),
        (dict(clients=4, model=2, axis_types=(AxisType.Auto,)), "one for each of the axes clients"),
        (dict(clients=8, axis_types="auto"), "expected one jax.sharding.AxisType"),
    ],
)
def test_make_mesh_says_what_is_wrong(kwargs, message):
    with pytest.raises(fax.PlacementError, match=re.escape(message)):
        fax.sharding.make_mesh(**kwargs)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (dict(clients="pod"), "clients names the mesh axis 'pod', but"),
        (dict(clients=("clients", "pod")), "the mesh in scope has the axes clients, model"),
        (dict(clients=("model", "model")), "clients names the mesh axis 'model' twice"),
        (dict(clients="model", regions="model"), "both name the mesh axis 'model'"),
    ],
)
def test_layout_says_what_is_wrong(axes, message):
    with (
        jax.set_mesh(mesh(clients=4, model=2)),
        pytest.raises(fax.PlacementError, match=re.escape(message)),
        fax.sharding.layout(**axes),
    ):
        pass


def test_a_layout_is_checked_where_a_program_is_called():
    @fax.program(clients=4, regions=2)
    def program(d):
        return fax.sum(d, placement="clients")

    with fax.sharding.layout(regions="clients"):  # without a mesh this could be
        assert program(np.ones(4)) == 4
        with (
            jax.set_mesh(mesh(clients=4, model=2)),
            pytest.raises(fax.PlacementError, match=r"clients and regions|regions and clients"),
        ):
            program(np.ones(4))
