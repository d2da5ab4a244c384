"""PAPA and Branch-Train-Merge against the papers in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import problems
import pytest
from jax.test_util import check_grads
from problems import SIZES, AdamW, Logistic, Quadratic, combine, numpy_batches

import fax
from fax.aggregators import PerClient
from fax.algorithms import branch_train_merge, local_sgd, papa, papa_2, papa_all
from fax.algorithms._papa import pair

REPLICAS = len(SIZES)
INNER = 0.05


def loss(params, batch, key):
    return Logistic.loss(params, batch, key)[0]


def quadratic(params, batch, key):
    return Quadratic.loss(params, batch, key)[0]


@pytest.fixture(scope="module")
def data():
    return problems.data()


def cohorts(data, steps, count=1):
    rounds = fax.data.cohorts(
        data, REPLICAS, 2, sampler="stream", max_steps=steps, placement="replicas"
    )
    return [cohort for _, cohort in zip(range(count), rounds)]


def run(algorithm, rounds, start):
    state, step = algorithm.init(start), jax.jit(algorithm.round)
    for cohort in rounds:
        state, metrics = step(state, cohort)
    return state, metrics


def different_starts(problem):
    """A model of its own for each, as rows."""
    rng = np.random.default_rng(5)
    return {k: v + rng.normal(size=(REPLICAS, *v.shape)) for k, v in problem.start().items()}


def row(tree, i):
    return {name: x[i] for name, x in tree.items()}


def stacked(trees):
    return combine(lambda *x: np.stack(x), *trees)


# PAPA


def numpy_papa(problem, start, rounds, every, alpha, here=None, k=REPLICAS):
    """Algorithm 1 of arXiv:2304.03094, with everybody's mean from before anybody is pushed."""
    w, inner, t = [row(start, i) for i in range(k)], [AdamW(INNER) for _ in range(k)], 0
    for cohort in rounds:
        batches = numpy_batches(cohort)
        for s in range(len(batches[0])):
            for i in range(k):
                _, gradient = problem.losses_and_gradient(w[i], *batches[i][s])
                w[i] = inner[i](w[i], gradient)
            t += 1
            if every and t % every == 0:
                average = t // every - 1
                who = [i for i in range(k) if here is None or here[average, i]]
                mean = combine(lambda *x: np.mean(x, 0), *[w[i] for i in who])
                a = alpha(average) if callable(alpha) else alpha
                for i in who:
                    w[i] = combine(lambda own, mean, a=a: a * own + (1 - a) * mean, w[i], mean)
    return w


# A schedule is that of the authors' code, below.
@pytest.mark.always("0.9")
@pytest.mark.parametrize("alpha", [0.9, lambda averages: 1 - 0.2 / (averages + 1)])
def test_papa_is_that_of_the_paper(data, alpha):
    rounds, start = cohorts(data, 4, 3), different_starts(Logistic)
    lost = np.isin(np.arange(REPLICAS), [2, 5])
    rounds[1] = dataclasses.replace(
        rounds[1], num_examples=jnp.where(lost, 0, rounds[1].num_examples)
    )
    here = np.ones((6, REPLICAS), bool)
    here[2:4, lost] = False
    algorithm = papa(loss, optax.adamw(INNER), replicas=REPLICAS, steps=2, alpha=alpha)
    state, metrics = run(algorithm, rounds, PerClient(start))
    w = numpy_papa(Logistic, start, rounds, 2, alpha, here)
    problems.assert_trees_close(state.replicas.rows.params, stacked(w))
    soup = combine(lambda *x: np.mean(x, 0), *w)
    problems.assert_trees_close(algorithm.params(state), soup)
    assert state.averages == 6
    assert sorted(metrics) == ["loss", "outer_steps", "replicas/bits", "replicas/loss"]


def test_pushes_scale_with_the_learning_rate_as_in_the_authors_code(data):
    every, peak, own = 2, 0.1, 0.8
    rounds, start = cohorts(data, 4, 3), different_starts(Quadratic)
    rate = optax.cosine_decay_schedule(peak, 12)
    algorithm = papa(
        quadratic,
        optax.sgd(rate),
        replicas=REPLICAS,
        steps=every,
        alpha=lambda averages: 1 - (1 - own) * rate(every * (averages + 1)) / peak,
    )
    state, _ = run(algorithm, rounds, PerClient(start))

    # The loop of main.py in github.com/SamsungSAILMontreal/PAPA: the optimizer's step, that of the
    # learning rate, and then an average with the new learning rate's share of the old one.
    w, step = start["w"], 0
    for batches in map(numpy_batches, rounds):
        for s in range(4):
            rates = [peak * (1 + np.cos(np.pi * t / 12)) / 2 for t in (step, step + 1)]
            for i in range(REPLICAS):
                _, gradient = Quadratic.losses_and_gradient({"w": w[i]}, *batches[i][s])
                w[i] -= rates[0] * gradient["w"]
            step += 1
            if step % every == 0:
                share = rates[1] / peak * (1 - own)
                w = (1 - share) * w + share * w.mean(0)
    problems.assert_trees_close(state.replicas.rows.params, {"w": w})


# Both are compared with their papers.
@pytest.mark.long
def test_without_a_share_of_ones_own_papa_is_averaging(data):
    rounds = cohorts(data, 3, 2)
    kwargs = {"replicas": REPLICAS}
    one = papa(quadratic, optax.adamw(INNER), alpha=0, steps=1, **kwargs)
    state, _ = run(one, rounds, Quadratic.start())
    other, _ = run(
        local_sgd(quadratic, optax.adamw(INNER), steps=1, **kwargs), rounds, Quadratic.start()
    )
    problems.assert_trees_close(one.params(state), other.params)
    problems.assert_trees_close(state.replicas, other.replicas)


def test_papa_all_replaces_models_by_their_mean(data):
    rounds, start = cohorts(data, 3, 1), different_starts(Quadratic)
    algorithm = papa_all(quadratic, optax.adamw(INNER), replicas=REPLICAS)
    state, metrics = run(algorithm, rounds, PerClient(start))
    alone = numpy_papa(Quadratic, start, rounds, None, None)
    mean = combine(lambda *x: np.mean(x, 0), *alone)
    problems.assert_trees_close(state.replicas.rows.params, stacked([mean] * REPLICAS))
    np.testing.assert_array_equal(metrics["replicas/bits"], [64 * 4] * REPLICAS)


def test_papa_2_replaces_models_by_means_of_pairs(data):
    """Everyone who is here gets the mean of two others who are here, and a pair of its own."""
    (cohort,) = cohorts(data, 2)
    lost = np.arange(REPLICAS) == 3
    cohort = dataclasses.replace(cohort, num_examples=jnp.where(lost, 0, cohort.num_examples))
    start = different_starts(Quadratic)
    algorithm = papa_2(quadratic, optax.adamw(INNER), replicas=REPLICAS)
    state, metrics = run(algorithm, [cohort], PerClient(start))
    alone = stacked(numpy_papa(Quadratic, start, [cohort], None, None))["w"]
    found = np.asarray(state.replicas.rows.params["w"])
    means = {(a, b): (alone[a] + alone[b]) / 2 for a in range(REPLICAS) for b in range(a)}
    drawn = []
    for i in range(REPLICAS):
        if i == 3:
            np.testing.assert_allclose(found[i], alone[i], rtol=1e-10)
        else:
            drawn += [p for p, mean in means.items() if np.allclose(found[i], mean, rtol=1e-9)]
    assert len(drawn) == REPLICAS - 1
    assert len(set(drawn)) > 1
    assert not any(3 in p for p in drawn)
    np.testing.assert_array_equal(metrics["replicas/bits"], np.where(lost, 0, 64 * 4))


def test_pairs_are_of_two_and_equally_likely():
    here = jnp.array([True, False, True, True, True])
    keys = jax.random.split(jax.random.key(0), 6000)
    a, b = jax.vmap(lambda key: pair(here, key))(keys)
    counts = np.zeros((5, 5))
    np.add.at(counts, (np.minimum(a, b), np.maximum(a, b)), 1)
    expected = np.zeros((5, 5))
    for i, j in [(0, 2), (0, 3), (0, 4), (2, 3), (2, 4), (3, 4)]:
        expected[i, j] = 1000
    assert (np.abs(counts - expected) <= 150).all()
    assert not counts[expected == 0].any()


@pytest.mark.long
def test_results_do_not_depend_on_where_models_are(data):
    start = PerClient(different_starts(Quadratic))
    for make, names in (
        (papa, ("jitted", "vectorized", "a mesh of 4 x 2")),
        (papa_2, ("jitted", "a mesh of 2")),
    ):
        results = []
        for name in names:
            context, at_once = problems.setting(name, "replicas")
            with context:
                algorithm = make(
                    quadratic, optax.sgd(INNER), replicas=REPLICAS, steps=2, vectorize=at_once
                )
                state, metrics = run(algorithm, cohorts(data, 2), start)
                results.append((algorithm.params(state), state, metrics))
        for found in results[1:]:
            problems.assert_trees_close(found, results[0], rtol=1e-9)


def test_a_push_costs_one_all_reduce_and_steps_none(data):
    mesh = meshes.mesh(replicas=2, model=2)
    with jax.set_mesh(mesh):
        algorithm = papa(quadratic, optax.sgd(INNER), replicas=REPLICAS, steps=2)
        state, (cohort,) = algorithm.init(Quadratic.start()), cohorts(data, 2)
        (found,) = fax.inspect.report(algorithm.round, state, cohort).collectives
    assert (found.operation, found.axes) == ("all-reduce", ("replicas",))
    assert found.loops == 0


@pytest.mark.long
def test_rates_can_be_differentiated(data):
    (cohort,) = cohorts(data, 4)

    def after(rates):
        algorithm = papa(quadratic, optax.sgd(rates[0]), replicas=REPLICAS, steps=2, alpha=rates[1])
        state = algorithm.init(PerClient(different_starts(Quadratic)))
        state, metrics = algorithm.round(state, cohort)
        return metrics["loss"] + jnp.sum(algorithm.params(state)["w"] ** 2)

    rates = jnp.array([0.01, 0.9])
    check_grads(jax.jit(after), (rates,), order=1, modes=("fwd", "rev"), eps=1e-5, rtol=1e-6)


def test_the_soup_has_a_model_state(data):
    def with_state(params, model_state, batch, key):
        return quadratic(params, batch, key), {}, {"mean": batch["x"].mean(0), "n": 1}

    algorithm = papa(with_state, optax.sgd(0.0), replicas=REPLICAS, steps=2, alpha=0.75)
    (cohort,) = cohorts(data, 2)
    state = algorithm.init(Quadratic.start(), {"mean": np.zeros(4), "n": 0})
    state, metrics = jax.jit(algorithm.round)(state, cohort)
    sizes = [x.size for x in jax.tree.leaves(Quadratic.start())]
    np.testing.assert_array_equal(metrics["replicas/bits"], 64 * (sum(sizes) + 4))
    own = np.array([batches[-1][0].mean(0) for batches in numpy_batches(cohort)])
    np.testing.assert_allclose(state.model_state["mean"], own.mean(0), rtol=1e-10)
    rows = state.replicas.rows.model_state
    np.testing.assert_allclose(rows["mean"], 0.75 * own + 0.25 * own.mean(0), rtol=1e-10)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (papa, {"steps": 0}, "papa: steps is 0, expected an int of at least 1"),
        (papa, {"alpha": -0.1}, r"papa: alpha is -0\.1, expected a number from 0 to 1"),
        (papa_2, {"replicas": 1}, "papa_2: replicas is 1, expected at least 2, for pairs"),
        (papa, {"steps": 4}, "has 6 batches for each replica, expected a multiple of steps=4"),
        (papa, {}, "has 6 batches for each replica, expected a multiple of steps=10"),
        (papa, {"replicas": 3}, r"rows\['w'\] has shape \(6, 4\), expected a row for each"),
    ],
)
def test_mistakes(data, make, arguments, message):
    def fail():
        algorithm = make(quadratic, optax.sgd(INNER), **{"replicas": REPLICAS, **arguments})
        start = PerClient(different_starts(Quadratic))
        algorithm.round(algorithm.init(start), cohorts(data, 6)[0])

    with pytest.raises(ValueError, match=message):
        fail()


# Branch-Train-Merge


@pytest.fixture(scope="module")
def forest(data):
    """Experts after a round, and what they are in NumPy."""
    rounds = cohorts(data, 3)
    algorithm = branch_train_merge(loss, optax.adamw(INNER), replicas=REPLICAS)
    state, metrics = run(algorithm, rounds, Logistic.start())
    start = stacked([Logistic.start()] * REPLICAS)
    return algorithm, state, metrics, numpy_papa(Logistic, start, rounds, None, None)


def chances(params, x):
    logits = x @ params["w"] + params["b"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def test_experts_train_alone(forest, data):
    algorithm, state, metrics, experts = forest
    problems.assert_trees_close(state.replicas.rows.params, stacked(experts))
    assert not metrics["replicas/bits"].any()
    mesh = meshes.mesh(replicas=2)
    with jax.set_mesh(mesh):
        begin, (cohort,) = algorithm.init(Logistic.start()), cohorts(data, 3)
        step = jax.jit(algorithm.round).lower(begin, cohort).compile()
        (found,) = fax.inspect.report(step).collectives
        after, _ = step(begin, cohort)
    problems.assert_trees_close(after.replicas, state.replicas, rtol=1e-9)
    assert found.bytes <= 2 * 8  # of the loss and the number of examples


def test_experts_are_merged_by_the_prior(forest):
    algorithm, state, _, experts = forest
    mean = combine(lambda *x: np.mean(x, 0), *experts)
    problems.assert_trees_close(algorithm.params(state), mean, rtol=1e-6)
    prior = np.array([1.0, 2, 0, 0, 0, 1])
    merged = algorithm.params(state._replace(prior=jnp.array(prior)))
    mean = combine(lambda *x: np.tensordot(prior / 4, x, 1), *experts)
    problems.assert_trees_close(merged, mean)


def test_experts_branch_from_mixtures(forest):
    algorithm, state, _, experts = forest
    rows = stacked(experts)
    weights = np.array([0.0, 3, 1, 0, 0, 0])
    new = algorithm.branch(state, weights)
    mixture = combine(lambda x: np.tensordot(weights / 4, x, 1), rows)
    problems.assert_trees_close(new.replicas.rows.params, stacked([mixture] * REPLICAS))
    assert not new.replicas.rows.optimizer[0].count.any()
    each = np.random.default_rng(0).uniform(size=(REPLICAS, REPLICAS))
    new = algorithm.branch(state, each)
    shares = each / each.sum(1, keepdims=True)
    expected = combine(lambda x: np.tensordot(shares, x, 1), rows)
    problems.assert_trees_close(new.replicas.rows.params, expected)
    with pytest.raises(ValueError, match=r"branch got weights of shape \(5,\), expected \(6,\) or"):
        algorithm.branch(state, np.ones(5))


def test_ensembles_are_weighted_by_how_likely_a_domain_is(forest):
    algorithm, state, _, experts = forest
    rng = np.random.default_rng(0)
    seen = {"x": rng.normal(size=(7, 4)), "y": rng.integers(0, 3, 7)}
    prior = rng.uniform(size=REPLICAS)
    state = state._replace(prior=jnp.array(prior))
    posterior = algorithm.posterior(state, seen, jax.random.key(0))
    likelihood = np.array([chances(e, seen["x"])[np.arange(7), seen["y"]] for e in experts]).T
    expected = likelihood * prior / (likelihood * prior).sum(1, keepdims=True)
    np.testing.assert_allclose(posterior, expected, rtol=1e-10)

    def apply(params, x):
        return x @ params["w"] + params["b"]

    x = rng.normal(size=(7, 4))
    each = np.array([chances(e, x) for e in experts])
    found = algorithm.ensemble(state, apply, x, posterior)
    np.testing.assert_allclose(found, np.log(np.einsum("bk,kbc->bc", expected, each)), rtol=1e-10)
    found = algorithm.ensemble(state, apply, x)
    np.testing.assert_allclose(
        found, np.log(np.tensordot(prior / prior.sum(), each, 1)), rtol=1e-10
    )
    with pytest.raises(ValueError, match=r"ensemble got weights of shape \(3,\), expected \(6,\)"):
        algorithm.ensemble(state, apply, x, np.ones(3))
