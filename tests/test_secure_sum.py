"""Secure sums against integers in NumPy: nothing is lost, and nothing is seen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import Quadratic, assert_trees_close

import fax
from fax.aggregators import chain, secure_sum, terngrad
from fax.aggregators._secure_sum import with_masks

KEY = jax.random.key(3)
QUICKLY = {"xla_backend_optimization_level": 0}  # what runs once need not be optimized


def updates(clients, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return {
        "b": rng.normal(size=(clients, 3)).astype(dtype),
        "w": rng.normal(size=(clients, 5, 4)).astype(dtype),
    }


def aggregate(aggregator, tree, weights=None, key=KEY):
    size = len(jax.tree.leaves(tree)[0])
    weights = np.ones(size) if weights is None else weights
    update, _, metrics = compiled(aggregator.aggregate, size)(tree, weights, (), key)
    return update, metrics


@functools.cache
def compiled(fn, size):
    program = fax.program(clients=size)(lambda *args: fn(*args))
    alone, inside = jax.jit(program, compiler_options=QUICKLY), jax.jit(program)

    def run(*args):
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args))
        return (inside if traced else alone)(*args)

    return run


def mask(words, neighbors=None, key=KEY):
    """What each client sends."""

    run = compiled(masks_of(neighbors), len(words))
    return np.asarray(run(words, key))


@functools.cache
def masks_of(neighbors):
    return lambda words, key: with_masks(words, key, neighbors)


def integers(clients, size=1000):
    return np.random.default_rng(0).integers(0, 2**32, (clients, size), np.uint32)


# Masks


@pytest.mark.parametrize(
    ("clients", "neighbors"), [(1, None), (2, None), (5, None), (6, None), (6, 2), (6, 4), (5, 100)]
)
def test_masks_cancel_exactly(clients, neighbors):
    words = integers(clients)
    sent = mask(words, neighbors)
    assert sent.dtype == np.uint32
    np.testing.assert_array_equal(
        sent.sum(0, dtype=np.uint32), words.sum(0, dtype=np.uint32), strict=True
    )
    if clients > 1:
        assert np.mean(sent != words) > 0.999
        # Of all clients but one, the sum tells nothing.
        assert np.mean(sent[1:].sum(0, dtype=np.uint32) != words[1:].sum(0, dtype=np.uint32)) > 0.99


@pytest.mark.parametrize("neighbors", [None, 2])
def test_what_a_client_sends_looks_uniform(neighbors):
    """Whatever it has: a chi-squared test of each byte, and of how neighbors go together."""
    size = 20_000
    words = np.zeros((5, size), np.uint32)
    sent = mask(words, neighbors)
    for row in [*sent, sent[0] - sent[1], sent[0] ^ sent[2]]:
        for byte in row.view(np.uint8).reshape(size, 4).T:
            counts = np.bincount(byte, minlength=256)
            chi2 = np.sum((counts - size / 256) ** 2) / (size / 256)
            assert abs(chi2 - 255) < 5 * np.sqrt(2 * 255)
    correlation = np.corrcoef(sent.astype(float)) - np.eye(5)
    assert np.abs(correlation[0, 2 if neighbors else 1]) < 0.5
    # The masks do not depend on what is masked, and do on the key.
    other = integers(5, size)
    np.testing.assert_array_equal(mask(other, neighbors) - sent, other)
    assert np.mean(mask(words, neighbors, jax.random.key(4)) == sent) < 1e-3


def test_who_shares_masks():
    """A client's mask is the sum of streams of its pairs, each of which another one subtracts."""
    size, zeros = 7, np.zeros((7, 50), np.uint32)

    def stream(i, offset):
        pair = jax.random.fold_in(jax.random.fold_in(KEY, i % size), offset)
        return np.asarray(jax.random.bits(pair, (50,), np.uint32))

    for neighbors, offsets in ((None, [1, 2, 3]), (4, [1, 2])):
        expected = [
            sum(stream(i, o) - stream(i - o, o) for o in offsets).astype(np.uint32)
            for i in range(size)
        ]
        np.testing.assert_array_equal(mask(zeros, neighbors), expected)


# Means


def numpy_mean(tree, weights, clip, max_weight, bits):
    """In Python's integers, which do not wrap around."""
    limit = 2 ** (bits - 1) - 1
    v = [round(limit * min(max(w / max_weight, 0), 1)) for w in weights]
    mean = {}
    for name, x in tree.items():
        x = np.clip(x, -clip, clip) / clip
        total = sum(np.round(u * n).astype(object) for u, n in zip(x, v))
        mean[name] = clip * (total / max(1, sum(v))).astype(float)
    return mean


@pytest.mark.parametrize(
    ("clients", "bits", "weights"),
    [(4, 16, [3, 1, 7, 2]), (5, 8, [0.5, 3.0, -1.0, 9.5, 8.0]), (2, 31, [8, 8]), (3, 2, [8, 5, 1])],
)
def test_nearest_sums_are_exact(clients, bits, weights):
    tree = updates(clients)
    aggregator = secure_sum(1.5, 8, bits=bits, rounding="nearest")
    update, metrics = aggregate(aggregator, tree, np.array(weights))
    assert_trees_close(update, numpy_mean(tree, weights, 1.5, 8, bits), rtol=1e-13)
    assert list(metrics["clients/bits"]) == [32 * (3 + 20 + 2)] * clients
    outside = [
        np.mean(np.concatenate([abs(tree[k][i]).ravel() > 1.5 for k in tree]))
        for i in range(clients)
    ]
    np.testing.assert_allclose(metrics["clipped_values"], np.mean(outside), rtol=1e-6)


def test_the_error_is_that_of_the_resolution():
    tree, weights = updates(4), np.array([3, 1, 7, 2])
    expected = jax.tree.map(lambda x: np.average(x, 0, weights), tree)
    update, _ = aggregate(secure_sum(4.0, 8, bits=24), tree, weights)
    # Four numbers, each up to one step c / L off, of a total weight of 13/8; and the weights.
    assert_trees_close(update, expected, atol=4 * 2 * 4 / 2**23 / (13 / 8), rtol=0)


def test_stochastic_rounding_is_right_on_average():
    x, draws, bits, clip = np.random.default_rng(0).normal(size=9), 10_000, 5, 3.0
    aggregator = secure_sum(clip, 1, bits=bits, neighbors=2)
    found, _ = aggregate(aggregator, np.broadcast_to(x, (draws, 9)))
    step = clip / (2 ** (bits - 1) - 1)
    share = x / step - np.floor(x / step)
    error = step * np.sqrt(share * (1 - share) / draws)
    assert np.all(np.abs(found - x) <= 4.5 * error + 1e-12)


def test_extremes_do_not_wrap_around():
    for clients, bits in ((2, 31), (8, 29)):
        aggregator = secure_sum(2.0, 1, bits=bits)
        for value in (1e9, -1e9, np.inf):
            tree = np.full((clients, 3), value, np.float32)
            update, metrics = aggregate(aggregator, tree)
            np.testing.assert_allclose(update, np.full(3, np.sign(value) * 2), rtol=1e-6)
            assert metrics["clipped_values"] == 1


def test_equal_updates_have_themselves_for_mean():
    """The weights that are sent are those that updates are multiplied by."""
    tree = np.full((5, 3), 0.75)
    update, _ = aggregate(
        secure_sum(1.0, 7, bits=24, rounding="nearest"), tree, np.array([1, 2, 3, 4, 5.5])
    )
    np.testing.assert_allclose(update, tree[0], rtol=1e-6)


def test_nothing_is_silently_wrong():
    tree, aggregator = updates(4), secure_sum(1.0, 1)
    tree["w"][2, 1, 1] = np.nan
    update, _ = aggregate(aggregator, tree)
    assert all(np.all(np.isnan(x)) for x in jax.tree.leaves(update))
    update, _ = aggregate(aggregator, updates(4), np.array([1, np.nan, 1, 1]))
    assert all(np.all(np.isnan(x)) for x in jax.tree.leaves(update))
    update, _ = aggregate(aggregator, updates(4), np.zeros(4))
    assert_trees_close(update, {"b": np.zeros(3), "w": np.zeros((5, 4))})
    zeros = jax.tree.map(np.zeros_like, updates(4))
    assert_trees_close(aggregate(aggregator, zeros)[0], jax.tree.map(lambda x: x[0], zeros))


def test_without_64_bits_sums_are_the_same():
    tree, weights = updates(4, dtype=np.float32), np.array([3, 1, 7, 2], np.int32)
    aggregator = secure_sum(1.5, 8, rounding="nearest")
    expected, _ = aggregate(aggregator, tree, weights)
    with jax.enable_x64(False):
        found = jax.jit(fax.program(clients=4)(aggregator.aggregate))(tree, weights, (), KEY)[0]
    assert_trees_close(found, expected, rtol=1e-6)


def test_dtypes_are_kept():
    tree = {**updates(3), "h": jnp.ones((3, 2), jnp.bfloat16), "s": np.ones(3, np.float32)}
    update, _ = aggregate(secure_sum(2.0, 1, bits=24), tree)
    assert {k: x.dtype for k, x in update.items()} == {k: x.dtype for k, x in tree.items()}
    np.testing.assert_allclose(update["h"].astype(float), np.ones(2), rtol=0.01)
    np.testing.assert_allclose(update["s"], 1, rtol=1e-6)


SOME = ["vectorized", "a mesh of 2"], ["jitted", "a mesh of 1", "a mesh of 4 x 2"]


@pytest.mark.always("4-settings0")
@pytest.mark.parametrize(("clients", "settings"), [(4, SOME[0]), (5, SOME[1])])
def test_results_do_not_depend_on_devices_or_on_how_clients_are_grouped(clients, settings):
    aggregator, tree, weights = secure_sum(2.0, 5), updates(clients), np.arange(1.0, clients + 1)

    def run(setting):
        context, at_once = problems.setting(setting)

        @functools.partial(jax.jit, compiler_options=QUICKLY)
        @fax.program(clients=clients)
        def round(tree, weights, key):
            made = fax.map(lambda x: jax.tree.map(jnp.sin, x), tree, vectorize=at_once)
            return aggregator.aggregate(made, weights, (), key)

        with context:
            return jax.tree.map(np.asarray, round(tree, weights, KEY))

    expected, *others = map(run, settings)
    for found in others:
        assert_trees_close(found, expected)


# In rounds


def temporary(aggregator, clients, size=100):
    data = fax.data.InMemory({str(i): {"x": np.ones((8, size))} for i in range(clients)})
    cohort = next(fax.data.cohorts(data, clients, 4))
    algorithm = fax.algorithms.fedavg(
        lambda w, b, k: jnp.sum(jnp.tanh(b["x"] @ w) ** 2, 1), optax.sgd(0.1), aggregator=aggregator
    )
    state = algorithm.init(np.ones((size, size)))
    compiled = jax.jit(algorithm.round).lower(state, cohort).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (8 * size**2)


@pytest.mark.long
def test_memory_does_not_grow_with_the_cohort():
    aggregator = secure_sum(1.0, 8)
    assert temporary(aggregator, 32) < temporary(aggregator, 4) + 0.5


@pytest.mark.long
def test_federated_averaging_learns():
    losses = []
    for aggregator in (None, chain(terngrad(None), secure_sum(4.0, 12))):
        algorithm = fax.algorithms.fedavg(Quadratic.loss, optax.sgd(0.02), aggregator=aggregator)
        cohorts = fax.data.cohorts(problems.data(), 4, 8)
        state = algorithm.init(Quadratic.start())
        state, metrics = fax.algorithms.many_rounds(algorithm, state, cohorts, 60)
        losses.append(metrics["loss"][-20:].mean())
    assert losses[1] < 1.3 * losses[0]
    assert metrics["clients/bits"][0, 0] == 32 * 6  # what the sum sends, not what TernGrad would


def test_derivatives_are_zero():
    def value(x):
        return jnp.sum(aggregate(secure_sum(2.0, 1), x)[0])

    np.testing.assert_array_equal(jax.grad(value)(np.ones((3, 2))), np.zeros((3, 2)))


# Mistakes


def test_too_many_clients():
    tree = np.zeros((5, 2))
    with pytest.raises(
        ValueError, match=r"bits is 30 in a round of 5 clients, .* expected at most 29"
    ):
        aggregate(secure_sum(1.0, 1, bits=30), tree)
    jax.eval_shape(functools.partial(aggregate, secure_sum(1.0, 1, bits=29)), tree)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: secure_sum(0, 1), "max_value is 0, expected a number above 0"),
        (lambda: secure_sum(1, -2), "max_weight is -2, expected a number above 0"),
        (lambda: secure_sum(1, 1, bits=32), "bits is 32, expected an int from 2 to 31"),
        (lambda: secure_sum(1, 1, rounding="up"), "rounding is 'up', expected 'stochastic' or"),
        (lambda: secure_sum(1, 1, neighbors=3), "neighbors is 3, expected an even int"),
        (lambda: secure_sum(1, 1, neighbors=0), "neighbors is 0, expected an int of at least 2"),
        (lambda: secure_sum(1, 1, masked=0), "masked is 0, expected"),
        (
            lambda: secure_sum(1, 1).init({"n": np.ones(2, int)}),
            r"updates\['n'\] is int64\[2\], expected an array of real floats",
        ),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_settings_at_the_ends_of_their_ranges():
    for bits in (2, 31):
        assert secure_sum(1, 1, bits=bits).init({"x": np.ones(2)}) == ()
