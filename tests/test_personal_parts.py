"""Ditto, and parts of a model that stay with the client, in every algorithm that averages."""

import dataclasses
import inspect
import itertools
import re

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
from fax import aggregators, algorithms
from fax.algorithms import ClientStore, ditto, fedbn, fedper, personal_parts, personal_state

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


# Every algorithm


class Apart:
    """The loss of a model of two parts that have nothing to do with each other.

    The second part's loss has a slope, but no value, so that also algorithms that look at losses
    do the same for the first part as if the second was not there.
    """

    @staticmethod
    def start():
        return {"base": Logistic.start(), "head": {"w": np.linspace(-1, 1, FEATURES)}}

    @staticmethod
    def loss(params, batch, key):
        losses, metrics = Logistic.loss(params["base"], batch, key)
        own = (batch["x"] @ params["head"]["w"] - batch["y"]) ** 2 / 2
        return losses + own - lax.stop_gradient(own), metrics

    @staticmethod
    def plain(params, batch, key):
        return Logistic.loss(params["base"], batch, key)


MOMENTUM = optax.sgd(0.05, momentum=0.5)
SHARED = dict(num_clients=N)
ALGORITHMS = {
    "agnostic_fedavg": lambda loss, **how: algorithms.agnostic_fedavg(
        loss, SGD, num_domains=2, domain_learning_rate=0.5, **how
    ),
    "apfl": lambda loss, **how: algorithms.apfl(loss, SGD, **SHARED, **how),
    "ditto": lambda loss, **how: ditto(loss, SGD, mu=0.5, **SHARED, **how),
    "fedavg": lambda loss, **how: algorithms.fedavg(loss, optax.adam(RATE), **how),
    "feddyn": lambda loss, **how: algorithms.feddyn(loss, SGD, alpha=0.5, **SHARED, **how),
    "fednova": lambda loss, **how: algorithms.fednova(loss, MOMENTUM, **how),
    "fedopt": lambda loss, **how: algorithms.fedopt(loss, SGD, optax.adam(RATE), **how),
    "fedprox": lambda loss, **how: algorithms.fedprox(loss, SGD, mu=0.5, **how),
    "maml": lambda loss, **how: algorithms.maml(loss, SGD, SGD, **how),
    "mime": lambda loss, **how: algorithms.mime(loss, MOMENTUM, **how),
    "mime_lite": lambda loss, **how: algorithms.mime_lite(loss, MOMENTUM, **how),
    "qfedavg": lambda loss, **how: algorithms.qfedavg(loss, SGD, q=0.7, lipschitz=9, **how),
    "reptile": lambda loss, **how: algorithms.reptile(loss, SGD, optax.sgd(0.5), **how),
    "scaffold": lambda loss, **how: algorithms.scaffold(loss, RATE, **SHARED, **how),
}
SAME = {"fedopt", "mime_lite", "reptile"}  # as fedavg and mime are


def test_every_algorithm_with_one_model_for_all_is_here():
    others = {"fedbn", "fedper", "hyp_cluster"}  # recipes; and one that has several models
    crossing = {
        name
        for name, make in vars(algorithms).items()
        if inspect.isfunction(make) and "aggregator" in inspect.signature(make).parameters
        if "replicas" not in inspect.signature(make).parameters
    }
    assert crossing - others - {"federated"} == ALGORITHMS.keys()


@pytest.mark.parametrize("name", sorted(ALGORITHMS.keys() - SAME))
def test_what_is_personal_is_no_business_of_the_algorithm(data, name):
    """The rest is trained as if it was alone, and the personal part by each client for itself."""

    def kinds(client_id, c):  # of examples: for MAML, and domains, of which a client has one
        here, domain = np.arange(len(c["y"])), int(client_id[-1]) % 2
        return {**c, "query": here % 3 == 2, "domain": np.full(len(here), domain)}

    plain = ALGORITHMS[name](Apart.plain)
    loss = personal_parts(Apart.loss, "head", optax.sgd(0.05), num_clients=N)
    algorithm = ALGORITHMS[name](loss, aggregator=aggregators.mean())

    @jax.jit
    def both(states, cohort):
        return plain.round(states[0], cohort)[0], algorithm.round(states[1], cohort)

    states = [plain.init({"base": Logistic.start()}), algorithm.init(Apart.start())]
    heads = [Apart.start()["head"]["w"]] * N
    for _, cohort in zip(range(2), cohorts(fax.data.map(data, kinds))):
        states[0], (states[1], metrics) = both(states, cohort)
        kind = np.asarray(cohort.batches["query"])
        for row, (i, own) in enumerate(zip(np.asarray(cohort.positions), numpy_batches(cohort))):
            for (x, y), query in zip(own, kind[row]):
                if name == "maml":  # steps are taken on examples for support alone
                    x, y = x[~query[: len(y)]], y[~query[: len(y)]]
                if len(y):
                    heads[i] = heads[i] - 0.05 * x.T @ (x @ heads[i] - y) / len(y)
    assert_trees_close(states[1].params["base"], states[0].params["base"])
    found = algorithm.params(states[1])
    assert_trees_close(found["base"], plain.params(states[0])["base"])
    np.testing.assert_array_equal(found["head"]["w"], Apart.start()["head"]["w"])
    np.testing.assert_allclose(algorithm.models(states[1])["head"]["w"], heads, rtol=1e-10)
    sent = 64 * sum(x.size for x in jax.tree.leaves(Logistic.start()))
    np.testing.assert_array_equal(metrics["clients/bits"], sent)


# Which parts


def chosen(parts, params=None, model_state=None):
    """The paths of what is personal."""
    params = BN.start() if params is None else params
    loss = personal_parts(BN.loss, parts, SGD, num_clients=2)
    state = algorithms.fedavg(loss, SGD).init(params, model_state or BN.statistics())
    whole = [*state.personal.start.params, *state.personal.start.model_state]
    rest = jax.tree_util.tree_leaves_with_path((state.params, state.model_state))
    assert len(whole) + len(rest) == 6
    return whole


def test_parts_are_named_in_several_ways():
    norm = ["norm/bias", "norm/scale"]
    statistics = ["norm/mean", "norm/var"]
    assert chosen("norm") == chosen(None) == norm + statistics
    assert chosen(["norm/scale", "out/b"]) == ["norm/scale", "out/b"]
    assert chosen("*/[bv]*") == ["norm/bias", "out/b", "norm/var"]
    assert chosen("norm/????") == ["norm/bias", "norm/mean"]
    assert chosen(lambda path: path.endswith("/w")) == ["out/w"]
    assert chosen("norm/mean") == ["norm/mean"]  # a statistic alone


def test_a_model_with_personal_statistics_may_be_private():
    """The aggregator sees updates of what is shared, and nothing else is sent."""
    private = aggregators.gaussian(1.0, 1.0, key=jax.random.key(0))
    algorithm, params, model_state = BN().make(aggregator=private)
    algorithm.init(params, model_state)
    some = personal_parts(BN.loss, "norm/mean", SGD, num_clients=N)
    with pytest.raises(
        ValueError, match=r"private, but model_state\['norm'\]\['var'\] is averaged"
    ):
        algorithms.fedavg(some, SGD, aggregator=private).init(params, model_state)


LEAVES = "params has norm/bias, norm/scale, out/b, out/w, and model_state norm/mean, norm/var."


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("nrom", f"parts has 'nrom', but {LEAVES}"),
        (["norm", "head/*"], f"parts has 'head/*', but {LEAVES}"),
        (lambda path: False, f"which chooses nothing to be personal: {LEAVES}"),
        ("*", f"parts is '*', which leaves no parameter to be averaged: {LEAVES}"),
        (lambda path: 1, "parts('norm/bias') is 1, expected True or False."),
        (["norm", 3], "parts is 3, expected a string, the path of a leaf or a pattern."),
        (lambda: True, "parts is a lambda, which takes (), expected a function parts(path)."),
    ],
)
def test_parts_that_there_are_not(parts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        chosen(parts)


def test_other_mistakes(data):
    make = personal_parts
    with pytest.raises(ValueError, match=r"personal_parts: optimizer is 0.1, .* optax.sgd\(0.1\)"):
        make(Per.loss, "head", 0.1, num_clients=N)
    with pytest.raises(ValueError, match="personal_parts: num_clients is 0, expected an int"):
        make(Per.loss, "head", SGD, num_clients=0)
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        chosen("a/b", {"a": {"b": np.ones(1)}, "a/b": np.ones(1)})
    loss = make(Per.loss, "head", SGD, num_clients=N)
    for refused in (
        lambda: algorithms.hyp_cluster(loss, SGD, num_clusters=2),
        lambda: algorithms.diloco(loss, SGD, replicas=2),
        lambda: algorithms.papa(loss, SGD, replicas=2),
        lambda: algorithms.personalize(loss, SGD),
    ):
        with pytest.raises(ValueError, match=r"loss is personal_parts\(.*'head'\), but only an al"):
            refused()
    with pytest.raises(ValueError, match="init got no model_state, but the loss is called as"):
        algorithms.fedavg(make(BN.loss, None, SGD, num_clients=N), SGD).init(BN.start())
    algorithm = algorithms.fedavg(loss, SGD)
    state, cohort = algorithm.init(Per.start()), next(cohorts(data))
    with pytest.raises(ValueError, match="personal_state: state is a State, expected that of an"):
        personal_state(state._replace(personal=None))
    with pytest.raises(ValueError, match="round got the State of another algorithm"):
        algorithm.round(state._replace(personal=None), cohort)

    def forgetful(server, own, data):
        trained = algorithms.local_steps(loss, SGD, server.params, data)
        return algorithms.ClientResult.of(trained, server)

    with pytest.raises(ValueError, match=r"model_state is None, expected the server\.model_state"):
        algorithms.federated("forgetful", loss, forgetful).round(state, cohort)


# Gradients


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
