"""FedNova, FedDyn and q-FedAvg against their papers in NumPy, and what they are for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax import lax
from problems import SIZES, Logistic, Quadratic, assert_trees_close, combine

import fax
from fax.algorithms import ClientStore, fedavg, feddyn, fednova, fedprox, qfedavg

RATE, N = 0.1, len(SIZES)


@pytest.fixture(scope="module")
def data():
    return problems.data()


def cohorts(data):
    """Clients of one to six steps, of whom one is missing in every other round."""
    return problems.one_missing(fax.data.cohorts(data, 4, 4, epochs=2, resident=False))


# The papers, in NumPy. The aggregator multiplies updates by ``scale``.


def mean(trees, weights=None):
    weights = np.ones(len(trees)) if weights is None else np.asarray(weights, float)
    return combine(lambda *leaves: np.tensordot(weights / weights.sum(), leaves, 1), *trees)


def times(factor, tree):
    return combine(lambda x: factor * x, tree)


class Paper:
    def __init__(self, problem, scale=1):
        self.problem, self.scale, self.x = problem, scale, problem.start()
        self.h = times(0, self.x)
        self.gradients = [self.h] * N

    def gradient(self, y, batch):
        return self.problem.losses_and_gradient(y, *batch)[1]

    def check(self, state):
        assert_trees_close(state.params, self.x)


class Nova(Paper):
    """FedNova of arXiv:2007.07481 with momentum, weighted by p_i = n_i / n, and server rate 0.8."""

    momentum, mu = 0.6, 0

    @classmethod
    def make(cls, problem, **kwargs):
        sgd = optax.sgd(RATE, momentum=cls.momentum or None)
        return fednova(problem.loss, sgd, optax.sgd(0.8), mu=cls.mu, **kwargs)

    @classmethod
    def norm(cls, tau):
        """Of a_i, from Section 4."""
        rho = cls.momentum
        return (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)

    def round(self, ids, every):
        present = [(SIZES[i], own) for i, own in zip(ids, every) if own]
        p = np.array([n for n, _ in present]) / sum(n for n, _ in present)
        directions, norms = [], []
        for _, own in present:
            y, v = self.x, times(0, self.x)
            for batch in own:
                g = self.gradient(y, batch)
                g = combine(lambda g, y, x: g + self.mu * (y - x), g, y, self.x)
                v = combine(lambda v, g: self.momentum * v + g, v, g)
                y = combine(lambda y, v: y - RATE * v, y, v)
            norms.append(self.norm(len(own)))
            directions.append(combine(lambda x, y: (x - y) / RATE / norms[-1], self.x, y))
        tau_eff = p @ norms
        d = times(self.scale * tau_eff * RATE, mean(directions, p))
        self.x = combine(lambda x, d: x - 0.8 * d, self.x, d)


class NovaProx(Nova):
    """The same with proximal steps in place of momentum."""

    momentum, mu = 0, 0.7

    @classmethod
    def norm(cls, tau):
        alpha = RATE * cls.mu
        return (1 - (1 - alpha) ** tau) / alpha


class Dyn(Paper):
    """Algorithm 1 of arXiv:2111.04263, with steps of SGD for the minimum."""

    alpha = 0.4

    @classmethod
    def make(cls, problem, **kwargs):
        sgd = optax.sgd(RATE)
        return feddyn(problem.loss, sgd, alpha=cls.alpha, num_clients=N, **kwargs)

    def round(self, ids, every):
        moves = []
        for i, own in zip(ids, every):
            if not own:
                continue
            y, before = self.x, self.gradients[i]
            for batch in own:
                g = self.gradient(y, batch)
                y = combine(
                    lambda y, g, b, x: y - RATE * (g - b + self.alpha * (y - x)),
                    *(y, g, before, self.x),
                )
            move = combine(np.subtract, y, self.x)
            self.gradients[i] = combine(lambda b, d: b - self.alpha * d, before, move)
            moves.append(times(self.scale, move))
        total = combine(lambda *d: sum(d), *moves)
        self.h = combine(lambda h, d: h - self.alpha * d / N, self.h, total)
        self.x = combine(lambda x, d, h: x + d / len(moves) - h / self.alpha, self.x, total, self.h)

    def check(self, state):
        super().check(state)
        assert_trees_close(state.server, self.h)
        rows = combine(lambda *rows: np.stack(rows), *self.gradients)
        assert_trees_close(state.clients.rows, rows)


class Fair(Paper):
    """Algorithm 2 of arXiv:1905.10497."""

    q, lipschitz = 0.7, 4.0

    @classmethod
    def make(cls, problem, **kwargs):
        sgd = optax.sgd(RATE)
        return qfedavg(problem.loss, sgd, q=cls.q, lipschitz=cls.lipschitz, **kwargs)

    def round(self, ids, every):
        deltas, steps = [], []
        for own in filter(None, every):
            losses = [self.problem.losses_and_gradient(self.x, *batch)[0] for batch in own]
            f, y = np.concatenate(losses).mean(), self.x
            for batch in own:
                y = combine(lambda y, g: y - RATE * g, y, self.gradient(y, batch))
            dw = combine(lambda x, y: self.lipschitz * (x - y), self.x, y)
            square = sum((d**2).sum() for d in dw.values())
            deltas.append(times(f**self.q, dw))
            steps.append(self.q * f ** (self.q - 1) * square + self.lipschitz * f**self.q)
        total = combine(lambda *d: self.scale * sum(d) / sum(steps), *deltas)
        self.x = combine(np.subtract, self.x, total)


class Half(fax.aggregators.Transformation):
    """Halves updates."""

    def __new__(cls):
        def update(updates, weights, state, key):
            return jax.tree.map(lambda u: u / 2, updates), weights, state, {}

        return super().__new__(cls, lambda params: (), update)


@pytest.mark.always(
    "Nova-a mesh of 2-Quadratic",
    "NovaProx-a mesh of 4 x 2-Logistic",
    "Dyn-jitted-Logistic",
    "Fair-a mesh of 2-Quadratic",
)
@pytest.mark.parametrize(
    ("paper", "setting", "problem"),
    [
        (Nova, "jitted", Logistic),
        (Nova, "a mesh of 2", Quadratic),
        (NovaProx, "a mesh of 4 x 2", Logistic),
        (Dyn, "jitted", Logistic),
        (Dyn, "a mesh of 2", Logistic),
        (Dyn, "a mesh of 4 x 2", Quadratic),
        (Fair, "vectorized", Logistic),
        (Fair, "a mesh of 2", Quadratic),
    ],
)
def test_rounds_are_those_of_the_paper(data, paper, setting, problem):
    """On a mesh with an aggregator, which halves the updates."""
    context, at_once = problems.setting(setting)
    more = {"aggregator": Half()} if "mesh" in setting else {}
    with context:
        algorithm = paper.make(problem, vectorize=at_once, **more)
        expected, step = paper(problem, 0.5 if more else 1), jax.jit(algorithm.round)
        state = algorithm.init(problem.start())
        for cohort in itertools.islice(cohorts(data), 4):
            state, metrics = step(state, cohort)
            expected.round(np.asarray(cohort.positions), problems.numpy_batches(cohort))
            expected.check(state)
    assert np.asarray(metrics["clients/loss"])[1] == 0  # who is missing


def test_a_store_keeps_the_gradients_of_clients(data):
    expected = Dyn(Quadratic)
    with ClientStore(Dyn.make(Quadratic)) as store:
        state = store.init(Quadratic.start())
        for cohort in itertools.islice(cohorts(data), 3):
            state, _ = store.round(state, cohort)
            expected.round(np.asarray(cohort.positions), problems.numpy_batches(cohort))
        assert_trees_close(store.params(state), expected.x)


# Identities and limits


def after_rounds(start, cohort, *algorithms, rounds=1):
    """The parameters of several algorithms after rounds with the same cohort, in one program."""

    @jax.jit
    def run(start):
        states = [algorithm.init(start) for algorithm in algorithms]

        def one(states, _):
            return [a.round(s, cohort)[0] for a, s in zip(algorithms, states)], None

        return [state.params for state in lax.scan(one, states, length=rounds)[0]]

    return run(start)


@pytest.mark.long
def test_special_cases_are_averaging(data):
    """With as many steps each FedNova is FedAvg, and FedProx with mu; q = 0 counts clients once."""
    same = fax.data.subset(data, [name for name, n in zip(data.client_ids(), SIZES) if n >= 3])
    same = fax.data.map(same, lambda _, c: {k: v[:3] for k, v in c.items()}, keeps_length=False)
    loss, sgd, adam = Logistic.loss, optax.sgd(RATE, momentum=0.5), optax.adam(RATE)
    averaged, *others, proximal, normalized = after_rounds(
        Logistic.start(),
        next(fax.data.cohorts(same, 4, 2, epochs=2)),
        fedavg(loss, sgd, optax.sgd(0.7)),
        fednova(loss, sgd, optax.sgd(0.7)),
        qfedavg(loss, sgd, optax.sgd(0.7), q=0, lipschitz=3),
        fedprox(loss, adam, mu=0.3),
        fednova(loss, adam, mu=0.3),
    )
    for found in others:
        assert_trees_close(found, averaged)
    assert_trees_close(normalized, proximal)


# Three clients with quadratics a (p - b)^2 / 2, and unequal numbers of examples.
A, B, SIZE = np.array([1.0, 2.0, 6.0]), np.array([0.0, 3.0, 1.0]), np.array([2, 8, 4])


def quadratic(p, batch, key):
    return batch["a"] * (p - batch["b"]) ** 2 / 2


def quadratics(batch_size):
    clients = {i: {"a": np.full(n, A[i]), "b": np.full(n, B[i])} for i, n in enumerate(SIZE)}
    return next(fax.data.cohorts(fax.data.InMemory(clients), 3, batch_size))


def test_objectives():
    """FedNova's steps are those of one objective, FedDyn reaches it; FedAvg ends elsewhere."""
    averaged, normalized, dynamic = after_rounds(
        np.float64(4),
        quadratics(1),
        fedavg(quadratic, optax.sgd(1e-3)),
        fednova(quadratic, optax.sgd(1e-3)),
        feddyn(quadratic, optax.sgd(0.1), alpha=1.0, num_clients=3),
        rounds=1000,
    )
    of_examples = (SIZE * A * B).sum() / (SIZE * A).sum()
    # A client moves by its number of steps, so that FedAvg counts its examples twice over.
    of_steps = (SIZE**2 * A * B).sum() / (SIZE**2 * A).sum()
    assert abs(of_steps - of_examples) > 0.1
    np.testing.assert_allclose(averaged, of_steps, atol=0.02)
    np.testing.assert_allclose(normalized, of_examples, atol=0.02)
    np.testing.assert_allclose(dynamic, (A * B).sum() / A.sum(), rtol=1e-8)


def test_fair_averaging_ends_where_the_sum_of_powers_is_stationary():
    """With one step for each client, of rate 1 / L, and for several q in one program."""
    cohort = quadratics(8)

    @jax.jit
    @jax.vmap
    def end(q):
        algorithm = qfedavg(quadratic, optax.sgd(0.01), q=q, lipschitz=100.0)
        start = algorithm.init(np.float64(4))
        return lax.scan(lambda s, _: (algorithm.round(s, cohort)[0], None), start, length=3000)[0]

    powers = np.array([0.0, 1.0, 5.0])[:, None]
    found = np.asarray(end(powers[:, 0]).params)[:, None]
    losses = A * (found - B) ** 2 / 2
    slopes = losses**powers * A * (found - B)
    np.testing.assert_allclose(slopes.sum(1) / abs(slopes).sum(1), 0, atol=1e-6)
    assert (np.diff(losses.max(1)) < 0).all()


def test_fair_averaging_does_not_depend_on_the_unit_of_losses():
    """Even if their powers vanish. The first round has no losses before it, and does nothing."""
    cohort = quadratics(8)

    @jax.jit
    @jax.vmap
    def path(scale):
        def loss(*args):
            return scale * quadratic(*args)

        algorithm = qfedavg(loss, optax.sgd(0.1 / scale), q=15, lipschitz=10 * scale)

        def step(state, _):
            state, _ = algorithm.round(state, cohort)
            return state, state.params

        return lax.scan(step, algorithm.init(np.float64(4)), length=5)[1]

    usual, tiny = path(np.array([1.0, 1e-25]))
    assert tiny[0] == 4
    assert abs(usual[0] - 4) > 0.01
    np.testing.assert_allclose(tiny[1:], usual[:-1], rtol=1e-10)


def test_fair_averaging_of_models_in_half_precision():
    """The squared norm of L (x - y) is more than float16 can hold."""
    algorithm = qfedavg(quadratic, optax.sgd(0.001), q=1, lipschitz=1000.0)
    (half, whole) = (
        algorithm.round(algorithm.init(jnp.asarray(4, dtype)), quadratics(8))[0].params
        for dtype in (jnp.float16, jnp.float32)
    )
    assert half.dtype == jnp.float16
    np.testing.assert_allclose(half, whole, rtol=2e-3)


def test_a_client_without_loss_has_no_step_in_fair_averaging():
    """Where F is zero its powers F^(q-1) are infinite; with q = 0 it counts as others do."""
    cohort = quadratics(8)

    @jax.jit
    @jax.vmap
    def after(q):
        def end(start, q):
            algorithm = qfedavg(quadratic, optax.sgd(0.1), q=q, lipschitz=10.0)
            return algorithm.round(algorithm.init(start), cohort)[0].params

        return jax.value_and_grad(end, (0, 1))(3.0, q)  # the second client's optimum

    found, slopes = after(np.array([0.0, 0.5]))
    assert np.isfinite(slopes).all()
    np.testing.assert_allclose(found[0], 3 - (A * (3 - B)).sum() / 30, rtol=1e-10)
    f, dw = np.array([(a * (3 - b) ** 2 / 2, a * (3 - b)) for a, b in zip(A, B) if b != 3]).T
    h = 0.5 * f**-0.5 * dw**2 + 10 * f**0.5
    np.testing.assert_allclose(found[1], 3 - (f**0.5 * dw).sum() / h.sum(), rtol=1e-10)


def test_a_negative_loss_makes_fair_averaging_nan():
    algorithm = qfedavg(lambda p, batch, key: batch["a"] * p, optax.sgd(0.1), q=2, lipschitz=1)
    (found,) = after_rounds(np.float64(-1), quadratics(8), algorithm)
    assert np.isnan(found)


# Gradients


@pytest.mark.long
@pytest.mark.always("feddyn")
@pytest.mark.parametrize(
    "make",
    [
        lambda h: fednova(Quadratic.loss, optax.sgd(h[0], momentum=h[2]), mu=h[1]),
        lambda h: feddyn(Quadratic.loss, optax.sgd(h[0]), alpha=h[1], num_clients=N),
        lambda h: qfedavg(Quadratic.loss, optax.sgd(h[0]), q=h[1], lipschitz=h[2]),
    ],
    ids=["fednova", "feddyn", "qfedavg"],
)
def test_hyperparameters_have_gradients(data, make):
    """Of a loss after two rounds, against finite differences, where one client is missing."""
    two = jax.tree.map(lambda *x: jnp.stack(x), *itertools.islice(cohorts(data), 2))

    @jax.jit
    @jax.value_and_grad
    def final_loss(numbers):
        algorithm = make(numbers)
        state, _ = lax.scan(algorithm.round, algorithm.init(Quadratic.start()), two)
        return jnp.sum(jnp.cos(algorithm.params(state)["w"]))

    numbers = np.array([0.03, 0.6, 0.4])
    _, found = final_loss(numbers)
    for i, step in enumerate(1e-5 * np.eye(3)):
        slope = (final_loss(numbers + step)[0] - final_loss(numbers - step)[0]) / 2e-5
        np.testing.assert_allclose(found[i], slope, rtol=1e-6, atol=1e-9)
