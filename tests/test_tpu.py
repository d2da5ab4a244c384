"""Programs compiled for TPUs by their own compiler, which needs no TPU and runs nothing.

That a program compiles is worth a test: this compiler knows fewer dtypes and operations than that
for CPUs. What a program sends and holds is read from what is compiled.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tpus
from jax import lax
from tpus import AGGREGATORS, ALGORITHMS, ALONE, AUTO, EXPLICIT, OF_REPLICAS, N, shaped

import fax
from fax import aggregators, algorithms
from fax.algorithms._replicas import mean_update
from fax.inspect import report

tpus.require()

KINDS = pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
WIDTH = 128
MODEL_BYTES = 2 * 4 * WIDTH * WIDTH


@pytest.fixture(autouse=True, scope="module")
def in_32_bits():
    """As users have it. TPUs emulate numbers of 64 bits, which take long to compile."""
    with jax.enable_x64(False):
        yield


# Rounds


def train(params, batches):
    """Local steps on a network of two layers, which may be sharded over ``model``."""
    mesh = jax.sharding.get_abstract_mesh()
    explicit = "model" in mesh.explicit_axes
    matmul = lambda a, b: jnp.matmul(a, b, **(dict(out_sharding=jax.P()) if explicit else {}))  # noqa: E731

    def loss(p, x):
        return jnp.mean((matmul(jnp.tanh(x @ p[0]), p[1]) - x) ** 2)

    def step(p, x):
        return jax.tree.map(lambda w, g: w - 0.1 * g, p, jax.grad(loss)(p, x)), None

    trained, _ = lax.scan(step, params, batches)
    return jax.tree.map(jnp.subtract, trained, params)


def fedavg(n, client=train, vectorize=None):
    client = jax.checkpoint(client)

    @fax.program(clients=n)
    def program(params, batches, weights):
        updates = fax.map(client, fax.broadcast(params), batches, vectorize=vectorize)
        return fax.mean(updates, weights=weights)

    return program


def and_gradient(program):
    """A round, and its gradient with respect to the parameters and the weights."""

    def squares(*args):
        out = program(*args)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(out)), out

    return jax.grad(squares, (0, 2), has_aux=True)


def arguments(n, model=None):
    rows = "clients" if n % jax.sharding.get_mesh().shape["clients"] == 0 else None
    params = shaped((WIDTH, WIDTH), None, model), shaped((WIDTH, WIDTH), model, None)
    return params, shaped((n, 2, 8, WIDTH), rows), shaped((n,), rows)


def sent(found):
    return sum(each.total_bytes for each in found)


@KINDS
def test_a_round_and_its_gradient_each_reduce_the_model_once(kind):
    with jax.set_mesh(tpus.mesh(kind, clients=4)):
        found = report(and_gradient(fedavg(8)), *arguments(8))
    assert {each.operation for each in found.collectives} == {"all-reduce"}
    # Besides the model there are sums of numbers: the total weight, and for its gradient.
    assert 2 * MODEL_BYTES <= sent(found.collectives) <= 2 * MODEL_BYTES + 16
    assert all(each.count == 1 for each in found.collectives)


@KINDS
def test_between_slices_a_sharded_model_crosses_once_in_a_round(kind):
    """Each chip sends its part of the model; local steps stay within a slice."""
    with jax.set_mesh(tpus.mesh(kind, slices=2, clients=2, model=4)):
        found = report(fedavg(2), *arguments(2, "model"))
    assert found.num_slices == 2
    tile = 8 * 128 * 4  # The total weight, a number, takes up to one.
    assert MODEL_BYTES / 4 < sent(found.between_slices) <= MODEL_BYTES / 4 + tile
    assert {each.axes for each in found.between_slices} == {("clients",)}
    assert all(each.count == 1 for each in found.between_slices)
    assert {each.axes for each in found.collectives} == {("clients",), ("model",)}


def test_uneven_rows_send_no_more():
    """Every chip holds all rows before, so nothing has to be sent for them."""
    with jax.set_mesh(tpus.mesh(clients=4)):
        found = report(fedavg(6), *arguments(6))
    assert {each.operation for each in found.collectives} == {"all-reduce"}
    assert sent(found.collectives) == MODEL_BYTES + 4


@pytest.mark.long
def test_memory_does_not_grow_with_clients():
    """For 4 and 16 clients on each chip. That of a `jax.vmap` does.

    The model has 16 MiB, because small ones stay in fast memory, which is not counted.
    """
    shape = (2048, 2048)
    model_bytes = 4 * 2048**2

    def client(params, factors):
        trained, _ = lax.scan(lambda p, x: (p - 0.1 * jnp.tanh(p * x), None), params, factors)
        return trained - params

    def plain(params, factors, weights):
        return jnp.tensordot(weights, jax.vmap(client, (None, 0))(params, factors), 1)

    def temporary(program, n):
        args = shaped(shape), shaped((n, 2), "clients"), shaped((n,), "clients")
        return report(program, *args).memory.temporary_bytes / model_bytes

    with jax.set_mesh(tpus.mesh(clients=4)):
        few, many = (temporary(and_gradient(fedavg(n, client, 1)), n) for n in (16, 64))
        assert temporary(plain, 64) > 8
    assert abs(many - few) < 0.02
    assert many <= 5


# What client functions compute


def test_every_setting_of_convolutions():
    """Of local steps with a convolution, one with groups, and pools, one by one and vectorized."""

    def client(kernels, images):
        def loss(kernels):
            first = lax.conv_general_dilated(
                images, kernels[0], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            pooled = -lax.reduce_window(
                first, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
            )
            second = lax.conv_general_dilated(
                *(pooled, kernels[1], (2, 2), "VALID"),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=4,
            )
            return jnp.sum(second**2)

        def step(_, kernels):
            return jax.tree.map(lambda k, g: k - 0.1 * g, kernels, jax.grad(loss)(kernels))

        return lax.fori_loop(0, 2, step, kernels)

    @fax.program(clients=8)
    def program(kernels, images):
        def one(number, convolutions, vectorize):
            own = [number * k for k in kernels]  # so that equal programs are not merged
            how = dict(convolutions=convolutions, vectorize=vectorize)
            return fax.mean(fax.map(client, fax.broadcast(own), images, **how))

        every = itertools.product(("auto", "xla", "matmul"), (1, 2))
        return [one(number, *how) for number, how in enumerate(every, 1)]

    with jax.set_mesh(tpus.mesh(clients=4)):
        kernels = [shaped((3, 3, 2, 8)), shaped((3, 3, 2, 8))]
        found = report(program, kernels, shaped((8, 2, 8, 8, 2), "clients"))
    bytes_of_kernels = 2 * 4 * 3 * 3 * 2 * 8
    assert sent(found.collectives) == 6 * bytes_of_kernels


def test_an_lstm_on_a_cohort_that_is_on_the_devices():
    """A round only gets the numbers of rows, and gathers the examples."""
    model = fax.models.create("char_lstm", num_tokens=10, hidden=8)
    text = {"x": np.ones((5, 4), np.int32), "y": np.ones((5, 4), np.int32)}
    data = fax.data.InMemory({str(i): text for i in range(4)})
    algorithm = algorithms.fedavg(model.loss, optax.sgd(0.1))
    cohort = next(fax.data.cohorts(data, 4, 2, resident=True))
    assert isinstance(cohort.batches, fax.data.Gathered)
    state = algorithm.init(model.init(jax.random.key(0)))
    with jax.set_mesh(tpus.mesh(clients=4)):
        found = report(algorithm.round, state, cohort)
    assert {each.operation for each in found.collectives} == {"all-reduce"}
    bytes_of_model = sum(x.nbytes for x in jax.tree.leaves(state.params))
    assert bytes_of_model < sent(found.collectives) < bytes_of_model + 200  # metrics and counts


# Algorithms and aggregators

# The axes of a mesh, its kind, the number of slices, and the number of clients.
SETTINGS = {
    "auto": (dict(clients=4), AUTO, 1, 4),
    "explicit": (dict(clients=2, model=2), EXPLICIT, 1, 4),
    "two slices": (dict(clients=2, model=4), AUTO, 2, 4),
    "uneven": (dict(clients=4), AUTO, 1, 3),
}


def compiled(algorithm, aggregator, setting):
    """The report of a round in one of the settings."""
    axes, kind, slices, clients = SETTINGS[setting]
    clients = N if algorithm in OF_REPLICAS else clients
    fn, args = tpus.a_round(algorithm, aggregator, clients=clients)
    placement = "replicas" if algorithm in OF_REPLICAS else "clients"
    mesh = tpus.mesh(kind, slices=slices, **axes)
    with jax.set_mesh(mesh), fax.sharding.layout(**{placement: "clients"}):
        found = report(fn, *args)
    assert found.over("clients")  # at least the metrics
    assert bool(found.between_slices) == (slices > 1)


PRIVATE = {"diloco": "dp_ftrl", "fedavg": "gaussian", "fedprox": "laplace"}  # others refuse them


def pairs():
    """Every algorithm and every aggregator in one pair at least, spread over the settings."""
    others = itertools.cycle(name for name in AGGREGATORS if name not in PRIVATE.values())
    settings = itertools.cycle(SETTINGS)
    tried = [
        (name, None if name in ALONE else PRIVATE.get(name) or next(others), next(settings))
        for name in ALGORITHMS
    ]
    left = sorted({*AGGREGATORS}.difference(aggregator for _, aggregator, _ in tried))
    return tried + [("fedavg", name, next(settings)) for name in left]


def public(module):
    return {name for name in dir(module) if callable(getattr(module, name)) and name.islower()}


def test_all_algorithms_and_aggregators_are_here():
    helpers = {"calibrate", "chain", "epsilon", "releases", "renewed"}
    assert set(AGGREGATORS) == {n for n in public(aggregators) if n[0] != "_"} - helpers
    returns = {n: getattr(algorithms, n).__annotations__.get("return") for n in public(algorithms)}
    assert set(ALGORITHMS) == {
        name for name, kind in returns.items() if kind in ("Algorithm", "BranchTrainMerge")
    } - {"federated"}  # which makes most of them
    tried = pairs()
    assert {algorithm for algorithm, *_ in tried} == set(ALGORITHMS)
    assert {aggregator for _, aggregator, _ in tried} == {None, *AGGREGATORS}


@pytest.mark.always("diloco-dp_ftrl-uneven", "scaffold-top_k-two slices")
@pytest.mark.parametrize(("algorithm", "aggregator", "setting"), pairs())
def test_an_algorithm_with_an_aggregator(algorithm, aggregator, setting):
    compiled(algorithm, aggregator, setting)


# Dtypes


@pytest.mark.always("32-2", "64-1")
@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("bits", [32, 64])
def test_reductions_of_every_dtype(bits, slices):
    """Of pairs of 64 bits the compiler has few; complex128 crashes it, also without fax."""
    short = "float32 bfloat16 float16 float8_e4m3fn int32 int16 int8 uint32 uint16 uint8 bool"
    dtypes = short.split() if bits == 32 else ["float64", "int64", "uint64"]

    @fax.program(clients=8)
    def program(rows):
        rows = fax.map(lambda own: jax.tree.map(jnp.flip, own), rows)
        return [fax.sum(rows), fax.mean(rows), fax.max(rows), fax.min(rows), fax.collect(rows)]

    with jax.enable_x64(bits == 64), jax.set_mesh(tpus.mesh(slices=slices, clients=4 * slices)):
        found = report(program, [shaped((8, 5), "clients", dtype=dtype) for dtype in dtypes])
    assert found.over("clients")


def test_between_slices_replicas_send_four_bits():
    """Each chip sends its part of a fragment in one all-gather, of an eighth of the bytes."""
    shapes = {"in": (64, 256), "norm": (64,), "out": (256, 64)}
    specs = {"in": jax.P(None, "model"), "norm": jax.P(), "out": jax.P("model")}
    aggregator = fax.aggregators.chain(fax.aggregators.e3m0())

    @fax.program(replicas=2)
    def mean(updates, here):
        state = aggregator.init(None)
        key = jax.random.key(0)
        return mean_update(aggregator, updates, here, None, state, key, specs)[:2]

    with jax.set_mesh(tpus.mesh(slices=2, replicas=2, model=4)):
        updates = {k: shaped((2, *s), "replicas", *specs[k]) for k, s in shapes.items()}
        found = report(mean, updates, shaped((2,), "replicas", dtype="bool"))
    (gather,) = [each for each in found.between_slices if each.dtype == "uint8"]
    assert (gather.operation, gather.axes, gather.count) == ("all-gather", ("replicas",), 1)
    numbers = 2 * 64 * 256 // 4
    assert numbers // 2 < gather.bytes <= numbers // 2 + 128
    others = [each for each in found.between_slices if each is not gather]
    assert sent(others) <= 8 * 128 * 4  # whether anyone takes part: a number, in a tile
