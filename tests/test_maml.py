"""MAML against its definition in NumPy, whose derivatives are taken by complex steps."""

import dataclasses

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import problems
import pytest
from problems import SETTINGS, Logistic, Quadratic, assert_trees_close

import fax
from fax.algorithms import fedavg, maml, many_rounds, personalize, reptile

RATE, SERVER = 0.1, 0.5
IDS = [f"client {i}" for i in range(len(problems.SIZES))]


@pytest.fixture(scope="module")
def data():
    """Some batches have no support, or no queries; client 2 has one example, for support."""
    rng, plain = np.random.default_rng(5), problems.data()
    clients = {}
    for i in IDS:
        own = dict(plain.client(i))
        query = rng.random(len(own["y"])) < 0.4
        query[:1] = False
        clients[i] = {**own, "query": query}
    clients["client 5"]["query"][4:8] = True
    return fax.data.InMemory(clients)


def cohorts(data, clients=4, **kwargs):
    # In order, so that client 5 has a batch without support.
    return fax.data.cohorts(data, clients, 4, **{"epochs": 2, "shuffle": False, **kwargs})


# The papers, in NumPy


def batches_of(cohort):
    """Each client's batches (x, y, query) without padding."""
    arrays = [np.asarray(cohort.batches[name]) for name in ("x", "y", "query")]
    mask = np.asarray(cohort.mask)
    return [
        [
            tuple(a[i][s][mask[i][s]] for a in arrays)
            for s in range(mask.shape[1])
            if mask[i][s].any()
        ]
        for i in range(len(mask))
    ]


def adapted(problem, x, batches):
    y = x
    for inputs, labels, query in batches:
        if not query.all():
            gradient = problem.losses_and_gradient(y, inputs[~query], labels[~query])[1]
            y = {k: y[k] - RATE * gradient[k] for k in y}
    return y


def query_loss(problem, y, batches):
    losses = [
        problem.losses_and_gradient(y, inputs[query], labels[query])[0]
        for inputs, labels, query in batches
        if query.any()
    ]
    return np.concatenate(losses).mean() if losses else None


def gradient_by_complex_steps(fn, x):
    """The imaginary part of fn(x + i h) is h fn'(x), with h so small that nothing is lost."""
    gradient = {}
    for name, value in x.items():
        gradient[name] = np.zeros(value.shape)
        for index in np.ndindex(value.shape):
            moved = {k: v.astype(complex) for k, v in x.items()}
            moved[name][index] += 1e-30j
            gradient[name][index] = fn(moved).imag / 1e-30
    return gradient


def meta_gradient(problem, x, batches, first_order):
    """G_i of one client and its query loss, or None without queries."""
    y = adapted(problem, x, batches)
    loss = query_loss(problem, y, batches)
    if loss is None:
        return None, 0.0
    if first_order:
        return gradient_by_complex_steps(lambda y: query_loss(problem, y, batches), y), loss

    def through(x):
        return query_loss(problem, adapted(problem, x, batches), batches)

    return gradient_by_complex_steps(through, x), loss


PAIRS = [
    (Logistic, False, "jitted"),
    (Logistic, True, "vectorized"),
    (Quadratic, False, "a mesh of 1"),
    (Quadratic, True, "jitted"),
    (Quadratic, False, "a mesh of 2"),
    (Logistic, False, "a mesh of 4 x 2"),
]
assert {setting for *_, setting in PAIRS} == set(SETTINGS)


@pytest.mark.always("Quadratic-True-jitted", "Logistic-False-a mesh of 4 x 2")
@pytest.mark.parametrize(
    ("problem", "first_order", "setting"), [problems.case(*pair) for pair in PAIRS]
)
def test_rounds_are_those_of_the_paper(data, problem, first_order, setting):
    context, at_once = problems.setting(setting)
    with context:
        algorithm = maml(
            problem.loss,
            optax.sgd(RATE),
            optax.sgd(SERVER),
            first_order=first_order,
            vectorize=at_once,
        )
        state, x = algorithm.init(problem.start()), problem.start()
        step = jax.jit(algorithm.round)
        for _, cohort in zip(range(3), cohorts(data, resident=setting == "jitted")):
            state, metrics = step(state, cohort)
            of_each = [meta_gradient(problem, x, own, first_order) for own in batches_of(cohort)]
            gradients = [gradient for gradient, _ in of_each if gradient is not None]
            x = {k: x[k] - SERVER * np.mean([g[k] for g in gradients], axis=0) for k in x}
            assert_trees_close(algorithm.params(state), x)
            losses = [loss for _, loss in of_each]
            np.testing.assert_allclose(metrics["clients/loss"], losses, rtol=1e-6)


def test_a_linear_problem_in_closed_form():
    """(q - y)^2 / 2 after k steps y = s + (1 - a)^k (x - s): d/dx is (1 - a)^k (y - q)."""
    s, q, x, a, k = 1.0, 4.0, 3.0, 0.2, 5
    own = {"b": np.array([s, q]), "query": np.array([False, True])}
    cohort = next(fax.data.cohorts(fax.data.InMemory({"a": own}), 1, 2, epochs=k))
    slope = (1 - a) ** k
    y = s + slope * (x - s)
    for first_order, expected in ((False, slope * (y - q)), (True, y - q)):
        algorithm = maml(
            lambda p, b, key: (p - b["b"]) ** 2 / 2,
            optax.sgd(a),
            optax.sgd(1.0),
            first_order=first_order,
        )
        state, metrics = jax.jit(algorithm.round)(algorithm.init(np.float64(x)), cohort)
        np.testing.assert_allclose(algorithm.params(state), x - expected, rtol=1e-12)
        np.testing.assert_allclose(metrics["loss"], (y - q) ** 2 / 2, rtol=1e-6)


def test_without_support_it_is_a_gradient_and_without_queries_nothing(data):
    """Neither is NaN."""
    cohort = next(cohorts(data, clients=6, epochs=1, resident=False))
    step = jax.jit(maml(Logistic.loss, optax.sgd(RATE), optax.sgd(SERVER)).round)
    start = maml(Logistic.loss, optax.sgd(RATE), optax.sgd(SERVER)).init(Logistic.start())

    def where_all_are(query):
        batches = {**cohort.batches, "query": jnp.full(cohort.mask.shape, query)}
        return step(start, dataclasses.replace(cohort, batches=batches))

    state, metrics = where_all_are(False)
    assert_trees_close(state.params, Logistic.start())
    assert metrics["loss"] == 0
    state, _ = where_all_are(True)
    gradients = [
        Logistic.losses_and_gradient(Logistic.start(), *map(np.concatenate, zip(*own)))[1]
        for own in problems.numpy_batches(cohort)
    ]
    expected = {
        k: v - SERVER * np.mean([g[k] for g in gradients], axis=0)
        for k, v in Logistic.start().items()
    }
    assert_trees_close(state.params, expected)


def test_adapting_is_what_clients_do(data):
    cohort = next(cohorts(data, resident=False))
    adapt = jax.jit(personalize(Quadratic.loss, optax.sgd(RATE), query="query"))
    own = adapt(Quadratic.start(), cohort)
    for row, batches in enumerate(batches_of(cohort)):
        expected = adapted(Quadratic, Quadratic.start(), batches)
        assert_trees_close({k: v[row] for k, v in own.items()}, expected)
    # On all examples and with any optimizer it is what Reptile and FedAvg average.
    adapt = jax.jit(personalize(Quadratic.loss, optax.adam(RATE), vectorize=2))
    own = adapt(Quadratic.start(), cohort)
    algorithm = fedavg(Quadratic.loss, optax.adam(RATE))
    state, _ = jax.jit(algorithm.round)(algorithm.init(Quadratic.start()), cohort)
    weights = np.asarray(cohort.num_examples) / cohort.num_examples.sum()
    mean = {k: np.tensordot(weights, v, 1) for k, v in own.items()}
    assert_trees_close(state.params, mean)


@pytest.mark.long
def test_meta_learned_parameters_adapt_better():
    """One step of adaptation is short, unless the scale of its parameters is learned for it."""
    rng = np.random.default_rng(0)
    tasks = {}
    for i in range(12):
        x, w = rng.normal(size=(8, 2)), np.array([4 * (i % 2) - 2, 1.0])
        tasks[i] = {"x": x, "y": x @ w, "query": np.arange(8) >= 4}
    cohorts = fax.data.cohorts(fax.data.InMemory(tasks), 12, 8, shuffle=False)

    def loss(p, batch, key):
        return (batch["x"] @ (jnp.exp(p["scale"]) * p["w"]) - batch["y"]) ** 2 / 2

    start = {"w": np.array([0.0, 1.0]), "scale": np.zeros(2)}
    adapt = personalize(loss, optax.sgd(0.1), query="query")
    everyone = next(cohorts)

    def judged(params):
        own = adapt(params, everyone)
        queries = {name: everyone.batches[name][:, 0, 4:] for name in ("x", "y")}
        return jax.vmap(loss, (0, 0, None))(own, queries, None).mean()

    ends = []
    sgd = optax.sgd(0.1)
    for algorithm in (maml(loss, sgd, sgd), reptile(loss, sgd, optax.sgd(0.5))):
        state, _ = many_rounds(algorithm, algorithm.init(start), cohorts, 300)
        ends.append(judged(algorithm.params(state)))
    assert ends[0] < 0.2 * ends[1] < 0.2 * judged(start)


# Transformations


@pytest.mark.long
def test_hyperparameters_can_be_differentiated_and_swept(data):
    two = problems.expand(cohorts(data, epochs=1).take(2))

    def final_loss(rates):
        algorithm = maml(Quadratic.loss, optax.sgd(rates[0]), optax.sgd(rates[1]))
        start = algorithm.init(Quadratic.start())
        state, _ = jax.lax.scan(algorithm.round, start, two)
        return jnp.sum(algorithm.params(state)["w"] ** 2)

    problems.check_sweep(final_loss, np.array([[0.03, 0.3], [0.05, 0.2]]))


@pytest.mark.long
def test_memory_does_not_grow_with_the_cohort():
    def temporary(clients):
        query = np.arange(8) % 2 == 0
        own = {"x": np.ones((8, 100)), "query": query}
        cohort = next(
            fax.data.cohorts(fax.data.InMemory(dict.fromkeys(range(clients), own)), clients, 4)
        )
        loss, sgd = lambda w, b, k: jnp.sum(jnp.tanh(b["x"] @ w) ** 2, 1), optax.sgd(0.1)
        algorithm = maml(loss, sgd, sgd)
        lowered = jax.jit(algorithm.round).lower(algorithm.init(np.ones((100, 100))), cohort)
        return lowered.compile().memory_analysis().temp_size_in_bytes / (8 * 100 * 100)

    few, many = temporary(4), temporary(32)
    assert many < few + 0.5


# As of other algorithms, in test_fedavg.py and test_control_variates.py.
@pytest.mark.long
def test_only_the_mean_is_reduced_across_devices(data):
    with jax.set_mesh(meshes.mesh(clients=2)):
        algorithm = maml(lambda *a: Logistic.loss(*a)[0], optax.sgd(RATE), optax.sgd(SERVER))
        state, cohort = algorithm.init(Logistic.start()), next(cohorts(data))
        text = jax.jit(algorithm.round).lower(state, cohort).compile().as_text()
    assert sum(" all-reduce(" in line for line in text.splitlines()) == 1
    assert "all-gather" not in text


# Models with state, aggregators, mistakes


@pytest.mark.long
def test_model_state_goes_through_the_local_steps(data):
    def loss(params, model_state, batch, key):
        return *Logistic.loss(params, batch, key), {"steps": model_state["steps"] + 1.0}

    algorithm = maml(loss, optax.sgd(RATE), optax.sgd(SERVER))
    cohort = next(cohorts(data, resident=False))
    state, _ = algorithm.round(algorithm.init(Logistic.start(), {"steps": 2.0}), cohort)
    steps = [sum(not q.all() for *_, q in own) for own in batches_of(cohort)]
    expected = 2 + np.average(steps, weights=cohort.num_examples)
    np.testing.assert_allclose(state.model_state["steps"], expected, rtol=1e-12)
    own = personalize(loss, optax.sgd(RATE), query="query")(
        Logistic.start(), cohort, {"steps": 2.0}
    )
    plain = personalize(Logistic.loss, optax.sgd(RATE), query="query")(Logistic.start(), cohort)
    assert_trees_close(own, plain)


# Those of MAML do in test_personal_parts.py, too.
@pytest.mark.long
def test_updates_go_through_the_aggregator(data):
    aggregator = fax.aggregators.chain(fax.aggregators.mean())
    cohort = next(cohorts(data))
    ends = []
    for chosen in (aggregator, None):
        algorithm = maml(Quadratic.loss, optax.sgd(RATE), optax.sgd(SERVER), aggregator=chosen)
        ends.append(jax.jit(algorithm.round)(algorithm.init(Quadratic.start()), cohort))
    assert_trees_close(ends[0][0].params, ends[1][0].params)
    assert ends[0][1]["clients/bits"].shape == (4,)


def test_mistakes(data):
    with pytest.raises(ValueError, match="maml: client_optimizer is -1, expected"):
        maml(Logistic.loss, -1, optax.sgd(1.0))
    algorithm = maml(Logistic.loss, optax.sgd(RATE), optax.sgd(SERVER))
    state = algorithm.init(Logistic.start())
    for resident in (True, False):
        cohort = next(fax.data.cohorts(problems.data(), 2, 4, resident=resident))
        with pytest.raises(
            ValueError, match=r"no feature 'query', but \['x', 'y'\]. Expected a bo"
        ):
            algorithm.round(state, cohort)
    with pytest.raises(ValueError, match=r"feature 'x' is float64\[4\] for each example, expected"):
        personalize(Logistic.loss, optax.sgd(RATE), query="x")(Logistic.start(), cohort)
    with pytest.raises(ValueError, match=r"feature 'y' is int64\[\] for each example, expected"):
        maml(Logistic.loss, optax.sgd(RATE), optax.sgd(1.0), query="y").round(state, cohort)
