"""Agnostic FedAvg, APFL and HypCluster against their papers in NumPy, and what they promise."""

import functools
import types

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import problems
import pytest
from jax import lax
from jax.test_util import check_grads
from problems import CLASSES, SIZES, Logistic, Quadratic, assert_trees_close, combine, numpy_batches

import fax
from fax.aggregators import Aggregator, PerClient
from fax.algorithms import (
    agnostic_fedavg,
    apfl,
    ditto,
    fedavg,
    hyp_cluster,
    hyp_cluster_choice,
    hyp_cluster_start,
    many_rounds,
)

RATE = 0.1
N = len(SIZES)


@pytest.fixture(scope="module")
def data():
    return problems.data()


def cohorts(data, clients=4, **kwargs):
    return fax.data.cohorts(data, clients, 4, **{"epochs": 2, "resident": False, **kwargs})


def sizes(cohort):
    return np.array([SIZES[i] for i in np.asarray(cohort.positions)], float)


def weighted(trees, weights):
    """The mean of dicts of arrays."""
    return combine(lambda *x: np.tensordot(weights / weights.sum(), x, 1), *trees)


def descend(params, gradient, rate=RATE):
    return combine(lambda p, g: p - rate * g, params, gradient)


def weighted_gradient(problem, params, x, y, factors):
    """Of the mean over a batch of losses times factors."""
    each = [
        problem.losses_and_gradient(params, x[i : i + 1], y[i : i + 1])[1] for i in range(len(y))
    ]
    return combine(lambda *g: np.tensordot(factors, g, 1) / len(y), *each)


def sgd(problem, params, batches):
    """Local steps."""
    for x, y in batches:
        params = descend(params, problem.losses_and_gradient(params, x, y)[1])
    return params


def mix(alpha, v, w):
    return combine(lambda v, w: alpha * v + (1 - alpha) * w, v, w)


def immutable(**options):
    return types.MappingProxyType(options)


# The papers, in NumPy


class Agnostic:
    """Ro et al., arXiv:2104.02748, with the scale of steps that the docstring speaks of."""

    options = immutable(num_domains=CLASSES, domain_learning_rate=0.5, domain="y", window=2)

    def __init__(self, problem):
        self.problem, self.params = problem, problem.start()
        self.weights = np.full(CLASSES, 1 / CLASSES)
        self.window = [np.ones(CLASSES), np.ones(CLASSES)]

    def round(self, cohort):
        alpha = self.weights / np.mean(self.window, 0)
        models, betas, losses, counts = [], [], 0, 0
        for batches, n in zip(numpy_batches(cohort), sizes(cohort)):
            y = np.concatenate([y for _, y in batches])
            x = np.concatenate([x for x, _ in batches])
            own = self.problem.losses_and_gradient(self.params, x, y)[0]
            share = n / len(y)
            number = share * np.array([(y == i).sum() for i in range(CLASSES)])
            losses = losses + share * np.array([own[y == i].sum() for i in range(CLASSES)])
            counts = counts + number
            beta = alpha @ number
            model = self.params
            for x, y in batches:
                factors = alpha[y] * n / beta
                model = descend(model, weighted_gradient(self.problem, model, x, y, factors))
            models.append(model)
            betas.append(beta)
        self.params = weighted(models, np.array(betas))
        mean = losses / counts
        weights = self.weights * np.exp(0.5 * mean)
        self.weights = weights / weights.sum()
        self.window = [*self.window[1:], counts]
        return {"domains/loss": mean}

    def check(self, state):
        assert_trees_close(state.params, self.params)
        np.testing.assert_allclose(state.server.weights, self.weights, rtol=1e-10)
        np.testing.assert_allclose(state.server.window, self.window, rtol=1e-10)


class APFL:
    """Algorithm 1 of Deng et al., arXiv:2003.13461."""

    options = immutable(num_clients=N, alpha=0.3)

    def __init__(self, problem):
        self.problem, self.w = problem, problem.start()
        self.v, self.alpha = [None] * N, [0.3] * N

    def mixture(self, i):
        v = self.w if self.v[i] is None else self.v[i]
        return mix(self.alpha[i], v, self.w)

    def round(self, cohort):
        models = []
        losses, examples = 0, 0
        every = numpy_batches(cohort)
        for batches, i in zip(every, np.asarray(cohort.positions)):
            w, a = self.w, self.alpha[i]
            v = self.w if self.v[i] is None else self.v[i]
            for x, y in batches:
                own, m_gradient = self.problem.losses_and_gradient(mix(a, v, w), x, y)
                w_gradient = self.problem.losses_and_gradient(w, x, y)[1]
                losses, examples = losses + own.sum(), examples + len(own)
                slope = sum(np.sum((v[k] - w[k]) * m_gradient[k]) for k in w)
                v, w = descend(v, m_gradient, RATE * a), descend(w, w_gradient)
                a = min(max(a - RATE * slope, 0), 1)
            if batches:  # until its first step, a client's local model is the server's
                self.v[i] = v
            self.alpha[i] = a
            models.append(w)
        self.w = weighted(models, sizes(cohort) * [len(own) > 0 for own in every])
        return {"personal/loss": losses / examples}

    def check(self, state):
        assert_trees_close(state.params, self.w)
        np.testing.assert_allclose(state.clients.rows.alpha, self.alpha, rtol=1e-10)
        mixtures = [self.mixture(i) for i in range(N)]
        expected = combine(lambda *x: np.stack(x), *mixtures)
        algorithm = apfl(Logistic.loss, optax.sgd(1.0), **self.options)
        assert_trees_close(algorithm.models(state), expected)
        assert_trees_close(algorithm.params(state), self.w)


class HypCluster:
    """HypCluster of Mansour et al., arXiv:2002.10619."""

    options = immutable(num_clusters=3)

    def __init__(self, problem):
        rng = np.random.default_rng(5)
        self.problem = problem
        self.models = [
            combine(lambda x: x + rng.normal(size=x.shape), problem.start()) for _ in range(3)
        ]
        self.models[2] = combine(lambda x: x + 1e3, self.models[2])  # nobody's

    def round(self, cohort):
        def mean(params, batches):
            losses = [self.problem.losses_and_gradient(params, x, y)[0] for x, y in batches]
            return np.mean(np.concatenate(losses))

        every = numpy_batches(cohort)
        chosen = np.array([np.argmin([mean(m, own) for m in self.models]) for own in every])
        new = [sgd(self.problem, self.models[c], own) for c, own in zip(chosen, every)]
        for j in np.unique(chosen):
            mine = np.flatnonzero(chosen == j)
            self.models[j] = weighted([new[i] for i in mine], sizes(cohort)[mine])
        return {"clients/cluster": chosen}

    def check(self, state):
        models = combine(lambda *x: np.stack(x), *self.models)
        algorithm = hyp_cluster(Logistic.loss, optax.sgd(1.0), **self.options)
        assert_trees_close(algorithm.models(state), models)
        assert_trees_close(algorithm.params(state), combine(lambda x: x.mean(0), models))


ALGORITHMS = {Agnostic: agnostic_fedavg, APFL: apfl, HypCluster: hyp_cluster}


def start_of(paper):
    if isinstance(paper, HypCluster):
        return combine(lambda *x: np.stack(x), *paper.models)
    return paper.problem.start()


@pytest.mark.parametrize("paper", ALGORITHMS)
def test_rounds_are_those_of_the_paper(data, paper):
    expected = paper(Logistic)
    algorithm = ALGORITHMS[paper](Logistic.loss, optax.sgd(RATE), **paper.options)
    state, step = algorithm.init(start_of(expected)), jax.jit(algorithm.round)
    rounds = cohorts(data, seed=5)
    if paper is APFL:  # a client that is new in the second round has no examples there
        rounds = problems.one_missing(rounds)
    for _, cohort in zip(range(4), rounds):
        state, metrics = step(state, cohort)
        for name, value in expected.round(cohort).items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-6)
        expected.check(state)


@pytest.mark.always("Agnostic-a mesh of 2", "APFL-a mesh of 4 x 2", "HypCluster-vectorized")
@pytest.mark.parametrize(
    ("paper", "setting"),
    [
        problems.case(paper, setting)
        for i, paper in enumerate(ALGORITHMS)
        for j, setting in enumerate(list(problems.SETTINGS)[1:])  # without a mesh: above
        if j != (i + 1) % 4
    ],
)
def test_results_do_not_depend_on_devices(data, paper, setting):
    expected = paper(Quadratic)
    where, at_once = problems.setting(setting)
    algorithm = ALGORITHMS[paper](
        Quadratic.loss, optax.sgd(RATE), vectorize=at_once, **paper.options
    )
    with where:
        state, step = algorithm.init(start_of(expected)), jax.jit(algorithm.round)
        for _, cohort in zip(range(2), cohorts(data, resident=True)):
            state, _ = step(state, cohort)
        for _, cohort in zip(range(2), cohorts(data)):
            expected.round(cohort)
        expected.check(jax.device_get(state))


# Identities


def after(algorithm, state, data):
    step = jax.jit(algorithm.round)
    for _, cohort in zip(range(3), cohorts(data)):
        state, metrics = step(state, cohort)
    return state, metrics


@pytest.fixture(scope="module")
def averaged(data):
    algorithm = fedavg(Logistic.loss, optax.adam(RATE), optax.adam(0.1))
    return after(algorithm, algorithm.init(Logistic.start()), data)


def assert_is_fedavg(averaged, params, metrics):
    assert_trees_close(params, averaged[0].params)
    assert_trees_close({k: metrics[k] for k in averaged[1]}, averaged[1], rtol=1e-9)


@pytest.mark.long
def test_one_domain_is_fedavg(data, averaged):
    labeled = fax.data.map(data, lambda _, c: {**c, "domain": np.zeros(len(c["y"]), np.int8)})
    algorithm = agnostic_fedavg(
        Logistic.loss, optax.adam(RATE), optax.adam(0.1), num_domains=1, domain_learning_rate=1.0
    )
    state, metrics = after(algorithm, algorithm.init(Logistic.start()), labeled)
    assert_is_fedavg(averaged, state.params, metrics)


@pytest.mark.long
def test_the_global_model_of_apfl_is_that_of_fedavg(data, averaged):
    algorithm = apfl(Logistic.loss, optax.adam(RATE), optax.adam(0.1), num_clients=N)
    state, metrics = after(algorithm, algorithm.init(Logistic.start()), data)
    assert_is_fedavg(averaged, state.params, metrics)
    # Without a share of their own, clients use the global model.
    alone = apfl(
        Logistic.loss,
        optax.sgd(RATE),
        num_clients=N,
        alpha=0.0,
        alpha_optimizer=optax.set_to_zero(),
    )
    state, _ = jax.jit(alone.round)(alone.init(Logistic.start()), next(cohorts(data)))
    every = jax.tree.map(lambda x: np.broadcast_to(x, (N, *x.shape)), state.params)
    assert_trees_close(alone.models(state), every)


@pytest.mark.long
def test_one_cluster_is_fedavg(data, averaged):
    algorithm = hyp_cluster(Logistic.loss, optax.adam(RATE), optax.adam(0.1), num_clusters=1)
    start = combine(lambda x: x[None], Logistic.start())
    state, metrics = after(algorithm, algorithm.init(start), data)
    assert_is_fedavg(averaged, combine(lambda x: x[0], state.params), metrics)


# What they are for


def squares(params, batch, key):
    return (batch["x"] - params) ** 2


@pytest.mark.long
def test_the_worst_domain_is_better_off():
    rng = np.random.default_rng(0)
    clients = {}
    for i in range(8):
        domain = (rng.random(10) < 0.1).astype(int)
        clients[f"client {i}"] = {"x": domain * 4.0 + rng.normal(size=10), "domain": domain}
    data = fax.data.InMemory(clients)

    def worst(algorithm):
        state, _ = many_rounds(
            algorithm, algorithm.init(np.zeros(())), fax.data.cohorts(data, 4, 5), 60
        )
        params = algorithm.params(state)
        x, d = (np.concatenate([c[k] for c in clients.values()]) for k in ("x", "domain"))
        return max(np.mean((x[d == i] - params) ** 2) for i in (0, 1))

    agnostic = agnostic_fedavg(
        squares, optax.sgd(0.05), num_domains=2, domain_learning_rate=0.05, window=5
    )
    assert worst(agnostic) < 0.6 * worst(fedavg(squares, optax.sgd(0.05)))


@pytest.mark.long
def test_planted_clusters_are_recovered_and_evaluated():
    rng = np.random.default_rng(0)
    truth = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2])
    means = np.array([-3.0, 0.0, 4.0])
    data = fax.data.InMemory(
        {f"client {i}": {"x": means[c] + rng.normal(size=6) / 9} for i, c in enumerate(truth)}
    )
    everyone = next(fax.data.cohorts(data, 9, 6, epochs=5))
    params, state = hyp_cluster_start(
        squares, optax.sgd(0.1), np.float64(9), everyone, jax.random.key(3), num_clusters=3
    )
    assert state is None
    algorithm = hyp_cluster(squares, optax.sgd(0.1), num_clusters=3)
    state, _ = many_rounds(algorithm, algorithm.init(params), fax.data.cohorts(data, 5, 6), 40)
    np.testing.assert_allclose(np.sort(algorithm.models(state)), means, atol=0.2)
    choice = np.zeros(9, int)
    chosen = hyp_cluster_choice(squares, algorithm.models(state), everyone)
    choice[np.asarray(everyone.positions)] = chosen
    own = algorithm.models(state)[choice]
    np.testing.assert_allclose(own, means[truth], atol=0.2)
    error = {
        "error": lambda batch, scores: fax.metrics.Mean(
            (batch["x"] - scores) ** 2, jnp.ones_like(scores)
        )
    }
    found = fax.metrics.evaluate_clients(
        lambda params, batch: jnp.broadcast_to(params, batch["x"].shape),
        own,
        data,
        error,
        personal=True,
    )
    assert found["error"].max() < 0.1


def test_the_start_takes_those_who_fit_worst():
    """Farthest-first traversal in NumPy; the client who fits worst is taken once."""
    rng = np.random.default_rng(1)
    clients = {f"client {i}": {"x": 3 * rng.normal() + rng.normal(size=4)} for i in range(7)}
    cohort = next(fax.data.cohorts(fax.data.InMemory(clients), 7, 4, resident=False))
    key = jax.random.key(0)
    found, _ = hyp_cluster_start(
        squares, optax.sgd(0.3), np.float64(0), cohort, key, num_clusters=7
    )
    x = np.asarray(cohort.batches["x"])[:, 0]
    models = 0.6 * x.mean(1)
    first = int(np.argmin(abs(models - np.asarray(found[0]))))
    chosen, best = [first], np.full(7, np.inf)
    for _ in range(6):
        best = np.minimum(best, ((x - models[chosen[-1]]) ** 2).mean(1))
        chosen.append(max(set(range(7)) - set(chosen), key=lambda i: best[i]))
    np.testing.assert_allclose(found, models[chosen], rtol=1e-12)


def test_a_model_whose_loss_is_nan_is_not_chosen():
    def loss(params, batch, key):  # NaN for models below zero, and for data above 100
        return jnp.where(batch["x"] > 100, jnp.nan, (batch["x"] - params) ** 2 + jnp.sqrt(params))

    clients = {str(i): {"x": np.full(2, x)} for i, x in enumerate([1.0, 3.0, 200.0, 2.0])}
    cohort = next(fax.data.cohorts(fax.data.InMemory(clients), 4, 2))
    by_client = np.argsort(cohort.positions)
    chosen = hyp_cluster_choice(loss, jnp.array([-1.0, 9.0, 3.0]), cohort)
    np.testing.assert_array_equal(chosen[by_client], [2, 2, 0, 2])
    # The start takes those who fit worst, but not the one of whom that is unknown. Its model would
    # stay where it was, so it is taken last.
    found, _ = hyp_cluster_start(
        loss, optax.sgd(0.1), np.float64(2.5), cohort, jax.random.key(0), num_clusters=4
    )
    np.testing.assert_array_equal(found == 2.5, [False, False, False, True])


# Parts


def test_domains_without_examples_keep_weight_and_counts():
    def client(*domains):
        return {"x": np.arange(len(domains), dtype=float), "domain": np.array(domains)}

    data = fax.data.InMemory({"ann": client(0, 0, 1), "bob": client(1, 0)})
    algorithm = agnostic_fedavg(
        squares,
        optax.sgd(0.1),
        num_domains=3,
        domain_learning_rate=2.0,
        domain_weights=[0.3, 0.5, 0.2],
        domain_counts=[5, 5, 7],
    )
    state = algorithm.init(np.zeros(()))
    state, metrics = jax.jit(algorithm.round)(state, next(fax.data.cohorts(data, 2, 3)))
    assert np.isnan(metrics["domains/loss"][2])
    np.testing.assert_allclose(state.server.window, [[3, 2, 7]])
    raised = np.array([0.3, 0.5]) * np.exp(2.0 * np.array([(0 + 1 + 1) / 3, (4 + 0) / 2]))
    np.testing.assert_allclose(state.server.weights, [*(0.8 * raised / raised.sum()), 0.2])
    assert np.isfinite(state.params)


def test_a_domain_that_there_is_not_makes_nan():
    algorithm = agnostic_fedavg(squares, optax.sgd(0.1), num_domains=2, domain_learning_rate=1)
    for strange in (-1, 2):
        data = fax.data.InMemory({"ann": {"x": np.ones(3), "domain": np.array([0, strange, 1])}})
        state, _ = jax.jit(algorithm.round)(algorithm.init(0.0), next(fax.data.cohorts(data, 1, 2)))
        assert np.isnan(state.params)
        assert np.isnan(state.server.weights).all()


def test_large_losses_do_not_overflow():
    data = fax.data.InMemory({"ann": {"x": np.array([0.0, 1e4]), "domain": np.arange(2)}})
    algorithm = agnostic_fedavg(squares, optax.sgd(0.0), num_domains=2, domain_learning_rate=1.0)
    state, _ = jax.jit(algorithm.round)(algorithm.init(0.0), next(fax.data.cohorts(data, 1, 2)))
    np.testing.assert_array_equal(state.server.weights, [0, 1])


def test_a_cluster_that_nobody_chooses_keeps_its_model_and_optimizer(data):
    algorithm = hyp_cluster(Quadratic.loss, optax.sgd(RATE), optax.adam(0.1), num_clusters=2)
    params = {"w": np.stack([Quadratic.start()["w"], np.full(4, 1e3)])}
    before = algorithm.init(params)
    after, metrics = jax.jit(algorithm.round)(before, next(cohorts(data)))
    np.testing.assert_array_equal(metrics["clients/cluster"], 0)
    changed = jax.tree.map(
        lambda a, b: np.any(np.asarray(a != b), tuple(range(1, a.ndim))), before, after
    )
    for leaf in jax.tree.leaves(changed):
        np.testing.assert_array_equal(leaf, [True, False])


def summing():
    """The mean, which counts its calls, and remembers what each client sent."""

    def init(params):
        return {"calls": jnp.zeros((), int), "sent": PerClient(jnp.zeros(N))}

    def aggregate(updates, weights, state, key):
        size = fax.map(lambda u: sum(jnp.sum(x) for x in jax.tree.leaves(u)), updates)
        state = {"calls": state["calls"] + 1, "sent": PerClient(state["sent"].rows + size)}
        metrics = {"clients/bits": weights * 2.0, "largest": fax.max(weights)}
        return fax.mean(updates, weights=weights), state, metrics

    return Aggregator(init, aggregate)


@pytest.mark.always("APFL")
@pytest.mark.parametrize("paper", ALGORITHMS)
def test_aggregators_with_state(data, paper):
    algorithm, reference = (
        ALGORITHMS[paper](Quadratic.loss, optax.sgd(RATE), **paper.options, **extra)
        for extra in ({"aggregator": summing()}, {})
    )
    cohort = next(cohorts(data))
    start = start_of(paper(Quadratic))
    expected, _ = jax.jit(reference.round)(reference.init(start), cohort)
    state, metrics = jax.jit(algorithm.round)(algorithm.init(start), cohort)
    assert_trees_close(state.params, expected.params)
    took_part = np.isin(np.arange(N), cohort.positions)
    if paper is not HypCluster:
        np.testing.assert_array_equal(state.aggregator["sent"].rows != 0, took_part)
        assert metrics["clients/bits"].shape == (4,)
        return
    chosen = np.full(N, -1)
    chosen[np.asarray(cohort.positions)] = metrics["clients/cluster"]
    for j, own in enumerate(state.aggregator):
        np.testing.assert_array_equal(own["sent"].rows != 0, chosen == j)
        assert own["calls"] == np.any(chosen == j)
    np.testing.assert_allclose(metrics["clients/bits"], 2 * sizes(cohort))
    assert metrics["largest"].shape == (3,)


def test_small_steps_of_alpha_are_not_lost_in_half_precision():
    def loss(params, batch, key):
        return (batch["x"] - params) ** 2 / 2

    data = fax.data.InMemory({"ann": {"x": np.ones(2)}, "bob": {"x": -np.ones(2)}})
    slowly = apfl(loss, optax.sgd(0.5), num_clients=2, alpha_optimizer=optax.sgd(1e-4))
    rounds = fax.data.cohorts(data, 2, 2, epochs=3)
    state, _ = jax.jit(slowly.round)(slowly.init(jnp.bfloat16(0.25)), next(rounds))
    assert state.params.dtype == state.clients.rows.params.dtype == jnp.bfloat16
    assert (jnp.abs(state.clients.rows.alpha - 0.5) > 1e-6).all()


@pytest.mark.parametrize("paper", ALGORITHMS)
def test_a_model_with_state(data, paper):
    def loss(params, model_state, batch, key):
        mean = 0.5 * model_state["mean"] + 0.5 * batch["x"].mean(0)
        losses, metrics = Quadratic.loss(params, {**batch, "x": batch["x"] - mean}, key)
        return losses, metrics, {"mean": mean, "steps": model_state["steps"] + 1}

    algorithm = ALGORITHMS[paper](loss, optax.sgd(0.0), **paper.options)
    model_state = {"mean": np.zeros(4), "steps": np.int32(3)}
    start = start_of(paper(Quadratic))
    if paper is HypCluster:
        model_state = jax.tree.map(lambda x: np.stack([x] * 3), model_state)
    cohort = next(fax.data.cohorts(data, N, 1, resident=False))
    before = algorithm.init(start, model_state)
    state, metrics = jax.jit(algorithm.round)(before, cohort)
    clusters = metrics["clients/cluster"] if paper is HypCluster else np.zeros(N)
    expected = []
    for j in range(3 if paper is HypCluster else 1):
        means = []
        for batches in numpy_batches(cohort):
            mean = np.zeros(4)
            for x, _ in batches:
                mean = 0.5 * mean + 0.5 * x.mean(0)
            means.append(mean)
        weights = np.where(np.asarray(clusters) == j, sizes(cohort), 0)
        expected.append(np.zeros(4) if not weights.any() else np.average(means, 0, weights))
    found = state.model_state["mean"].reshape(-1, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(state.model_state["steps"], 3)
    if paper is HypCluster:
        models, states = hyp_cluster_start(
            loss,
            optax.sgd(RATE),
            Quadratic.start(),
            cohort,
            jax.random.key(0),
            {"mean": np.zeros(4), "steps": np.int32(3)},
            num_clusters=2,
        )
        assert states["mean"].shape == (2, 4)
        assert states["steps"].dtype == np.int32
        assert hyp_cluster_choice(loss, models, cohort, states).shape == (N,)


# Transformations


@pytest.mark.long
@pytest.mark.parametrize("paper", ALGORITHMS)
def test_hyperparameters_can_be_differentiated_and_swept(data, paper):
    cohort, start = next(cohorts(data, 3, epochs=1)), start_of(paper(Quadratic))
    options = dict(paper.options)

    def final(rates):
        if paper is Agnostic:
            options["domain_learning_rate"] = rates[1]
        if paper is APFL:
            options["alpha"] = rates[1]
        algorithm = ALGORITHMS[paper](Quadratic.loss, optax.sgd(rates[0]), **options)
        state, _ = lax.scan(
            lambda state, _: algorithm.round(state, cohort), algorithm.init(start), length=2
        )
        models = algorithm.params if algorithm.models is None else algorithm.models
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(models(state)))

    rates = jnp.array([0.05, 0.4])
    jitted = jax.jit(final)
    check_grads(jitted, (rates,), order=1, modes=("rev",), rtol=1e-5, eps=1e-6)
    sweep = jnp.array([[0.05, 0.4], [0.02, 0.3]])
    np.testing.assert_allclose(
        jax.jit(jax.vmap(final))(sweep), [jitted(r) for r in sweep], rtol=1e-10
    )


@pytest.mark.long
@pytest.mark.parametrize("paper", [Agnostic, HypCluster])
def test_memory_does_not_grow_with_the_cohort(paper):
    @functools.cache
    def temporary(clients):
        rng = np.random.default_rng(0)
        data = fax.data.InMemory(
            {str(i): {"x": np.ones((8, 100)), "y": rng.integers(0, 3, 8)} for i in range(clients)}
        )
        cohort = next(fax.data.cohorts(data, clients, 4))

        def loss(w, b, k):
            return jnp.sum(jnp.tanh(b["x"] @ w) ** 2, 1)

        algorithm = ALGORITHMS[paper](loss, optax.sgd(0.1), **paper.options)
        w = np.random.default_rng(0).normal(size=(3, 100, 100))
        state = algorithm.init(w if paper is HypCluster else w[0])
        compiled = jax.jit(algorithm.round).lower(state, cohort).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (8 * 100 * 100)

    assert temporary(64) < temporary(4) + 0.5
    assert temporary(4) < (14 if paper is HypCluster else 6)


@pytest.mark.parametrize("paper", [Agnostic, HypCluster])
def test_a_round_is_one_all_reduce(data, paper):
    with jax.set_mesh(meshes.mesh(clients=2)):
        algorithm = ALGORITHMS[paper](
            lambda *a: Quadratic.loss(*a)[0], optax.sgd(RATE), **paper.options
        )
        state, cohort = algorithm.init(start_of(paper(Quadratic))), next(cohorts(data))
        text = jax.jit(algorithm.round).lower(state, cohort).compile().as_text()
    assert sum(" all-reduce(" in line for line in text.splitlines()) == 1
    assert "all-gather" not in text


# Mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: apfl(squares, optax.sgd(0.1), num_clients=0),
            "num_clients is 0, expected an int of at least",
        ),
        (
            lambda: apfl(None, None, num_clients=2, alpha=1.5),
            "alpha is 1.5, expected a number from",
        ),
        (
            lambda: hyp_cluster(None, None, num_clusters=True),
            "num_clusters is True, expected an int",
        ),
        (lambda: agnostic(window=0), "window is 0, expected an int of at least 1"),
        (
            lambda: agnostic(domain_weights=[1.0]),
            r"domain_weights has shape \(1,\), expected \(3,\)",
        ),
        (
            lambda: agnostic(domain_weights=[0.5, 0.2, 0.2]),
            "nonnegative numbers that add up to 1",
        ),
        (
            lambda: agnostic(domain_counts=[0, 1, 1]),
            "domain_counts is .*, expected positive numbers",
        ),
        (
            lambda: hyp_cluster(Logistic.loss, optax.sgd(1.0), num_clusters=2).init(
                {"w": np.zeros((3, 4))}
            ),
            r"params\['w'\] has shape \(3, 4\), expected a leading axis of 2 clusters",
        ),
        (
            lambda: hyp_cluster(Logistic.loss, optax.sgd(1.0), num_clusters=2).init(
                np.ones((2, 4))
            ),
            "all 2 clusters have the same params",
        ),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def agnostic(**kwargs):
    options = {"num_domains": 3, "domain_learning_rate": 0.1, **kwargs}
    return agnostic_fedavg(Quadratic.loss, optax.sgd(0.1), **options)


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (agnostic(), "domain='domain' is not among the features of a batch, 'x', 'y'"),
        (
            agnostic(domain="x"),
            r"feature 'x' is float64\[4, 4\] in a batch, expected ints of shape",
        ),
        (
            apfl(Quadratic.loss, optax.sgd(0.1), num_clients=3),
            "made for num_clients=3, but the cohort has",
        ),
        (
            apfl(
                lambda *a: (Quadratic.loss(*a)[0], {"personal/loss": a[1]["y"]}),
                optax.sgd(0.1),
                num_clients=N,
            ),
            "loss returned a metric 'personal/loss', but apfl has a metric of that name",
        ),
        (
            ditto(
                lambda *a: (Quadratic.loss(*a)[0], {"personal/loss": a[1]["y"]}),
                optax.sgd(0.1),
                mu=1.0,
                num_clients=N,
            ),
            "loss returned a metric 'personal/loss', but ditto has a metric of that name",
        ),
    ],
)
def test_rounds_that_cannot_be(data, algorithm, message):
    with pytest.raises(ValueError, match=message):
        algorithm.round(algorithm.init(Quadratic.start()), next(cohorts(data)))


def test_a_start_needs_clients(data):
    with pytest.raises(ValueError, match="num_clusters=5, but the cohort has 4 clients"):
        hyp_cluster_start(
            Quadratic.loss,
            optax.sgd(0.1),
            Quadratic.start(),
            next(cohorts(data)),
            jax.random.key(0),
            num_clusters=5,
        )
