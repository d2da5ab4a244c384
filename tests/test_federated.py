"""The skeleton of algorithms: an algorithm of one's own, what it reports, and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import SIZES, Quadratic, assert_trees_close, combine
from test_init import ALGORITHMS, COPIES, given, loss

import fax
from fax import algorithms
from fax.aggregators import chain, gaussian, non_finite
from fax.algorithms import ClientResult, federated, local_steps

N, RATE = len(SIZES), 0.1


def fedvarp(loss, *, num_clients, **others):
    """FedVARP, arXiv:2207.14130, as docs/your_own_algorithm.md has it."""

    def client(server, last, data):
        optimizer = optax.sgd(RATE)
        trained = local_steps(loss, optimizer, server.params, data, server.model_state)
        result = ClientResult.of(trained, server, weight=1.0)
        return result._replace(update=optax.tree.sub(result.update, last), own=result.update)

    def server(state, received, step):
        share = received.cohort.size / num_clients
        mean = optax.tree.add_scale(state.server, share, received.update)
        after = step(optax.tree.add(state.server, received.update))
        return after._replace(server=mean), {"share": jnp.float32(share)}

    zeros = optax.tree.zeros_like
    others = {"server_state": zeros, "client_state": zeros, "num_clients": num_clients, **others}
    return federated("fedvarp", loss, client, server=server, **others)


@pytest.mark.parametrize("setting", ["jitted", "a mesh of 2"])
def test_rounds_are_those_of_the_paper(setting):
    context, at_once = problems.setting(setting)
    x, last = Quadratic.start(), [combine(np.zeros_like, Quadratic.start())] * N
    with context:
        rounds = fax.data.cohorts(problems.data(), 4, 4, epochs=2, resident=setting == "jitted")
        algorithm = fedvarp(Quadratic.loss, num_clients=N, vectorize=at_once)
        state, step = algorithm.init(x), jax.jit(algorithm.round, donate_argnums=0)
        for _, cohort in zip(range(3), rounds):
            state, metrics = step(state, cohort)
            guess, updates = combine(lambda *h: np.mean(h, 0), *last), {}
            ids = np.asarray(cohort.positions)
            for i, batches in zip(ids, problems.numpy_batches(cohort)):
                y = x
                for batch in batches:
                    gradient = Quadratic.losses_and_gradient(y, *batch)[1]
                    y = combine(lambda y, g: y - RATE * g, y, gradient)
                updates[i] = combine(np.subtract, y, x)
            news = [combine(np.subtract, updates[i], last[i]) for i in ids]
            x = combine(lambda x, h, *d: x + h + np.mean(d, 0), x, guess, *news)
            last = [updates.get(i, last[i]) for i in range(N)]
        assert_trees_close(state.params, x)
        assert_trees_close(state.server, combine(lambda *h: np.mean(h, 0), *last))
        assert_trees_close(state.clients.rows, combine(lambda *h: np.stack(h), *last))
    assert sorted(metrics) == ["clients/loss", "loss", "share"]
    assert repr(algorithm) == "Algorithm(fedvarp)"


def test_numbers_in_a_state_have_the_type_that_they_have_after_a_round():
    """Otherwise a jitted round would be compiled twice."""
    start = {"server_state": lambda x: 0.0, "client_state": lambda x: (1, jax.random.key(0))}
    algorithm = fedvarp(Quadratic.loss, num_clients=N, **start)
    state = jax.eval_shape(algorithm.init, Quadratic.start())
    assert not any(x.weak_type for x in jax.tree.leaves(state))


@COPIES
@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_model_comes_out_of_every_algorithm(name):
    """One can be exchanged for another, whatever else it has."""
    algorithm = ALGORITHMS[name](loss)
    state = jax.eval_shape(algorithm.init, given(name)) if name != "hyp_cluster" else None
    state = algorithm.init(given(name)) if state is None else state
    one = jax.eval_shape(algorithm.params, state)
    assert jax.tree.map(lambda x: x.shape, one) == {"w": (2,), "b": ()}
    if algorithm.models is not None:
        every = jax.eval_shape(algorithm.models, state)
        sizes = 1 if name == "local_sgd" else 2
        assert jax.tree.map(lambda x: x.shape, every) == {"w": (sizes, 2), "b": (sizes,)}


# Clients that are not finite


def of_state(params, model_state, batch, key):
    """A loss with statistics; those of an odd batch are NaN, like its losses."""
    odd = jnp.where(batch["x"] > 5, jnp.nan, 1)
    mean = 0.5 * model_state["mean"] + 0.5 * jnp.mean(odd * batch["x"])
    return (batch["x"] - params["w"] - params["b"]) ** 2 * odd, {}, {"mean": mean}


DROP = {"aggregator": chain(non_finite())}
WITH_STATE = {
    "fedavg": lambda: algorithms.fedavg(of_state, optax.sgd(RATE), **DROP),
    "fedper": lambda: algorithms.fedper(
        of_state, optax.sgd(RATE), personal="b", num_clients=3, **DROP
    ),
    "fedbn": lambda: algorithms.fedper(
        of_state, optax.sgd(RATE), personal="mean", num_clients=3, **DROP
    ),
    "hyp_cluster": lambda: algorithms.hyp_cluster(
        of_state, optax.sgd(RATE), num_clusters=2, **DROP
    ),
    "diloco": lambda: algorithms.diloco(of_state, optax.sgd(RATE), replicas=3, **DROP),
}


@pytest.mark.parametrize("name", WITH_STATE)
def test_model_states_and_personal_rows_leave_out_what_is_not_finite(name):
    algorithm = WITH_STATE[name]()
    models = 2 if name == "hyp_cluster" else None
    start = {"w": np.float64(0.5), "b": np.float64(0.0)}, {"mean": np.float64(2.0)}
    start = jax.tree.map(lambda x: x if models is None else np.stack([x, x + 1]), start)
    placement = "replicas" if name == "diloco" else "clients"
    states = []
    for last in (9.0, None):  # as if the third client were not there
        clients = {"a": [1.0], "b": [4.0] * 2, "c": [4.0 if last is None else last]}
        data = fax.data.InMemory({k: {"x": np.array(x)} for k, x in clients.items()})
        cohort = next(fax.data.cohorts(data, 3, 2, sampler=lambda _: range(3), placement=placement))
        if last is None:
            there = np.array([True, True, False])
            mask = cohort.mask & there[:, None, None]
            n = np.where(there, cohort.num_examples, 0)
            cohort = dataclasses.replace(cohort, mask=mask, num_examples=n)
        state, _ = jax.jit(algorithm.round)(algorithm.init(*start), cohort)
        states.append(jax.device_get(state))
    for part in ("params", "model_state", *(["personal"] if placement == "clients" else [])):
        assert_trees_close(*(getattr(state, part) for state in states), rtol=1e-12)


@pytest.mark.parametrize("name", ["papa", "papa_all", "streaming_diloco"])
def test_a_replica_that_is_not_finite_starts_from_what_it_is_pushed_toward(name):
    """As in DiLoCo, where all replicas start from it."""
    settings = {"streaming_diloco": {"steps": 1, "fragments": 1, "tau": 0}, "papa": {"steps": None}}
    algorithm = getattr(algorithms, name)(
        of_state, optax.sgd(RATE), replicas=3, **DROP, **settings.get(name, {})
    )
    data = fax.data.InMemory({k: {"x": np.array([x])} for k, x in zip("abc", (1.0, 4.0, 9.0))})
    cohort = fax.data.cohorts(data, 3, 1, sampler=lambda _: range(3), placement="replicas")
    state = algorithm.init({"w": np.float64(0.5), "b": np.float64(0)}, {"mean": np.float64(2)})
    state, _ = jax.jit(algorithm.round)(state, next(cohort))
    rows = state.replicas.rows
    # Pushes toward a mean do not change it.
    toward = getattr(state, "params", jax.tree.map(lambda x: x[:2].mean(), rows.params))
    last = jax.tree.map(lambda x: x[2], (rows.params, rows.model_state))
    assert_trees_close(last, (toward, state.model_state), rtol=1e-12)


def test_a_round_without_examples_keeps_the_models_state():
    algorithm = algorithms.fedavg(of_state, optax.sgd(RATE))
    data = fax.data.InMemory({"a": {"x": [1.0]}, "b": {"x": [2.0]}})
    cohort = next(fax.data.cohorts(data, 2, 1))
    nobody = np.zeros_like(cohort.num_examples)
    cohort = dataclasses.replace(cohort, mask=cohort.mask & False, num_examples=nobody)
    state = algorithm.init({"w": 0.5, "b": 0.0}, {"mean": 2.0})
    after, _ = jax.jit(algorithm.round)(state, cohort)
    assert after.model_state["mean"] == 2


def test_clients_may_keep_keys_and_integers():
    def client(server, own, data):
        key, count = own
        return ClientResult(
            {"w": 1 / data.batches["x"][0, 0]}, {}, own=(jax.random.fold_in(key, 1), count + 1)
        )

    start = jax.random.key(3), jnp.int8(5)
    algorithm = federated(
        "ours", Quadratic.loss, client, client_state=lambda params: start, num_clients=2, **DROP
    )
    data = fax.data.InMemory({"a": {"x": [1.0]}, "b": {"x": [0.0]}})
    cohort = next(fax.data.cohorts(data, 2, 1, sampler=lambda _: range(2)))
    state, _ = jax.jit(algorithm.round)(algorithm.init({"w": 0.0}), cohort)
    keys, counts = state.clients.rows
    np.testing.assert_array_equal(counts, np.array([6, 5], np.int8))
    assert jnp.all(keys == jnp.stack([jax.random.fold_in(start[0], 1), start[0]]))


def test_rows_that_may_be_kept_take_no_memory_of_their_own():
    """Temporary memory is that of the old rows and of the new ones."""
    clients, size = 16, 20_000

    def client(server, own, data):
        update = server.params * jnp.sum(data.batches["x"]) + own
        return ClientResult(update, {}, own=update)

    algorithm = federated(
        "ours", loss, client, client_state=jnp.zeros_like, num_clients=clients, vectorize=1
    )
    data = fax.data.InMemory({str(i): {"x": np.ones(1)} for i in range(clients)})
    cohort = next(fax.data.cohorts(data, clients, 1))
    state = jax.eval_shape(algorithm.init, jnp.ones(size))
    compiled = jax.jit(algorithm.round).lower(state, cohort).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * clients * size * 8


# What is reported


def test_metrics_are_statistics_or_numbers_of_each_client():
    """Of a loss: a mean with weights of its own. Of an algorithm: what is each client's alone."""

    def loss(params, batch, key):
        losses, _ = Quadratic.loss(params, batch, key)
        weights = 0.1 * batch["y"]
        weighted = fax.metrics.Mean(weights * batch["x"][:, 0], weights)
        return losses, {"weighted": weighted, "sizes": fax.metrics.Sum(batch["y"] >= 0)}

    def client(server, own, data):
        trained = local_steps(loss, optax.sgd(RATE), server.params, data)
        result = ClientResult.of(trained, server)
        return result._replace(metrics={**result.metrics, "position": data.position})

    algorithm = federated("ours", loss, client)
    cohort = next(fax.data.cohorts(problems.data(), N, 4, resident=False))
    _, metrics = jax.jit(algorithm.round)(algorithm.init(Quadratic.start()), cohort)
    own = [problems.data().client(f"client {i}") for i in np.asarray(cohort.positions)]
    totals = np.array([[np.sum(c["y"] * c["x"][:, 0]), np.sum(c["y"])] for c in own])
    expected = np.where(totals[:, 1] > 0, totals[:, 0] / np.maximum(totals[:, 1], 1), 0)
    np.testing.assert_allclose(metrics["clients/weighted"], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["weighted"], np.divide(*totals.sum(0)), rtol=1e-6)
    np.testing.assert_array_equal(metrics["clients/sizes"], [len(c["y"]) for c in own])
    assert metrics["sizes"] == sum(SIZES)
    np.testing.assert_array_equal(metrics["clients/position"], cohort.positions)
    assert "position" not in metrics


# What is refused


def result(update=None, **others):
    """A client function that returns this."""

    def client(server, own, data):
        sent = server.params if update is None else update
        return ClientResult(sent, **{"metrics": {}, **others})

    return client


make = functools.partial(federated, "ours", Quadratic.loss)
ROWS = {"client_state": optax.tree.zeros_like, "num_clients": N}
PRIVATE = {"aggregator": gaussian(1.0, 1.0, expected_clients=2)}


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (
            make(result(own={"w": np.zeros(3)}), **ROWS),
            r"ours: client: own\['w'\] is float64\[3\], expected",
        ),
        (
            make(result(own={"w": "text"}), **ROWS),
            r"ours: client: own\['w'\] is 'text', expected an array",
        ),
        (
            make(result(own="text"), **ROWS),
            r"ours: client: own is 'text', expected {'w': f\w+\[4\]}",
        ),
        (
            make(result(), **ROWS),
            "ours: client: own is None, expected what the client keeps",
        ),
        (
            make(result(own=1.0)),
            "ours: client returned own, but clients have no state",
        ),
        (make(result(jnp.zeros(4))), r"ours: the update is f\w+\[4\], expected {'w': f\w+\[4\]}"),
        (make(result(extra=1.0), **PRIVATE), "private, but clients send more than updates"),
        (make(result(), first=lambda *_: 1.0, **PRIVATE), "private, but clients send more"),
        (make(result(metrics=None)), "ours: client: metrics is None, expected a dict from names"),
        (
            make(result(metrics={"name": "text"})),
            r"ours: client: metrics\['name'\] is 'text', expected an array",
        ),
        (make(lambda *_: 1.0), "ours: client returned 1.0, expected a fax.algorithms.ClientResult"),
    ],
)
def test_results_that_do_not_fit(algorithm, message):
    cohort = next(fax.data.cohorts(problems.data(), 2, 16))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(algorithm.round, algorithm.init(Quadratic.start()), cohort)


def test_other_mistakes():
    cohort = next(fax.data.cohorts(problems.data(), 2, 16))
    with pytest.raises(ValueError, match=r"ours: num_clients is None.* Pass num_clients=len"):
        make(result(), client_state=optax.tree.zeros_like)
    with pytest.raises(ValueError, match="ours: num_clients is 3, but clients have no state"):
        make(result(), num_clients=3)
    for name in ("server", "server_state", "first", "models", "params"):
        with pytest.raises(ValueError, match=f"ours: {name} is 3, expected a function {name}"):
            make(result(), **{name: 3})
    forgetful = make(result(), server=lambda state, received, step: step(received.update))
    with pytest.raises(ValueError, match="ours: server returned a State, expected a pair of a"):
        forgetful.round(forgetful.init(Quadratic.start()), cohort)
    pooled = make(result(), server=lambda s, r, step: (s, {"mean": fax.metrics.Mean(1.0, 2.0)}))
    with pytest.raises(ValueError, match=r"ours: server: metrics\['mean'\] is .* its result\(\)"):
        jax.eval_shape(pooled.round, pooled.init(Quadratic.start()), cohort)
    for field, value, message in (
        ("server", jnp.zeros(()), "ours: server: the state is .*, expected .*"),
        ("params", {"w": jnp.zeros(2)}, r"the state.params\['w'\] is float64\[2\], expected"),
    ):
        wrong = make(
            result(), server=lambda s, r, step, own={field: value}: (s._replace(**own), {})
        )
        with pytest.raises(ValueError, match=message):
            wrong.round(wrong.init(Quadratic.start()), cohort)
    with pytest.raises(ValueError, match="ours: not_private is 3, expected"):
        make(result(), not_private=3)
    with pytest.raises(ValueError, match="private, but they send votes without it"):
        make(result(), not_private="they send votes", **PRIVATE)
    with pytest.raises(ValueError, match="ours: client is 3, expected a function"):
        make(3)
    with pytest.raises(ValueError, match="ours: round got the State of another algorithm"):
        make(result(), **ROWS).round(make(result()).init(Quadratic.start()), cohort)
    stateful = federated("ours", lambda *a: (*Quadratic.loss(a[0], *a[2:]), a[1]), result())
    with pytest.raises(ValueError, match="ours: client: model_state is None, exp"):
        stateful.round(stateful.init(Quadratic.start(), 1.0), cohort)
    short = fax.metrics.Sum(jnp.ones(1))
    wrong = algorithms.fedavg(lambda *a: (Quadratic.loss(*a)[0], {"short": short}), optax.sgd(RATE))
    with pytest.raises(ValueError, match=r"'short' with .total of shape \(1,\), expected \(16, "):
        wrong.round(wrong.init(Quadratic.start()), cohort)
