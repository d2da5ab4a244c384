"""Error feedback: what was sent and what is left add up, whoever was left out of a round."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import fax
from fax.aggregators import (
    chain,
    drive,
    e3m0,
    error_feedback,
    hadamard,
    mean,
    non_finite,
    power_sgd,
    top_k,
)
from fax.aggregators._per_client import rows_after

N = 4
KEY = jax.random.key(7)
QUICKLY = {"xla_backend_optimization_level": 0}


def updates(seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shapes = {"b": (3,), "e": (0,), "s": (), "w": (5, 4)}
    return {name: rng.normal(size=(N, *s)).astype(dtype) for name, s in shapes.items()}


def rows(tree):
    return jax.tree.map(lambda x: x[0], tree)


def rounds(part, many, weights, state=None):
    """What is sent in rounds [rounds, clients, ...], the state after them, and the last metrics."""
    state = part.init(jax.tree.map(lambda x: x[0, 0], many)) if state is None else state
    keys = jax.random.split(KEY, len(weights))
    state, (sent, after, metrics) = compiled(part, len(weights[0]))(state, many, weights, keys)
    last = jax.tree.map(lambda x: x[-1], jax.device_get(metrics))
    return *jax.device_get((sent, after)), state, last


@functools.cache
def compiled(part, clients):
    @functools.partial(jax.jit, compiler_options=QUICKLY)
    @fax.program(clients=clients)
    def run(state, many, weights, keys):
        def round(state, own):
            tree, weights, key = own
            sent, after, state, metrics = part.update(tree, weights, state, key)
            return state, (sent, after, metrics)

        return jax.lax.scan(round, state, (many, weights, keys))

    return run


@pytest.mark.long
def test_a_chain_inside_has_no_lasting_bias():
    """The case that was found: .249 arrived in place of .3, for ever."""
    u = np.array([[0.3, 0.11, -0.07, 0.02, 1.0]] * 2)
    many = np.broadcast_to(u, (400, *u.shape))
    inside = error_feedback(chain(top_k(2), e3m0()), num_clients=2)
    sent, _, state, _ = rounds(inside, many, np.ones((400, 2)))
    left = state.memory.rows
    np.testing.assert_allclose(sent.sum(0) + left, 400 * u, rtol=1e-12)
    np.testing.assert_allclose(sent.mean(0), u, atol=0.01)


PARTS = {
    "top_k": lambda: error_feedback(top_k(3), num_clients=N),
    "chain": lambda: error_feedback(chain(drive(), e3m0()), num_clients=N),
    "dropped inside": lambda: error_feedback(chain(non_finite(), top_k(3)), num_clients=N),
    "packed": lambda: error_feedback(top_k(2, per=3, values=e3m0()), num_clients=N),
    "rotated": lambda: hadamard(error_feedback(top_k(3), num_clients=N)),
}


@pytest.mark.always("packed", "rotated")
@pytest.mark.parametrize("name", PARTS)
def test_what_is_sent_and_what_is_left_add_up(name):
    """Of clients that come and go, and sometimes send NaN."""
    weights = np.random.default_rng(1).integers(0, 3, (8, N)).astype(float)
    weights[0] = 1
    many = jax.tree.map(lambda *x: np.stack(x), *(updates(seed) for seed in range(8)))
    poisoned = jax.tree.map(np.copy, many)
    poisoned["s"][weights == 0] = np.nan
    if name == "dropped inside":
        weights[3, 1], poisoned["s"][3, 1] = 1, np.nan
    sent, after, state, _ = rounds(PARTS[name](), poisoned, weights)
    assert (np.asarray(after) != 0).tolist() == (
        (weights != 0) & ((name != "dropped inside") | np.isfinite(poisoned["s"]))
    ).tolist()
    if name == "rotated":  # each round has a rotation of its own, in which memories are
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((sent, state)))
        return
    here = np.asarray(after) != 0
    for key, x in many.items():
        on = here.reshape(*here.shape, *[1] * (x.ndim - 2))
        total = np.where(on, x, 0).sum(0)
        np.testing.assert_allclose(
            np.where(on, sent[key], 0).sum(0) + state.memory.rows[key], total, atol=1e-12
        )


def numpy_sparse_loco(u, memory, k, per, decay):
    """arXiv:2508.15706, algorithm 1, with four-bit values: of one leaf of one client."""
    wanted = decay * memory + u
    flat, chosen = wanted.ravel(), np.zeros(wanted.size, bool)
    for start in range(0, flat.size, per):
        order = np.argsort(-np.abs(flat[start : start + per]), kind="stable")
        chosen[start + order[:k]] = True
    levels = np.array([0, *(2.0 ** np.arange(-6, 1))])
    scale = np.float64(np.float32(np.abs(flat[chosen]).max()))
    nearest = levels[np.argmin(np.abs(np.abs(flat[chosen])[:, None] / scale - levels), 1)]
    sent = np.zeros(flat.size)
    sent[chosen] = np.sign(flat[chosen]) * nearest * scale
    sent = sent.reshape(u.shape)
    return sent, wanted - sent


def test_sparse_loco():
    k, per, decay = 2, 6, 0.9
    part = error_feedback(top_k(k, per=per, values=e3m0()), num_clients=N, decay=decay)
    many = jax.tree.map(lambda *x: np.stack(x), *(updates(seed) for seed in range(4)))
    del many["s"], many["e"]
    sent, _, state, metrics = rounds(part, many, np.ones((4, N)))
    for name, x in many.items():
        for client in range(N):
            memory = np.zeros_like(x[0, client])
            for round in range(4):
                expected, memory = numpy_sparse_loco(x[round, client], memory, k, per, decay)
                np.testing.assert_allclose(sent[name][round, client], expected, atol=1e-12)
            np.testing.assert_allclose(state.memory.rows[name][client], memory, atol=1e-12)
    # Of 3 numbers 2 in a chunk of 3, of 20 numbers 2 in each of 4 chunks of 6, 6, 6 and 2.
    assert list(metrics["clients/bits"]) == [2 * (4 + 2) + 32 + 8 * (4 + 3) + 32] * N


@pytest.mark.parametrize(("k", "per"), [(2, 4), (0.5, 4), (0.26, 7), (3, "leaf"), (0.3, "leaf")])
def test_the_largest_of_each_chunk(k, per):
    tree = updates()
    del tree["e"]
    sent, _, _, metrics = rounds(
        top_k(k, per=per), jax.tree.map(lambda x: x[None], tree), np.ones((1, N))
    )
    bits = 0
    for name, x in tree.items():
        flat, size = x.reshape(N, -1), x[0].size
        length, expected = size if per == "leaf" else min(per, size), np.zeros((N, size))
        for start in range(0, size, length):
            chunk = flat[:, start : start + length]
            width = chunk.shape[1]
            count = min(width, k if isinstance(k, int) else max(1, round(k * width)))
            bits += count * (64 + int(np.ceil(np.log2(length))))
            for i, own in enumerate(chunk):
                best = start + np.argsort(-np.abs(own), kind="stable")[:count]
                expected[i, best] = flat[i, best]
        np.testing.assert_array_equal(sent[name][0].reshape(N, -1), expected)
    assert list(metrics["clients/bits"]) == [min(bits, 64 * 24)] * N


def test_what_is_too_large_for_a_dtype_is_sent_later():
    u = np.full((3, 1, 2), 6e4, np.float16)
    u[1:] = 0
    part = error_feedback(chain(e3m0()), num_clients=1)
    state = part.init(u[0, 0])
    state = state._replace(memory=jax.tree.map(lambda x: x + 1e5, state.memory))
    sent, _, state, _ = rounds(part, u, np.ones((3, 1)), state)
    assert np.isfinite(sent).all()
    assert (np.asarray(sent[0]) <= 65504).all()
    total = np.asarray(sent, np.float64).sum(0) + np.asarray(state.memory.rows, np.float64)
    np.testing.assert_allclose(total, u[0].astype(float) + 1e5, rtol=1e-6)


REMEMBERING = error_feedback(top_k(2), num_clients=2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_remembered(bad):
    many = np.random.default_rng(0).normal(size=(3, 2, 5))
    many[1, 0, 3] = bad
    sent, _, state, _ = rounds(REMEMBERING, many, np.ones((3, 2)))
    assert not np.isfinite(sent[1, 0]).all()
    assert np.isfinite(np.asarray(sent)[[0, 2]]).all()
    left = np.asarray(state.memory.rows)
    total = np.delete(many, 1, 0)[:, 0].sum(0)
    np.testing.assert_allclose(np.asarray(sent)[[0, 2], 0].sum(0) + left[0], total, atol=1e-12)


@pytest.mark.parametrize("first", [jax.grad, jax.jacfwd])
def test_second_derivatives_do_not_reach_rows_that_are_left_out(first):
    def total(factor, x):
        @fax.program(clients=3)
        def work(factor, x):
            rows = fax.map(lambda a, x: jnp.sqrt(a * x), fax.broadcast(factor), x)
            return rows_after(fax.index(), rows, x)

        return jnp.sum(work(factor, x) ** 3)

    x = np.array([0.0, 2.0, 3.0])  # the first client is left out; its derivatives are NaN
    found = jax.jit(jax.grad(first(total)))(1.5, x)
    np.testing.assert_allclose(found, 0.75 / 1.5**0.5 * np.sum(x**1.5), rtol=1e-12)


def test_power_sgd_restarts_and_keeps_memories():
    aggregator = power_sgd(1, num_clients=N)
    run = jax.jit(fax.program(clients=N)(aggregator.aggregate), compiler_options=QUICKLY)
    state, sent, made = aggregator.init(np.zeros((6, 5))), 0, 0
    weights = np.array([1.0, 2.0, 3.0, 0.0])
    for round in range(3):
        tree = np.random.default_rng(round).normal(size=(N, 6, 5))
        tree[3] = np.nan
        update, state, _ = run(tree, weights, state, KEY)
        sent, made = sent + np.asarray(update), made + np.average(tree[:3], 0, weights[:3])
    rows = np.asarray(state.memory.rows[0])
    left = np.average(rows[:3], 0, weights[:3])
    np.testing.assert_allclose(sent + left, made, rtol=1e-9, atol=1e-12)
    assert not rows[3].any()
    # A round that is NaN ends with it.
    update, state, _ = run(tree, np.ones(N), state, KEY)
    assert np.isnan(update).all()
    update, state, _ = run(np.ones((N, 6, 5)), np.ones(N), state, KEY)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((update, state)))


def test_a_replica_without_a_batch_keeps_its_memory():
    data = {str(i): {"x": np.full((4, 2), i + 1.0)} for i in range(2)}
    cohort = next(fax.data.cohorts(fax.data.InMemory(data), 2, 2, placement="replicas"))
    part = chain(error_feedback(top_k(1), num_clients=2))
    algorithm = fax.algorithms.diloco(
        lambda w, batch, key: jnp.sum((batch["x"] - w * jnp.array([1.0, 2.0])) ** 2, 1),
        optax.sgd(0.05),
        optax.sgd(1.0),
        replicas=2,
        aggregator=part,
    )
    step = jax.jit(algorithm.round)
    state, _ = step(algorithm.init(jnp.zeros(2)), cohort)
    before = np.asarray(state.aggregator[0].memory.rows)
    assert before.any(1).all()
    alone = cohort.mask & (np.asarray(cohort.positions) == 0)[:, None, None]
    state, _ = step(state, type(cohort)(**{**vars(cohort), "mask": alone}))
    after = np.asarray(state.aggregator[0].memory.rows)
    gone = int(np.flatnonzero(np.asarray(cohort.positions))[0])
    np.testing.assert_array_equal(after[gone], before[gone])
    assert (after[1 - gone] != before[1 - gone]).any()


@pytest.mark.long
def test_decay_can_be_swept():
    many = np.random.default_rng(0).normal(size=(2, 2, 5))

    def left(decay):
        part = error_feedback(top_k(2), num_clients=2, decay=decay)
        program = fax.program(clients=2)(lambda u, s: part.update(u, jnp.ones(2), s, KEY)[2])
        state = part.init(many[0, 0])
        for u in many:
            state = program(u, state)
        return state.memory.rows

    found = jax.jit(jax.vmap(left))(jnp.array([0.0, 0.5]))
    for i, decay in enumerate([0.0, 0.5]):
        problems.assert_trees_close(operator.itemgetter(i)(found), left(decay))


def test_chains_of_transformations_are_transformations():
    tree = updates()
    inner = chain(top_k(5), e3m0())
    nested = chain(inner, mean())
    flat = chain(top_k(5), e3m0(), mean())

    @fax.program(clients=N)
    def both(tree):
        return [
            part.aggregate(tree, jnp.ones(N), part.init(rows(tree)), KEY)[0]
            for part in (nested, flat)
        ]

    problems.assert_trees_close(*jax.jit(both)(tree))
    for wrong in (mean(), chain(top_k(5), mean()), top_k):
        with pytest.raises(ValueError, match="or a chain of transformations alone"):
            error_feedback(wrong, num_clients=N)
    with pytest.raises(ValueError, match="Only the last part may be an Aggregator"):
        chain(chain(top_k(5), mean()), mean())


def test_each_part_of_a_chain_has_a_state_of_its_own():
    def part(start):
        update = lambda updates, weights, state, key: (updates, weights, state + 1, {})  # noqa: E731
        return fax.aggregators.Transformation(lambda params: start, update)

    last = fax.aggregators.Aggregator(
        lambda params: 30, lambda updates, weights, state, key: (updates, state + 2, {})
    )
    aggregator = chain(part(10), part(20), last)
    assert aggregator.aggregate((), (), aggregator.init(()), KEY)[1] == (11, 21, 32)


def test_bits_of_leaves_of_several_dtypes():
    tree = {
        "a": np.array([[1, 9]], np.float16),
        "b": np.array([[8.0, 2]]),
        "c": np.ones((1, 1), "f4"),
    }

    @jax.jit
    @fax.program(clients=1)
    def every(tree):
        return [top_k(k).update(tree, jnp.ones(1), (), KEY) for k in (1, 2, 3)]

    expected = 16 + 3, 16 + 64 + 6, 16 + 2 * 64 + 9
    for (sent, _, _, metrics), bits in zip(every(tree), expected, strict=True):
        assert metrics["clients/bits"][0] == bits
        assert [x.dtype for x in sent.values()] == [np.float16, np.float64, np.float32]
