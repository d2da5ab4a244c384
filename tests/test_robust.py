"""Clipping and robust aggregators against NumPy, in all settings, and against attackers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.test_util import check_grads
from problems import SIZES, Logistic, combine, numpy_batches

import fax
from fax.aggregators import (
    Aggregator,
    _non_finite,
    adaptive_clip,
    chain,
    clip_by_norm,
    geometric_median,
    krum,
    mean,
    median,
    multi_krum,
    non_finite,
    trimmed_mean,
)
from fax.algorithms import fedavg

CLIENTS = 7
WEIGHTS = np.array([3, 1, 0, 12, 5, 9, 4])  # the third client is left out
KEY = jax.random.key(3)


def updates(clients=CLIENTS, seed=0):
    rng = np.random.default_rng(seed)
    return {"w": rng.normal(size=(clients, 2, 3)), "b": rng.normal(size=(clients, 2)) + 0.5}


def rows(tree):
    """Each client's update as one vector, [clients, parameters]."""
    tree = jax.tree.map(np.asarray, tree)
    return np.concatenate([tree[k].reshape(len(tree[k]), -1) for k in ("w", "b")], axis=1)


def vector(tree):
    return np.concatenate([np.ravel(tree[k]) for k in ("w", "b")])


# Each of these is one in all tests, so that its programs are compiled once.
MEAN, MEDIAN, TRIMMED = mean(), median(), trimmed_mean(count=2)
KRUM, MULTI_KRUM = krum(2), multi_krum(2, 5)


@functools.cache
def compiled(aggregator, clients):
    @jax.jit
    @fax.program(clients=clients)
    def round(updates, weights, state):
        return aggregator.aggregate(updates, weights, state, KEY)

    return round


def run(aggregator, updates, weights=None, state=None):
    """One compiled round of the aggregator alone: the update, its state, and metrics."""
    clients = len(jax.tree.leaves(updates)[0])
    weights = np.ones(clients) if weights is None else weights
    if state is None:
        state = aggregator.init(jax.tree.map(lambda x: x[0], updates))
    return compiled(aggregator, clients)(updates, weights, state)


# The papers, in NumPy, on updates as rows


def numpy_mean(u, w):
    return w @ u / w.sum()


def numpy_clipped(u, limit):
    norms = np.sqrt((u**2).sum(1))
    return u * np.minimum(1, limit / norms)[:, None]


def numpy_median(u, w):
    return np.median(u[w != 0], axis=0)


def numpy_trimmed(u, w, b):
    u = np.sort(u[w != 0], axis=0)
    return u[b : len(u) - b].mean(0)


def numpy_krum(u, w, f, select=1):
    u = u[w != 0]
    scores = []
    for i in range(len(u)):
        squares = sorted(((u[i] - u[j]) ** 2).sum() for j in range(len(u)) if j != i)
        scores.append(sum(squares[: len(u) - f - 2]))
    return u[np.argsort(scores)[:select]].mean(0)


def numpy_weiszfeld(u, w, iterations, smoothing=1e-6):
    v = np.zeros(u.shape[1])
    for _ in range(iterations):
        beta = w / np.maximum(smoothing, np.sqrt(((v - u) ** 2).sum(1)))
        v = beta @ u / beta.sum()
    return v


AGGREGATORS = {
    "mean": (mean(), numpy_mean),
    "clipped mean": (
        chain(clip_by_norm(1.5)),
        lambda u, w: numpy_mean(numpy_clipped(u, 1.5), w),
    ),
    "median": (median(), numpy_median),
    "trimmed mean": (trimmed_mean(count=2), lambda u, w: numpy_trimmed(u, w, 2)),
    "trimmed by a fraction": (trimmed_mean(0.2), lambda u, w: numpy_trimmed(u, w, 1)),
    "krum": (krum(1), lambda u, w: numpy_krum(u, w, 1)),
    "multi krum": (multi_krum(1, 3), lambda u, w: numpy_krum(u, w, 1, 3)),
    "geometric median": (geometric_median(4), lambda u, w: numpy_weiszfeld(u, w, 4)),
}


PARAMS = {"w": np.linspace(0, 1, 6).reshape(2, 3), "b": np.array([2.0, -1.0])}


@functools.cache
def round_with_all(at_once):
    """With all aggregators in one, so that a setting compiles a single program."""

    @jax.jit
    @fax.program(clients=CLIENTS)
    def round(params, data, weights):
        sent = fax.map(
            lambda p, d: jax.tree.map(lambda p, d: jnp.tanh(p) * d + p**2, p, d),
            fax.broadcast(params),
            data,
            vectorize=at_once,
        )
        return sent, {
            name: aggregator.aggregate(sent, weights, aggregator.init(()), KEY)[0]
            for name, (aggregator, _) in AGGREGATORS.items()
        }

    return round


@pytest.mark.always("a mesh of 2")
@pytest.mark.parametrize("name", problems.EACH_SETTING)
def test_aggregators_are_those_of_the_papers(name):
    """Of gradients that clients compute, so that maps fuse, on meshes and side by side."""
    data = updates()
    context, at_once = problems.setting(name)
    with context:
        sent, found = jax.device_get(round_with_all(at_once)(PARAMS, data, WEIGHTS))
    u = rows({k: np.tanh(PARAMS[k]) * data[k] + PARAMS[k] ** 2 for k in data})
    np.testing.assert_allclose(rows(sent), u, rtol=1e-12)
    for key, (_, expected) in AGGREGATORS.items():
        assert jax.tree.map(np.shape, found[key]) == jax.tree.map(np.shape, PARAMS)
        np.testing.assert_allclose(vector(found[key]), expected(u, WEIGHTS), rtol=1e-10)


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 5])
def test_median_of_few_clients(clients):
    u = updates(clients)
    found, _, _ = run(MEDIAN, u)
    np.testing.assert_allclose(vector(found), np.median(rows(u), axis=0), rtol=1e-12)


def test_no_client_that_counts_gives_zero():
    _, found = round_with_all(1)(PARAMS, updates(), np.zeros_like(WEIGHTS))
    for name in AGGREGATORS:
        assert not vector(found[name]).any(), name


def test_trimming_adapts_to_who_is_left():
    """With four of seven left and two trimmed on each side, the middle two are averaged."""
    weights = np.array([1.0, 0, 0, 1, 1, 0, 1])
    found, _, _ = run(TRIMMED, updates(), weights)
    expected = np.median(rows(updates())[weights != 0], axis=0)
    np.testing.assert_allclose(vector(found), expected, rtol=1e-12)


@pytest.mark.parametrize(("fraction", "clients", "b"), [(0.29, 100, 29), (0.3, 10, 3), (0, 5, 0)])
def test_a_fraction_is_rounded_down_but_not_by_its_rounding_error(fraction, clients, b):
    x = np.random.default_rng(0).normal(size=clients)
    for given in (fraction, jnp.float32(fraction)):
        found, _, _ = run(trimmed_mean(given), x)
        np.testing.assert_allclose(found, np.sort(x)[b : clients - b].mean(), rtol=1e-12)


def test_weiszfeld_converges_to_the_geometric_median():
    u, w = updates(), WEIGHTS
    found = vector(run(geometric_median(300), u, w)[0])
    np.testing.assert_allclose(found, numpy_weiszfeld(rows(u), w, 2000), rtol=1e-6)
    large = (5000 * w).astype(np.float16)  # of which twice the largest would be infinite
    few = vector(run(FEW_AND_MANY[0], u, large)[0])
    np.testing.assert_allclose(few, numpy_weiszfeld(rows(u), large.astype(float), 3), rtol=1e-6)

    def total(v):
        return w @ np.sqrt(((rows(u) - v) ** 2).sum(1))

    rng = np.random.default_rng(1)
    nearby = [total(found + 1e-3 * rng.normal(size=found.size)) for _ in range(50)]
    assert total(found) <= min(nearby)


# Attackers


def attacked(attack, honest=5, attackers=2):
    """The honest updates, and those with attackers among them."""
    good, bad = updates(honest), updates(attackers, seed=1)
    bad = jax.tree.map(lambda x: np.full_like(x, attack) if np.isscalar(attack) else x, bad)
    order = np.random.default_rng(2).permutation(honest + attackers)
    return rows(good), jax.tree.map(lambda g, b: np.concatenate([g, b])[order], good, bad)


ATTACKS = [1e30, -1e200, np.inf, -np.inf, np.nan]


@pytest.mark.parametrize("aggregator", [MEDIAN, TRIMMED, trimmed_mean(0.3), KRUM, MULTI_KRUM])
def test_attackers_cannot_leave_the_honest_hull(aggregator):
    for attack in ATTACKS:
        good, everyone = attacked(attack)
        found = vector(run(aggregator, everyone)[0])
        assert (found >= good.min(0)).all(), attack
        assert (found <= good.max(0)).all(), attack


FEW_AND_MANY = geometric_median(3), geometric_median(100)


@pytest.mark.parametrize("attack", [1e30, -1e200, 50.0])
def test_attackers_cannot_move_the_geometric_median_far(attack):
    """Less than half of the weight moves it by at most 2 (1 - α) / (1 - 2 α) honest radii."""
    good, everyone = attacked(attack)
    center, share = good.mean(0), 2 / 7
    radius = np.sqrt(((good - center) ** 2).sum(1)).max()
    bound = 2 * (1 - share) / (1 - 2 * share) * radius
    for aggregator in FEW_AND_MANY:
        found = vector(run(aggregator, everyone)[0])
        assert np.linalg.norm(found - center) <= bound


@pytest.mark.parametrize("attack", ATTACKS)
def test_attackers_own_the_mean(attack):
    good, everyone = attacked(attack)
    found = vector(run(MEAN, everyone)[0])
    assert not ((found >= good.min(0)) & (found <= good.max(0))).any()


def test_krum_takes_an_honest_update_and_says_which():
    """Attackers that agree with one another lie close together, and are too few all the same."""
    good, everyone = attacked(40.0)
    found, _, metrics = run(KRUM, everyone)
    (chosen,) = np.flatnonzero(metrics["clients/chosen"])
    np.testing.assert_array_equal(vector(found), rows(everyone)[chosen])
    assert (vector(found) == good).all(1).any()
    _, _, metrics = run(MULTI_KRUM, everyone)
    assert metrics["clients/chosen"].sum() == 5
    assert not (rows(everyone)[np.asarray(metrics["clients/chosen"])] == 40).any()


def test_krum_chooses_among_who_is_left():
    """Two of six may be attackers, so four are averaged; one that is alone is chosen."""
    good, everyone = attacked(40.0)
    weights = np.ones(7)
    weights[np.flatnonzero((rows(everyone) == good[0]).all(1))] = 0
    found, _, metrics = run(MULTI_KRUM, everyone, weights)
    assert metrics["clients/chosen"].sum() == 4
    np.testing.assert_allclose(vector(found), good[1:].mean(0), rtol=1e-12)
    for aggregator in (KRUM, MULTI_KRUM):
        found, _, _ = run(aggregator, everyone, 1.0 * (np.arange(7) == 6))
        np.testing.assert_array_equal(vector(found), rows(everyone)[6])


# Clipping


def test_clipping_by_a_norm():
    u, w = updates(), WEIGHTS
    limit = 2.0
    found, _, metrics = run(chain(clip_by_norm(limit), mean()), u, w)
    norms = np.linalg.norm(rows(u), axis=1)
    assert 0 < (norms > limit).sum() < CLIENTS
    np.testing.assert_allclose(vector(found), numpy_mean(numpy_clipped(rows(u), limit), w))
    np.testing.assert_allclose(metrics["clipped"], (norms > limit)[w != 0].mean())
    assert metrics["clip_norm"] == limit


@jax.jit
@fax.program(clients=2)
def clipped_to(updates, limit):
    return chain(clip_by_norm(limit)).aggregate(updates, np.ones(2), ((), ()), KEY)[0]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_directions_survive_where_squares_overflow(scale, dtype):
    u = np.array([[3.0, 4.0], [0.0, 0.0]]) * scale
    found = clipped_to(u.astype(dtype), 0.5 * scale)
    assert found.dtype == dtype
    expected = 0.25 * scale * np.array([0.6, 0.8])
    np.testing.assert_allclose(np.asarray(found, float), expected, rtol=1e-2)


def test_the_norm_adapts_as_in_the_paper():
    clip = chain(adaptive_clip(0.3, initial_clip_norm=0.5, learning_rate=0.7))
    u, w = updates(), WEIGHTS
    state, norm = clip.init({"w": u["w"][0], "b": u["b"][0]}), 0.5
    for _ in range(5):
        found, state, metrics = run(clip, u, w, state)
        np.testing.assert_allclose(metrics["clip_norm"], norm, rtol=1e-12)
        np.testing.assert_allclose(vector(found), numpy_mean(numpy_clipped(rows(u), norm), w))
        b = (np.linalg.norm(rows(u), axis=1) <= norm)[w != 0].mean()
        np.testing.assert_allclose(metrics["clipped"], 1 - b)
        norm *= np.exp(-0.7 * (b - 0.3))


@jax.jit
@fax.program(clients=200)
def adapted_norms(quantile):
    aggregator = chain(adaptive_clip(quantile, initial_clip_norm=1e-4))

    def round(state, key):
        size = fax.map(lambda k: jnp.exp(jax.random.normal(k)), fax.keys(key))
        _, state, _ = aggregator.aggregate(size, fax.broadcast(1.0), state, key)
        return state, jax.tree.leaves(state)[0]

    return jax.lax.scan(round, aggregator.init(jnp.zeros(())), jax.random.split(KEY, 800))[1]


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.8])
def test_the_norm_converges_to_the_quantile(quantile):
    """From far away, in one compiled loop, of norms that are new in each round."""
    norms = np.asarray(adapted_norms(quantile))[-100:]
    below = (np.exp(np.random.default_rng(0).normal(size=100_000)) <= float(norms.mean())).mean()
    assert abs(below - quantile) < 0.03


# Updates that are not finite


def poisoned(u, *clients):
    u = jax.tree.map(np.array, u)
    for i, value in zip(clients, itertools.cycle([np.nan, np.inf, -np.inf])):
        u["w"][i, 1, 1] = value
    return u


@pytest.mark.parametrize("after", [MEAN, MEDIAN, geometric_median()])
def test_dropped_clients_are_as_if_they_had_not_been(after):
    u, gone = updates(), [1, 5]
    found, _, metrics = run(chain(non_finite("drop"), after), poisoned(u, *gone), WEIGHTS)
    assert metrics["non_finite"] == 2
    left = np.delete(np.arange(CLIENTS), gone)
    expected, _, _ = run(after, jax.tree.map(lambda x: x[left], u), WEIGHTS[left])
    np.testing.assert_allclose(vector(found), vector(expected), rtol=1e-12)


def test_a_weight_that_is_not_finite_is_dropped():
    weights = np.array([1, np.nan, 1, np.inf, 1, 1, 1])
    found, _, metrics = run(chain(non_finite("drop")), updates(), weights)
    assert metrics["non_finite"] == 2
    np.testing.assert_allclose(vector(found), rows(updates())[np.isfinite(weights)].mean(0))


@pytest.mark.always("after1", "after3")
@pytest.mark.parametrize("after", [(), (clip_by_norm(0.1),), (median(),), (geometric_median(),)])
def test_no_derivative_comes_from_a_dropped_client(after):
    """Not even through its local training, which is singular: the logarithm of zero."""
    aggregator = chain(non_finite("drop"), *after)
    x = np.array([[1.0, 2.0], [0.0, 3.0], [2.0, 1.0], [1.5, 3.0]])

    def loss(params, x):
        @fax.program(clients=len(x))
        def round(params, x):
            sent = fax.map(
                jax.checkpoint(lambda p, x: jnp.log(p * x) * p), fax.broadcast(params), x
            )
            state = aggregator.init(params)
            return aggregator.aggregate(sent, np.ones(len(x)), state, KEY)[0]

        return jnp.sum(round(params, x) ** 2)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    params = jnp.array([2.0, 3.0])
    by_params, by_x = gradient(params, x)
    left = np.array([0, 2, 3])
    expected, expected_x = gradient(params, x[left])
    np.testing.assert_allclose(by_params, expected, rtol=1e-10)
    np.testing.assert_allclose(by_x[left], expected_x, rtol=1e-10, atol=1e-14)
    assert not by_x[1].any()


@pytest.mark.parametrize("name", ["jitted", "a mesh of 2", "a mesh of 4 x 2"])
def test_a_round_fails_for_updates_that_are_not_finite(name):
    aggregator = chain(non_finite("raise"))
    context, _ = problems.setting(name)
    message = r"FloatingPointError: fax.aggregators.non_finite: 2 of 8 .* in rows 3, 6 of"
    with context:
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(run(aggregator, poisoned(updates(8), 3, 6)))
        # Rounds that follow are not affected.
        found, _, metrics = run(aggregator, updates(8))
        jax.block_until_ready(found)
        jax.effects_barrier()
    assert metrics["non_finite"] == 0


# In training


def test_a_message_names_ten_clients_at_most():
    for clients, rest in ((10, ""), (11, ", ...")):
        message = f"{clients} of 12 clients .* rows 0, 1, .*, 9{rest} of the cohort"
        with pytest.raises(FloatingPointError, match=message):
            _non_finite._raise_unless_all(np.arange(12) >= clients)


@pytest.mark.long
def test_fedavg_trains_with_a_chain_of_them():
    data = problems.data()
    clients = {id: dict(data.client(id)) for id in data.client_ids()}
    spoiled = list(clients)[3]
    clients[spoiled]["x"] = np.full_like(clients[spoiled]["x"], 1e200)
    cohorts = fax.data.cohorts(fax.data.InMemory(clients), 6, 4)
    aggregator = chain(non_finite("drop"), clip_by_norm(1.0), median())
    algorithm = fedavg(Logistic.loss, optax.sgd(0.3), aggregator=aggregator)
    state, expected = algorithm.init(Logistic.start()), Logistic.start()
    step = jax.jit(algorithm.round)
    for _, cohort in zip(range(3), cohorts):
        state, metrics = step(state, cohort)
        assert metrics["non_finite"] == 1
        np.testing.assert_array_equal(metrics["clients/bits"], 64 * 15)
        sent = []
        for batches, client in zip(numpy_batches(cohort), cohort.positions):
            if client == 3:
                continue
            params = expected
            for x, y in batches:
                _, gradient = Logistic.losses_and_gradient(params, x, y)
                params = combine(lambda p, g: p - 0.3 * g, params, gradient)
            sent.append(combine(np.subtract, params, expected))
        flat = np.stack([vector(u) for u in sent])
        assert len(flat) == len(SIZES) - 1
        move = numpy_median(numpy_clipped(flat, 1.0), np.ones(len(flat)))
        new = vector(expected) + move
        expected = {"w": new[:12].reshape(4, 3), "b": new[12:]}
        problems.assert_trees_close(state.params, expected)


@pytest.mark.always("aggregator0", "aggregator3")
@pytest.mark.parametrize(
    "aggregator",
    [
        chain(clip_by_norm(1.0)),
        median(),
        trimmed_mean(count=1),
        geometric_median(),
        multi_krum(1, 3),
    ],
)
def test_derivatives(aggregator):
    u = updates(5)

    def value(u):
        return vector_sum(run(aggregator, u)[0])

    def vector_sum(tree):
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(tree))

    check_grads(jax.jit(value), (u,), order=1, modes=("fwd", "rev"), rtol=1e-5)


def test_clipping_nothing_has_a_derivative():
    aggregators = chain(clip_by_norm(1.0)), geometric_median()

    @jax.jit
    def gradients(u):
        return [jax.grad(lambda u, a=a: run(a, u)[0].sum())(u) for a in aggregators]

    for gradient in gradients(np.zeros((3, 2))):
        np.testing.assert_allclose(gradient, np.full((3, 2), 1 / 3))


def test_only_what_needs_rows_collects_them():
    def text(aggregator):
        @fax.program(clients=5)
        def round(u):
            return aggregator.aggregate(u, jnp.ones(5), aggregator.init(u), KEY)[0]

        return str(jax.make_jaxpr(round)(np.ones((5, 3))))

    for sums in (mean(), chain(non_finite(), adaptive_clip()), geometric_median()):
        assert "collect[" not in text(sums)
    for every in (median(), trimmed_mean(0.1), krum(1)):
        assert "collect[" in text(every)


def test_memory_of_what_sums_does_not_grow_with_the_cohort():
    aggregator = chain(non_finite("drop"), clip_by_norm(1.0), adaptive_clip())

    def temporary(clients):
        @fax.program(clients=clients)
        def round(w, x):
            sent = fax.map(lambda w, x: jnp.outer(x, x) @ w, fax.broadcast(w), x)
            return aggregator.aggregate(sent, jnp.ones(clients), aggregator.init(w), KEY)

        args = np.ones((300, 300)), np.ones((clients, 300))
        compiled = jax.jit(round).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (8 * 300 * 300)

    few, many = temporary(4), temporary(64)
    assert many < few + 0.3


def test_bits():
    u = {"w": np.ones((5, 10), np.float32), "b": np.ones((5, 3), np.float64)}
    everything = 10 * 32 + 3 * 64

    @jax.jit
    @fax.program(clients=5)
    def bits(u):
        found = []
        for aggregator in (MEDIAN, krum(1), chain(non_finite()), geometric_median(3)):
            state = aggregator.init(jax.tree.map(lambda x: x[0], u))
            metrics = aggregator.aggregate(u, np.ones(5), state, KEY)[2]
            found.append(metrics["clients/bits"])
        return found

    *others, rounds = bits(u)
    for own in others:
        np.testing.assert_array_equal(own, [everything] * 5)
    np.testing.assert_array_equal(rounds, [3 * (everything + 32)] * 5)


# Mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: clip_by_norm(0), r"clip_by_norm: clip_norm is 0, expected a number above 0"),
        (lambda: clip_by_norm(np.nan), "clip_norm is nan"),
        (lambda: clip_by_norm("one"), "clip_norm is 'one'"),
        (lambda: adaptive_clip(1.0), "quantile is 1.0, expected a number above 0 and below 1"),
        (
            lambda: adaptive_clip(initial_clip_norm=-1),
            "initial_clip_norm is -1, expected a number above 0",
        ),
        (lambda: adaptive_clip(learning_rate=0), "learning_rate is 0"),
        (lambda: trimmed_mean(), "fraction is None and count is None, expected one of the two"),
        (lambda: trimmed_mean(0.1, count=1), "fraction is 0.1 and count is 1"),
        (lambda: trimmed_mean(0.5), "fraction is 0.5, expected a number of at least 0 and below 0"),
        (lambda: trimmed_mean(count=-1), "count is -1, expected an int of at least 0"),
        (lambda: krum(1.5), "byzantine is 1.5, expected an int"),
        (lambda: multi_krum(1, 0), "select is 0, expected an int of at least 1"),
        (lambda: geometric_median(0), "iterations is 0"),
        (lambda: geometric_median(smoothing=0.0), "smoothing is 0.0"),
        (lambda: non_finite("ignore"), "policy is 'ignore', expected 'drop' or 'raise'"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_only_real_floats_have_an_order_and_a_norm(dtype):
    limits = dict(clip_norm=1.0, noise_multiplier=1.0)
    parts = [
        *(median(), trimmed_mean(0.1), geometric_median(), clip_by_norm(1.0), adaptive_clip()),
        *(fax.aggregators.gaussian(**limits), fax.aggregators.laplace(**limits)),
        fax.aggregators.dp_ftrl(**limits, num_clients=9, separation=2, participations=1),
    ]
    message = rf"updates\['n'\] is {dtype}\[(5,)?2\], expected an array of real floats"
    for part in parts:
        with pytest.raises(ValueError, match=message):
            part.init({"n": jnp.zeros(2, dtype)})
        call = getattr(part, "aggregate", None) or part.update
        with pytest.raises(ValueError, match=message):
            call({"n": jnp.zeros((5, 2), dtype)}, np.ones(5), (), KEY)


def test_arguments_at_the_ends_of_their_ranges():
    made = trimmed_mean(0), trimmed_mean(count=0), geometric_median(1), krum(0), multi_krum(0, 1)
    assert all(isinstance(aggregator, Aggregator) for aggregator in made)


@pytest.mark.parametrize(
    ("aggregator", "message"),
    [
        (krum(2), "krum: byzantine is 2 in a round of 6 clients, expected at most 1. .* 7 cl"),
        (
            multi_krum(3, 1),
            "byzantine is 3 in a round of 6 .*, expected at most 1. .* at least 9 cl",
        ),
        (
            multi_krum(1, 6),
            r"select is 6 in a round of 6 clients with byzantine=1, expected at most 5",
        ),
        (trimmed_mean(count=3), r"count is 3, which leaves none of the 6 .* at most 2"),
    ],
)
def test_too_few_clients(aggregator, message):
    with pytest.raises(ValueError, match=message):
        run(aggregator, updates(6))
