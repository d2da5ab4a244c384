"""Ditto, and parameters and statistics that stay with the client, in every algorithm that averages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax import lax
from problems import CLASSES, FEATURES, SIZES, Logistic, Quadratic, assert_trees_close, combine

import fax
from fax import aggregators, algorithms
from fax.algorithms import ClientStore, ditto, fedbn, fedper

RATE, N, SGD = 0.1, len(SIZES), optax.sgd(0.1)


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


def present(cohort):
    """The positions and batches of those who have any."""
    ids, every = np.asarray(cohort.positions), problems.numpy_batches(cohort)
    return [(i, own) for i, own in zip(ids, every) if own]


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
    """FedBN, arXiv:2102.07623: the parameters and statistics of a normalised layer stay."""

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
                model = down(model, self.gradient(model, (x - x.mean(0)) / np.sqrt(x.var(0) + 0.1), y))
                stats = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, stats, seen)
            self.norms[i], self.stats[i] = model["norm"], stats
            ends.append(model["out"])
            ids.append(i)
        self.out = mean(ends, ids)

    def models(self):
        first = {"norm": self.start()["norm"], "out": self.out}
        return first, [{"norm": norm, "out": self.out} for norm in self.norms]
