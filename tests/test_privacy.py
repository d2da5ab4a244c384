"""Private means: their noise, against the papers in NumPy, and what they cost."""

import functools
import itertools
import math
import sys

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from dp_accounting import pld
from problems import Logistic

import fax
from fax.aggregators import (
    Budget,
    NoiseState,
    PrivacyBudgetError,
    _accounting,
    adaptive_clip,
    calibrate,
    chain,
    epsilon,
    non_finite,
    releases,
    renewed,
)
from fax.algorithms import fedavg, many_rounds

CLIENTS = 5
WEIGHTS = np.array([3, 1, 0, 12, 5])  # the third client is left out
KEY = jax.random.key(5)
DRAWS = 10_000

# Every test has the same noise in each run.
gaussian, laplace, dp_ftrl = (
    functools.partial(private, key=jax.random.key(7))
    for private in (fax.aggregators.gaussian, fax.aggregators.laplace, fax.aggregators.dp_ftrl)
)


def updates(seed=0):
    rng = np.random.default_rng(seed)
    return {"w": rng.normal(size=(CLIENTS, 2, 3)), "b": rng.normal(size=(CLIENTS, 2)) + 0.5}


def rows(tree):
    return np.concatenate([np.reshape(tree[k], (len(tree[k]), -1)) for k in leaves(tree)], axis=1)


def vector(tree):
    return np.concatenate([np.ravel(tree[k]) for k in leaves(tree)])


def leaves(tree):
    return [k for k in ("w", "b") if k in tree]


@functools.cache
def one_round(aggregator, clients=CLIENTS):
    @fax.program(clients=clients)
    def round(updates, weights, state, key):
        return aggregator.aggregate(updates, weights, state, key)

    return round


def first(tree):
    return jax.tree.map(lambda x: x[0], tree)


def run(aggregator, updates, weights=WEIGHTS, state=None, key=KEY):
    state = aggregator.init(first(updates)) if state is None else state
    clients = len(jax.tree.leaves(updates)[0])
    update, *rest = jax.jit(one_round(aggregator, clients))(updates, weights, state, key)
    assert jax.tree.map(jnp.shape, update) == jax.tree.map(lambda x: x.shape[1:], updates)
    return update, *rest


def draws(aggregator, updates, count=DRAWS):
    """The update, state and metrics of a round with so many keys, each with a leading axis."""
    state = aggregator.init(first(updates))
    each = jax.vmap(one_round(aggregator), in_axes=(None, None, None, 0))
    return jax.jit(each)(updates, WEIGHTS, state, jax.random.split(KEY, count))


def clipped(u, limit, order=2):
    norms = np.linalg.norm(u, order, axis=1)
    return u * np.minimum(1, limit / norms)[:, None]


# Means and their noise


@pytest.mark.always("a mesh of 4 x 2")
@pytest.mark.parametrize("name", problems.EACH_SETTING)
def test_without_noise_it_is_the_unweighted_mean_of_clipped_updates(name):
    """Of one leaf, for noise is drawn for each, and takes most of the time to compile."""
    data, (context, at_once) = {"w": updates()["w"]}, problems.setting(name)
    aggregators = {
        "gaussian": gaussian(2.0, 0.0),
        "laplace": laplace(3.0, 0.0),
        "adaptive": gaussian(2.0, 0.0, quantile=0.5),
        "ftrl": dp_ftrl(2.0, 0.0, num_clients=9, separation=3, participations=2),
    }

    @jax.jit
    @fax.program(clients=CLIENTS)
    def round(data, states, expected):
        sent = fax.map(lambda d: jax.tree.map(jnp.sin, d), data, vectorize=at_once)
        traced = {"of 8": gaussian(2.0, 0.0, expected_clients=expected)}
        return {
            name: aggregator.aggregate(sent, WEIGHTS, states[name], KEY)[0]
            for name, aggregator in (aggregators | traced).items()
        }

    states = {name: aggregator.init(first(data)) for name, aggregator in aggregators.items()}
    states["of 8"] = aggregators["gaussian"].init(first(data))
    members = states["ftrl"].members.rows
    members = fax.aggregators.PerClient({k: v[:CLIENTS] for k, v in members.items()})
    states["ftrl"] = states["ftrl"]._replace(members=members)
    with context:
        found = jax.tree.map(np.asarray, round(data, states, 8.0))
    u = np.sin(rows(data))
    by_norm = clipped(u, 2.0)[WEIGHTS != 0].sum(0)
    for name in ("gaussian", "adaptive", "ftrl"):
        np.testing.assert_allclose(vector(found[name]), by_norm / 5, rtol=1e-10)
    np.testing.assert_allclose(vector(found["of 8"]), by_norm / 8, rtol=1e-10)
    by_l1 = clipped(u, 3.0, 1)[WEIGHTS != 0].sum(0)
    np.testing.assert_allclose(vector(found["laplace"]), by_l1 / 5, rtol=1e-10)


# The others differ in the number of clients, and in the matrix that the test of prefix sums has.
@pytest.mark.always("aggregator1-1.2-3", "aggregator2-0.8485281374238571-6")
@pytest.mark.parametrize(
    ("aggregator", "deviation", "kurtosis"),
    [
        (gaussian(2.0, 1.5), 2.0 * 1.5 / CLIENTS, 3),
        (gaussian(2.0, 1.5, expected_clients=2.5), 2.0 * 1.5 / 2.5, 3),
        (laplace(2.0, 1.5), 2.0 * 1.5 * 2**0.5 / CLIENTS, 6),
        # One band is independent noise, for three rounds that a client takes part in.
        (
            dp_ftrl(2.0, 1.5, num_clients=CLIENTS, separation=2, participations=3, bands=1),
            2.0 * 1.5 * 3**0.5 / CLIENTS,
            3,
        ),
    ],
)
def test_noise_has_the_promised_variance_and_shape(aggregator, deviation, kurtosis):
    found = draws(aggregator, updates())[0]
    found = np.concatenate([np.reshape(found[k], (DRAWS, -1)) for k in ("w", "b")], axis=1)
    noise = found - found.mean(0)
    # Four standard errors of the variance of all coordinates together.
    error = 4 * np.sqrt((kurtosis - 1) / noise.size)
    assert abs(noise.var() / deviation**2 - 1) < error
    assert abs((noise**4).mean() / noise.var() ** 2 / kurtosis - 1) < 0.1
    correlations = np.corrcoef(noise.T) - np.eye(8)
    assert np.abs(correlations).max() < 5 / np.sqrt(DRAWS)  # leaves are independent, too
    quiet = rows(updates())[WEIGHTS != 0]
    if hasattr(aggregator.init(()), "norm"):  # of gaussian
        m = 2.0 * 1.5 / deviation
        expected = clipped(quiet, 2.0).sum(0) / m
        assert np.abs(found.mean(0) - expected).max() < 5 * deviation / np.sqrt(DRAWS)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_noise_keeps_the_dtype_of_the_model(dtype):
    u = jax.ShapeDtypeStruct((CLIENTS, 3, 4), dtype)
    for aggregator in (
        gaussian(1.0, 1.0),
        laplace(1.0, 1.0),
        gaussian(1.0, 1.0, quantile=0.5, count_noise=3.0),
    ):
        state = aggregator.init(np.ones((3, 4), dtype))
        update, *_ = jax.eval_shape(one_round(aggregator), u, WEIGHTS, state, KEY)
        assert update.dtype == dtype


QUIET = {2: gaussian(2.0, 0.0), 1: laplace(2.0, 0.0)}  # by the order of the norm


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("aggregator", QUIET.values())
def test_a_client_that_cannot_be_clipped_is_left_out(aggregator, bad):
    u = updates()
    found, _, _ = run(aggregator, {**u, "b": np.where(np.arange(5)[:, None] == 1, bad, u["b"])})
    expected, _, _ = run(aggregator, u, np.where(np.arange(5) == 1, 0, WEIGHTS))
    np.testing.assert_allclose(vector(found), vector(expected), rtol=1e-12)


def test_no_client_moves_the_sum_by_more_than_the_norm():
    """Sensitivity: of what a client can send, with any weight, in the units of the noise."""
    for order, aggregator in QUIET.items():
        u, round = updates(), jax.jit(one_round(aggregator))
        state = aggregator.init(first(u))
        without = vector(round(u, np.array([1, 1, 1, 1, 0]), state, KEY)[0]) * CLIENTS
        for sent, weight in itertools.product([1e-3, 1.0, 1e30, 1e300, np.nan], [1, 1000]):
            attack = jax.tree.map(np.copy, u)
            attack["w"][4], attack["b"][4] = sent, -sent
            found, _, _ = round(attack, np.array([1, 1, 1, 1, weight]), state, KEY)
            found = vector(found) * CLIENTS
            assert np.linalg.norm(found - without, order) <= 2.0 * (1 + 1e-12)


# The norm that adapts


def test_the_norm_adapts_as_in_the_paper():
    private = gaussian(0.7, 0.0, quantile=0.3, learning_rate=0.5, count_noise=1e-9)
    u, norm = updates(), 0.7
    state, round = private.init(first(u)), jax.jit(one_round(private))
    for _ in range(6):
        found, state, metrics = round(u, WEIGHTS, state, KEY)
        np.testing.assert_allclose(metrics["clip_norm"], norm, rtol=1e-8)
        expected = clipped(rows(u), norm)[WEIGHTS != 0].sum(0) / CLIENTS
        np.testing.assert_allclose(vector(found), expected, rtol=1e-7)
        inside = np.linalg.norm(rows(u), axis=1)[WEIGHTS != 0] <= norm
        norm *= np.exp(-0.5 * ((inside - 0.5).sum() / CLIENTS + 0.5 - 0.3))


def test_noise_is_split_between_updates_and_the_count():
    z, sigma = 1.5, 2.0
    private = gaussian(2.0, z, quantile=0.5, learning_rate=0.2, count_noise=sigma)
    found, (_, norm), _ = draws(private, updates())
    on_updates = np.concatenate([np.ravel(x - x.mean(0)) for x in found.values()]).std()
    on_updates *= CLIENTS / 2.0
    on_count = np.log(norm).std() / 0.2 * CLIENTS
    np.testing.assert_allclose(on_count, sigma, rtol=0.03)
    # Two Gaussian releases of sensitivities 1 and 1/2 are one, of multiplier z.
    np.testing.assert_allclose((on_updates**-2 + (2 * on_count) ** -2) ** -0.5, z, rtol=0.03)
    assert on_updates > z * 1.03


def test_the_private_norm_converges_to_the_quantile():
    private = gaussian(1e-3, 1.0, quantile=0.8)

    @jax.jit
    @fax.program(clients=100)
    def train(state, key):
        def round(state, key):
            size = fax.map(lambda k: jnp.exp(jax.random.normal(k)), fax.keys(key))
            _, state, _ = private.aggregate(size, fax.broadcast(1.0), state, key)
            return state, state.clip_norm

        return jax.lax.scan(round, state, jax.random.split(key, 300))[1]

    norms = train(private.init(jnp.zeros(())), KEY)[-150:]
    assert abs(math.erf(math.log(norms.mean()) / 2**0.5) / 2 + 0.5 - 0.8) < 0.03


# DP-FTRL


def factors(rounds, bands):
    """The matrix of prefix sums, and the banded square root of it, in NumPy."""
    prefix = np.tril(np.ones((rounds, rounds)))
    j = np.arange(bands)
    c = np.array([math.comb(2 * k, k) / 4**k for k in j])
    return prefix, sum(c[k] * np.eye(rounds, k=-k) for k in j)


@pytest.mark.always("4-2")
@pytest.mark.parametrize(("bands", "participations"), [(1, 1), (4, 2), (7, 3)])
def test_noise_of_prefix_sums_is_that_of_the_factorization(bands, participations):
    rounds, z, clip = 12, 1.5, 2.0
    private = dp_ftrl(
        clip,
        z,
        num_clients=2,
        separation=7,
        participations=participations,
        bands=bands,
        expected_clients=1,
    )
    zeros = jnp.zeros((2, 40))

    @jax.jit
    @jax.vmap
    def train(key):
        def round(state, key):
            update, state, _ = one_round(private, 2)(zeros, jnp.ones(2), state, key)
            return state, update

        return jax.lax.scan(round, private.init(zeros[0]), jax.random.split(key, rounds))[1]

    found = np.asarray(train(jax.random.split(KEY, 500)))  # [draws, rounds, parameters]
    prefix, c = factors(rounds, bands)
    # Where it has room for all bands, the norm of a column of C is that of the first.
    sensitivity = math.sqrt(participations) * np.linalg.norm(c[:, 0])
    scale = z * clip * sensitivity
    expected = scale * np.linalg.norm(prefix @ np.linalg.inv(c), axis=1)
    deviations = np.cumsum(found, axis=1).std(axis=(0, 2))
    np.testing.assert_allclose(deviations, expected, rtol=0.04)
    covariance = np.einsum("dtp,dsp->ts", found, found) / (500 * 40)
    inverse = np.linalg.inv(c)
    np.testing.assert_allclose(covariance, scale**2 * inverse @ inverse.T, atol=0.06 * scale**2)


def test_bands_pay():
    """At the same privacy, 16 bands leave less than half of the noise in the last model."""

    def last(bands):
        prefix, c = factors(64, bands)
        return np.linalg.norm(c[:, 0]) * np.linalg.norm((prefix @ np.linalg.inv(c))[-1])

    assert last(16) < 0.5 * last(1)


def test_sensitivity_covers_all_ways_to_take_part():
    """Of all patterns with enough distance, none moves C G by more than the noise is scaled for."""
    rounds, bands, separation, participations = 11, 3, 4, 3
    _, c = factors(rounds, bands)
    bound = math.sqrt(participations) * np.linalg.norm(c[:, 0])
    largest = 0
    for times in range(1, participations + 1):
        for pattern in itertools.combinations(range(rounds), times):
            if all(np.diff(pattern) >= separation):
                # All coefficients are positive, so that the same direction every time is worst.
                largest = max(largest, np.linalg.norm(c[:, pattern].sum(1)))
    np.testing.assert_allclose(largest, bound)


def test_clients_that_come_too_soon_or_too_often_are_refused():
    private = dp_ftrl(9.0, 0.0, num_clients=3, separation=3, participations=2, expected_clients=1)
    state, round = private.init(jnp.zeros(())), jax.jit(one_round(private, 3))
    u = np.array([1.0, 10.0, 100.0]) / 20
    # Who comes in a round, of three clients, and who is let in.
    present = ["110", "101", "010", "110", "001", "000", "100", "011"]
    allowed = ["110", "001", "000", "110", "001", "000", "000", "000"]
    for here, counts in zip(present, allowed):
        here, counts = np.array([*here], int), np.array([*counts], int)
        found, state, metrics = round(u, here, state, KEY)
        np.testing.assert_allclose(found, u @ counts, rtol=1e-12)
        assert metrics["refused"] == here.sum() - counts.sum()


@pytest.mark.long
def test_dp_ftrl_in_training_refuses_nobody_who_waits():
    """The cohorts that its docstring promises, over their last round and one more."""
    clients, num_clients, rounds = 2, 6, 7
    private = dp_ftrl(
        1.0,
        0.1,
        num_clients=num_clients,
        separation=num_clients // clients,
        participations=-(-rounds * clients // num_clients),
    )
    algorithm = fedavg(Logistic.loss, optax.sgd(0.1), aggregator=chain(non_finite(), private))
    cohorts = fax.data.cohorts(problems.data(), clients, 4, sampler="minimum_reuse")
    state, metrics = many_rounds(algorithm, algorithm.init(Logistic.start()), cohorts, rounds)
    assert not metrics["refused"].any()
    times = state.aggregator[-1].members.rows["times"]
    assert times.sum() == rounds * clients
    assert times.max() == 3
    for _ in range(3):
        state, metrics = jax.jit(algorithm.round)(state, next(cohorts))
    assert metrics["refused"] > 0


@pytest.mark.long
def test_what_is_private_in_a_round_of_fedavg():
    """The same clients in training, jitted, and what they send."""
    private = gaussian(1.0, 0.5, quantile=0.5, count_noise=0.5)
    algorithm = fedavg(Logistic.loss, optax.sgd(0.3), aggregator=chain(non_finite(), private))
    state = algorithm.init(Logistic.start())
    cohorts = fax.data.cohorts(problems.data(), 6, 4)
    state, metrics = many_rounds(algorithm, state, cohorts, 4)
    np.testing.assert_array_equal(metrics["clients/bits"], 64 * 15 + 1)
    moves = np.diff(metrics["clip_norm"], axis=0)
    assert (moves != 0).all()
    assert np.isfinite(vector(state.params)).all()


# Transformations


@pytest.mark.long
def test_noise_and_norm_can_be_swept_and_differentiated():
    u = updates()
    state = gaussian(1.0, 1.0).init(first(u))

    def mean(clip, z):
        return vector_sum(one_round(gaussian(clip, z))(u, WEIGHTS, state, KEY)[0])

    def vector_sum(tree):
        return sum(jnp.sum(x) for x in jax.tree.leaves(tree))

    clips, zs = jnp.array([0.5, 1.0, 2.0]), jnp.array([0.0, 1.0, 2.0])
    swept, known = jax.jit(jax.vmap(mean))(clips, zs), jax.jit(lambda: mean(2.0, 2.0))()
    mean = jax.jit(mean)
    np.testing.assert_allclose(swept, [mean(c, z) for c, z in zip(clips, zs)])
    np.testing.assert_allclose(swept[2], known)
    slope, h = jax.jit(jax.grad(mean, argnums=(0, 1)))(1.0, 1.0), 1e-6
    np.testing.assert_allclose(
        slope[0], (mean(1.0 + h, 1.0) - mean(1.0 - h, 1.0)) / (2 * h), rtol=1e-5
    )
    np.testing.assert_allclose(slope[1], mean(1.0, 2.0) - mean(1.0, 1.0), rtol=1e-9)


@pytest.mark.long
def test_memory_does_not_grow_with_the_cohort_and_rows_stay():
    private = gaussian(1.0, 1.0, quantile=0.5)

    def temporary(clients):
        @fax.program(clients=clients)
        def round(w, x):
            sent = fax.map(lambda w, x: jnp.outer(x, x) @ w, fax.broadcast(w), x)
            return private.aggregate(sent, jnp.ones(clients), private.init(w), KEY)

        args = np.ones((300, 300)), np.ones((clients, 300))
        assert "collect[" not in str(jax.make_jaxpr(round)(*args))
        compiled = jax.jit(round).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (8 * 300 * 300)

    few, many = temporary(40), temporary(160)
    assert many < few + 0.3


# Accounting


def composed(event, rounds, delta):
    """dp-accounting's own."""
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    return pld.PLDAccountant(relation).compose(event, rounds).get_epsilon(delta)


def test_epsilon_is_that_of_dp_accounting():
    event = dp_accounting.GaussianDpEvent(8.0)
    assert epsilon(8.0, 10, 1e-5) == composed(event, 10, 1e-5)
    sampled = dp_accounting.PoissonSampledDpEvent(0.02, dp_accounting.GaussianDpEvent(2.1))
    found = epsilon(2.1, 200, 1e-5, sampling_rate=0.02, sampling="poisson")
    assert found == composed(sampled, 200, 1e-5)
    # Whoever is missing is replaced, so the noise counts half.
    assert found == epsilon(4.2, 200, 1e-5, sampling_rate=0.02)
    sampled = dp_accounting.PoissonSampledDpEvent(0.02, dp_accounting.LaplaceDpEvent(2.0))
    found = epsilon(4.0, 50, 1e-5, sampling_rate=0.02, mechanism="laplace")
    assert found == composed(sampled, 50, 1e-5)
    everyone = epsilon(8.0, 10, 1e-5, sampling_rate=1)
    assert everyone == epsilon(8.0, 10, 1e-5)


def test_epsilon_in_closed_form():
    """The Gaussian mechanism's δ(ε), Balle and Wang, arXiv:1805.06530; Laplace is 1/z at most."""

    def phi(x):
        return math.erfc(-x / 2**0.5) / 2

    for z, rounds in ((1.0, 1), (5.0, 20), (0.6, 1)):
        found, mu = epsilon(z, rounds, 1e-4), rounds**0.5 / z
        log_tail = math.log(phi(-mu / 2 - found / mu))
        delta = phi(mu / 2 - found / mu) - math.exp(found + log_tail)
        assert 0.99e-4 < delta < 1.001e-4
    assert epsilon(2.0, 1, 1e-12, mechanism="laplace") == pytest.approx(0.5, abs=1e-3)
    assert epsilon(2.0, 3, 1e-12, mechanism="laplace") == pytest.approx(1.5, abs=1e-3)
    assert epsilon(0.0, 1, 1e-4) == math.inf
    assert epsilon(1.0, 0, 1e-4) == 0
    # Privacy loss distributions end at a delta of about 1e-15, and at losses whose exponential
    # overflows.
    assert 11.743 < epsilon(1.0, 1, 1e-30) < 12.5
    assert epsilon(1.0, 100, 1e-30, sampling_rate=0.01) < math.inf
    assert epsilon(2.0, 3, 1e-30, mechanism="laplace") == pytest.approx(1.5)
    assert epsilon(1e-4, 1, 1e-4, mechanism="laplace") == pytest.approx(1e4)
    assert epsilon(1e-4, 1, 1e-4, mechanism="laplace", sampling_rate=0.01) >= 0.99e4
    assert epsilon(1e-6, 1, 1e-4) == pytest.approx(5e11, rel=1e-4)
    assert epsilon(1e-6, 1, 1e-4, sampling_rate=0.5) >= 5e11


@pytest.mark.always("2.0")
@pytest.mark.parametrize("z", [0.8, 2.0])
def test_uniform_sampling_costs_no_more_than_epsilon_says(z):
    """One client sends 1 and all others -1: the exact divergence, by integration over the sum.

    Counting the same cohorts as Poisson samples would promise too much.
    """
    population, clients, delta = 6, 2, 1e-2
    x = np.linspace(-30, 30, 20_001)

    def density(sends):
        sums = [sum(c) for c in itertools.combinations(sends, clients)]
        return (
            np.mean([np.exp(-(((x - s) / z) ** 2) / 2) for s in sums], 0) / z / (2 * np.pi) ** 0.5
        )

    with_client, without = density([1] + [-1] * (population - 1)), density([-1] * (population - 1))

    def exact(eps):
        pairs = ((with_client, without), (without, with_client))
        return max(np.maximum(p - math.exp(eps) * q, 0).sum() * (x[1] - x[0]) for p, q in pairs)

    setting = dict(sampling_rate=clients / population)
    assert exact(epsilon(z, 1, delta, **setting)) == pytest.approx(delta, rel=1e-2)
    assert exact(epsilon(z, 1, delta, **setting, sampling="poisson")) > 1.5 * delta


def test_losses_that_are_no_privacy_have_a_coarse_resolution():
    """It is about a millionth of the largest loss."""
    assert _accounting._interval(1.0, 30, "gaussian") == 1e-4
    mu = 100**0.5 / 0.3
    assert _accounting._interval(0.3, 100, "gaussian") == pytest.approx(1e-6 * (mu**2 / 2 + 5 * mu))
    assert _accounting._interval(0.01, 10, "laplace") == pytest.approx(1e-3)


@pytest.mark.long
def test_losses_that_are_no_privacy_take_no_minutes():
    assert 600 < epsilon(0.3, 100, 1e-5) < 800
    assert 900 < epsilon(0.01, 10, 1e-5, mechanism="laplace") < 1100


# Accounting for samples takes several times as long.
@pytest.mark.parametrize("rate", [None, pytest.param(0.05, marks=pytest.mark.long)])
def test_calibrated_noise_costs_what_was_asked_for(rate):
    setting = {"sampling_rate": rate}
    z = calibrate(1.5, 5, 1e-4, **setting)
    assert 0.998 * 1.5 <= epsilon(z, 5, 1e-4, **setting) <= 1.5
    assert calibrate(jnp.asarray(1.5), 5, 1e-4, **setting) == z
    # With noise above some amount this delta alone is enough.
    assert 0.998 * 0.01 <= epsilon(calibrate(0.01, 1, 0.1), 1, 0.1) <= 0.01
    # Privacy loss distributions would be infinite here, whatever the noise.
    assert 0.998 * 1.5 <= epsilon(calibrate(1.5, 5, 1e-20), 5, 1e-20) <= 1.5


def counted(count, key=0):
    """A state after so many releases."""
    return {"own": NoiseState(jnp.array([key, 1], jnp.uint32), jnp.int32(count))}


@pytest.mark.parametrize(
    ("z", "rate"), [(6.0, None), pytest.param(4.0, 0.2, marks=pytest.mark.long)]
)
def test_a_budget_is_spent_release_by_release(z, rate):
    setting = dict(delta=1e-4, noise_multiplier=z, sampling_rate=rate)
    budget = Budget(1.25, **setting)
    assert epsilon(rounds=budget.rounds, **setting) <= 1.25
    assert epsilon(rounds=budget.rounds + 1, **setting) > 1.25
    assert budget.rounds > 3
    budget.spend(counted(0))
    assert not budget.record
    for _ in range(2):  # it is the state that counts, not the calls
        budget.spend(counted(budget.rounds - 2))
        assert budget.spent == budget.rounds - 2
    resumed = Budget(1.25, **setting, record=budget.record)
    budget.spend(counted(budget.rounds))
    assert budget.epsilon == epsilon(rounds=budget.rounds, **setting)
    message = (
        rf"with this state there are {budget.rounds + 1} releases, but epsilon=1.25 with "
        rf"delta=0.0001 allows only {budget.rounds}, and {budget.rounds} are spent"
    )
    with pytest.raises(PrivacyBudgetError, match=message):
        budget.spend(counted(budget.rounds + 1))
    assert budget.spent == budget.rounds
    # Nobody knows how far the old key was used, so a new one has to go on.
    with pytest.raises(PrivacyBudgetError, match=r"noise was used twice.*renewed\(state\)"):
        resumed.spend(counted(budget.rounds - 1))
    state = renewed(counted(budget.rounds - 2))
    assert releases(state) == 0
    assert (state["own"].key != counted(0)["own"].key).any()
    with pytest.raises(PrivacyBudgetError, match="allows only"):
        resumed.spend(counted(3, key=1))
    assert resumed.spent == budget.rounds - 2
    resumed.spend(counted(2, key=1))
    with pytest.raises(PrivacyBudgetError, match="noise was used twice"):
        resumed.spend(counted(1, key=1))
    with pytest.raises(ValueError, match=r"record has 99999 releases, expected at most \d+, which"):
        Budget(1.25, **setting, record={"key": 99_999})
    nothing = Budget(1e-3, 1e-4, 5.0)
    with pytest.raises(PrivacyBudgetError, match="allows only 0"):
        nothing.spend(counted(1))


def test_processes_have_to_agree_on_a_key(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="would differ between the 2 processes"):
        fax.aggregators.gaussian(1.0, 1.0).init(jnp.ones(2))
    gaussian(1.0, 1.0).init(jnp.ones(2))


def test_accounting_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match=r"pip install 'fax-jax\[privacy\]'"):
        epsilon(1.0, 1, 0.123)


# Mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gaussian(0.0, 1.0), r"gaussian: clip_norm is 0.0, expected a number above 0"),
        (lambda: gaussian(1.0, -1), "noise_multiplier is -1, expected a number of at least 0"),
        (lambda: gaussian(1.0, np.inf), "noise_multiplier is inf"),
        (lambda: gaussian(1.0, 1.0, quantile=1.5), "quantile is 1.5, .* above 0 and below 1"),
        (
            lambda: gaussian(1.0, 1.0, count_noise=3),
            "count_noise is 3, but the clip norm does not adapt",
        ),
        (lambda: gaussian(1.0, 1.0, expected_clients=0), "expected_clients is 0"),
        (
            lambda: run(gaussian(1.0, 1.0, quantile=0.5), updates()),
            r"count_noise is 0.25, by default .*, expected more than noise_multiplier / 2 = 0.5",
        ),
        (lambda: laplace(-1.0, 1.0), r"laplace: clip_norm is -1.0"),
        (lambda: laplace(1.0, None), "noise_multiplier is None"),
        (lambda: dp_ftrl(0, 1, num_clients=2, separation=1, participations=1), "clip_norm is 0"),
        (lambda: dp_ftrl(1, 1, num_clients=0, separation=1, participations=1), "num_clients is 0"),
        (lambda: dp_ftrl(1, 1, num_clients=2, separation=0, participations=1), "separation is 0"),
        (
            lambda: dp_ftrl(1, 1, num_clients=2, separation=1, participations=0.5),
            "participations is 0.5, expected an int of at least 1",
        ),
        (
            lambda: dp_ftrl(1, 1, num_clients=9, separation=3, participations=1, bands=4),
            "bands is 4, expected from 1 to separation=3",
        ),
        (lambda: epsilon(-1, 1, 1e-5), "epsilon: noise_multiplier is -1"),
        (lambda: epsilon(1, -1, 1e-5), "rounds is -1, expected an int of at least 0"),
        (lambda: epsilon(1, 1, 0), "delta is 0, expected a number above 0 and below 1"),
        (lambda: epsilon(1, 1, 1), "delta is 1, expected a number above 0 and below 1"),
        (lambda: calibrate(1, 1, 1), "delta is 1, expected a number above 0 and below 1"),
        (
            lambda: epsilon(1, 1, 1e-5, sampling_rate=0),
            "sampling_rate is 0, expected a number above 0",
        ),
        (lambda: epsilon(1, 1, 1e-5, sampling_rate=1.5), "sampling_rate is 1.5, expected a number"),
        (
            lambda: epsilon(1, 1, 1e-5, sampling="shuffled"),
            "sampling is 'shuffled', expected 'uniform' or 'poisson'",
        ),
        (lambda: epsilon(1, 1, 1e-5, mechanism="cauchy"), "mechanism is 'cauchy', expected 'g"),
        (lambda: calibrate(0, 1, 1e-5), "calibrate: epsilon is 0, expected a number above 0"),
        (
            lambda: calibrate(1, 2, 0.01, sampling_rate=0.005),
            "delta is 0.01, expected less than 0.009975, the probability that a client takes part",
        ),
        (lambda: Budget(1.0, 1.0, 1.0), "Budget: delta is 1.0"),
        (lambda: Budget(1.0, 1e-5, 1.0, record=3), "record is 3, expected the record of an"),
        (lambda: Budget(1.0, 1e-5, 1.0, record={"a": -1}), r"record\['a'\] is -1, expected an int"),
        (lambda: Budget(1.0, 1e-5, 1.0).spend(0), "no aggregator in state counts releases"),
        (
            lambda: Budget(1.0, 1e-5, 1.0).spend(jax.tree.map(lambda x: x[None], counted(1))),
            r"state is that of several training runs, of shape \(1,\), expected that of one",
        ),
        (
            lambda: fax.aggregators.gaussian(1.0, 1.0, key=7).init(()),
            r"gaussian: key is 7, expected a random key, as in jax\.random\.key\(0\)",
        ),
        (
            lambda: chain(non_finite(), adaptive_clip(), laplace(1.0, 1.0)).init(np.ones(2)),
            "chain: part 1 has a state that all clients share, but the aggregator is private",
        ),
        (
            lambda: jax.jit(fax.aggregators.laplace(1.0, 1.0).init)(jnp.ones(2)),
            "laplace: init draws a fresh secret key, but is called in a function that JAX traces",
        ),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_arguments_at_the_ends_of_their_ranges():
    one = dp_ftrl(1, 0, num_clients=1, separation=1, participations=1, key=KEY)
    assert one.init(np.zeros(3)).noise.shape == (0, 3)
    sixteen = dp_ftrl(1, 0, num_clients=1, separation=20, participations=1, key=KEY)
    assert sixteen.init(np.zeros(3)).noise.shape == (15, 3)
    assert calibrate(0.5, 1, 0.1, sampling_rate=1.0) == calibrate(0.5, 1, 0.1)
    assert Budget(1.0, 1e-5, 20.0, record={"key": 0}).spent == 0
