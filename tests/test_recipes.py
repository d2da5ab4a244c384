"""The recipes of the documentation, as they are written there, against their papers in NumPy."""

import doctest
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import SIZES, AdamW, Logistic, Nesterov, combine, numpy_batches

import fax
from fax import aggregators

PAGE = pathlib.Path(__file__).parent.parent / "docs/data_center.md"
REPLICAS, INNER, STEPS = len(SIZES), 0.05, 3


def loss(params, batch, key):
    return Logistic.loss(params, batch, key)[0]


@pytest.fixture(scope="module")
def recipes():
    """The functions that the page defines."""
    names = {"fax": fax, "jax": jax, "jnp": jnp, "optax": optax}
    for example in doctest.DocTestParser().get_examples(PAGE.read_text(encoding="utf-8")):
        if example.source.startswith("def "):
            exec(example.source, names)
    return names


@pytest.fixture(scope="module")
def rounds():
    cohorts = fax.data.cohorts(
        problems.data(), REPLICAS, 2, sampler="stream", max_steps=STEPS, placement="replicas"
    )
    return [cohort for _, cohort in zip(range(3), cohorts)]


def train(algorithm, rounds):
    state, step = algorithm.init(Logistic.start()), jax.jit(algorithm.round)
    for cohort in rounds:
        state, _ = step(state, cohort)
    return state


def deltas_of(thetas, inner, cohort):
    """What H steps of the replicas' optimizers change, with the opposite sign."""
    deltas = []
    for theta, optimizer, batches in zip(thetas, inner, numpy_batches(cohort), strict=True):
        own = theta
        for batch in batches:
            own = optimizer(own, Logistic.losses_and_gradient(own, *batch)[1])
        deltas.append(combine(np.subtract, theta, own))
    return deltas


def mean(trees):
    return combine(lambda *x: np.mean(x, 0), *trees)


@pytest.mark.long
def test_muon_inside_is_muon_for_each_replica(recipes):
    def stacked(params, batch, key):
        return (jnp.tanh(batch["x"] @ params["layers"][0]) @ params["layers"][1]).sum(1) ** 2

    rng = np.random.default_rng(0)
    start = {"layers": jnp.array(rng.normal(size=(2, 4, 4))), "bias": jnp.ones(4)}
    data = fax.data.InMemory({f"shard {i}": {"x": rng.normal(size=(4, 4))} for i in range(2)})
    cohort = next(fax.data.cohorts(data, 2, 2, sampler="stream", max_steps=2, placement="replicas"))
    algorithm = recipes["muloco"](stacked, 0.1, replicas=2, steps=2)
    state, _ = jax.jit(algorithm.round)(algorithm.init(start), cohort)

    # Each layer alone: the momentum of its gradients, orthogonalized.
    scale = optax.contrib.scale_by_muon(beta=0.9, nesterov=False)

    @jax.jit
    def change(layers, batches):
        trained, memory = layers, [scale.init(w) for w in layers]
        for batch in batches:
            gradient = jax.grad(lambda w, b=batch: stacked({"layers": w}, b, None).mean())(trained)
            moves, memory = zip(*map(scale.update, gradient, memory), strict=True)
            trained = trained - 0.1 * jnp.stack(moves)
        return layers - trained

    shards = [[{"x": x} for x in rows] for rows in cohort.batches["x"]]
    delta = np.mean([change(start["layers"], own) for own in shards], 0)
    expected = Nesterov(0.9, 0.8)({"w": start["layers"]}, {"w": delta})["w"]
    np.testing.assert_allclose(state.params["layers"], expected, rtol=1e-9)
    assert not np.allclose(state.params["layers"], start["layers"], atol=0.05)


def test_sparse_updates_with_a_memory_are_those_of_sparseloco(rounds):
    decay, rate, chunk = 0.95, 0.8, 4
    sparse = aggregators.error_feedback(
        aggregators.top_k(1, per=chunk), num_clients=REPLICAS, decay=decay
    )
    algorithm = fax.algorithms.diloco(
        loss,
        optax.adamw(INNER),
        optax.sgd(rate),
        replicas=REPLICAS,
        aggregator=aggregators.chain(sparse),
    )
    state = train(algorithm, rounds)

    def largest(x):
        sent = np.zeros(x.size)
        for at in range(0, x.size, chunk):
            i = at + np.argmax(np.abs(x.ravel()[at : at + chunk]))
            sent[i] = x.ravel()[i]
        return sent.reshape(x.shape)

    # Algorithm 1 of arXiv:2508.15706, without rounding.
    theta, inner = Logistic.start(), [AdamW(INNER) for _ in range(REPLICAS)]
    memory = [combine(np.zeros_like, theta) for _ in range(REPLICAS)]
    for cohort in rounds:
        deltas = deltas_of([theta] * REPLICAS, inner, cohort)
        memory = [combine(lambda e, d: decay * e + d, *both) for both in zip(memory, deltas)]
        sent = [combine(largest, own) for own in memory]
        memory = [combine(np.subtract, *both) for both in zip(memory, sent)]
        theta = combine(lambda x, d: x - rate * d, theta, mean(sent))
    problems.assert_trees_close(state.params, theta)


def test_eager_updates_are_late_except_for_ones_own(recipes, rounds):
    algorithm = recipes["eager_diloco"](
        loss,
        optax.adamw(INNER),
        optax.sgd(0.4, momentum=0.9, nesterov=True),
        replicas=REPLICAS,
    )
    state = train(algorithm, rounds)

    thetas = [Logistic.start()] * REPLICAS
    inner = [AdamW(INNER) for _ in range(REPLICAS)]
    outer = [Nesterov(0.4, 0.9) for _ in range(REPLICAS)]
    last = [combine(np.zeros_like, thetas[0]) for _ in range(REPLICAS)]
    for cohort in rounds:
        deltas, late = deltas_of(thetas, inner, cohort), mean(last)
        for i in range(REPLICAS):
            eager = combine(
                lambda late, new, old: late + (new - old) / REPLICAS, late, deltas[i], last[i]
            )
            thetas[i] = outer[i](thetas[i], eager)
        last = deltas
    problems.assert_trees_close(algorithm.params(state), mean(thetas))
    rows = combine(lambda *x: np.stack(x), *thetas)
    problems.assert_trees_close(state.rows[0], rows)


def test_the_share_of_ones_own_grows_as_the_rate_falls(recipes):
    rate = optax.linear_schedule(0.2, 0.0, 100)
    share = recipes["share_of_own"](rate, 0.2, alpha=0.9, steps=10)
    np.testing.assert_allclose([share(0), share(4), share(9)], [0.91, 0.95, 1.0])
