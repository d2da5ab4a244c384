"""FedOpt, FedProx and Reptile against the papers in NumPy, and the server optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import SETTINGS, SIZES, Logistic, Quadratic, assert_trees_close, combine

import fax
from fax.algorithms import (
    fedavg,
    fedopt,
    fedprox,
    reptile,
    server_adagrad,
    server_adam,
    server_momentum,
    server_yogi,
)

RATE, MU = 0.1, 0.3


@pytest.fixture(scope="module")
def data():
    return problems.data()


def cohorts(data, **kwargs):
    return fax.data.cohorts(data, 4, 4, **{"epochs": 2, **kwargs})


# The papers, in NumPy


def mean_update(problem, x, cohort, mu=0.0):
    """D of Algorithm 1, arXiv:2003.00295, whose clients do Algorithm 2 of arXiv:1812.06127."""
    ends = []
    for batches in problems.numpy_batches(cohort):
        y = x
        for batch in batches:
            g = problem.losses_and_gradient(y, *batch)[1]
            y = combine(lambda y, g, x: y - RATE * (g + mu * (y - x)), y, g, x)
        ends.append(y)
    n = np.array([SIZES[i] for i in cohort.positions], float)
    mean = combine(lambda *ys: np.tensordot(n / n.sum(), ys, 1), *ends)
    return combine(np.subtract, mean, x)


def adaptive(next_v, b1, rate=0.05, tau=0.01):
    """Algorithm 2 of arXiv:2003.00295: the way of one array, given each round's D."""

    def step(state, d):
        m, v = (np.zeros_like(d), np.full_like(d, tau**2)) if state is None else state
        m = b1 * m + (1 - b1) * d
        v = next_v(v, d)
        return (m, v), rate * m / (np.sqrt(v) + tau)

    return step


def momentum(v, d):
    """FedAvgM, arXiv:1909.06335."""
    v = 0.8 * (0 if v is None else v) + d
    return v, 0.5 * v


def plain(rate):
    return lambda state, d: (None, rate * d)


def yogi_v(v, d):
    return v - 0.01 * d**2 * np.sign(v - d**2)


CASES = {
    "momentum": (
        lambda loss, **k: fedopt(loss, optax.sgd(RATE), server_momentum(0.5, momentum=0.8), **k),
        momentum,
        0.0,
    ),
    "adagrad": (
        lambda loss, **k: fedopt(loss, optax.sgd(RATE), server_adagrad(0.05, tau=0.01), **k),
        adaptive(lambda v, d: v + d**2, b1=0),
        0.0,
    ),
    "adam": (
        lambda loss, **k: fedopt(loss, optax.sgd(RATE), server_adam(0.05, tau=0.01), **k),
        adaptive(lambda v, d: 0.99 * v + 0.01 * d**2, b1=0.9),
        0.0,
    ),
    "yogi": (
        lambda loss, **k: fedopt(loss, optax.sgd(RATE), server_yogi(0.05, tau=0.01), **k),
        adaptive(yogi_v, b1=0.9),
        0.0,
    ),
    "prox": (
        lambda loss, **k: fedprox(loss, optax.sgd(RATE), optax.sgd(0.7), mu=MU, **k),
        plain(0.7),
        MU,
    ),
    "reptile": (
        lambda loss, **k: reptile(loss, optax.sgd(RATE), optax.sgd(0.4), **k),
        plain(0.4),
        0.0,
    ),
}
PAIRS = [
    problems.case(case, [Logistic, Quadratic][(i + j) % 2], setting)
    for i, case in enumerate(CASES)
    for j, setting in enumerate(SETTINGS)
    if setting == "jitted" or (i + j) % len(CASES) in (2, 3)
]


@pytest.mark.always(
    "momentum-Quadratic-a mesh of 2",
    "adagrad-Logistic-vectorized",
    "adam-Logistic-jitted",
    "yogi-Quadratic-jitted",
    "prox-Logistic-a mesh of 4 x 2",
    "reptile-Quadratic-jitted",
)
@pytest.mark.parametrize(("case", "problem", "setting"), PAIRS)
def test_rounds_are_those_of_the_paper(data, case, problem, setting):
    make, server_step, mu = CASES[case]
    context, at_once = problems.setting(setting)
    with context:
        algorithm = make(problem.loss, vectorize=at_once)
        state, x, server = algorithm.init(problem.start()), problem.start(), {}
        step = jax.jit(algorithm.round)
        for _, cohort in zip(range(3), cohorts(data, resident=setting == "jitted")):
            state, _ = step(state, cohort)
            for name, d in mean_update(problem, x, cohort, mu).items():
                server[name], move = server_step(server.get(name), d)
                x = {**x, name: x[name] + move}
            assert_trees_close(algorithm.params(state), x)


# Identities


def end(algorithm, data):
    start = algorithm.init(Quadratic.start())
    return algorithm.params(jax.jit(algorithm.round)(start, next(cohorts(data)))[0])


# All are compared with their papers.
@pytest.mark.long
def test_what_federated_averaging_is(data):
    loss, client = Quadratic.loss, optax.sgd(RATE, momentum=0.5)
    average = end(fedavg(loss, client), data)
    for other in (
        fedopt(loss, client, server_momentum(momentum=0.0)),
        fedprox(loss, client, mu=0.0),
        reptile(loss, client),
    ):
        assert_trees_close(end(other, data), average, rtol=1e-12)


def test_with_bias_correction_adam_is_that_of_optax():
    ours = server_adam(0.1, bias_correction=True)
    theirs = optax.adam(0.1, 0.9, 0.99, eps=1e-3)
    start = Quadratic.start()
    found, expected = ((start, one.init(start)) for one in (ours, theirs))
    for gradient in (start, combine(np.square, start)):
        found, expected = one_step(ours, gradient, *found), one_step(theirs, gradient, *expected)
        assert_trees_close(found[0], expected[0], rtol=1e-12)


def one_step(optimizer, gradient, params, state):
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def test_an_infinite_proximal_term_holds_clients_where_they_are():
    """SGD on (y - b)^2 / 2 + mu (y - x)^2 / 2 ends at (b + mu x) / (1 + mu)."""
    x = fax.data.InMemory({i: {"b": np.full(2, float(i))} for i in range(3)})
    cohort = next(fax.data.cohorts(x, 3, 2, epochs=300))
    for mu in (0.0, 1.0, 9.0):
        algorithm = fedprox(lambda p, b, k: (p - b["b"]) ** 2 / 2, optax.sgd(0.1), mu=mu)
        state, _ = jax.jit(algorithm.round)(algorithm.init(np.float64(5)), cohort)
        np.testing.assert_allclose(algorithm.params(state), (1 + mu * 5) / (1 + mu), rtol=1e-10)


def test_a_server_optimizer_keeps_dtypes_and_takes_schedules():
    params = {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.ones((), jnp.float32)}
    gradient = jax.tree.map(lambda x: -x, params)
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.5})
    for make in (server_adagrad, server_adam, server_yogi, server_momentum):
        optimizer = make(schedule)
        state = optimizer.init(params)
        types = jax.tree.map(jnp.result_type, state)
        for _ in range(2):
            updates, state = optimizer.update(gradient, state, params)
            assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, params)
            assert jax.tree.map(jnp.result_type, state) == types
        half, _ = make(0.5).update(gradient, make(0.5).init(params))
        whole, _ = optimizer.update(gradient, optimizer.init(params))
        assert_trees_close(half, jax.tree.map(lambda x: x / 2, whole), rtol=1e-2)


# Transformations


@pytest.mark.long
@pytest.mark.parametrize(
    "make",
    [
        lambda r: fedprox(Quadratic.loss, optax.sgd(r[0]), mu=r[1]),
        lambda r: fedopt(Quadratic.loss, optax.sgd(0.02), server_adam(r[0], b1=r[1], tau=0.1)),
        lambda r: fedopt(Quadratic.loss, optax.sgd(r[0]), server_yogi(0.1, b2=r[1], tau=0.1)),
    ],
    ids=["prox", "adam", "yogi"],
)
def test_hyperparameters_can_be_differentiated_and_swept(data, make):
    two = problems.expand(cohorts(data, epochs=1).take(2))

    def final_loss(rates):
        algorithm = make(rates)
        start = algorithm.init(Quadratic.start())
        state, _ = jax.lax.scan(algorithm.round, start, two)
        return jnp.sum(algorithm.params(state)["w"] ** 2)

    problems.check_sweep(final_loss, np.array([[0.03, 0.6], [0.05, 0.2]]))


# Aggregators, and mistakes

RECIPES = ["prox", "reptile"]


@pytest.mark.always("prox")
@pytest.mark.parametrize("make", [CASES[name][0] for name in RECIPES], ids=RECIPES)
def test_updates_go_through_the_aggregator(data, make):
    half = fax.aggregators.Transformation(
        lambda params: 0,
        lambda updates, weights, state, key: (
            jax.tree.map(lambda u: u / 2, updates),
            weights,
            state + 1,
            {},
        ),
    )
    start, cohort = Quadratic.start(), next(cohorts(data))
    algorithm = make(Quadratic.loss, aggregator=fax.aggregators.chain(half))
    state, metrics = jax.jit(algorithm.round)(algorithm.init(start), cohort)
    plain = make(Quadratic.loss)
    whole, _ = jax.jit(plain.round)(plain.init(start), cohort)
    middle = combine(lambda a, b: (a + b) / 2, start, jax.device_get(plain.params(whole)))
    assert_trees_close(algorithm.params(state), middle)
    assert metrics["clients/bits"].shape == (4,)
    assert state.aggregator[0] == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fedprox(None, None, mu=-1), r"fedprox: mu is -1, expected a number of at least 0"),
        (lambda: fedprox(None, None, mu="big"), "mu is 'big', expected a number"),
        (lambda: fedprox(None, None, mu=np.ones(2)), r"mu is array\(\[1., 1.\]\), expected"),
        (lambda: server_adam(0.1, tau=0), r"server_adam: tau is 0, expected a number above 0"),
        (lambda: server_yogi(-0.1), "server_yogi: learning_rate is -0.1, expected"),
        (lambda: server_adagrad(float("nan")), "learning_rate is nan, expected"),
        (
            lambda: reptile(Logistic.loss, optax.sgd(1.0), -1.0),
            "reptile: server_optimizer is -1.0, ",
        ),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
