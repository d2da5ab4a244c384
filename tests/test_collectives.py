"""What programs send between devices, and what they hold there, read from compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec
from meshes import KINDS, mesh, mixed, put

import fax
from fax.inspect import report
from fax.lowering._across import across

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
# What a round sends, its gradient sends too, which is looked at for all types of axes.
UNIFORM_KINDS = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.long] * mixed(kind)) for kind in KINDS]
)
N, WIDTH = 8, 16
MODEL_BYTES = 2 * 4 * WIDTH * 2 * WIDTH  # two float32 matrices, of which a device has a half


def local_training(matmul):
    def loss(p, x):
        return jnp.sum((matmul(jnp.tanh(x @ p[0]), p[1]) - x) ** 2)

    def client(p, batches):
        def step(p, x):
            return jax.tree.map(lambda w, g: w - 0.1 * g, p, jax.grad(loss)(p, x)), None

        trained, _ = lax.scan(step, p, batches)
        return jax.tree.map(jnp.subtract, trained, p)

    return client


def fedavg(n, kind):
    """A round of federated averaging of a network that is split over `model`."""
    explicit = KINDS[kind][1] == jax.sharding.AxisType.Explicit
    options = dict(out_sharding=PartitionSpec()) if explicit else {}
    client = jax.checkpoint(local_training(lambda a, b: jnp.matmul(a, b, **options)))

    @fax.program(clients=n)
    def program(p, batches, weights):
        return fax.mean(fax.map(client, fax.broadcast(p), batches), weights=weights)

    return program


def arguments(n):
    p = (put(np.ones((WIDTH, 2 * WIDTH), np.float32), None, "model"),)
    p += (put(np.ones((2 * WIDTH, WIDTH), np.float32), "model", None),)
    rows = "clients" if n % jax.sharding.get_mesh().shape["clients"] == 0 else None
    batches = put(np.ones((n, 3, 2, WIDTH), np.float32), rows)
    return p, batches, put(np.ones(n, np.float32), rows)


def squares(program):
    return lambda *args: sum(jnp.sum(x**2) for x in jax.tree.leaves(program(*args)))


@UNIFORM_KINDS
def test_a_round_reduces_the_model_once(kind):
    with jax.set_mesh(mesh(kind, clients=4, model=2)):
        (only,) = report(fedavg(N, kind), *arguments(N)).over("clients")
    assert only.operation == "all-reduce"
    assert only.axes == ("clients",)
    assert only.count == 1
    assert only.bytes == MODEL_BYTES / 2 + 4  # and the total weight


@pytest.mark.always("first-auto")
@EVERY_KIND
def test_its_gradient_reduces_the_model_twice(kind):
    """Once forward, and once backward; besides, one number for the gradient of the weights."""
    with jax.set_mesh(mesh(kind, clients=4, model=2)):
        args, program = arguments(N), squares(fedavg(N, kind))
        sent = report(jax.grad(program), *args).over("clients")
        both = report(jax.grad(program, (0, 2)), *args).over("clients")
    for collective in *sent, *both:
        assert collective.operation == "all-reduce"
        assert collective.axes == ("clients",)
    of_models = [c for c in sent if c.bytes >= MODEL_BYTES / 2]
    assert len(of_models) == 2
    assert MODEL_BYTES <= sum(c.total_bytes for c in sent) <= MODEL_BYTES + 16
    assert MODEL_BYTES <= sum(c.total_bytes for c in both) <= MODEL_BYTES + 16


@pytest.mark.always("auto")
@UNIFORM_KINDS
def test_uneven_rows_cost_no_more(kind):
    """They are on all devices before, so nothing has to be sent for them."""
    with jax.set_mesh(mesh(kind, clients=4, model=2)):
        args, program = arguments(13), fedavg(13, kind)
        (only,) = report(program, *args).over("clients")
        sent = report(jax.grad(squares(program)), *args).over("clients")
    assert only.operation == "all-reduce"
    assert only.total_bytes == MODEL_BYTES / 2 + 4
    assert {c.operation for c in sent} == {"all-reduce"}
    assert sum(c.total_bytes for c in sent) <= MODEL_BYTES + 16


@pytest.mark.always("explicit")
@UNIFORM_KINDS
def test_a_layout_over_two_axes_reduces_over_both_at_once(kind):
    with (
        jax.set_mesh(mesh(kind, pod=2, clients=2, model=2)),
        fax.sharding.layout(clients=("pod", "clients")),
    ):
        p, batches, weights = arguments(N)
        batches, weights = put(batches, ("pod", "clients")), put(weights, ("pod", "clients"))
        sent = report(fedavg(N, kind), p, batches, weights).collectives
    (only,) = [c for c in sent if c.axes != ("model",)]
    assert only.operation == "all-reduce"
    assert only.axes == ("pod", "clients")


@pytest.mark.filterwarnings("ignore:A program over clients runs under a mesh of replicas")
def test_without_the_axis_nothing_is_sent():
    with jax.set_mesh(mesh(replicas=8)):
        assert not report(fedavg(N, "auto"), *host_arguments()).collectives


def host_arguments():
    p = (np.ones((WIDTH, 2 * WIDTH), np.float32), np.ones((2 * WIDTH, WIDTH), np.float32))
    return p, np.ones((N, 3, 2, WIDTH), np.float32), np.ones(N, np.float32)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_maps_and_indices_send_nothing(kind):
    on = mesh(kind, clients=8)

    @fax.program(clients=16)
    def program(p, d, key):
        keys = fax.keys(key)
        return fax.map(lambda p, d, i, k: p * d + i + jax.random.bits(k), fax.broadcast(p), d,
                       fax.index(), keys)  # fmt: skip

    with jax.set_mesh(on):
        args = put(np.ones(3)), put(np.ones((16, 3)), "clients"), jax.random.key(0)
        assert not report(program, *args).collectives


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_maximum_costs_one_collective(mode):
    on = mesh(clients=8)

    @fax.program(clients=16)
    def program(d):
        return getattr(fax, mode)(fax.map(jnp.sin, d))

    with jax.set_mesh(on):
        (only,) = report(program, put(np.ones((16, 3)), "clients")).collectives
    assert only.operation == "all-reduce"


def test_short_floats_are_reduced_in_float32():
    on = mesh(clients=8)

    @fax.program(clients=16)
    def program(d):
        return fax.mean(fax.map(lambda x: x * 2, d))

    with jax.set_mesh(on):
        d = put(np.ones((16, 5), jnp.bfloat16), "clients")
        (only,) = report(program, d).collectives
        assert only.bytes == 4 * 5
        # 256 + 1 is 256 in bfloat16, on a device and across devices.
        d = put(np.array([128, *[0.5] * 15], jnp.bfloat16).reshape(16, 1), "clients")
        assert jax.jit(program)(d) == jnp.bfloat16((256 + 15) / 16)


# Memory


LAYERS, UNITS = 4, 64


@pytest.mark.parametrize("gradient", [False, True])
def test_temporary_memory_does_not_grow_with_the_participants(gradient):
    def client(p, x):
        for _ in range(2):
            step = jax.grad(lambda p: sum(jnp.sum(jnp.tanh(x @ w) ** 2) for w in p))(p)
            p = [w - 0.1 * g for w, g in zip(p, step, strict=True)]
        return p

    def of(n):
        @fax.program(clients=n)
        def program(p, d, weights):
            return fax.mean(fax.map(jax.checkpoint(client), fax.broadcast(p), d), weights=weights)

        fn = jax.grad(squares(program)) if gradient else program
        p = [put(np.ones((UNITS, UNITS), np.float32))] * LAYERS
        d, weights = np.ones((n, 2, UNITS), np.float32), np.ones(n, np.float32)
        args = p, put(d, "clients"), put(weights, "clients")
        return report(fn, *args).memory.temporary_bytes

    with jax.set_mesh(mesh(clients=4, model=2)):
        small, large = of(32), of(512)
    model = 4 * LAYERS * UNITS**2
    rows = (512 - 32) // 4 * 2 * UNITS * 4  # a device's part of the data
    assert small <= 6 * model
    assert large - small < 0.05 * rows


@pytest.mark.parametrize("vectorize", [1, 3])
def test_batches_are_those_of_a_device(vectorize):
    """24 participants on 4 devices: six each, in batches of one or three."""

    @fax.program(clients=24)
    def program(p, d):
        return fax.sum(fax.map(lambda p, x: jnp.tanh(x @ p), fax.broadcast(p), d,
                               vectorize=vectorize))  # fmt: skip

    with jax.set_mesh(mesh(clients=4)):
        text = jax.jit(program).lower(np.ones((5, 7)), np.ones((24, 5))).as_text()
    together = {size: f"tensor<{size}x7xf64>" in text for size in (3, 6, 24)}
    assert together == {3: vectorize == 3, 6: False, 24: False}


@pytest.mark.parametrize("mode", ["sum", "max", "min"])
@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64"])
def test_what_replaces_reductions_of_64_bits_on_tpu(dtype, mode):
    """The TPU compiler lacks these reductions. What it gets instead has equal results on CPU."""
    if dtype == "float64":  # as TPUs have them: sums of two float32
        low, same = 2.0**-30 * np.arange(-4, 4), np.array([1.5, -1.5, np.inf, -np.inf, 0, 3])
        x = np.stack([np.add.outer(same, low).T, np.outer(low, np.ones(6))], 2)
    else:
        rng, limits = np.random.default_rng(0), np.iinfo(dtype)
        x = rng.integers(limits.min, limits.max, (8, 6, 2), dtype, endpoint=True)
        x[:, 0], x[0, 0], x[:, 1, 0] = limits.min, limits.max, x[0, 1, 0] // 256 * 256
        x[:, 1, 0] |= np.arange(8).astype(dtype)  # equal in their high parts
    run = lambda x: across("tpu", ("clients",), [mode], [x])[0]  # noqa: E731
    with jax.set_mesh(mesh(clients=8)):
        spread = dict(in_specs=PartitionSpec("clients"), out_specs=PartitionSpec())
        found = jax.jit(jax.shard_map(run, check_vma=False, **spread))(x)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = getattr(np, mode)(x, axis=0, keepdims=True)
    assert found.dtype == dtype
    if dtype == "float64" and mode == "sum":
        np.testing.assert_allclose(found, expected, rtol=1e-15)
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_extrema_across_devices_are_nan_if_a_row_is(dtype):
    """XLA's own maxima across CPU devices ignore NaN. Signs and infinities are kept, too."""
    x = np.random.default_rng(0).normal(size=(8, 9)).astype(np.float32)
    x[3, 0], x[5, 1], x[:, 2] = np.nan, -np.nan, np.nan
    x[2, 3], x[6, 4], x[:, 5], x[:, 6] = np.inf, -np.inf, -np.inf, -np.abs(x[:, 6])
    x[7, 3] = np.nan
    x = x.astype(jnp.dtype(dtype))
    extrema = fax.program(clients=8)(lambda x: (fax.max(x), fax.min(x)))
    with jax.set_mesh(mesh(clients=4)):
        found = jax.jit(extrema)(put(x, "clients"))
        run = lambda x: across("tpu", ("clients",), ["max", "min"], [x, x])  # noqa: E731
        spread = dict(in_specs=PartitionSpec("clients"), out_specs=PartitionSpec())
        of_pairs = jax.jit(jax.shard_map(run, check_vma=False, **spread))(x[::2])
    for mode, own, pair in zip((np.max, np.min), found, of_pairs, strict=True):
        assert own.dtype == dtype
        for got, of in ((own, x), (np.asarray(pair)[0], x[::2])):
            # NumPy does not know which bfloat16 are NaN.
            np.testing.assert_array_equal(np.asarray(got).astype(float), mode(of.astype(float), 0))
