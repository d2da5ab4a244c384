"""FedNova, FedDyn and q-FedAvg against their papers in NumPy, and what they are for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import SIZES, Logistic, Quadratic, assert_trees_close, combine

import fax
from fax.algorithms import ClientStore, fedavg, feddyn, fednova, fedprox, many_rounds, qfedavg

RATE, N = 0.1, len(SIZES)


@pytest.fixture(scope="module")
def data():
    return problems.data()


def cohorts(data, clients=4):
    """Clients of one to six steps, in every other round with one of them missing."""
    rounds = fax.data.cohorts(data, clients, 4, epochs=2, resident=False)
    for number, cohort in enumerate(rounds):
        if number % 2:
            here = np.arange(clients) != 1
            mask, sizes = cohort.mask & here[:, None, None], cohort.num_examples * here
            cohort = dataclasses.replace(cohort, mask=mask, num_examples=sizes)
        yield cohort


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
        self.x = combine(
            lambda x, d, h: x + d / len(moves) - h / self.alpha, self.x, total, self.h
        )

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


@pytest.mark.parametrize(
    ("paper", "setting", "problem"),
    [
        (Nova, "jitted", Logistic),
        (Nova, "a mesh of 2", Quadratic),
        (NovaProx, "a mesh of 4 x 2", Logistic),
        (Dyn, "jitted", Logistic),
        (Dyn, "a mesh of 2", Logistic),
        (Dyn, "a mesh of 4 x 2", Quadratic),
        (Fair, "vectorised", Logistic),
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
        for _, cohort in zip(range(4), cohorts(data)):
            state, metrics = step(state, cohort)
            expected.round(np.asarray(cohort.positions), problems.numpy_batches(cohort))
            expected.check(state)
    assert metrics["clients/loss"].shape == (4,)
    assert metrics["clients/loss"][1] == 0  # who is missing


def test_a_store_keeps_the_gradients_of_clients(data):
    expected = Dyn(Quadratic)
    with ClientStore(Dyn.make(Quadratic)) as store:
        state = store.init(Quadratic.start())
        for _, cohort in zip(range(3), cohorts(data)):
            state, _ = store.round(state, cohort)
            expected.round(np.asarray(cohort.positions), problems.numpy_batches(cohort))
        assert_trees_close(store.params(state), expected.x)


# Identities and limits


def after(algorithm, cohort):
    return algorithm.round(algorithm.init(Logistic.start()), cohort)[0].params


def test_special_cases_are_averaging(data):
    """With as many steps each FedNova is FedAvg, and FedProx with mu; q = 0 counts clients once."""
    same = fax.data.map(data, lambda _, c: {k: v[:3] for k, v in c.items()}, keeps_length=False)
    same = fax.data.subset(same, [name for name, n in zip(data.client_ids(), SIZES) if n >= 3])
    cohort = next(fax.data.cohorts(same, 4, 2, epochs=2))
    sgd, adam = optax.sgd(RATE, momentum=0.5), optax.adam(RATE)
    loss = Logistic.loss
    averaged = after(fedavg(loss, sgd, optax.sgd(0.7)), cohort)
    assert_trees_close(after(fednova(loss, sgd, optax.sgd(0.7)), cohort), averaged)
    proximal = after(fedprox(loss, adam, mu=0.3), cohort)
    assert_trees_close(after(fednova(loss, adam, mu=0.3), cohort), proximal)
    assert_trees_close(after(qfedavg(loss, sgd, optax.sgd(0.7), q=0, lipschitz=3), cohort), averaged)


# Three clients with quadratics a (p - b)^2 / 2, one batch each, and unequal numbers of steps.
A, B, STEPS = np.array([1.0, 2.0, 6.0]), np.array([0.0, 3.0, 1.0]), (2, 8, 4)


def quadratic(p, batch, key):
    return batch["a"] * (p - batch["b"]) ** 2 / 2


def unequal():
    clients = {i: {"a": np.full(n, A[i]), "b": np.full(n, B[i])} for i, n in enumerate(STEPS)}
    return fax.data.cohorts(fax.data.InMemory(clients), 3, 1)


def end(algorithm, rounds=2000):
    state, _ = many_rounds(algorithm, algorithm.init(np.float64(4)), unequal(), rounds)
    return float(algorithm.params(state))


def test_objectives():
    """FedNova's steps are those of one objective, FedDyn reaches it; FedAvg ends elsewhere."""
    small, n = 1e-3, np.array(STEPS)
    of_examples = (n * A * B).sum() / (n * A).sum()
    of_steps = (n * n * A * B).sum() / (n * n * A).sum()
    assert abs(of_steps - of_examples) > 0.1
    # A client moves by its number of steps, so that FedAvg counts its examples twice over.
    np.testing.assert_allclose(end(fedavg(quadratic, optax.sgd(small))), of_steps, atol=0.02)
    np.testing.assert_allclose(end(fednova(quadratic, optax.sgd(small))), of_examples, atol=0.02)
    dynamic = feddyn(quadratic, optax.sgd(0.1), alpha=1.0, num_clients=3)
    np.testing.assert_allclose(end(dynamic, 300), (A * B).sum() / A.sum(), rtol=1e-8)


def test_fair_averaging_evens_out_losses():
    def spread(q):
        found = end(qfedavg(quadratic, optax.sgd(0.01), q=q, lipschitz=100.0))
        return np.var(A * (found - B) ** 2 / 2)

    losses = [spread(q) for q in (0.0, 1.0, 5.0)]
    assert losses[0] > 1.5 * losses[1] > 2 * losses[2]


def test_a_client_without_loss_does_not_count_in_fair_averaging():
    """Where its loss is zero F^(q-1) is infinite, and its step is none."""
    cohort = next(unequal())
    for q, expected in ((0.0, "fedavg"), (0.5, "others")):
        algorithm = qfedavg(quadratic, optax.sgd(0.1), q=q, lipschitz=10.0)

        def moved(start, q, algorithm=algorithm):
            algorithm = qfedavg(quadratic, optax.sgd(0.1), q=q, lipschitz=10.0)
            return algorithm.round(algorithm.init(start), cohort)[0].params

        found, slopes = jax.value_and_grad(moved, (0, 1))(3.0, q)  # the second client's optimum
        assert np.isfinite([found, *slopes]).all(), expected
        y = B + (1 - 0.1 * A) ** STEPS * (3 - B)
        f, dw = A * (3 - B) ** 2 / 2, 10 * (3 - y)
        others = f > 0 if q else f >= 0
        f, dw = f[others], dw[others]
        h = q * f ** (q - 1) * dw**2 + 10 * f**q if q else np.full(3, 10.0)
        np.testing.assert_allclose(found, 3 - (f**q * dw).sum() / h.sum(), rtol=1e-10)


# Gradients


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
    two = [cohort for _, cohort in zip(range(2), cohorts(data))]

    @jax.jit
    @jax.value_and_grad
    def final_loss(numbers):
        algorithm = make(numbers)
        state = algorithm.init(Quadratic.start())
        for cohort in two:
            state, _ = algorithm.round(state, cohort)
        return jnp.sum(jnp.cos(algorithm.params(state)["w"]))

    numbers = np.array([0.03, 0.6, 0.4])
    _, found = final_loss(numbers)
    for i, step in enumerate(1e-5 * np.eye(3)):
        slope = (final_loss(numbers + step)[0] - final_loss(numbers - step)[0]) / 2e-5
        np.testing.assert_allclose(found[i], slope, rtol=1e-6, atol=1e-9)
