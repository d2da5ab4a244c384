"""SCAFFOLD, Mime and MimeLite against the papers in NumPy, and that they converge despite drift."""

import dataclasses

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import problems
import pytest
from problems import SETTINGS, SIZES, Logistic, Quadratic, assert_trees_close, combine

import fax
from fax.aggregators import chain, non_finite
from fax.algorithms import (
    agnostic_fedavg,
    fedavg,
    feddyn,
    fednova,
    many_rounds,
    mime,
    mime_lite,
    scaffold,
)

RATE, N = 0.1, len(SIZES)


@pytest.fixture(scope="module")
def data():
    return problems.data()


def cohorts(data, clients=4, **kwargs):
    return fax.data.cohorts(data, clients, 4, **{"epochs": 2, **kwargs})


# The papers, in NumPy


def weighted(trees, weights):
    weights = np.asarray(weights, float) / np.sum(weights)
    return combine(lambda *leaves: np.tensordot(weights, leaves, 1), *trees)


class Scaffold:
    """Algorithm 1 of arXiv:1910.06378, with option II and server rate 0.8."""

    @staticmethod
    def make(problem, **kwargs):
        return scaffold(problem.loss, RATE, 0.8, num_clients=N, **kwargs)

    def __init__(self, problem):
        self.gradient = lambda y, b: problem.losses_and_gradient(y, *b)[1]
        self.x = problem.start()
        zero = combine(np.zeros_like, self.x)
        self.c, self.c_i = zero, [zero] * N

    def round(self, ids, batches):
        ends, changes = [], []
        for i, own in zip(ids, batches):
            y = self.x
            for batch in own:
                g = self.gradient(y, batch)
                y = combine(
                    lambda y, g, c_i, c: y - RATE * (g - c_i + c), y, g, self.c_i[i], self.c
                )
            step = combine(lambda x, y: (x - y) / RATE, self.x, y)
            mean = combine(np.divide, step, dict.fromkeys(y, len(own)))
            new = combine(lambda c_i, c, g: c_i - c + g, self.c_i[i], self.c, mean)
            changes.append(combine(np.subtract, new, self.c_i[i]))
            self.c_i[i] = new
            ends.append(y)
        y = weighted(ends, np.ones(len(ids)))
        self.x = combine(lambda x, y: x + 0.8 * (y - x), self.x, y)
        change = weighted(changes, np.ones(len(ids)))
        self.c = combine(lambda c, d: c + len(ids) / N * d, self.c, change)

    def check(self, state):
        assert_trees_close(state.params, self.x)
        assert_trees_close(state.server, self.c)
        rows = combine(lambda *rows: np.stack(rows), *self.c_i)
        assert_trees_close(state.clients.rows, rows)
        # What the paper's update of c keeps true.
        assert_trees_close(self.c, weighted(self.c_i, np.ones(N)))


class Mime:
    """Algorithm 1 of arXiv:2008.03606 with Adam, whose statistics are U's and V's."""

    lite = False
    optimizer = optax.adam(0.05, b1=0.9, b2=0.99, eps=0.1)

    @classmethod
    def make(cls, problem, **kwargs):
        return (mime_lite if cls.lite else mime)(problem.loss, cls.optimizer, 0.8, **kwargs)

    def __init__(self, problem):
        self.gradient = lambda y, b: problem.losses_and_gradient(y, *b)[1]
        self.x = problem.start()
        zero = combine(np.zeros_like, self.x)
        self.s = (zero, zero, 0)

    @staticmethod
    def next_statistics(g, s):
        m, v, t = s
        m = combine(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        return m, combine(lambda v, g: 0.99 * v + 0.01 * g**2, v, g), t + 1

    @classmethod
    def update(cls, g, s):
        m, v, t = cls.next_statistics(g, s)
        return combine(
            lambda m, v: -0.05 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 0.1), m, v
        )

    def full_gradient(self, batches):
        gradients = [self.gradient(self.x, batch) for batch in batches]
        return weighted(gradients, [len(y) for _, y in batches])

    def round(self, ids, batches):
        n = [SIZES[i] for i in ids]
        c = weighted([self.full_gradient(own) for own in batches], n)
        ends = []
        for own in batches:
            y = self.x
            for batch in own:
                g = self.gradient(y, batch)
                if not self.lite:
                    g = combine(lambda g, h, c: g - h + c, g, self.gradient(self.x, batch), c)
                y = combine(np.add, y, self.update(g, self.s))
            ends.append(y)
        self.s = self.next_statistics(c, self.s)
        self.x = combine(lambda x, y: x + 0.8 * (y - x), self.x, weighted(ends, n))

    def check(self, state):
        assert_trees_close(state.params, self.x)
        m, v, t = self.s
        adam = state.server[0]
        assert_trees_close(adam.mu, m)
        assert_trees_close(adam.nu, v)
        assert adam.count == t


class MimeLite(Mime):
    lite = True


PAPERS = [Scaffold, Mime, MimeLite]
# For tests of what Mime and MimeLite share.
EACH_KIND = [Scaffold, Mime, pytest.param(MimeLite, marks=pytest.mark.long)]
PAIRS = [
    problems.case(paper, [Logistic, Quadratic][(i + j) % 2], setting)
    for i, paper in enumerate(PAPERS)
    for j, setting in enumerate(SETTINGS)
    if paper is Scaffold or (i + j) % 2
]


@pytest.mark.always(
    "Scaffold-Logistic-a mesh of 4 x 2", "Mime-Quadratic-jitted", "MimeLite-Quadratic-vectorized"
)
@pytest.mark.parametrize(("paper", "problem", "setting"), PAIRS)
def test_rounds_are_those_of_the_paper(data, paper, problem, setting):
    context, at_once = problems.setting(setting)
    with context:
        algorithm = paper.make(problem, vectorize=at_once)
        state, reference = algorithm.init(problem.start()), paper(problem)
        step = jax.jit(algorithm.round)
        for _, cohort in zip(range(4), cohorts(data, resident=setting == "jitted")):
            state, metrics = step(state, cohort)
            reference.round(np.asarray(cohort.positions), problems.numpy_batches(cohort))
            reference.check(state)
    assert metrics["clients/loss"].shape == (4,)


# What they are for: drift


A, B = np.array([1.0, 2.0, 6.0]), np.array([0.0, 3.0, 1.0])  # of a (p - b)^2 / 2
OPTIMUM = (A * B).sum() / A.sum()
SLOW, STEPS = 0.05, 10


def drifting():
    """Three clients with quadratics of other curvatures; each has one batch and many epochs."""
    clients = {i: {"a": np.full(2, A[i]), "b": np.full(2, B[i])} for i in range(3)}
    return fax.data.cohorts(fax.data.InMemory(clients), 3, 2, epochs=STEPS)


def drifting_loss(p, batch, key):
    return batch["a"] * (p - batch["b"]) ** 2 / 2


def end(algorithm, rounds, start=4.0):
    state, _ = many_rounds(algorithm, algorithm.init(np.float64(start)), drifting(), rounds)
    return float(algorithm.params(state))


@pytest.mark.long
def test_federated_averaging_ends_elsewhere_than_at_the_optimum():
    """A client goes from p to b + q (p - b), q = (1 - rate a)^steps, so the fixed point is a mean.

    It is that of the b weighted by 1 - q, where the optimum weighs them by a.
    """
    moved = 1 - (1 - SLOW * A) ** STEPS
    fixed_point = (moved * B).sum() / moved.sum()
    assert abs(fixed_point - OPTIMUM) > 0.1
    average = fedavg(drifting_loss, optax.sgd(SLOW))
    np.testing.assert_allclose(end(average, 100), fixed_point, rtol=1e-10)
    np.testing.assert_allclose(end(average, 1, start=fixed_point), fixed_point, rtol=1e-12)


@pytest.mark.parametrize(
    ("algorithm", "rounds"),
    [
        (scaffold(drifting_loss, SLOW, num_clients=3), 200),
        (mime(drifting_loss, optax.sgd(SLOW)), 100),
    ],
    ids=["scaffold", "mime"],
)
def test_control_variates_reach_the_optimum(algorithm, rounds):
    np.testing.assert_allclose(end(algorithm, rounds), OPTIMUM, rtol=1e-8)


@pytest.mark.long
def test_scaffold_reaches_it_with_some_of_the_clients_at_a_time():
    clients = {i: {"a": np.full(2, A[i]), "b": np.full(2, B[i])} for i in range(3)}
    rounds = fax.data.cohorts(fax.data.InMemory(clients), 2, 2, epochs=STEPS)
    algorithm = scaffold(drifting_loss, SLOW, num_clients=3)
    state, _ = many_rounds(algorithm, algorithm.init(np.float64(4)), rounds, 600)
    np.testing.assert_allclose(algorithm.params(state), OPTIMUM, rtol=1e-6)
    np.testing.assert_allclose(state.clients.rows, A * (OPTIMUM - B), rtol=1e-5)


# Identities


@pytest.mark.long
def test_the_first_round_of_scaffold_is_that_of_averaging():
    rng = np.random.default_rng(3)
    same = fax.data.InMemory(  # of equal sizes, for the paper counts clients and not examples
        {i: {"x": rng.normal(size=(6, 4)), "y": rng.integers(0, 3, 6)} for i in range(4)}
    )
    cohort = next(cohorts(same))
    states = []
    for algorithm in (
        scaffold(Logistic.loss, RATE, 0.7, num_clients=4),
        fedavg(Logistic.loss, optax.sgd(RATE), optax.sgd(0.7)),
    ):
        states.append(jax.jit(algorithm.round)(algorithm.init(Logistic.start()), cohort)[0])
    assert_trees_close(states[0].params, states[1].params, rtol=1e-12)


@pytest.mark.long
def test_mime_with_sgd_and_full_batches_is_sgd(data):
    """One step of a full batch each is one step on all examples."""
    everything = [data.client(i) for i in data.client_ids()]
    x, y = (np.concatenate([own[k] for own in everything]) for k in "xy")
    for make in (mime, mime_lite):
        algorithm = make(Logistic.loss, optax.sgd(RATE, momentum=0.9))
        state, rounds = algorithm.init(Logistic.start()), fax.data.cohorts(data, N, max(SIZES))
        params, v = Logistic.start(), combine(np.zeros_like, Logistic.start())
        state, _ = many_rounds(algorithm, state, rounds, 3)
        for _ in range(3):
            gradient = Logistic.losses_and_gradient(params, x, y)[1]
            v = combine(lambda v, g: 0.9 * v + g, v, gradient)
            params = combine(lambda p, v: p - RATE * v, params, v)
        assert_trees_close(state.params, params)


def test_mime_with_sgd_and_full_batches_of_equal_curvature_takes_many_steps_of_sgd():
    """Then grad f_i(y) - grad f_i(x) + grad f(x) is grad f(y), wherever y is."""
    clients = {i: {"a": np.full(i + 1, 2.0), "b": np.full(i + 1, float(i))} for i in range(3)}
    cohort = next(fax.data.cohorts(fax.data.InMemory(clients), 3, 3, epochs=7))
    algorithm = mime(drifting_loss, optax.sgd(SLOW))
    state, _ = jax.jit(algorithm.round)(algorithm.init(np.float64(4)), cohort)
    mean = (1 * 0 + 2 * 1 + 3 * 2) / 6
    np.testing.assert_allclose(state.params, mean + (1 - 2 * SLOW) ** 7 * (4 - mean), rtol=1e-12)


@pytest.mark.long
def test_mime_lite_with_sgd_is_averaging(data):
    ends = []
    for algorithm in (
        mime_lite(Logistic.loss, optax.sgd(RATE), 0.6),
        fedavg(Logistic.loss, optax.sgd(RATE), optax.sgd(0.6)),
    ):
        ends.append(
            jax.jit(algorithm.round)(algorithm.init(Logistic.start()), next(cohorts(data)))[0]
        )
    assert_trees_close(ends[0].params, ends[1].params, rtol=1e-12)


def test_a_client_without_steps_keeps_its_control_variate(data):
    algorithm = scaffold(Logistic.loss, RATE, num_clients=N)
    rounds, step = cohorts(data, resident=False), jax.jit(algorithm.round)
    state, _ = step(algorithm.init(Logistic.start()), next(rounds))
    cohort = next(rounds)
    idle = cohort.positions[1]
    mask = cohort.mask.at[1].set(False)
    new, metrics = step(state, dataclasses.replace(cohort, mask=mask))
    was, now = (jax.device_get(s.clients.rows) for s in (state, new))
    for name, rows in now.items():
        np.testing.assert_array_equal(rows[idle], was[name][idle])
    assert metrics["clients/loss"][1] == 0
    # The others make the round, as if the idle client were not in the cohort.
    others = jax.jit(lambda x: jax.tree.map(lambda x: jnp.delete(x, 1, axis=0), x))(cohort)
    expected, _ = jax.jit(algorithm.round)(state, others)
    assert_trees_close(new, expected, rtol=1e-12)
    assert_trees_close(new.server, combine(lambda x: x.mean(0), now))


@pytest.mark.always("scaffold", "feddyn", "agnostic")
@pytest.mark.parametrize("name", ["scaffold", "feddyn", "fednova", "mime_lite", "agnostic"])
def test_a_client_that_is_not_finite_is_left_out(name):
    """Of everything that the server adds up, and it keeps its own state; derivatives, too."""

    def loss(p, batch, key):
        return jnp.where(batch["x"] > 5, jnp.nan, 1) * (batch["x"] - p) ** 2

    def make(rate):
        sgd, drop = optax.sgd(rate, momentum=0.5), chain(non_finite())
        return {
            "scaffold": lambda: scaffold(loss, rate, num_clients=3, aggregator=drop),
            "feddyn": lambda: feddyn(loss, sgd, alpha=0.5, num_clients=3, aggregator=drop),
            "fednova": lambda: fednova(loss, sgd, aggregator=drop),
            "mime_lite": lambda: mime_lite(loss, sgd, aggregator=drop),
            "agnostic": lambda: agnostic_fedavg(
                loss, sgd, num_domains=2, domain_learning_rate=0.1, aggregator=drop
            ),
        }[name]()

    clients = {"a": ([1.0], [0]), "b": ([4.0], [1]), "nan": ([9.0] * 3, [0] * 3)}
    data = fax.data.InMemory({k: {"x": x, "domain": d} for k, (x, d) in clients.items()})

    def trained(rate, rounds):
        algorithm = make(rate)
        state, _ = jax.lax.scan(algorithm.round, algorithm.init(0.5), rounds)
        kept = state.params, state.server, state.clients
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(kept)), kept

    rounds = problems.expand(fax.data.cohorts(data, 3, 1).take(3))
    there = rounds.positions < 2  # as if the client were not in the cohorts
    without = dataclasses.replace(
        rounds,
        mask=rounds.mask & there[:, :, None, None],
        num_examples=jnp.where(there, rounds.num_examples, 0),
    )
    run = jax.jit(jax.value_and_grad(trained, has_aux=True))
    found, expected = (jax.device_get(run(RATE, own)) for own in (rounds, without))
    assert_trees_close(found, expected, rtol=1e-12)
    (_, (_, server, clients)), _ = found
    if clients is not None:
        assert clients.rows[2] == 0
        np.testing.assert_allclose(server, clients.rows.mean(), rtol=1e-12)


@pytest.mark.long
def test_a_client_that_is_not_finite_is_left_out_on_a_mesh():
    """Of five clients on four devices, and of derivatives."""

    def loss(p, batch, key):
        return jnp.where(batch["x"] > 5, jnp.nan, 1) * (batch["x"] - p) ** 2

    def trained(rate, cohort):
        algorithm = scaffold(loss, rate, num_clients=5, aggregator=chain(non_finite()))

        def again(state, _):
            return algorithm.round(state, cohort)[0], None

        state, _ = jax.lax.scan(again, algorithm.init(0.5), None, length=2)
        return state.params + jnp.sum(state.clients.rows**2), state

    data = fax.data.InMemory({str(i): {"x": [x]} for i, x in enumerate((1.0, 4.0, 9.0, 2.0, 3.0))})
    both = jax.jit(jax.value_and_grad(trained, has_aux=True))
    expected = both(RATE, next(fax.data.cohorts(data, 5, 1)))
    assert np.isfinite(expected[1])
    assert expected[0][1].clients.rows[2] == 0
    with jax.set_mesh(meshes.mesh("first-explicit", clients=4, model=2)):
        found = both(RATE, next(fax.data.cohorts(data, 5, 1)))
    assert_trees_close(jax.device_get(found), jax.device_get(expected), rtol=1e-12)


# Transformations


@pytest.mark.long
@pytest.mark.always("scaffold")
@pytest.mark.parametrize(
    "make",
    [
        lambda r: scaffold(Quadratic.loss, r[0], r[1], num_clients=N),
        lambda r: mime(Quadratic.loss, optax.sgd(r[0], momentum=0.5), r[1]),
    ],
    ids=["scaffold", "mime"],
)
def test_hyperparameters_can_be_differentiated_and_swept(data, make):
    two = problems.expand(cohorts(data, epochs=1).take(2))

    def final_loss(rates):
        algorithm = make(rates)
        start = algorithm.init(Quadratic.start())
        state, _ = jax.lax.scan(algorithm.round, start, two)
        return jnp.sum(algorithm.params(state)["w"] ** 2)

    problems.check_sweep(final_loss, np.array([[0.03, 0.6], [0.05, 0.2]]))


@pytest.mark.long
@pytest.mark.parametrize("make", [mime, mime_lite])
def test_memory_of_a_round_and_its_gradient_does_not_grow_with_the_cohort(make):
    def temporary(clients):
        data = fax.data.InMemory({str(i): {"x": np.ones((8, 100))} for i in range(clients)})
        cohort = next(fax.data.cohorts(data, clients, 4))
        algorithm = make(lambda w, b, k: jnp.sum(jnp.tanh(b["x"] @ w) ** 2, 1), optax.sgd(0.1))
        state = algorithm.init(np.ones((100, 100)))

        def size(fn):
            compiled = jax.jit(fn).lower(state, cohort).compile()
            return compiled.memory_analysis().temp_size_in_bytes / (8 * 100 * 100)

        def after(state, cohort):
            return jnp.sum(algorithm.params(algorithm.round(state, cohort)[0]))

        return size(algorithm.round), size(jax.grad(after, allow_int=True))

    few, many = temporary(4), temporary(32)
    assert many[0] < few[0] + 0.5
    assert many[1] < few[1] + 0.5


@pytest.mark.parametrize(("make", "reductions"), [(mime, 2), (mime_lite, 1)])
def test_what_crosses_devices(data, make, reductions):
    with jax.set_mesh(meshes.mesh(clients=2)):
        algorithm = make(lambda *a: Quadratic.loss(*a)[0], optax.sgd(RATE))
        state, cohort = algorithm.init(Quadratic.start()), next(cohorts(data))
        text = jax.jit(algorithm.round).lower(state, cohort).compile().as_text()
    assert sum(" all-reduce(" in line for line in text.splitlines()) == reductions
    assert "all-gather" not in text


@pytest.mark.long
def test_many_rounds_are_rounds(data):
    algorithm = scaffold(Logistic.loss, RATE, num_clients=N)
    state, step = algorithm.init(Logistic.start()), jax.jit(algorithm.round)
    for _, cohort in zip(range(4), cohorts(data)):
        state, _ = step(state, cohort)
    found, metrics = many_rounds(algorithm, algorithm.init(Logistic.start()), cohorts(data), 4)
    assert_trees_close(found, state, rtol=1e-9)
    assert sorted(metrics) == ["accuracy", "clients/accuracy", "clients/loss", "loss"]


# Models with state, aggregators, mistakes


@pytest.mark.long
@pytest.mark.always("Scaffold")
@pytest.mark.parametrize("paper", EACH_KIND)
def test_model_state_is_that_of_averaging(data, paper):
    """A running mean of the features, and a counter, which is not averaged."""

    class Running:
        @staticmethod
        def loss(params, model_state, batch, key):
            mean = 0.5 * model_state["mean"] + 0.5 * batch["x"].mean(0)
            losses, metrics = Logistic.loss(params, {**batch, "x": batch["x"] - mean}, key)
            return losses, metrics, {"mean": mean, "steps": model_state["steps"] + 1}

    cohort = next(fax.data.cohorts(data, 4, 1))
    before = {"mean": np.zeros(4), "steps": np.int32(3)}
    states = []
    for algorithm in (paper.make(Running), fedavg(Running.loss, optax.sgd(RATE))):
        start = algorithm.init(Logistic.start(), before)
        states.append(jax.jit(algorithm.round)(start, cohort)[0].model_state)
    assert_trees_close(*states)


class Counting(fax.aggregators.Transformation):
    """Halves updates, and counts how often each client took part."""

    def __new__(cls):
        def init(params):
            return fax.aggregators.PerClient(jnp.zeros(N, jnp.int32))

        def update(updates, weights, state, key):
            more = {"clients/weight": weights}
            state = fax.aggregators.PerClient(state.rows + 1)
            return jax.tree.map(lambda u: u / 2, updates), weights, state, more

        return super().__new__(cls, init, update)


# With other algorithms, in test_fedopt.py.
@pytest.mark.long
@pytest.mark.parametrize("paper", EACH_KIND)
def test_updates_go_through_the_aggregator(data, paper):
    algorithm = paper.make(Logistic, aggregator=fax.aggregators.chain(Counting()))
    cohort = next(cohorts(data))
    state, metrics = jax.jit(algorithm.round)(algorithm.init(Logistic.start()), cohort)
    plain = paper.make(Logistic)
    whole, _ = jax.jit(plain.round)(plain.init(Logistic.start()), cohort)
    middle = combine(lambda a, b: (a + b) / 2, Logistic.start(), plain.params(whole))
    assert_trees_close(algorithm.params(state), middle)
    took_part = np.isin(np.arange(N), cohort.positions)
    np.testing.assert_array_equal(state.aggregator[0].rows, took_part)
    weights = np.ones(4) if paper is Scaffold else cohort.num_examples
    np.testing.assert_array_equal(metrics["clients/weight"], weights)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: scaffold(None, 0, num_clients=3),
            "client_learning_rate is 0, expected a number a",
        ),
        (lambda: scaffold(None, 1, num_clients=0), "num_clients is 0, expected an int of at least"),
        (lambda: scaffold(None, 1, num_clients=2.5), r"num_clients is 2.5, expected an int"),
        (lambda: scaffold(None, 1, -1, num_clients=1), "server_learning_rate is -1, expected"),
        (lambda: mime(None, None, -1), "mime: server_learning_rate is -1, expected"),
        (lambda: mime_lite(None, None, "x"), "mime_lite: server_learning_rate is 'x', expected"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_cohort_larger_than_the_population(data):
    algorithm = scaffold(Logistic.loss, RATE, num_clients=3)
    with pytest.raises(ValueError, match=r"num_clients=3.*len\(data\)"):
        algorithm.round(algorithm.init(Logistic.start()), next(cohorts(data)))
