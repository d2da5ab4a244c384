"""FedAvg and FedOpt against the papers in NumPy, and what JAX can do to a round."""

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import problems
import pytest
from flax import nnx
from problems import CLASSES, FEATURES, SIZES, Logistic, Quadratic, numpy_batches
from subsets import alike

import fax
from fax.algorithms import fedavg, many_rounds

RATE = 0.3
logistic, start = Logistic.loss, Logistic.start


@pytest.fixture(scope="module")
def data():
    return problems.data()


def cohorts(data, clients=4, **kwargs):
    return fax.data.cohorts(data, clients, 4, **{"epochs": 2, **kwargs})


def flat(lists):
    return [x for own in lists for x in own]


# The papers, in NumPy


def client_update(params, batches):
    """Algorithm 1 of arXiv:1602.05629, ClientUpdate."""
    losses, hits = [], []
    for x, y in batches:
        loss, gradient = Logistic.losses_and_gradient(params, x, y)
        losses += loss.tolist()
        hits += ((x @ params["w"] + params["b"]).argmax(1) == y).tolist()
        params = {k: params[k] - RATE * gradient[k] for k in params}
    return params, losses, hits


class Momentum:
    """FedAvgM, Hsu et al., arXiv:1909.06335: v = beta v + D, x = x + rate v."""

    optimizer = optax.sgd(0.7, momentum=0.9)

    def __init__(self):
        self.v = 0

    def __call__(self, delta):
        self.v = 0.9 * self.v + delta
        return 0.7 * self.v


class Average:
    optimizer = None

    def __call__(self, delta):
        return delta


class Adam:
    """FedAdam, Algorithm 2 of arXiv:2003.00295, with the bias correction that optax has."""

    optimizer = optax.adam(0.1, b1=0.9, b2=0.99, eps=1e-3)

    def __init__(self):
        self.m = self.v = self.t = 0

    def __call__(self, delta):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * delta
        self.v = 0.99 * self.v + 0.01 * delta**2
        m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.99**self.t)
        return 0.1 * m / (np.sqrt(v) + 1e-3)


# With momentum, FedOpt (test_fedopt.py).
@pytest.mark.always("Average-True", "Adam-False")
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("server", [Average, Momentum, Adam])
def test_rounds_are_those_of_the_paper(data, server, resident):
    algorithm = fedavg(logistic, optax.sgd(RATE), server.optimizer)
    state, expected = algorithm.init(start()), start()
    steps = {name: server() for name in expected}
    step = jax.jit(algorithm.round)
    for _, cohort in zip(range(4), cohorts(data, resident=resident)):
        state, metrics = step(state, cohort)
        results = [client_update(expected, batches) for batches in numpy_batches(cohort)]
        n = np.array([SIZES[c] for c in cohort.positions], float)
        for name in expected:
            updates = [params[name] - expected[name] for params, _, _ in results]
            mean = np.tensordot(n / n.sum(), updates, 1)
            expected = {**expected, name: expected[name] + steps[name](mean)}
        for name in expected:
            np.testing.assert_allclose(algorithm.params(state)[name], expected[name], rtol=1e-10)
        for name, number in (("loss", 1), ("accuracy", 2)):
            own = [result[number] for result in results]
            np.testing.assert_allclose(metrics[name], np.mean(flat(own)), rtol=1e-6)
            np.testing.assert_allclose(
                metrics[f"clients/{name}"], list(map(np.mean, own)), rtol=1e-6
            )
    assert sorted(metrics) == ["accuracy", "clients/accuracy", "clients/loss", "loss"]


def test_a_closed_form():
    """One full batch of (p - x)^2 / 2 takes p to p + rate (mean - p), and so does the round."""
    rng = np.random.default_rng(0)
    x = {f"client {i}": {"x": rng.normal(size=n)} for i, n in enumerate([2, 5, 3])}
    algorithm = fedavg(lambda p, batch, key: (p - batch["x"]) ** 2 / 2, optax.sgd(0.25))
    cohort = next(fax.data.cohorts(fax.data.InMemory(x), 3, 5))
    state, metrics = algorithm.round(algorithm.init(np.float64(4)), cohort)
    everything = np.concatenate([client["x"] for client in x.values()])
    np.testing.assert_allclose(state.params, 4 + 0.25 * (everything.mean() - 4), rtol=1e-12)
    np.testing.assert_allclose(metrics["loss"], np.mean((4 - everything) ** 2 / 2), rtol=1e-12)


@pytest.fixture(scope="module")
def in_default_groups(data):
    """A cohort, and what comes out of its round."""
    cohort = next(cohorts(data))
    reference = fedavg(logistic, optax.adam(RATE))
    return cohort, jax.jit(reference.round)(reference.init(start()), cohort)


# Clients are vectorized in the tests of its recipes, too (test_fedopt.py).
@pytest.mark.long
@pytest.mark.parametrize("at_once", [1, 2, 3, 4])
def test_results_do_not_depend_on_how_clients_are_grouped(in_default_groups, at_once):
    cohort, expected = in_default_groups
    algorithm = fedavg(logistic, optax.adam(RATE), vectorize=at_once)
    found = jax.jit(algorithm.round)(algorithm.init(start()), cohort)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, expected)


@pytest.mark.always("5-explicit")
@pytest.mark.kinds(kind=alike, clients=alike)
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("clients", [4, 5])
def test_results_do_not_depend_on_devices(data, kind, clients):
    algorithm = fedavg(logistic, optax.sgd(RATE), optax.adam(0.1))
    step = jax.jit(algorithm.round)

    def train():
        state = algorithm.init(start())
        for _, cohort in zip(range(3), cohorts(data, clients)):
            state, metrics = step(state, cohort)
        order = np.argsort(np.asarray(cohort.positions))
        metrics = jax.tree.map(np.asarray, metrics)
        return state, {k: v[order] if k[:8] == "clients/" else v for k, v in metrics.items()}

    expected = train()
    with jax.set_mesh(meshes.mesh(kind, clients=2)):
        found = train()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), found, expected)


# Transformations


def test_hyperparameters_can_be_differentiated_and_swept(data):
    two = problems.expand(cohorts(data).take(2))

    def final_loss(rates):
        algorithm = fedavg(Quadratic.loss, optax.sgd(rates[0]), optax.sgd(rates[1], momentum=0.5))
        _, metrics = jax.lax.scan(algorithm.round, algorithm.init(Quadratic.start()), two)
        return metrics["loss"][-1]

    problems.check_sweep(final_loss, np.array([[0.01, 0.8], [0.03, 1.0], [0.0, 1.0]]))


def test_memory_of_a_round_and_its_gradient_does_not_grow_with_the_cohort():
    def temporary(clients):
        data = fax.data.InMemory({str(i): {"x": np.ones((8, 300))} for i in range(clients)})
        cohort = next(fax.data.cohorts(data, clients, 4))
        algorithm = fedavg(lambda w, b, k: jnp.sum(jnp.tanh(b["x"] @ w) ** 2, 1), optax.sgd(0.1))
        state = algorithm.init(np.ones((300, 300)))

        def loss(state, cohort):
            state, metrics = jax.jit(algorithm.round)(state, cohort)
            return jnp.sum(algorithm.params(state) ** 2) + metrics["loss"]

        def size(fn):
            compiled = jax.jit(fn).lower(state, cohort).compile()
            return compiled.memory_analysis().temp_size_in_bytes / (8 * 300 * 300)

        return size(algorithm.round), size(jax.grad(loss, allow_int=True))

    few, many = temporary(4), temporary(64)
    assert many[0] < few[0] + 0.3
    assert many[1] < few[1] + 0.3
    assert few[0] < 5


def test_only_the_mean_is_reduced_across_devices(data):
    with jax.set_mesh(meshes.mesh(clients=2)):
        algorithm = fedavg(lambda *a: logistic(*a)[0], optax.sgd(RATE))
        state, cohort = algorithm.init(start()), next(cohorts(data))
        text = jax.jit(algorithm.round).lower(state, cohort).compile().as_text()
    assert sum(" all-reduce(" in line for line in text.splitlines()) == 1
    assert "all-gather" not in text


def test_a_step_of_padding_is_skipped_by_a_branch(data):
    algorithm = fedavg(logistic, optax.sgd(RATE))
    state, cohort = algorithm.init(start()), next(cohorts(data))
    text = jax.jit(algorithm.round).lower(state, cohort).compile().as_text()
    assert " conditional(" in text
    # Who runs a step alone needs no select between what it was and what it becomes.
    selects = [line for line in text.splitlines() if "f64[4,3]{1,0} select(" in line]
    assert not [line for line in selects if "while/body" in line]
    at_once = fedavg(logistic, optax.sgd(RATE), vectorize=2)
    text = jax.jit(at_once.round).lower(state, cohort).compile().as_text()
    assert " conditional(" in text


# Many rounds


@pytest.mark.always("1")
@pytest.mark.parametrize("devices", [1, 2])
def test_many_rounds_are_rounds(data, devices):
    algorithm = fedavg(logistic, optax.sgd(RATE), optax.adam(0.1))
    with jax.set_mesh(meshes.mesh(clients=devices)):
        state, losses = algorithm.init(start()), []
        for _, cohort in zip(range(6), cohorts(data)):
            state, metrics = jax.jit(algorithm.round)(state, cohort)
            losses.append(metrics["clients/loss"])
        rounds = cohorts(data)
        found = algorithm.init(start())
        next(rounds)
        rounds = cohorts(data)
        found, first = many_rounds(algorithm, found, rounds, 3)
        found, second = many_rounds(algorithm, found, rounds, 3)
    assert rounds.round == 6
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), found, state)
    seen = np.concatenate([first["clients/loss"], second["clients/loss"]])
    np.testing.assert_allclose(seen, losses, rtol=1e-6)


def test_many_rounds_sample_in_one_program(data):
    algorithm = fedavg(logistic, optax.sgd(RATE))
    with pytest.raises(fax.data.DataError, match="resident=True"):
        many_rounds(algorithm, algorithm.init(start()), cohorts(data, resident=False), 3)
    with pytest.raises(fax.data.DataError, match="rounds is 0, expected an int of at least 1"):
        many_rounds(algorithm, algorithm.init(start()), cohorts(data), 0)


def test_a_round_is_compiled_once_for_each_shape(data):
    def loss(params, model_state, batch, key):
        return (batch["x"][:, 0] - params["p"]) ** 2, {}, model_state

    algorithm = fedavg(loss, optax.adam(RATE), optax.adam(0.1))
    # Python's numbers have no type of their own, but what comes out of a round has.
    state = algorithm.init({"p": 0.5}, {"mean": 0.0, "count": 0})
    train, rounds = jax.jit(algorithm.round), cohorts(data)
    for _ in range(6):
        state, _ = train(state, next(rounds))
    assert train._cache_size() == len(rounds.shapes)


@pytest.mark.long
@pytest.mark.parametrize(
    ("at_once", "resident"), [(1, True), pytest.param(2, False, marks=pytest.mark.long)]
)
def test_rounds_under_jax_checks(data, at_once, resident):
    """Leaked tracers, NaN, transfers that nobody asked for, and no compilation at all."""
    algorithm = fedavg(logistic, optax.sgd(RATE), optax.adam(0.1), vectorize=at_once)
    state, cohort = algorithm.init(start()), next(cohorts(data, resident=resident))
    expected = algorithm.round(state, cohort)
    with jax.checking_leaks(), jax.debug_nans(True):
        found = jax.jit(algorithm.round)(state, cohort)
    with jax.transfer_guard("disallow"):
        again = jax.jit(algorithm.round)(state, cohort)
    with jax.disable_jit():
        slowly = algorithm.round(state, cohort)
    for other in (found, again, slowly):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), other, expected)


@pytest.mark.long
def test_second_derivatives_with_clients_at_once(data):
    cohort = next(cohorts(data, clients=3, epochs=1))

    def after(rate, at_once=1):
        algorithm = fedavg(logistic, optax.sgd(rate), vectorize=at_once)
        state, _ = algorithm.round(algorithm.init(start()), cohort)
        return jnp.sum(algorithm.params(state)["w"] ** 2)

    slope, h = jax.jit(jax.grad(after)), 1e-5
    expected = (slope(0.3 + h) - slope(0.3 - h)) / (2 * h)
    found = jax.jit(jax.hessian(after), static_argnums=1)(0.3, 2)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# Models


def test_model_state_is_averaged_by_examples(data):
    """A running mean of the features, and a counter, which is not averaged."""

    def loss(params, model_state, batch, key):
        mean = 0.5 * model_state["mean"] + 0.5 * batch["x"].mean(0)
        losses, metrics = logistic(params, {**batch, "x": batch["x"] - mean}, key)
        return losses, metrics, {"mean": mean, "steps": model_state["steps"] + 1}

    algorithm = fedavg(loss, optax.sgd(0.0))
    model_state = {"mean": np.zeros(FEATURES), "steps": np.int32(3)}
    cohort = next(fax.data.cohorts(data, 6, 1, epochs=1))
    state, _ = algorithm.round(algorithm.init(start(), model_state), cohort)
    total = np.zeros(FEATURES)
    for batches, client in zip(numpy_batches(cohort), cohort.positions):
        mean = np.zeros(FEATURES)
        for x, _ in batches:
            mean = 0.5 * mean + 0.5 * x.mean(0)
        total += SIZES[client] * mean
    np.testing.assert_allclose(state.model_state["mean"], total / sum(SIZES), rtol=1e-10)
    assert state.model_state["steps"] == 3
    jax.tree.map(np.testing.assert_array_equal, algorithm.params(state), start())


def test_a_loss_with_state_returns_three_values(data):
    algorithm = fedavg(lambda p, s, b, k: logistic(p, b, k), optax.sgd(RATE))
    with pytest.raises(ValueError, match=r"2 values, expected \(losses, metrics, model_state\)"):
        algorithm.round(algorithm.init(start(), {"n": 0}), next(cohorts(data)))


@pytest.mark.long
def test_a_flax_network_with_dropout_learns(data):
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(FEATURES, 8, rngs=rngs, param_dtype=jnp.float32)
            self.dropout = nnx.Dropout(0.2)
            self.out = nnx.Linear(8, CLASSES, rngs=rngs, param_dtype=jnp.float32)

        def __call__(self, x, rngs):
            return self.out(self.dropout(nnx.relu(self.hidden(x)), rngs=rngs))

    graph, params = nnx.split(Network(nnx.Rngs(0)))

    def loss(params, batch, key):
        logits = nnx.merge(graph, params)(batch["x"].astype(jnp.float32), nnx.Rngs(dropout=key))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    algorithm = fedavg(loss, optax.sgd(0.1), optax.sgd(1.0, momentum=0.5))
    _, metrics = many_rounds(algorithm, algorithm.init(params), cohorts(data), 60)
    assert metrics["loss"][-10:].mean() < 0.7 * metrics["loss"][:3].mean()


# Mistakes


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda p, b, k: logistic(p, b, k)[0].mean(),
            r"loss returned 'loss' of shape \(\), expected \(4,\)",
        ),
        (
            lambda p, b, k: (logistic(p, b, k)[0], {"norm": 1.0}),
            r"'norm' of shape \(\), expected \(4,\)",
        ),
        (
            lambda p, b, k: (logistic(p, b, k)[0], 3),
            r"loss returned 3 for metrics, expected a mapping",
        ),
        (lambda p, b, k: (logistic(p, b, k)[0], {"loss": b["y"]}), "Names must not be 'loss'"),
        # It would be lost among fax's own.
        (lambda p, b, k: (logistic(p, b, k)[0], {"clients/loss": b["y"]}), "begin with 'clients/'"),
        (lambda p, b, k: (*logistic(p, b, k), 0), r"3 values, expected \(losses, metrics\)"),
    ],
)
def test_losses_that_are_not_per_example(data, loss, message):
    algorithm = fedavg(loss, optax.sgd(RATE))
    with pytest.raises(ValueError, match=message):
        algorithm.round(algorithm.init(start()), next(cohorts(data)))
