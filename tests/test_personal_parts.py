"""Parts of a model that stay with the client, in every algorithm that averages the rest."""

import inspect
import re

import jax
import numpy as np
import optax
import problems
import pytest
from jax import lax
from problems import FEATURES, SIZES, Logistic, assert_trees_close, numpy_batches
from test_fedper import BN, Per, cohorts

import fax
from fax import aggregators, algorithms
from fax.algorithms import ditto, personal_parts, personal_state

RATE, N, SGD = 0.1, len(SIZES), optax.sgd(0.1)


@pytest.fixture(scope="module")
def data():
    return problems.data()


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
# The bits that clients send besides their update: control variates, gradients, or a few numbers.
BESIDES = {
    "agnostic_fedavg": 64 * 2 * 2 + 8,
    "feddyn": 64,
    "fednova": 64,
    "mime": 64 * 15,
    "qfedavg": 64 * 2,
    "scaffold": 64 * 15,
}


def test_every_algorithm_with_one_model_for_all_is_here():
    others = {"fedbn", "fedper", "hyp_cluster"}  # recipes; and one that has several models
    crossing = {
        name
        for name, make in vars(algorithms).items()
        if inspect.isfunction(make) and "aggregator" in inspect.signature(make).parameters
        if "replicas" not in inspect.signature(make).parameters
    }
    assert crossing - others - {"federated"} == ALGORITHMS.keys()


@pytest.mark.always("apfl", "fedavg", "scaffold")
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
    np.testing.assert_array_equal(metrics["clients/bits"], sent + BESIDES.get(name, 0))


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
    assert chosen(path for path in ("out/b", "norm/var")) == ["out/b", "norm/var"]
    odd = {"out": {"w[0]": np.ones(1), "w0": np.ones(1), "b": np.ones(1), "[": np.ones(1)}}
    assert chosen("out/w[0]", odd) == chosen(["out/w[0]"], odd) == ["out/w[0]"]


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
        ("nrom", f"parts has 'nrom', which matches nothing: {LEAVES}"),
        (["norm", "head/*"], f"parts has 'head/*', which matches nothing: {LEAVES}"),
        (lambda path: False, f"which matches nothing: {LEAVES}"),
        ("*", f"matches all parameters, so nothing is left to average: {LEAVES}"),
        (lambda path: 1, "parts('norm/bias') is 1, expected True or False."),
        (["norm", 3], "parts is 3, expected a string, the path of a leaf or a pattern."),
        (
            3,
            "parts is 3, expected the path of a leaf or a pattern, a sequence of these, a function",
        ),
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
        with pytest.raises(
            ValueError, match=r"loss is personal_parts\(.*'head'\), which only works"
        ):
            refused()
    with pytest.raises(ValueError, match="init got no model_state, but the loss has the form"):
        algorithms.fedavg(make(BN.loss, None, SGD, num_clients=N), SGD).init(BN.start())
    algorithm = algorithms.fedavg(loss, SGD)
    state, cohort = algorithm.init(Per.start()), next(cohorts(data))
    with pytest.raises(ValueError, match="personal_state: state is a State, expected the state"):
        personal_state(state._replace(personal=None))
    with pytest.raises(ValueError, match="round got the State of another algorithm"):
        algorithm.round(state._replace(personal=None), cohort)

    def forgetful(server, own, data):
        trained = algorithms.local_steps(loss, SGD, server.params, data)
        return algorithms.ClientResult.of(trained, server)

    with pytest.raises(ValueError, match=r"model_state is None, expected the server\.model_state"):
        algorithms.federated("forgetful", loss, forgetful).round(state, cohort)
