"""Aggregators that compress: papers in NumPy with the same random numbers, expectations, bounds."""

import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.test_util import check_grads
from problems import Quadratic, assert_trees_close

import fax
from fax.aggregators import (
    chain,
    drive,
    e3m0,
    e4m3,
    error_feedback,
    hadamard,
    int8,
    mean,
    power_sgd,
    terngrad,
    top_k,
)
from fax.aggregators import uniform_quantization as quantization

KEY = jax.random.key(7)
QUICKLY = {"xla_backend_optimization_level": 0}  # what runs once need not be optimized
N = 4


def updates(seed=0, clients=N, dtype=np.float64):
    rng = np.random.default_rng(seed)
    tree = {"b": (3,), "s": (), "w": (5, 4)}
    return {name: rng.normal(size=(clients, *s)).astype(dtype) for name, s in tree.items()}


def rows(tree):
    """Something of each client's type, for `init`."""
    return jax.tree.map(lambda x: x[0], tree)


def send(part, tree, state=None, key=KEY):
    """Updates, state and metrics after a transformation."""
    size = len(jax.tree.leaves(tree)[0])
    state = part.init(rows(tree)) if state is None else state
    sent, _, state, metrics = compiled(part.update, size)(tree, np.ones(size), state, key)
    return sent, state, metrics


def aggregate(aggregator, tree, weights=None, state=None, key=KEY):
    """An update of all, state and metrics."""
    size = len(jax.tree.leaves(tree)[0])
    weights = np.ones(size) if weights is None else weights
    state = aggregator.init(rows(tree)) if state is None else state
    return compiled(aggregator.aggregate, size)(tree, weights, state, key)


@functools.cache
def compiled(fn, size):
    program = fax.program(clients=size)(lambda *args: fn(*args))
    alone, inside = jax.jit(program, compiler_options=QUICKLY), jax.jit(program)

    def run(*args):
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args))
        return (inside if traced else alone)(*args)

    return run


def random_of(client, sizes):
    """The random numbers that a client has for its leaves."""
    u = jax.random.uniform(jax.random.fold_in(KEY, client), (sum(sizes),), np.float32)
    return np.split(np.asarray(u), np.cumsum(sizes)[:-1])


def walsh(size):
    """Walsh and Hadamard's matrix, entry by entry."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return np.array(signs) / np.sqrt(size)


# The papers, in NumPy, on one leaf


def numpy_quantization(x, u, levels):
    borders = x.min() + np.arange(levels) * (x.max() - x.min()) / (levels - 1)
    r = np.clip(np.searchsorted(borders, x, side="right") - 1, 0, levels - 2)
    width = borders[r + 1] - borders[r]
    return np.where(u * width < x - borders[r], borders[r + 1], borders[r])


def numpy_terngrad(x, u, clip):
    bound = clip * np.sqrt(np.mean(x**2))
    g = np.where(np.abs(x) > bound, np.sign(x) * bound, x)
    s = np.abs(g).max()
    return s * np.sign(g) * (u < np.abs(g) / s)


def numpy_drive(x, u):
    size, signs = len(u), np.where(u < 0.5, 1, -1)
    y = walsh(size) @ (signs * np.pad(x, (0, size - len(x))))
    scale = np.sum(x**2) / np.abs(y).sum()
    return (signs * (walsh(size).T @ (scale * np.sign(y))))[: len(x)]


STRICT = terngrad(0.7)


@pytest.mark.parametrize(
    ("part", "reference"),
    [
        (quantization(5), functools.partial(numpy_quantization, levels=5)),
        (quantization(2), functools.partial(numpy_quantization, levels=2)),
        (terngrad(), functools.partial(numpy_terngrad, clip=2.5)),
        (STRICT, functools.partial(numpy_terngrad, clip=0.7)),
        (drive(), numpy_drive),
    ],
)
def test_encodings_are_those_of_the_papers(part, reference):
    tree = updates()
    found, _, _ = send(part, tree)
    for client in range(N):
        sizes = [4, 1, 32] if reference is numpy_drive else [3, 1, 20]
        for (name, x), u in zip(tree.items(), random_of(client, sizes)):
            if name == "s" and part is not STRICT:  # a single number is kept
                np.testing.assert_allclose(found[name][client], x[client], rtol=1e-12)
                continue
            expected = reference(x[client].ravel(), u).reshape(x[client].shape)
            np.testing.assert_allclose(found[name][client], expected, rtol=1e-10, atol=1e-12)


DRAWS = 10_000


def draws(part, x):
    """What the server decodes, in many draws for the same update."""
    return np.asarray(send(part, np.broadcast_to(x, (DRAWS, len(x))))[0])


X = np.random.default_rng(3).normal(size=12)


def test_quantization_is_unbiased_with_the_variance_of_rounding():
    found = draws(quantization(4), X)
    borders = np.linspace(X.min(), X.max(), 4)
    r = np.clip(np.searchsorted(borders, X, side="right") - 1, 0, 2)
    variance = (X - borders[r]) * (borders[r + 1] - X)
    assert np.all(np.abs(found.mean(0) - X) <= 4.5 * np.sqrt(variance / DRAWS) + 1e-12)
    np.testing.assert_allclose(found.var(0), variance, rtol=0.1, atol=1e-12)


def test_terngrad_is_an_unbiased_estimate_of_the_clipped_gradient():
    clipped = np.clip(X, -1.2 * np.sqrt(np.mean(X**2)), 1.2 * np.sqrt(np.mean(X**2)))
    assert np.any(clipped != X)
    variance = np.abs(clipped).max() * np.abs(clipped) - clipped**2
    found = draws(terngrad(1.2), X)
    assert np.all(np.abs(found.mean(0) - clipped) <= 4.5 * np.sqrt(variance / DRAWS) + 1e-12)
    found = draws(terngrad(None), X)
    variance = np.abs(X).max() * np.abs(X) - X**2
    assert np.all(np.abs(found.mean(0) - X) <= 4.5 * np.sqrt(variance / DRAWS) + 1e-12)


def test_a_rotated_quantization_is_unbiased_for_each_rotation():
    found = draws(hadamard(quantization(4)), X)
    error = np.sum((found - X) ** 2, 1)
    # Coordinates are uncorrelated: the mean's error has the draws' one, divided by their number.
    assert np.sum((found.mean(0) - X) ** 2) < 3 * error.mean() / DRAWS


@pytest.mark.long
def test_error_of_drive_is_that_of_the_paper():
    x = np.random.default_rng(0).normal(size=512)
    found = draws(drive(), x)[:4000]
    error = np.sum((found - x) ** 2, 1) / np.sum(x**2)
    np.testing.assert_allclose(error.mean(), math.pi / 2 - 1, atol=0.01)
    # Rotations of the clients' own: what is left of the error is as small as their number is large.
    bias = np.sum((found.mean(0) - x) ** 2) / np.sum(x**2)
    assert bias < 2 * error.mean() / len(found)


@pytest.mark.always("2")
@pytest.mark.parametrize("levels", [2, 3, 16])
def test_errors_keep_the_bounds_of_the_paper(levels):
    """Theorems 2 and 3 of arXiv:1611.00429, for one client, and what rotation is for."""
    rng = np.random.default_rng(0)
    spike = np.zeros(256)
    spike[[3, 200]] = 5.0, -4.0
    parts = [quantization(levels), hadamard(quantization(levels))]
    for x in (spike, rng.normal(size=256), rng.normal(size=256) ** 5):
        squares = np.sum(x**2)
        batch = np.broadcast_to(x, (200, 256))
        plain, rotated = (
            np.mean(np.sum((np.asarray(send(part, batch)[0]) - x) ** 2, 1)) for part in parts
        )
        assert plain <= 256 * squares / (2 * (levels - 1) ** 2)
        assert rotated <= (2 * math.log(256) + 2) * squares / (levels - 1) ** 2
    assert rotated < plain / 3


# Rotations


def look(seen):
    """A transformation that changes nothing, and lets a test see what it gets."""

    def update(tree, weights, state, key):
        seen.append(jax.tree.map(jnp.shape, tree))
        return tree, weights, state, {"inner": tree}

    return fax.aggregators.Transformation(lambda params: jax.tree.map(jnp.shape, params), update)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 130, 5000])
def test_a_rotation_is_orthonormal_and_undone(size):
    x, seen = np.random.default_rng(0).normal(size=(2, size)), []
    found, _, metrics = send(hadamard(look(seen)), x, state=())
    np.testing.assert_allclose(found, x, rtol=1e-10, atol=1e-12)
    rotated = np.asarray(metrics["inner"])
    length = 2 ** math.ceil(math.log2(size))
    assert rotated.shape == (2, length)
    np.testing.assert_allclose(np.sum(rotated**2, 1), np.sum(x**2, 1), rtol=1e-10)
    if size <= 130:
        signs = (rotated @ walsh(length))[:, :size] / x
        np.testing.assert_allclose(np.abs(signs), 1, rtol=1e-8)
        np.testing.assert_allclose(signs[0], signs[1], rtol=1e-8)


# Sparsification


def numpy_top_k(tree, k):
    flat = np.concatenate([x.ravel() for x in tree.values()])
    chosen = np.zeros(len(flat), bool)
    chosen[np.argsort(-np.abs(flat), kind="stable")[:k]] = True
    parts = np.split(np.where(chosen, flat, 0), np.cumsum([x.size for x in tree.values()])[:-1])
    return {name: part.reshape(x.shape) for (name, x), part in zip(tree.items(), parts)}


def with_rows(ids, x, new):
    x = x.copy()
    x[ids] = new
    return x


def test_what_is_not_sent_is_remembered():
    """Algorithm 1 of arXiv:1809.07599, of cohorts that are a part of the population."""
    part, population = error_feedback(top_k(5), num_clients=6), 6
    memory = jax.tree.map(lambda x: np.zeros((population, *x.shape[1:])), updates())
    state = part.init(rows(updates()))
    state = jax.device_get(state)
    assert_trees_close(state.memory.rows, memory)
    sent_so_far = jax.tree.map(np.zeros_like, memory)
    made_so_far = jax.tree.map(np.zeros_like, memory)
    for round in range(5):
        ids = np.random.default_rng(round).choice(population, N, replace=False)
        tree = updates(round)
        found, own, _ = jax.device_get(
            send(part, tree, jax.tree.map(operator.itemgetter(ids), state))
        )
        state = jax.tree.map(functools.partial(with_rows, ids), state, own)
        for i, client in enumerate(ids):
            wanted = {name: tree[name][i] + memory[name][client] for name in tree}
            expected = numpy_top_k(wanted, 5)
            for name in tree:
                np.testing.assert_allclose(found[name][i], expected[name], rtol=1e-12)
                memory[name][client] = wanted[name] - expected[name]
                sent_so_far[name][client] += found[name][i]
                made_so_far[name][client] += tree[name][i]
    assert_trees_close(state.memory.rows, memory)
    assert_trees_close(
        jax.tree.map(lambda sent, left: sent + left, sent_so_far, state.memory.rows), made_so_far
    )


def test_top_k_without_memory_and_the_fractions():
    tree, settings = updates(), ((3, 3), (0.25, 6), (1e-9, 1), (1.0, 24))

    def every(tree, weights, key):
        return [top_k(k).update(tree, weights, (), key) for k, _ in settings]

    results = jax.device_get(compiled(every, N)(tree, np.ones(N), KEY))
    for (found, _, state, metrics), (_, count) in zip(results, settings, strict=True):
        assert state == ()
        for client in range(N):
            expected = numpy_top_k({name: x[client] for name, x in tree.items()}, count)
            assert_trees_close(jax.tree.map(operator.itemgetter(client), found), expected)
        # 64 bits and a position among 24, unless all 24 numbers are shorter.
        assert list(metrics["clients/bits"]) == [min(count * (64 + 5), 24 * 64)] * N
    ties = send(top_k(2), np.ones((1, 4)))[0]
    np.testing.assert_array_equal(ties, [[1, 1, 0, 0]])


def test_error_feedback_in_half_precision_loses_nothing():
    tree = updates(dtype=np.float16)
    part = error_feedback(top_k(4), num_clients=N)
    state = part.init(rows(tree))
    for _ in range(3):
        before = state.memory.rows
        found, state, _ = send(part, tree, state)
        assert found["w"].dtype == np.float16
        assert state.memory.rows["w"].dtype == np.float32
        for name in tree:
            total = np.asarray(before[name], np.float64) + np.asarray(tree[name], np.float64)
            np.testing.assert_allclose(
                np.asarray(found[name], np.float64)
                + np.asarray(state.memory.rows[name], np.float64),
                total,
                rtol=1e-6,
                atol=1e-7,
            )


# PowerSGD


def numpy_power_sgd(matrices, weights, q):
    """Algorithm 1 of arXiv:1905.13727, and line 7 of algorithm 2."""
    weights = weights / weights.sum()
    p = np.linalg.qr(sum(w * (m @ q) for w, m in zip(weights, matrices)))[0]
    factors = [m.T @ p for m in matrices]
    q = sum(w * f for w, f in zip(weights, factors))
    return p @ q.T, q, np.array([m - p @ f.T for m, f in zip(matrices, factors)])


def test_power_sgd_is_that_of_the_paper():
    aggregator, weights = power_sgd(2, num_clients=N), np.array([1.0, 3.0, 0.0, 2.0])
    rng = np.random.default_rng(0)
    shapes = {"bias": (4,), "conv": (3, 3, 2, 5), "small": (3, 3), "w": (8, 6)}
    state = aggregator.init({name: np.zeros(shape) for name, shape in shapes.items()})
    assert [q.shape for q in state.q] == [(5, 2), (6, 2)]
    q = dict(zip(["conv", "w"], map(np.asarray, state.q)))
    memory = {"conv": np.zeros((N, 18, 5)), "w": np.zeros((N, 8, 6))}
    for _ in range(4):
        tree = {name: rng.normal(size=(N, *shape)) for name, shape in shapes.items()}
        found, state, metrics = aggregate(aggregator, tree, weights, state)
        for number, name in enumerate(q):
            matrices = tree[name].reshape(memory[name].shape) + memory[name]
            expected, q[name], left = numpy_power_sgd(matrices, weights, q[name])
            memory[name] = np.where(weights[:, None, None] != 0, left, memory[name])
            np.testing.assert_allclose(found[name], expected.reshape(shapes[name]), rtol=1e-9)
            left = state.memory.rows[number]
            np.testing.assert_allclose(left, memory[name].reshape(left.shape), atol=1e-12)
        for name in ("bias", "small"):  # 2 (3 + 3) numbers are not fewer than 9
            np.testing.assert_allclose(found[name], np.average(tree[name], 0, weights), rtol=1e-12)
        # What was sent and what is left are all updates: here, on average.
        expected = [64 * (2 * (18 + 5) + 2 * (8 + 6) + 4 + 9)] * N
        assert list(metrics["clients/bits"]) == expected


def test_power_sgd_sends_everything_in_the_end():
    aggregator, weights = power_sgd(1, num_clients=N), np.array([1.0, 2.0, 3.0, 4.0])
    state, sent, made = aggregator.init(np.zeros((6, 5))), 0, 0
    for round in range(5):
        tree = np.random.default_rng(round).normal(size=(N, 6, 5))
        update, state, _ = aggregate(aggregator, tree, weights, state)
        sent, made = sent + np.asarray(update), made + np.average(tree, 0, weights)
    left = np.average(state.memory.rows[0], 0, weights)
    np.testing.assert_allclose(sent + left, made, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_clients", [None, N])
def test_power_sgd_is_exact_for_matrices_of_low_rank(num_clients):
    rng = np.random.default_rng(0)
    tree = np.stack([rng.normal(size=(9, 2)) @ np.ones((2, 7)) * i for i in range(N)])
    tree += np.einsum("i,j,k->kij", rng.normal(size=9), rng.normal(size=7), rng.normal(size=N))
    aggregator = power_sgd(2, num_clients)
    rank = np.linalg.matrix_rank(tree.mean(0))
    assert rank == 2
    found, state, _ = aggregate(aggregator, tree)
    np.testing.assert_allclose(found, tree.mean(0), rtol=1e-9, atol=1e-12)
    assert (state.memory is None) == (num_clients is None)


def test_power_sgd_recovers_from_a_round_of_zeros():
    aggregator = power_sgd(1)
    update, state, _ = aggregate(aggregator, np.zeros((N, 6, 5)))
    np.testing.assert_array_equal(update, np.zeros((6, 5)))
    tree = np.broadcast_to(np.outer(np.arange(6.0), np.ones(5)), (N, 6, 5))
    for _ in range(2):
        update, state, _ = aggregate(aggregator, tree, state=state)
        np.testing.assert_allclose(update, tree[0], rtol=1e-9, atol=1e-12)


# What is sent


def test_bits_of_cases_worked_by_hand():
    cases = [
        # Leaves of 3, 1 and 20 float32; 2 scales for each quantized leaf.
        (quantization(2), 24 * 1 + 3 * 64),
        (quantization(5), 24 * 3 + 3 * 64),
        (quantization(16), 24 * 4 + 3 * 64),
        (hadamard(quantization(16)), (4 + 1 + 32) * 4 + 3 * 64),
        (drive(), 4 + 1 + 32 + 3 * 32),
        (terngrad(), 24 * 2 + 3 * 32),
        (top_k(3), 3 * (32 + 5)),
        (top_k(1.0), 24 * 32),
    ]

    def every(tree, weights, key):
        return [part.update(tree, weights, (), key)[3]["clients/bits"] for part, _ in cases]

    found = compiled(every, N)(updates(dtype=np.float32), np.ones(N), KEY)
    for bits, (_, expected) in zip(found, cases):
        assert bits.dtype == np.float32
        assert list(bits) == [expected] * N


def test_bits_are_those_of_the_last_that_changes_what_is_sent():
    tree = updates(dtype=np.float32)
    low_rank = power_sgd(1)
    aggregators = [chain(terngrad(), last) for last in (mean(), low_rank, chain(low_rank))]

    def every(tree, weights, states, key):
        parts = zip(aggregators, states)
        return [part.aggregate(tree, weights, own, key)[2]["clients/bits"] for part, own in parts]

    states = [part.init(rows(tree)) for part in aggregators]
    found = compiled(every, N)(tree, np.ones(N), states, KEY)
    ternary, factors = 24 * 2 + 3 * 32, 32 * (5 + 4 + 4)
    for bits, expected in zip(found, (ternary, factors, factors), strict=True):
        assert list(bits) == [expected] * N


def test_bits_of_an_arithmetic_code():
    # Levels 0, 1 and 2 hold 4, 2 and 2 numbers: 4 log2(2) + 4 log2(4) = 12 bits and 2; the
    # histogram 3 log2(11 e / 3) = 9.95; and two float32.
    x = np.array([[0, 0, 0, 0, 1, 1, 2, 2]], np.float32)
    _, _, metrics = send(quantization(3, entropy_coded=True), x)
    assert metrics["clients/bits"][0] == math.ceil(12 + 2 + 9.95) + 64
    # Peaked updates take less than one bit each, where a fixed code would take four.
    x = np.zeros((1, 4096), np.float32)
    x[0, 0] = 1
    assert send(quantization(16, entropy_coded=True), x)[2]["clients/bits"][0] < 400


# Whatever there is


EVERY = {
    "quantization": lambda: chain(quantization(4)),
    "entropy": lambda: chain(quantization(4, entropy_coded=True)),
    "hadamard": lambda: chain(hadamard(quantization(4))),
    "drive": lambda: chain(drive()),
    "terngrad": lambda: chain(terngrad()),
    "top_k": lambda: chain(top_k(3)),
    "memory": lambda: chain(error_feedback(top_k(3), num_clients=N)),
    "both": lambda: chain(error_feedback(top_k(5), num_clients=N), quantization(4)),
    "power_sgd": lambda: power_sgd(1, num_clients=N),
}


@pytest.mark.always("hadamard", "memory", "power_sgd")
@pytest.mark.parametrize("name", EVERY)
def test_zeros_stay_zeros_and_nothing_is_nan(name):
    tree = {"e": np.zeros((N, 0)), "h": np.zeros((N, 6), jnp.bfloat16), **updates()}
    zeros = jax.tree.map(np.zeros_like, tree)
    aggregator = EVERY[name]()
    update, state, metrics = aggregate(aggregator, zeros)
    assert_trees_close(update, rows(zeros), atol=0)
    assert [x.dtype for x in update.values()] == [x.dtype for x in rows(zeros).values()]
    assert np.all(np.isfinite(metrics["clients/bits"]))
    # Constant leaves, and those of one number, are kept by what scales them.
    constant = jax.tree.map(lambda x: np.full_like(x, 3), tree)
    update, state, _ = aggregate(aggregator, constant)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((update, state)))
    if name in ("quantization", "entropy", "terngrad", "power_sgd"):
        assert_trees_close(update, rows(constant), rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("quantization", jnp.bfloat16),
        ("drive", jnp.float16),
        ("top_k", jnp.bfloat16),
    ],
)
def test_dtypes_are_kept(name, dtype):
    tree, aggregator = jax.tree.map(lambda x: x.astype(dtype), updates()), EVERY[name]()
    update, _, _ = jax.device_get(aggregate(aggregator, tree))
    wide = jax.tree.map(lambda x: x.astype(np.float32), tree)
    wide, _, _ = jax.device_get(aggregate(aggregator, wide))
    for a, b in zip(jax.tree.leaves(update), jax.tree.leaves(wide)):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.astype(np.float32), b, rtol=0.03, atol=0.03)


def test_models_in_half_precision_keep_their_dtypes():
    """Some encodings return float32, so that whatever follows adds up in that precision."""
    data = fax.data.InMemory({"a": {"x": np.array([[0.5, 3.0]])}})
    cohort = next(fax.data.cohorts(data, 1, 1))
    for part in (e3m0(), e4m3(), int8(), top_k(2, values=e3m0())):
        algorithm = fax.algorithms.fedavg(
            lambda p, batch, key: jnp.sum(batch["x"].astype(p.dtype) * p, axis=-1),
            optax.sgd(1.0),
            aggregator=part,
        )
        state = algorithm.init(jnp.ones(2, jnp.bfloat16))
        after, _ = jax.eval_shape(algorithm.round, state, cohort)
        assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
    after, _ = algorithm.round(state, cohort)
    np.testing.assert_array_equal(after.params, np.array([0.625, -2.0], jnp.bfloat16))


SETTINGS_OF = [  # all pairs would take too long
    *(("quantization", setting) for setting in ("vectorized", "a mesh of 2")),
    *(("both", setting) for setting in ("a mesh of 1", "a mesh of 4 x 2")),
    ("hadamard", "a mesh of 2"),
    ("drive", "a mesh of 4 x 2"),
    ("terngrad", "a mesh of 2"),
    *(("power_sgd", setting) for setting in ("vectorized", "a mesh of 2")),
]


@pytest.mark.always("both-a mesh of 4 x 2")
@pytest.mark.parametrize(("name", "setting"), SETTINGS_OF)
def test_results_do_not_depend_on_devices_or_on_how_clients_are_grouped(name, setting):
    aggregator, tree, weights = EVERY[name](), updates(), np.array([1.0, 2.0, 3.0, 1.0])

    def run(setting):
        context, at_once = problems.setting(setting)

        @functools.partial(jax.jit, compiler_options=QUICKLY)
        @fax.program(clients=N)
        def round(tree, weights, state, key):
            made = fax.map(lambda x: jax.tree.map(jnp.sin, x), tree, vectorize=at_once)
            return aggregator.aggregate(made, weights, state, key)

        with context:
            return jax.tree.map(np.asarray, round(tree, weights, aggregator.init(rows(tree)), KEY))

    assert_trees_close(run(setting), run("jitted"))


@pytest.mark.always("quantization", "terngrad")
@pytest.mark.parametrize("name", ["quantization", "hadamard", "drive", "terngrad"])
def test_derivatives_are_those_of_the_expectation(name):
    aggregator = EVERY[name]() if name != "terngrad" else chain(terngrad(None))
    weights, w = np.array([1.0, 2.0, 0.0, 1.0]), updates(5, 1)

    def value(tree, aggregator):
        update, _, _ = aggregate(aggregator, tree, weights)
        return sum(jnp.vdot(a, b[0]) for a, b in zip(jax.tree.leaves(update), w.values()))

    slope = jax.jit(jax.grad(value), static_argnums=1)
    found = slope(updates(), aggregator)
    assert_trees_close(found, slope(updates(), mean()))
    zeros = jax.tree.map(np.zeros_like, updates())
    assert_trees_close(slope(zeros, aggregator), found)


def test_derivatives_pass_through_what_is_sent():
    tree = np.array([[3.0, 1.0, -4.0], [0.5, 2.0, 0.1]])
    slope = jax.jit(jax.grad(lambda x: jnp.sum(aggregate(chain(top_k(2)), x)[0])))(tree)
    np.testing.assert_allclose(slope, [[0.5, 0, 0.5], [0.5, 0.5, 0]])
    check_grads(
        jax.jit(lambda x: aggregate(power_sgd(1), x)[0]),
        (np.random.default_rng(0).normal(size=(2, 4, 3)),),
        order=1,
        modes=("fwd", "rev"),
        rtol=1e-5,
    )


@pytest.mark.long
def test_hyperparameters_can_be_swept():
    tree = updates()
    found = jax.vmap(lambda clip: aggregate(chain(terngrad(clip)), tree)[0])(jnp.array([0.5, 2.0]))
    for i, clip in enumerate([0.5, 2.0]):
        one = aggregate(chain(terngrad(clip)), tree)[0]
        assert_trees_close(jax.tree.map(operator.itemgetter(i), found), one)


# In rounds


@functools.cache
def trained(name, rounds=60):
    data = problems.data()
    aggregator = {
        "mean": lambda: None,
        "memory": lambda: chain(error_feedback(top_k(1), num_clients=len(data))),
        "power_sgd": lambda: power_sgd(1, num_clients=len(data)),
        "both": lambda: chain(
            hadamard(error_feedback(top_k(3), num_clients=len(data))), quantization(16)
        ),
        "quantization": lambda: chain(quantization(32)),
    }.get(name, EVERY.get(name))()
    algorithm = fax.algorithms.fedavg(Quadratic.loss, optax.sgd(0.02), aggregator=aggregator)
    state = algorithm.init(Quadratic.start())
    cohorts = fax.data.cohorts(data, 4, 8)
    state, metrics = fax.algorithms.many_rounds(algorithm, state, cohorts, rounds)
    return float(metrics["loss"][-20:].mean()), float(metrics["loss"][0])


@pytest.mark.long
@pytest.mark.parametrize("name", ["quantization", "drive", "memory", "power_sgd", "both"])
def test_federated_averaging_learns(name):
    best, start = trained("mean")
    loss, first = trained(name)
    assert first == start
    assert loss < best + 0.2 * (start - best)


# Encoded or not, clients are summed by the same loops, whose memory the tests of FedAvg look at.
@pytest.mark.long
@pytest.mark.parametrize(
    ("part", "at_once", "gradient"),
    [
        (quantization(4), 2, False),
        (terngrad(), None, True),
    ],
    ids=["a round", "a gradient"],
)
def test_memory_does_not_grow_with_the_cohort(part, at_once, gradient):
    size = 100

    def temporary(clients):
        data = fax.data.InMemory({str(i): {"x": np.ones((8, size))} for i in range(clients)})
        cohort = next(fax.data.cohorts(data, clients, 4))
        algorithm = fax.algorithms.fedavg(
            lambda w, b, k: jnp.sum(jnp.tanh(b["x"] @ w) ** 2, 1),
            optax.sgd(0.1),
            aggregator=chain(part),
            vectorize=at_once,
        )
        state = algorithm.init(np.ones((size, size)))

        def loss(state, cohort):
            state, metrics = algorithm.round(state, cohort)
            return jnp.sum(algorithm.params(state) ** 2) + metrics["loss"]

        fn = jax.grad(loss, allow_int=True) if gradient else algorithm.round
        compiled = jax.jit(fn).lower(state, cohort).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (8 * size**2)

    few, many = temporary(4), temporary(32)
    assert many < few + 0.5


# Mistakes


@pytest.mark.parametrize("name", EVERY)
def test_leaves_that_are_no_floats(name):
    tree = {**updates(), "n": np.ones((N, 2), np.int32)}
    message = r"updates\['n'\] is int32\[(4,)?2\], expected an array of real floats"
    with pytest.raises(ValueError, match=message):
        EVERY[name]().init(rows(tree))
    aggregator = EVERY[name]()
    state = aggregator.init(rows(updates()))
    with pytest.raises(ValueError, match=message):
        aggregate(aggregator, tree, state=state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quantization(1), "levels is 1, expected an int from 2 to 65536"),
        (lambda: quantization(2.0), "levels is 2.0, expected an int"),
        (lambda: terngrad(0), "clip is 0, expected a number above 0"),
        (lambda: top_k(0), "k is 0, expected an int of at least 1"),
        (lambda: top_k(1.5), "k is 1.5, expected an int of at least 1, or a fraction"),
        (lambda: top_k(True), "k is True, expected an int"),
        (lambda: top_k(3, per=2), "k is 3, expected at most per=2"),
        (lambda: top_k(3, per="layer"), "per is 'layer', expected 'update', 'leaf', or an int"),
        (lambda: top_k(3, per=0), "per is 0, expected .* an int of at least 1"),
        (lambda: error_feedback(top_k(3), num_clients=0), "num_clients is 0, expected an int of"),
        (
            lambda: error_feedback(top_k(3), num_clients=2, decay=1.5),
            "error_feedback: decay is 1.5, expected a number from 0 to 1",
        ),
        (lambda: top_k(9).init(np.zeros(4)), "k is 9, but an update has 4 coordinates"),
        (lambda: power_sgd(0), "rank is 0, expected an int of at least 1"),
        (lambda: power_sgd(1, 2.5), "num_clients is 2.5, expected an int"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_settings_at_the_ends_of_their_ranges():
    parts = [
        *(quantization(2), quantization(65536), top_k(1), top_k(1.0), top_k(2, per=2)),
        *(error_feedback(top_k(1), num_clients=1, decay=decay) for decay in (0, 1)),
    ]
    assert all(isinstance(part, fax.aggregators.Transformation) for part in parts)
    assert power_sgd(1, 1).init(np.zeros((4, 3))).memory.rows[0].shape == (1, 4, 3)


def test_what_is_rotated_is_a_transformation():
    with pytest.raises(ValueError, match=r"expected a fax\.aggregators\.Transformation"):
        hadamard(mean())
