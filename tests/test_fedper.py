"""Ditto, FedPer and FedBN against their papers in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax import lax
from problems import (
    CLASSES,
    FEATURES,
    SIZES,
    Logistic,
    assert_trees_close,
    combine,
    numpy_batches,
)

import fax
from fax.algorithms import ClientStore, ditto, fedbn, fedper, personal_parts, personal_state

RATE, N, SGD = 0.1, len(SIZES), optax.sgd(0.1)


@pytest.fixture(scope="module")
def data():
    return problems.data()


def cohorts(data):
    """Clients of one to six steps, of whom one is missing in every other round."""
    return problems.one_missing(fax.data.cohorts(data, 4, 4, epochs=2, resident=False))


def present(cohort):
    """The positions and batches of those who have any."""
    every = zip(np.asarray(cohort.positions), numpy_batches(cohort))
    return [(i, own) for i, own in every if own]


def mean(trees, ids):
    """Weighted by examples."""
    weights = np.array([SIZES[i] for i in ids], float)
    return jax.tree.map(lambda *x: np.tensordot(weights / weights.sum(), x, 1), *trees)


def down(params, gradient, rate=RATE):
    return jax.tree.map(lambda p, g: p - rate * g, params, gradient)


def stacked(trees):
    return jax.tree.map(lambda *x: np.stack(x), *trees)


# The papers, in NumPy


class Ditto:
    """Algorithm 1 of arXiv:2012.04221, whose v_k start from the model that a client first gets."""

    mu, rate = 0.6, 0.05

    def __init__(self):
        self.w, self.v = Logistic.start(), [None] * N

    def make(self, **kwargs):
        personal = optax.sgd(self.rate)
        options = dict(mu=self.mu, num_clients=N, personal_optimizer=personal)
        return ditto(Logistic.loss, SGD, **options, **kwargs), Logistic.start(), None

    def round(self, cohort):
        ends, ids = [], []
        for i, own in present(cohort):
            w, v = self.w, self.w if self.v[i] is None else self.v[i]
            for batch in own:
                g = Logistic.losses_and_gradient(v, *batch)[1]
                g = combine(lambda g, v, w: g + self.mu * (v - w), g, v, self.w)
                v = down(v, g, self.rate)
                w = down(w, Logistic.losses_and_gradient(w, *batch)[1])
            self.v[i] = v
            ends.append(w)
            ids.append(i)
        self.w = mean(ends, ids)

    def models(self):
        return self.w, [self.w if v is None else v for v in self.v]


class Per:
    """FedPer, arXiv:1912.00818: a layer of everyone's, and one of the client's own on top of it."""

    @staticmethod
    def start():
        rng = np.random.default_rng(7)
        base, head = rng.normal(size=(FEATURES, 2)), rng.normal(size=(2, CLASSES))
        return {"base": {"w": base}, "head": {"w": head, "b": np.zeros(CLASSES)}}

    @staticmethod
    def loss(params, batch, key):
        x = batch["x"] @ params["base"]["w"]
        return Logistic.loss(params["head"], {**batch, "x": x}, key)

    @staticmethod
    def gradient(params, x, y):
        z = x @ params["base"]["w"]
        own = Logistic.losses_and_gradient(params["head"], z, y)[1]
        logits = z @ params["head"]["w"] + params["head"]["b"]
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        error = (p - np.eye(CLASSES)[y]) / len(y)
        return {"base": {"w": x.T @ (error @ params["head"]["w"].T)}, "head": own}

    def __init__(self):
        start = self.start()
        self.base, self.first, self.heads = start["base"], start["head"], [start["head"]] * N

    def make(self, **kwargs):
        options = dict(personal="head", num_clients=N)
        return fedper(self.loss, SGD, **options, **kwargs), self.start(), None

    def round(self, cohort):
        ends, ids = [], []
        for i, own in present(cohort):
            model = {"base": self.base, "head": self.heads[i]}
            for batch in own:
                model = down(model, self.gradient(model, *batch))
            self.heads[i] = model["head"]
            ends.append(model["base"])
            ids.append(i)
        self.base = mean(ends, ids)

    def models(self):
        model = {"base": self.base, "head": self.first}
        return model, [{**model, "head": head} for head in self.heads]


class BN:
    """FedBN, arXiv:2102.07623: the parameters and statistics of a normalized layer stay."""

    @staticmethod
    def start():
        out = np.random.default_rng(8).normal(size=(FEATURES, CLASSES))
        norm = {"scale": np.ones(FEATURES), "bias": np.zeros(FEATURES)}
        return {"norm": norm, "out": {"w": out, "b": np.zeros(CLASSES)}}

    @staticmethod
    def statistics():
        return {"norm": {"mean": np.zeros(FEATURES), "var": np.ones(FEATURES)}}

    @staticmethod
    def loss(params, model_state, batch, key, mask):
        x = batch["x"]
        mean, var = (f(x, axis=0, where=mask[:, None]) for f in (jnp.mean, jnp.var))
        z = (x - mean) / jnp.sqrt(var + 0.1) * params["norm"]["scale"] + params["norm"]["bias"]
        losses, metrics = Logistic.loss(params["out"], {**batch, "x": z}, key)
        seen = {"norm": {"mean": mean, "var": var}}
        new = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, model_state, seen)
        return losses, metrics, new

    @staticmethod
    def gradient(params, normed, y):
        z = normed * params["norm"]["scale"] + params["norm"]["bias"]
        own = Logistic.losses_and_gradient(params["out"], z, y)[1]
        logits = z @ params["out"]["w"] + params["out"]["b"]
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        dz = (p - np.eye(CLASSES)[y]) / len(y) @ params["out"]["w"].T
        return {"norm": {"scale": (dz * normed).sum(0), "bias": dz.sum(0)}, "out": own}

    def __init__(self):
        self.out, norm = self.start()["out"], self.start()["norm"]
        self.norms, self.stats = [norm] * N, [self.statistics()] * N

    def make(self, **kwargs):
        made = fedbn(self.loss, SGD, num_clients=N, **kwargs)
        return made, self.start(), self.statistics()

    def round(self, cohort):
        ends, ids = [], []
        for i, own in present(cohort):
            model, stats = {"norm": self.norms[i], "out": self.out}, self.stats[i]
            for x, y in own:
                seen = {"norm": {"mean": x.mean(0), "var": x.var(0)}}
                model = down(
                    model, self.gradient(model, (x - x.mean(0)) / np.sqrt(x.var(0) + 0.1), y)
                )
                stats = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, stats, seen)
            self.norms[i], self.stats[i] = model["norm"], stats
            ends.append(model["out"])
            ids.append(i)
        self.out = mean(ends, ids)

    def models(self):
        first = {"norm": self.start()["norm"], "out": self.out}
        return first, [{"norm": norm, "out": self.out} for norm in self.norms]


PAPERS = [Ditto, Per, BN]


@pytest.mark.always("Ditto-jitted", "Per-a mesh of 2", "BN-vectorized")
@pytest.mark.parametrize(
    ("paper", "setting"),
    [
        *((paper, "jitted") for paper in PAPERS),
        (Ditto, "a mesh of 4 x 2"),
        (Per, "a mesh of 2"),
        (BN, "vectorized"),
    ],
)
def test_rounds_are_those_of_the_paper(data, paper, setting):
    """Without a mesh those of a store, which has no rows of clients on the devices."""
    context, at_once = problems.setting(setting)
    expected = paper()
    algorithm, params, model_state = expected.make(vectorize=at_once)
    with context, ClientStore(algorithm) as store:
        stored = setting == "jitted"
        state = (store if stored else algorithm).init(params, model_state)
        step = store.round if stored else jax.jit(algorithm.round)
        models = (lambda state: store.models(state, range(N))) if stored else algorithm.models
        assert stored == all(len(x) != N for x in jax.tree.leaves(state) if x.ndim)
        for _, cohort in zip(range(4), cohorts(data)):
            before = jax.device_get(models(state))
            state, metrics = step(state, cohort)
            expected.round(cohort)
            model, every = expected.models()
            found = jax.device_get(models(state))
            assert_trees_close(algorithm.params(state), model)
            assert_trees_close(found, stacked(every))
        if paper is BN and not stored:
            assert_trees_close(personal_state(state), stacked(expected.stats))
    if paper is Per:  # who was not there has, to the bit, what it had
        away = sorted({*range(N)} - {i for i, _ in present(cohort)})
        for was, now in zip(*(jax.tree.leaves(x["head"]) for x in (before, found))):
            np.testing.assert_array_equal(was[away], now[away])
    assert np.asarray(metrics["clients/loss"])[1] == 0  # who is missing


# Gradients


@pytest.mark.long
def test_hyperparameters_have_gradients(data):
    """Of clients' losses after two rounds, against finite differences."""
    two = jax.tree.map(lambda *x: jnp.stack(x), *itertools.islice(cohorts(data), 2))

    @jax.jit
    @jax.value_and_grad
    def final_loss(numbers):
        rate, mu, personal_rate = numbers
        sgd, own = optax.sgd(rate), optax.sgd(personal_rate)
        parts = personal_parts(Per.loss, "head", own, num_clients=N)
        made = ditto(parts, sgd, mu=mu, num_clients=N, personal_optimizer=own)
        state, _ = lax.scan(made.round, made.init(Per.start()), two)
        found = made.params(state), made.models(state)
        return sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(found))

    numbers = np.array([0.03, 0.6, 0.05])
    _, found = final_loss(numbers)
    for i, step in enumerate(1e-5 * np.eye(3)):
        slope = (final_loss(numbers + step)[0] - final_loss(numbers - step)[0]) / 2e-5
        np.testing.assert_allclose(found[i], slope, rtol=1e-6)
