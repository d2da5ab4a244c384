"""Cohorts hold what their definition says, on every device and in every round."""

import concurrent.futures
import contextlib
import copy
import dataclasses
import gc
import os
import pickle
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from subsets import alike

import fax
from fax._keys import Use, derive
from fax.data import _batching, _prefetch, _resident, _samplers
from fax.data._batching import Batching
from fax.data._prefetch import Prefetch

SIZES = [1, 2, 3, 5, 8, 13, 21, 34, 7, 7, 7, 40]
HALVES = np.array([1, 0.5], np.float32)


def population(sizes=SIZES):
    """Clients whose examples say whose they are: feature "x" is 1000 client + number."""
    return fax.data.InMemory(
        {
            f"client {i}": {
                "x": np.float32(1000 * i) + np.arange(n, dtype=np.float32)[:, None] * HALVES,
                "y": np.arange(n, dtype=np.int32),
            }
            for i, n in enumerate(sizes)
        }
    )


def examples(cohort):
    """The labels of each client's real examples, in order, by its position in the data."""
    labels, mask = np.asarray(cohort.batches["y"]), np.asarray(cohort.mask)
    return {
        int(client): [own[m].tolist() for own, m in zip(labels[row], mask[row])]
        for row, client in enumerate(cohort.positions)
    }


def same(one, other):
    """Whether two cohorts are of the same clients, batches and keys."""
    for name in ("mask", "num_examples", "positions"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_array_equal(*(jax.random.key_data(c.keys) for c in (one, other)))
    mask = np.asarray(one.mask)
    for name in ("x", "y"):
        np.testing.assert_array_equal(one.batches[name][mask], other.batches[name][mask])


def flat(lists):
    return [x for own in lists for x in own]


# Batches


@settings(max_examples=60)
@given(
    n=st.integers(1, 30),
    batch_size=st.integers(1, 9),
    epochs=st.integers(1, 4),
    max_steps=st.none() | st.integers(1, 8),
    drop_remainder=st.booleans(),
    shuffle=st.booleans(),
)
def test_an_epoch_has_every_example_once(n, batch_size, epochs, max_steps, drop_remainder, shuffle):
    batching = Batching(batch_size, epochs, max_steps, drop_remainder, shuffle)
    plan = _batching.plan_epochs(batching, np.array([0]), np.array([n]), 0, 0, None)
    batches = [index[mask].tolist() for index, mask in zip(plan.rows[0], plan.mask[0])]

    of_epoch = n // batch_size if drop_remainder else -(-n // batch_size)
    steps = of_epoch * epochs if max_steps is None else min(of_epoch * epochs, max_steps)
    assert plan.steps.tolist() == [steps] == batching.steps(np.array([n])).tolist()
    assert not any(batches[steps:])
    for start in range(0, steps, of_epoch or 1):
        epoch = batches[start : min(start + of_epoch, steps)]
        seen = [example for batch in epoch for example in batch]
        assert len(set(seen)) == len(seen)
        assert all(len(batch) == batch_size for batch in epoch[:-1])
        if len(epoch) == of_epoch:
            assert len(seen) == (of_epoch * batch_size if drop_remainder else n)
        if not shuffle:
            assert seen == list(range(len(seen)))


def test_epochs_have_orders_of_their_own():
    data = population([40, 40])
    cohort = next(fax.data.cohorts(data, clients=2, batch_size=40, epochs=2))
    orders = [order for batches in examples(cohort).values() for order in batches]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(40)) for order in orders)


@pytest.mark.parametrize("resident", [True, False])
def test_a_cohort_says_who_has_what(resident):
    data = population()
    rounds = fax.data.cohorts(data, clients=5, batch_size=4, resident=resident, seed=3)
    assert rounds.resident == resident
    for cohort, _ in zip(rounds, range(4)):
        clients, steps, batch = cohort.mask.shape
        assert (clients, batch, cohort.size) == (5, 4, 5)
        assert cohort.mask.dtype == bool
        assert cohort.num_examples.dtype == cohort.positions.dtype == jnp.int32
        assert len(set(cohort.positions.tolist())) == 5
        assert cohort.batches["x"].shape == (5, steps, 4, 2)
        for client, batches in examples(cohort).items():
            assert sorted(flat(batches)) == list(range(SIZES[client]))
        x, mask = np.asarray(cohort.batches["x"]), np.asarray(cohort.mask)
        for row, client in enumerate(cohort.positions.tolist()):
            assert cohort.num_examples[row] == SIZES[client]
            assert set((x[row][mask[row]][:, 0] // 1000).tolist()) == {client}


def test_cohorts_are_compared_by_identity():
    one, other = (next(fax.data.cohorts(population(), 2, 4)) for _ in range(2))
    assert one == one
    assert one != other
    assert len({one, other}) == 2


def test_batches_know_their_features_without_gathering():
    examples = {"x": jnp.ones(3)}
    batches = fax.data.Gathered(examples, "not to be looked at")
    assert "x" in batches
    assert "y" not in batches
    assert list(batches) == ["x"]


def test_keys_belong_to_seed_round_and_client():
    def keys(**kwargs):
        cohort = next(fax.data.cohorts(population(), clients=12, batch_size=4, **kwargs))
        return dict(zip(cohort.positions.tolist(), jax.random.key_data(cohort.keys).tolist()))

    first = keys(start=5)
    assert len(set(map(tuple, first.values()))) == 12
    # Of a branch of its own: a user's jax.random.key(0) is split into others.
    seed_key = derive(jax.random.key(0), Use.COHORTS)
    round_key = jax.random.fold_in(seed_key, 5)
    for client, key in first.items():
        assert jax.random.key_data(jax.random.fold_in(round_key, client)).tolist() == key
    for other in (keys(start=6), keys(start=5, seed=1)):
        assert all(first[client] != other[client] for client in first)


# Rounds


@pytest.mark.kinds(resident=alike, sampler=alike)
@pytest.mark.parametrize("sampler", ["uniform", "weighted", "shuffled", "minimum_reuse", "stream"])
@pytest.mark.parametrize("resident", [True, False])
def test_any_round_can_be_resumed(sampler, resident):
    weights = np.arange(1, 13) if sampler == "weighted" else None
    how = dict(clients=12 if sampler == "stream" else 4, batch_size=3, max_steps=5)
    how |= dict(sampler=sampler, weights=weights, seed=7)
    rounds = fax.data.cohorts(population(), **how)
    cohorts = [next(rounds) for _ in range(6)]
    for r in (0, 3, 5):
        resumed = fax.data.cohorts(population(), **how, start=r, resident=resident)
        same(cohorts[r], next(resumed))
    other = next(fax.data.cohorts(population(), **{**how, "seed": 8}))
    assert examples(other) != examples(cohorts[0])


def test_shapes_are_few():
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(3, 1.5, 300), 1, 4000).astype(int)
    rounds = fax.data.cohorts(population(sizes), clients=5, batch_size=4)
    for _ in range(60):
        next(rounds)
    assert sum(rounds.shapes.values()) == 60
    assert 1 < len(rounds.shapes) < 16
    assert rounds.round == 60
    most = -(-max(sizes) // 4)
    for _, steps, _ in rounds.shapes:
        assert steps in {
            1,
            2,
            3,
            4,
            6,
            8,
            12,
            16,
            24,
            32,
            48,
            64,
            96,
            128,
            192,
            256,
            384,
            512,
            most,
        }


def test_buckets_by_hand():
    expected = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 6, 7: 8, 8: 8, 9: 12, 12: 12, 13: 16, 17: 24}
    assert {steps: _batching.padded_steps(steps, None) for steps in expected} == expected
    # Up to twice the bucket, it is the most that any client has.
    assert [_batching.padded_steps(3, most) for most in (3, 6, 7)] == [3, 6, 3]


@given(st.integers(0, 10**6), st.none() | st.integers(1, 10**6))
def test_buckets_hold_what_they_are_for(steps, most):
    if most is not None:
        steps = min(steps, most)
    size = _batching.padded_steps(steps, most)
    assert size >= steps
    assert size <= max(1, 1.5 * steps) or (size == most and most <= 3 * steps)
    assert most is None or size <= most


@pytest.mark.parametrize("kind", [None, "auto", "explicit"])
def test_nothing_is_compiled_again(caplog, kind):
    """Neither for the next rounds, nor for those of another call of `cohorts`."""

    def cohorts():
        return fax.data.cohorts(population([4] * 12), clients=4, batch_size=4)

    on = contextlib.nullcontext() if kind is None else jax.set_mesh(meshes.mesh(kind, clients=4))
    with on, cohorts() as rounds, cohorts() as others:
        next(rounds), rounds.take(2)
        caplog.clear()
        with jax.log_compiles():
            for again in (rounds, rounds, rounds, others):
                next(again), again.take(2)
    assert not [m for m in caplog.messages if m.startswith("Compiling")]


def test_take_gives_the_next_rounds_at_once():
    how = dict(clients=4, batch_size=3, seed=2)
    one_by_one = fax.data.cohorts(population(), **how)
    at_once = fax.data.cohorts(population(), **how)
    for _ in range(2):
        same(next(one_by_one), next(at_once))
    several = at_once.take(3)
    assert at_once.round == 5
    for r in range(3):
        rows = several.batches.rows[r]
        own = jax.tree.map(lambda x, r=r: x[r], (several.mask, several.positions, several.keys))
        expected = next(one_by_one)
        steps = expected.mask.shape[1]
        np.testing.assert_array_equal(own[0][:, :steps], expected.mask)
        assert not own[0][:, steps:].any()
        np.testing.assert_array_equal(rows[:, :steps], expected.batches.rows)
        np.testing.assert_array_equal(own[1], expected.positions)
        np.testing.assert_array_equal(*map(jax.random.key_data, (own[2], expected.keys)))
    same(next(one_by_one), next(at_once))
    with pytest.raises(fax.data.DataError, match="resident=True"):
        fax.data.cohorts(population(), **how, resident=False).take(2)


# Samplers


def chosen(rounds, count):
    return [next(rounds).positions.tolist() for _ in range(count)]


# The clients of rounds 11 and 12, some of them with the first of their examples, in order.
GOLDEN = {
    "uniform": [
        {0: [0], 3: [2, 1, 3, 0, 4], 9: [1, 0, 4, 2, 3]},
        {1: [1, 0], 2: [2, 1, 0], 4: [0, 7, 6, 1, 3]},
    ],
    "weighted": [
        {5: [8, 1, 2, 9, 3], 8: [5, 1, 4, 3, 2], 10: [2, 0, 5, 1, 6]},
        {8: [0, 5, 2, 1, 4], 10: [0, 2, 6, 1, 3], 11: [23, 25, 0, 26, 6]},
    ],
    "shuffled": [
        {7: [9, 14, 30, 10, 27], 10: [0, 6, 2, 5, 4], 11: [8, 10, 7, 11, 6]},
        {3: [0, 2, 3, 1, 4], 7: [30, 19, 22, 14, 18], 8: [0, 5, 2, 1, 4]},
    ],
    "minimum_reuse": [
        {1: [1, 0], 6: [10, 1, 17, 16, 9], 9: [1, 0, 4, 2, 3]},
        {2: [2, 1, 0], 4: [0, 5, 2, 1, 4], 5: [1, 6, 0, 4, 11]},
    ],
    "stream": [
        {9: [6, 4, 5, 5, 6], 10: [3, 4, 2, 4, 0], 11: [33, 3, 17, 32, 25]},
        {9: [3, 2, 2, 3, 6], 10: [1, 2, 1, 6, 2], 11: [34, 29, 12, 6, 26]},
    ],
}
# The key of the last client of round 12.
KEYS = {4: [1851579613, 4023154588], 5: [625348831, 751749007], 8: [3925732849, 1925709452]}
KEYS[11] = [1932816937, 1008987806]


@pytest.mark.parametrize("sampler", GOLDEN)
def test_draws_are_what_they_have_always_been(sampler):
    """Whoever resumes a training with a later version has to meet the same clients."""
    weights = np.arange(12.0) if sampler == "weighted" else None
    steps = 2 if sampler == "stream" else None
    rounds = fax.data.cohorts(
        population(),
        12 if sampler == "stream" else 3,
        4,
        sampler=sampler,
        weights=weights,
        max_steps=steps,
        seed=7,
        start=11,
    )
    found = []
    for cohort in (next(rounds), next(rounds)):
        order = examples(cohort)
        found.append({client: flat(order[client])[:5] for client in sorted(order)[-3:]})
    assert found == GOLDEN[sampler]
    words = jax.random.key_data(cohort.keys)[np.argmax(cohort.positions)]
    assert words.tolist() == KEYS[int(max(cohort.positions))]


def test_uniform_takes_everybody_equally_often():
    rounds = fax.data.cohorts(population(), clients=3, batch_size=64, seed=1)
    counts = np.bincount(np.ravel(chosen(rounds, 400)), minlength=12)
    assert counts.sum() == 1200
    # 100 expected of each, with a standard deviation of sqrt(400 * 1/4 * 3/4) = 8.7.
    assert np.abs(counts - 100).max() < 4 * 8.7


def test_settings_tell_weights_apart():
    """So that a run is not resumed with others."""

    def settings_of(weights):
        return fax.data.cohorts(population(), 3, 4, sampler="weighted", weights=weights).settings

    of_floats = settings_of(np.arange(12.0))
    assert of_floats == settings_of(range(12)) != settings_of(range(12, 0, -1))


def test_weighted_clients_are_in_the_order_of_the_pool():
    """A partition has them in an order that depends on the processor."""
    sample = _samplers.weighted(np.arange(1.0, 201.0))
    for number in range(20):
        positions = sample(np.arange(200), 40, number, (0,))
        assert (np.diff(positions) > 0).all()


def test_weighted_follows_the_weights():
    weights = np.array([0, 1, 2, 3] + [0] * 8)
    how = dict(batch_size=64, sampler="weighted", weights=weights)
    counts = np.bincount(
        np.ravel(chosen(fax.data.cohorts(population(), 1, **how), 600)), minlength=12
    )
    assert (counts[[0, *range(4, 12)]] == 0).all()
    np.testing.assert_allclose(counts[1:4] / 600, [1 / 6, 2 / 6, 3 / 6], atol=0.08)
    # Two of them, one after the other: P(1 and 2) = 1/6 2/5 + 2/6 1/4 = 3/20.
    pairs = [frozenset(c) for c in chosen(fax.data.cohorts(population(), 2, **how), 600)]
    assert abs(pairs.count(frozenset({1, 2})) / 600 - 3 / 20) < 0.06
    assert all(len(pair) == 2 for pair in pairs)


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1.0, 1e307])
def test_weights_may_be_of_any_size(scale):
    weights = np.array([scale] * 3 + [0] * 9)
    how = dict(batch_size=64, sampler="weighted", weights=weights)
    counts = np.bincount(np.ravel(chosen(fax.data.cohorts(population(), 1, **how), 300)))
    # 100 expected of each, with a standard deviation of sqrt(300 * 1/3 * 2/3) = 8.2.
    assert len(counts) == 3
    assert np.abs(counts - 100).max() < 4 * 8.2


def test_a_device_needs_enough_clients_with_a_weight(monkeypatch):
    data = population([8] * 12)
    monkeypatch.setattr(_resident, "_CPU_BYTES", 600)
    with jax.set_mesh(meshes.mesh(clients=4)):
        pools = fax.data.cohorts(data, 4, 4)._builder.resident.pools
        weights = np.ones(12)
        weights[pools[2]] = 0
        with pytest.raises(fax.data.DataError, match=r"only 0 clients of those .* 4 devices"):
            fax.data.cohorts(data, 4, 4, sampler="weighted", weights=weights)


def test_shuffled_passes_through_all_clients():
    rounds = fax.data.cohorts(population(), clients=4, batch_size=64, sampler="shuffled")
    passes = [flat(chosen(rounds, 3)) for _ in range(4)]
    assert all(sorted(p) == list(range(12)) for p in passes)
    assert len({tuple(p) for p in passes}) == 4
    uneven = fax.data.cohorts(population(), clients=5, batch_size=64, sampler="shuffled")
    for _ in range(5):
        assert len(set(flat(chosen(uneven, 2)))) == 10


def test_minimum_reuse_lets_everybody_wait_as_long_as_possible():
    rounds = fax.data.cohorts(population(), clients=5, batch_size=64, sampler="minimum_reuse")
    took_part = {}
    for r, members in enumerate(chosen(rounds, 30)):
        assert len(set(members)) == 5
        for client in members:
            assert r - took_part.get(client, -10) >= 2  # 12 clients, 5 a round
            took_part[client] = r


def test_only_streams_are_known_to_have_no_padding():
    """It is known of the mask of `cohorts`, however a cohort is passed on, and of no other mask."""
    rounds = fax.data.cohorts(population([3, 7, 1]), 3, 2, max_steps=2, sampler="stream")
    cohort, several = next(rounds), rounds.take(2)
    assert not cohort.padded
    assert not several.padded
    assert bool(several.mask.all())
    assert next(fax.data.cohorts(population([4, 4]), 2, 2)).padded  # whatever its mask is
    seen = []

    @fax.program(clients=3)
    def program(cohort):
        return fax.map(lambda client: seen.append(client.padded), cohort.clients())

    for same in (
        dataclasses.replace(cohort, num_examples=cohort.num_examples * 0),
        jax.tree.map(lambda x: x, cohort),
        jax.tree.map(lambda x: x[0], several),
        copy.deepcopy(cohort),
        jax.jit(lambda cohort: cohort)(cohort),
    ):
        assert not same.padded
        assert jax.tree.structure(same) == jax.tree.structure(cohort)
    assert jax.tree.structure(
        jax.tree.map(lambda x: None, cohort), is_leaf=lambda x: x is None
    ) == (jax.tree.structure(cohort))
    other = dataclasses.replace(cohort, mask=jnp.ones_like(cohort.mask))
    by_hand = fax.data.Cohort(
        cohort.batches, cohort.mask, cohort.num_examples, cohort.positions, cohort.keys
    )
    assert other.padded
    assert by_hand.padded
    assert dataclasses.replace(other, num_examples=cohort.num_examples).padded
    for own in (cohort, other):
        jax.make_jaxpr(program)(own)
    assert seen == [False, True]


def test_a_stream_goes_on_where_it_stopped():
    sizes = [4, 7, 1]
    rounds = fax.data.cohorts(population(sizes), 3, 2, max_steps=3, sampler="stream", seed=5)
    seen = {client: [] for client in range(3)}
    for _ in range(14):
        cohort = next(rounds)
        assert cohort.positions.tolist() == [0, 1, 2]
        assert cohort.mask.all()
        assert cohort.mask.shape == (3, 3, 2)
        for client, batches in examples(cohort).items():
            seen[client] += flat(batches)
    for client, n in enumerate(sizes):
        epochs = [seen[client][i : i + n] for i in range(0, 84 - n + 1, n)]
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
        assert n == 1 or len({tuple(epoch) for epoch in epochs}) > 1


def test_a_function_chooses():
    rounds = fax.data.cohorts(population(), 2, 64, sampler=lambda r: [r, r + 1], start=3)
    assert [sorted(c) for c in chosen(rounds, 3)] == [[3, 4], [4, 5], [5, 6]]


# Order


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 9))
def test_devices_have_about_the_same_number_of_steps(steps, ways):
    steps = np.array(steps)
    order = _batching.balanced_order(steps, ways)
    assert sorted(order) == list(range(len(steps)))
    rows = _batching.rows_of_devices(len(steps), ways)
    assert sorted(flat(rows)) == list(range(len(steps)))
    loads = [steps[order[own]].sum() for own in rows if own]
    for own in rows:
        assert (np.diff(steps[order[own]]) <= 0).all()
    if len(steps) % ways == 0:
        assert max(loads) - min(loads) <= steps.max() * (1 + len(steps) // ways)
        assert max(loads) <= steps.sum() / ways + steps.max()


def test_little_of_what_is_computed_is_padding():
    rng = np.random.default_rng(0)
    for clients, ways in [(10, 1), (100, 1), (100, 2), (1000, 8), (64, 4)]:
        rounds = []
        for _ in range(20):
            steps = -(-np.clip(rng.lognormal(5, 0.6, clients), 10, 500).astype(int) // 20)
            rounds.append(steps[_batching.balanced_order(steps, ways)])
        at_once = _batching.vectorized_clients(rounds, ways)
        needed = sum(steps.sum() for steps in rounds)
        computed = sum(_batching.computed_steps(steps, ways, at_once) for steps in rounds)
        assert 1 - needed / computed <= 0.15
        assert at_once >= 8 or clients / ways <= 64


@pytest.mark.parametrize("sampler", ["uniform", "shuffled", "function"])
def test_how_many_at_once_does_not_depend_on_where_rounds_begin(sampler):
    def function(number):
        return {5: [0, 1], 40: [2, 11]}[number]  # a function may have as few rounds as are wanted

    found = set()
    for start in (0, 5, 40):
        rounds = fax.data.cohorts(
            population(),
            2,
            4,
            sampler=function if sampler == "function" else sampler,
            start=start,
            prefetch=1,
        )
        found.add(rounds._builder._choose_vectorize())
    assert len(found) == 1
    assert found != {64}  # which is what clients of equal length have


def test_computed_steps_by_hand():
    steps = np.array([9, 5, 4, 1, 7, 3, 3])
    # Two devices: rows 0-2 and 6, rows 3-5. In pairs: max(9, 5) 2 + max(4, 3) 2; max(1, 7) 2 + 3.
    assert _batching.computed_steps(steps, 2, 2) == 18 + 8 + 14 + 3
    assert _batching.computed_steps(steps, 2, 1) == steps.sum()
    assert _batching.computed_steps(steps, 1, 100) == 9 * 7


def test_padding_is_reported():
    rounds = fax.data.cohorts(population(), clients=6, batch_size=4)
    assert rounds.padding == 0
    next(rounds)
    assert rounds.padding == 0  # on CPU a device works for one client at a time
    rounds._builder.vectorize = 3
    steps = next(rounds).mask.any(2).sum(1)
    first = np.asarray(steps)
    computed = 3 * first[0] + 3 * first[3]
    before = next(fax.data.cohorts(population(), clients=6, batch_size=4)).mask.any(2).sum()
    assert rounds.padding == pytest.approx(1 - (before + first.sum()) / (before + computed))


# Local steps


def trace_of_steps(cohort, vectorize):
    """What each client computed, and how many steps the device ran."""
    ran = []

    @fax.program(clients=cohort.size)
    def program(cohort):
        def client(own):
            def step(carry, batch, mask, key):
                jax.debug.callback(lambda: ran.append(1))
                total, keys = carry
                total = 3 * total + jnp.sum(jnp.where(mask, batch["y"] + 1.0, 0))
                return total, keys + jax.random.uniform(key)

            return own.scan(step, (jnp.zeros(()), jnp.zeros(())))

        return fax.map(client, cohort.clients(), vectorize=vectorize)

    out = jax.block_until_ready(jax.jit(program)(cohort))
    jax.effects_barrier()
    return out, len(ran)


@pytest.mark.always("1-True", "3-False")
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("at_once", [1, 2, 3, 6])
def test_only_steps_that_somebody_needs_are_run(resident, at_once):
    cohort = next(fax.data.cohorts(population(), 6, 4, resident=resident, epochs=2))
    steps = np.asarray(cohort.mask.any(2).sum(1))
    (totals, keys), ran = trace_of_steps(cohort, at_once)
    assert ran * at_once == _batching.computed_steps(steps, 1, at_once)
    for row, (_, batches) in enumerate(examples(cohort).items()):
        expected = 0.0
        for batch in batches[: steps[row]]:
            expected = 3 * expected + sum(label + 1.0 for label in batch)
        assert totals[row] == expected
        numbers = [jax.random.fold_in(cohort.keys[row], i) for i in range(steps[row])]
        np.testing.assert_allclose(keys[row], sum(map(jax.random.uniform, numbers)))


def test_company_computes_nothing_singular():
    """A vectorized client that has finished must not bring in NaN from zeros that fill it up."""
    data = fax.data.InMemory({"long": {"x": np.ones((9, 1))}, "short": {"x": np.ones((1, 1))}})
    cohort = next(fax.data.cohorts(data, 2, 1, resident=False))
    assert (np.asarray(cohort.batches["x"])[~np.asarray(cohort.mask)] == 0).any()

    @fax.program(clients=2)
    def program(w, cohort):
        def client(w, own):
            def step(total, batch, mask, key):
                return total + jnp.sum(jnp.where(mask, jnp.sqrt(w * batch["x"][:, 0]), 0))

            return own.scan(step, jnp.zeros(()))

        return fax.sum(fax.map(client, fax.broadcast(w), cohort.clients(), vectorize=2))

    value, slope = jax.value_and_grad(program)(4.0, cohort)
    assert (value, slope) == (20.0, 2.5)


def test_memory_does_not_grow_with_the_cohort():
    def temporary(clients):
        data = population([40] * clients)
        cohort = next(fax.data.cohorts(data, clients, 8))

        @fax.program(clients=clients)
        def program(w, cohort):
            def client(w, own):
                return own.scan(lambda w, b, m, k: w + (b["x"].T @ b["x"])[0], w)

            return fax.mean(fax.map(client, fax.broadcast(w), cohort.clients()))

        compiled = jax.jit(program).lower(jnp.zeros(2), cohort).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # A batch of 8 examples is 128 bytes, and the gathered cohort of 256 would be 164 kB.
    assert temporary(256) < temporary(8) + 4096


def test_a_step_keeps_the_types_of_what_it_carries():
    cohort = next(fax.data.cohorts(population(), 2, 4))

    def total(start, step):
        @fax.program(clients=2)
        def program(cohort):
            return fax.map(lambda own: own.scan(step, start), cohort.clients())

        return program(cohort)

    counted = total(0, lambda n, b, m, k: n + jnp.sum(m))
    np.testing.assert_array_equal(counted, cohort.num_examples)
    with pytest.raises(
        TypeError, match=r"carry\['a'\] is float32\[\], but float32\[4\] after a step"
    ):
        total({"a": np.float32(0)}, lambda c, b, m, k: {"a": c["a"] + b["x"][:, 0]})
    with pytest.raises(TypeError, match="step returned a carry of another structure"):
        total((0, 1), lambda c, b, m, k: c[0])


# Meshes


@pytest.mark.always("True-6-explicit", "False-6-auto")
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("clients", [8, 6])
@pytest.mark.parametrize("resident", [True, False])
def test_cohorts_on_a_mesh(kind, clients, resident):
    how = dict(clients=clients, batch_size=4, seed=1, resident=resident)
    alone = next(fax.data.cohorts(population(), **how))
    with jax.set_mesh(meshes.mesh(kind, clients=4, model=2)):
        cohort = next(fax.data.cohorts(population(), **how))
        spec = cohort.mask.sharding.spec
        assert (spec[0] if spec else None) == ("clients" if clients == 8 else None)
        assert cohort.keys.sharding.is_equivalent_to(cohort.positions.sharding, 1)

        @jax.jit
        @fax.program(clients=clients)
        def program(scale, cohort):
            def client(scale, own):
                return own.scan(
                    lambda t, b, m, k: 2 * t + jnp.sum(b["x"] * scale, where=m[:, None]), 0.0
                )

            return fax.map(client, fax.broadcast(scale), cohort.clients())

        on_mesh = dict(zip(cohort.positions.tolist(), np.asarray(program(2.0, cohort)).tolist()))
    expected = dict(zip(alone.positions.tolist(), np.asarray(program(2.0, alone)).tolist()))
    assert on_mesh == expected
    loads = np.asarray(cohort.mask.any(2).sum(1))
    if clients == 8:
        assert loads.reshape(4, 2).sum(1).max() <= loads.sum() / 4 + loads.max()


@pytest.mark.always("weighted-explicit")
@pytest.mark.kinds(kind=alike, sampler=alike)
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("sampler", ["uniform", "weighted", "shuffled", "minimum_reuse"])
def test_examples_split_over_devices(monkeypatch, kind, sampler):
    data = population([5 + i % 4 for i in range(24)])
    monkeypatch.setattr(_resident, "_CPU_BYTES", 500)  # of 24 * 6.5 examples of 12 bytes
    weights = np.ones(24) if sampler == "weighted" else None
    how = dict(clients=8, batch_size=4, sampler=sampler, weights=weights)
    with jax.set_mesh(meshes.mesh(kind, clients=4)):
        rounds = fax.data.cohorts(data, **how)
        assert rounds.resident
        seen = []

        @jax.jit
        @fax.program(clients=8)
        def total(cohort):
            def client(own):
                return own.scan(lambda t, b, m, k: t + jnp.sum(b["x"], where=m[:, None]), 0.0)

            return fax.sum(fax.map(client, cohort.clients()))

        cohort = next(rounds)
        compiled = total.lower(cohort).compile()
        for number in range(12):
            cohort = next(rounds) if number else cohort
            assert cohort.batches.examples["x"].sharding.spec[0] == "clients"
            for client_id, batches in examples(cohort).items():
                assert sorted(flat(batches)) == list(range(5 + client_id % 4))
            seen += cohort.positions.tolist()
            expected = sum(data.client(f"client {i}")["x"].sum() for i in cohort.positions.tolist())
            np.testing.assert_allclose(compiled(cohort), expected, rtol=1e-6)
        assert len(set(seen)) == 24 or sampler in ("uniform", "weighted")
        text = compiled.as_text()
        assert "all-gather" not in text
        assert "all-to-all" not in text
        with pytest.raises(fax.data.DataError, match=r"clients=6 cannot be divided evenly over 4"):
            fax.data.cohorts(data, clients=6, batch_size=4, resident=True)
    assert not fax.data.cohorts(data, **how).resident  # one device has no room for all


# The thread


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("fax.data")]


def until(condition):
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_the_thread_works_ahead_but_not_without_end():
    made = []

    def sampler(number):
        made.append(number)
        return [0, 1]

    rounds = fax.data.cohorts(population(), 2, 4, sampler=sampler, prefetch=3)
    assert made == []
    next(rounds)
    assert until(lambda: len(made) == 5)  # one is taken, three wait, one waits for room
    time.sleep(0.1)
    assert made == [0, 1, 2, 3, 4]
    rounds.close()


def test_the_thread_ends_with_its_iterator():
    before = set(threads())

    def new():
        return set(threads()) - before

    rounds = fax.data.cohorts(population(), 2, 4)
    next(rounds)
    assert len(new()) == 1
    rounds.close()
    assert not new()
    with pytest.raises(StopIteration):
        next(rounds)
    with fax.data.cohorts(population(), 2, 4) as rounds:
        next(rounds)
    assert not new()
    rounds = fax.data.cohorts(population(), 2, 4)
    next(rounds)
    del rounds
    gc.collect()
    assert until(lambda: not new())


class Gate:
    """A function for `fax.data.map` that stops at some client until it is let through."""

    def __init__(self, stop_at):
        self.stop_at, self.calls = stop_at, []
        self.here, self.open = threading.Event(), threading.Event()

    def preprocess(self, client_id, examples):
        self.calls.append(client_id)
        if client_id == self.stop_at:
            self.here.set()
            assert self.open.wait(60)
        return examples


def test_closing_does_not_wait_for_a_function_that_is_stuck(monkeypatch):
    monkeypatch.setattr(_prefetch, "_JOIN_SECONDS", 0.01)
    before, gate = set(threads()), Gate("client 3")
    data = fax.data.map(population(), gate.preprocess)
    order = [[0, 1], [2, 3], [4, 5]]
    rounds = fax.data.cohorts(data, 2, 4, sampler=order.__getitem__, resident=False)
    next(rounds)
    assert gate.here.wait(60)
    message = r"still in preprocess \(.*test_cohorts.py, line \d+\), for client 'client 3'\."
    with pytest.warns(UserWarning, match=message) as caught:
        rounds.close()
    assert caught[0].filename == __file__
    with pytest.raises(StopIteration):
        next(rounds)
    assert set(threads()) - before
    gate.open.set()
    assert until(lambda: not set(threads()) - before)


def test_closing_ends_a_round_between_two_clients():
    gate = Gate("client 3")
    data = fax.data.map(population(), gate.preprocess)
    rounds = fax.data.cohorts(data, 8, 4, sampler=lambda r: range(2, 10), resident=False)
    rounds._items = _prefetch.Prefetch(rounds._builder, 0, 1)
    assert gate.here.wait(60)
    rounds._items._stop.set()  # as close does first
    gate.open.set()
    rounds.close()
    assert gate.calls[-1] == "client 3"


def test_threads_that_share_an_iterator_get_each_cohort_once(monkeypatch):
    """They used to start a thread each, and both got the first rounds."""
    entered, start = threading.Barrier(2, timeout=5), Prefetch.__init__

    def both_first(self, *given):  # a second thread comes here too, if nothing keeps it out
        with contextlib.suppress(threading.BrokenBarrierError):
            entered.wait(0.2)
        start(self, *given)

    monkeypatch.setattr(Prefetch, "__init__", both_first)
    with fax.data.cohorts(population(), 2, 4) as rounds:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda _: next(rounds), range(2)))
        keys = {jax.random.key_data(cohort.keys).tobytes() for cohort in found}
        assert (len(keys), rounds.round) == (2, 2)


def test_a_closed_iterator_has_no_more_rounds():
    with fax.data.cohorts(population(), 2, 4) as rounds:
        rounds.take(2)
    with pytest.raises(fax.data.DataError, match="take: the iterator is closed"):
        rounds.take(2)


def test_errors_of_the_thread_arrive_when_they_are_due():
    class Broken:
        def __init__(self):
            self.data = population()

        def client_ids(self):
            return self.data.client_ids()

        def __len__(self):
            return 12

        def num_examples(self, client_id):
            return self.data.num_examples(client_id)

        def client(self, client_id):
            if client_id == "client 7":
                raise OSError("the disk is gone")
            return self.data.client(client_id)

    before = set(threads())
    order = [[0, 1], [2, 3], [6, 7], [8, 9]]
    rounds = fax.data.cohorts(Broken(), 2, 4, sampler=order.__getitem__, resident=False)
    assert sorted(chosen(rounds, 2)[1]) == [2, 3]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(rounds)
    assert until(lambda: not set(threads()) - before)


def test_collecting_garbage_waits_for_nobody():
    """Whoever collects may hold a lock that the thread needs."""
    lock, reading = threading.Lock(), threading.Event()

    class Locked:
        def __init__(self):
            self.data = population()

        def client_ids(self):
            return self.data.client_ids()

        def __len__(self):
            return 12

        def num_examples(self, client_id):
            return self.data.num_examples(client_id)

        def client(self, client_id):
            reading.set()
            with lock:
                return self.data.client(client_id)

    before = set(threads())
    rounds = fax.data.cohorts(Locked(), 2, 4, resident=False)
    next(rounds)
    cycle = [rounds]
    cycle.append(cycle)
    with lock:
        reading.clear()
        del rounds, cycle
        collector = threading.Thread(target=gc.collect, daemon=True)
        collector.start()
        collector.join(20)
        assert not collector.is_alive()
    assert until(lambda: not set(threads()) - before)


def test_an_iterator_does_not_wait_for_a_thread_that_is_gone():
    """As in a process that was forked, which has the iterator and not its thread."""
    rounds = fax.data.cohorts(population(), 2, 4)
    next(rounds)
    thread = rounds._items._thread
    rounds._items._stop.set()
    thread.join()
    rounds._items._stop.clear()
    with pytest.raises(RuntimeError, match="forked"):
        chosen(rounds, 5)


def test_an_iterator_is_of_one_process(monkeypatch):
    """In another one, which was forked before its thread began, JAX would hang."""
    rounds = fax.data.cohorts(population(), 2, 4)
    with pytest.raises(TypeError, match=r"iterator cannot be pickled.*Make one in each process"):
        pickle.dumps(rounds)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    for use in (lambda: next(rounds), lambda: rounds.take(1)):
        with pytest.raises(RuntimeError, match=r"forked.*get_context\(.spawn.\)"):
            use()


def test_a_sampler_that_runs_out_does_not_end_the_loop_in_silence():
    order = iter([[0, 1], [2, 3]])
    rounds = fax.data.cohorts(population(), 2, 4, sampler=lambda r: next(order))
    with pytest.raises(RuntimeError, match="round 2 raised StopIteration"):
        list(rounds)


def test_the_interpreter_ends_while_the_thread_works():
    code = """
import fax, numpy as np
data = fax.data.InMemory({i: {"x": np.ones(4, np.float32)} for i in range(5)})
held = fax.data.cohorts(data, 2, 2)
dropped = fax.data.cohorts(data, 2, 2)
next(held), next(dropped)
del dropped
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_the_interpreter_does_not_wait_for_a_function_that_is_stuck():
    code = """
import threading, numpy as np, fax
from fax.data import _prefetch
_prefetch._JOIN_SECONDS = 0.1
here = threading.Event()
def stuck(client_id, examples):
    if client_id == "b":
        here.set()
        threading.Event().wait()
    return examples
data = fax.data.map(fax.data.InMemory({i: {"x": np.ones(3)} for i in "ab"}), stuck)
rounds = fax.data.cohorts(data, 1, 1, sampler=lambda r: [r], resident=False)
next(rounds)
here.wait()
"""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0
    assert "is still in stuck (<string>, line 9), for client 'b'." in ended.stderr


def test_the_thread_has_the_settings_of_whoever_made_the_iterator():
    long = np.ones(2, np.longdouble)  # JAX has no such dtype
    clients = {
        "ann": {"x": np.array([1, 2]), "long": long},
        "bob": {"x": np.array([3, 2**40]), "long": long},
    }
    with jax.enable_x64(False):
        rounds = fax.data.cohorts(Unchecked(clients), 1, 2, sampler=lambda r: [r], resident=False)
    cohort = next(rounds)
    assert cohort.batches["x"].dtype == jnp.int32
    assert cohort.batches["long"].dtype == jnp.float32
    with pytest.raises(fax.data.DataError, match=r"'bob', feature 'x' has numbers such as 10995"):
        next(rounds)


def test_nothing_is_transferred_that_was_not_asked_for():
    rounds = fax.data.cohorts(population(), 2, 4)
    jax.config.update("jax_transfer_guard", "disallow")
    try:
        next(rounds)
        rounds.take(2)
    finally:
        jax.config.update("jax_transfer_guard", None)


# Mistakes


def with_client(**features):
    clients = {f"client {i}": population().client(f"client {i}") for i in range(3)}
    return Unchecked({**clients, "odd": features})


class Unchecked:
    """Data of somebody's own, which nobody has checked."""

    def __init__(self, clients):
        self.clients = clients

    def client_ids(self):
        return list(self.clients)

    def __len__(self):
        return len(self.clients)

    def num_examples(self, client_id):
        first = next(iter(self.clients[client_id].values()))
        return len(first) if np.ndim(first) else 4

    def client(self, client_id):
        return self.clients[client_id]


LABEL = np.zeros(4, np.int32)
X = np.zeros((4, 2), np.float32)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (dict(x=X, y=LABEL[:3]), r"'odd' has 4 examples by feature 'x', but 3 by 'y'"),
        (
            dict(x=X.astype(float), y=LABEL),
            r"'odd', feature 'x' is float64\[2\] .* float32\[2\] at",
        ),
        (dict(x=X[:, :1], y=LABEL), r"'odd', feature 'x' is float32\[1\] .* float32\[2\] at"),
        (dict(x=X), r"'odd' has the features \['x'\], but client 'client 0' has \['x', 'y'\]"),
        (dict(x=np.float32(3), y=LABEL), r"'odd', feature 'x' is a scalar"),
        (dict(x=X[:0], y=LABEL[:0]), r"'odd' has no examples"),
        (
            dict(x=X + np.float32([0, np.nan]), y=LABEL),
            r"'odd', feature 'x' has 4 .* not finite",
        ),
        (dict(x=X + np.float32([0, np.inf]), y=LABEL), r"'x' has 4 .* first is inf in example 0"),
        (dict(x={"nested": X}, y=LABEL), r"'odd', feature 'x' is a dict, .* a feature of its own"),
    ],
)
def test_clients_that_differ_are_named(resident, odd, message):
    data = with_client(**odd)
    with pytest.raises(fax.data.DataError, match=message):
        next(fax.data.cohorts(data, 4, 4, resident=resident))


def test_what_num_examples_says_has_to_be_true():
    class Wrong(Unchecked):
        def num_examples(self, client_id):
            return 5 if client_id == "bob" else 4

    data = Wrong({"ann": {"y": LABEL}, "bob": {"y": LABEL}})
    with pytest.raises(
        fax.data.DataError, match=r"'bob', feature 'y' has 4 examples, .* returns 5"
    ):
        next(fax.data.cohorts(data, 2, 4))


class Counted(Unchecked):
    """Says how many examples it has, and is never read beyond its first client."""

    def __init__(self, counts, dtype=np.uint8):
        super().__init__({i: {"x": np.zeros((1, 0), dtype)} for i in range(len(counts))})
        self.counts = counts

    def num_examples(self, client_id):
        return self.counts[client_id]


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (2.5, "client 1: num_examples is 2.5, expected an int"),
        (None, "client 1: num_examples is None, expected an int"),
        (-1, "client 1 has no examples"),
        (2**31, "client 1 has 2147483648 examples, but int32 can number at most 2147483647"),
    ],
)
def test_counts_are_ints_that_an_index_holds(count, message):
    with pytest.raises(fax.data.DataError, match=message):
        fax.data.cohorts(Counted([1, count]), 1, 4)


def test_counts_of_few_bits_do_not_overflow():
    data = Unchecked({"ann": {"x": np.zeros(250)}})
    data.num_examples = lambda client_id: np.uint8(250)
    assert next(fax.data.cohorts(data, 1, 20)).mask.shape == (1, 13, 20)


def test_more_rows_than_int32_numbers_stay_on_the_host():
    data = Counted([2**30] * 3)  # whose examples take no memory
    assert not fax.data.cohorts(data, 1, 4, max_steps=1).resident
    with pytest.raises(fax.data.DataError, match="would have 3221225472 examples, but int32"):
        fax.data.cohorts(data, 1, 4, max_steps=1, resident=True)


def test_examples_are_split_only_if_the_largest_part_fits(monkeypatch):
    data = population([100, 1, 1, 1])
    monkeypatch.setattr(_resident, "_CPU_BYTES", 600)  # 103 * 12 bytes, 309 for each device
    with jax.set_mesh(meshes.mesh(clients=4)):
        assert not fax.data.cohorts(data, 4, 4).resident


@pytest.mark.parametrize("sampler", ["uniform", "minimum_reuse"])
def test_rounds_are_counted_without_overflow(sampler):
    how = dict(clients=3, batch_size=64, sampler=sampler)
    one = fax.data.cohorts(population(), **how, start=np.int8(126))
    other = fax.data.cohorts(population(), **how, start=126)
    assert chosen(one, 3) == chosen(other, 3)
    assert one.round == 129


def test_text_and_large_numbers_are_refused():
    text = Unchecked({"ann": {"words": np.array(["a", "b"]), "y": LABEL[:2]}})
    with pytest.raises(fax.data.DataError, match=r"'ann', feature 'words' has dtype <U1, but only"):
        fax.data.cohorts(text, 1, 1)
    large = Unchecked({"ann": {"x": np.array([1, 2**40]), "y": LABEL[:2]}})
    with (
        jax.enable_x64(False),
        pytest.raises(fax.data.DataError, match=r"'x' has numbers such as 1099511627776, which"),
    ):
        fax.data.cohorts(large, 1, 1)
    assert next(fax.data.cohorts(large, 1, 2)).batches["x"].max() == 2**40
    far = Unchecked({"ann": {"x": np.array([1, 1e300])}})
    with (
        jax.enable_x64(False),
        pytest.raises(fax.data.DataError, match=r"'ann', feature 'x' has numbers such as 1e\+300"),
    ):
        fax.data.cohorts(far, 1, 1)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(clients=13), "clients is 13, but data has only 12 clients"),
        (dict(clients=0), "clients is 0, expected an int of at least 1"),
        (dict(clients=2, batch_size=0), "batch_size is 0"),
        (dict(clients=2, batch_size=2.5), "batch_size is 2.5"),
        (dict(clients=2, epochs=True), "epochs is True"),
        (dict(clients=2, max_steps=0), "max_steps is 0"),
        (dict(clients=2, start=-1), "start is -1, expected an int of at least 0"),
        (dict(clients=2, seed=-1), "seed is -1"),
        (
            dict(clients=2, seed=2**40),
            "seed is 1099511627776, expected an int from 0 to 2147483647",
        ),
        (
            dict(clients=12, sampler="stream", max_steps=2, epochs=2),
            "epochs=2 has no meaning for sampler='stream'",
        ),
        (
            dict(clients=2, sampler="random"),
            "sampler is 'random', expected 'uniform'",
        ),
        (dict(clients=2, sampler="weighted"), r"sampler='weighted' needs weights=, a number for"),
        (
            dict(clients=2, weights=[1] * 12),
            r"weights are for sampler='weighted' only, but .*'uniform'",
        ),
        (
            dict(clients=2, sampler="weighted", weights=[1, 2]),
            r"weights has shape \(2,\), expected \(12,\)",
        ),
        (
            dict(clients=2, sampler="weighted", weights=[1] + [0] * 11),
            "only 1 clients have a positive",
        ),
        (dict(clients=2, sampler="weighted", weights=[-1] + [1] * 11), r"weights\[0\] is -1"),
        (dict(clients=2, sampler="stream"), "sampler='stream' needs max_steps="),
        (dict(clients=2, sampler="stream", max_steps=1), "all 12 clients of data"),
        (
            dict(clients=2, sampler=lambda r: [1]),
            r"sampler\(0\) returned int64\[1\], expected 2 ints",
        ),
        (dict(clients=2, sampler=lambda r: [1, 12]), r"positions from 1 to 12, but .* 0 to 11"),
        (dict(clients=2, sampler=lambda r: [3, 3]), r"sampler\(0\) returned the same client more"),
        (dict(clients=13, sampler=lambda r: [*range(13)]), "clients is 13, but data has only 12"),
        (dict(clients=12, batch_size=2, drop_remainder=True), r"'client 0' has fewer examples"),
    ],
)
def test_arguments_out_of_range(how, message):
    with pytest.raises(fax.data.DataError, match=message):
        next(fax.data.cohorts(population(), **{"batch_size": 4, **how}))
