"""DiLoCo and local SGD against the papers in NumPy, and what JAX can do to their rounds."""

import dataclasses
import pickle
import re
import warnings

import jax
import jax.numpy as jnp
import jaxprs
import meshes
import numpy as np
import optax
import problems
import pytest
from flax.linen import Partitioned
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from problems import SIZES, AdamW, Logistic, Nesterov, Quadratic, combine, numpy_batches
from subsets import alike

import fax
from fax.algorithms import diloco, fedavg, local_sgd, many_rounds, papa, streaming_diloco

REPLICAS = len(SIZES)
INNER = 0.05


@pytest.fixture(scope="module")
def data():
    return problems.data()


def cohorts(data, steps=6, **kwargs):
    """Each replica has a shard of its own, the same in every round."""
    return fax.data.cohorts(
        data, REPLICAS, 2, sampler="stream", max_steps=steps, placement="replicas", **kwargs
    )


def first(n, rounds):
    return [cohort for _, cohort in zip(range(n), rounds)]


def losses_of(problem):
    return lambda *args: problem.loss(*args)[0]


def train(algorithm, start, rounds):
    state, step = algorithm.init(start), jax.jit(algorithm.round)
    for cohort in rounds:
        state, metrics = step(state, cohort)
    return state, metrics


# The paper, in NumPy


def numpy_diloco(problem, rounds, steps, inner, outer, weights=None, trained=None, heard=None):
    """Algorithm 1 of arXiv:2311.08105. ``inner`` makes an inner optimizer, ``outer`` is one.

    ``steps`` is H, as a function of the number of outer steps. ``trained[step, i]`` and
    ``heard[outer step, i]`` are whether replica i trains, and whether it is heard.
    """
    theta, k = problem.start(), REPLICAS
    thetas, optimizers = [theta] * k, [inner() for _ in range(k)]
    weights = np.ones(k) if weights is None else np.array(weights, float)
    t = outer_steps = since = 0
    losses = []
    for cohort in rounds:
        batches = numpy_batches(cohort)
        losses = [[] for _ in range(k)]
        for s in range(len(batches[0])):
            for i in range(k):
                if trained is not None and not trained[t, i]:
                    continue
                own, gradient = problem.losses_and_gradient(thetas[i], *batches[i][s])
                losses[i] += own.tolist()
                thetas[i] = optimizers[i](thetas[i], gradient)
            t, since = t + 1, since + 1
            if since == steps(outer_steps):
                here = [i for i in range(k) if heard is None or heard[outer_steps, i]]
                share = weights[here] / weights[here].sum()
                deltas = [combine(np.subtract, theta, thetas[i]) for i in here]
                delta = combine(lambda *rows, share=share: np.tensordot(share, rows, 1), *deltas)
                theta = outer(theta, delta)
                for i in here:
                    thetas[i] = theta
                outer_steps, since = outer_steps + 1, 0
    return theta, thetas, optimizers, losses


def stacked(trees):
    return combine(lambda *x: np.stack(x), *trees)


def assert_same(state, expected):
    theta, thetas, optimizers, _ = expected
    problems.assert_trees_close(state.params, theta)
    problems.assert_trees_close(state.replicas.rows.params, stacked(thetas))
    if isinstance(optimizers[0], AdamW):
        found = state.replicas.rows.optimizer[0].mu
        problems.assert_trees_close(found, stacked([own.m for own in optimizers]))


@pytest.mark.always("False-Quadratic", "True-Logistic")
@pytest.mark.parametrize("problem", problems.PROBLEMS)
@pytest.mark.parametrize("weighted", [False, True])
def test_rounds_are_those_of_the_paper(data, problem, weighted):
    rounds = first(3, cohorts(data))
    algorithm = diloco(
        losses_of(problem), optax.adamw(INNER), replicas=REPLICAS, steps=3, weighted=weighted
    )
    state, metrics = train(algorithm, problem.start(), rounds)
    weights = SIZES if weighted else None
    expected = numpy_diloco(
        problem, rounds, lambda n: 3, lambda: AdamW(INNER), Nesterov(0.7, 0.9), weights
    )
    assert_same(state, expected)
    losses = expected[3]
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-10)
    np.testing.assert_allclose(metrics["replicas/loss"], np.mean(losses, 1), rtol=1e-10)
    assert metrics["outer_steps"] == 2
    size = sum(x.size for x in problem.start().values())
    np.testing.assert_array_equal(metrics["replicas/bits"], [2 * 64 * size] * REPLICAS)
    assert sorted(metrics) == ["loss", "outer_steps", "replicas/bits", "replicas/loss"]


@pytest.mark.always("True")
@pytest.mark.parametrize("weighted", [False, True])
def test_a_replica_that_drops_out_goes_on_from_its_own_parameters(data, weighted):
    rounds = first(3, cohorts(data))
    # In the first round replica 1 has nothing to train on after the first outer step, in the
    # second replicas 0 and 4 train and are not heard, in the third everybody is back.
    mask = np.array([cohort.mask for cohort in rounds])
    mask[0, 1, 3:] = False
    rounds = [dataclasses.replace(c, mask=jnp.array(own)) for c, own in zip(rounds, mask)]
    lost = np.isin(np.arange(REPLICAS), [0, 4])
    n = jnp.where(lost, 0, rounds[1].num_examples)
    unheard = dataclasses.replace(rounds[1], num_examples=n)
    trained, heard = np.ones((18, REPLICAS), bool), np.ones((6, REPLICAS), bool)
    trained[3:6, 1] = heard[1, 1] = False
    heard[2:4, lost] = False

    algorithm = diloco(
        losses_of(Logistic), optax.adamw(INNER), replicas=REPLICAS, steps=3, weighted=weighted
    )
    state, metrics = train(algorithm, Logistic.start(), [rounds[0], unheard])
    bits = np.full(REPLICAS, 2 * 64 * 15)
    np.testing.assert_array_equal(metrics["replicas/bits"], np.where(lost, 0, bits))
    state, _ = jax.jit(algorithm.round)(state, rounds[2])
    full = [dataclasses.replace(c, mask=jnp.ones_like(c.mask)) for c in rounds]
    expected = numpy_diloco(
        Logistic,
        full,
        lambda n: 3,
        lambda: AdamW(INNER),
        Nesterov(0.7, 0.9),
        SIZES if weighted else None,
        trained,
        heard,
    )
    assert_same(state, expected)


def test_an_outer_step_without_anybody_is_none(data):
    algorithm = diloco(losses_of(Quadratic), optax.sgd(INNER), replicas=REPLICAS)
    rounds = first(2, cohorts(data, 2))
    state, _ = train(algorithm, Quadratic.start(), rounds[:1])
    nobody = dataclasses.replace(rounds[1], mask=jnp.zeros_like(rounds[1].mask))
    after, metrics = jax.jit(algorithm.round)(state, nobody)
    problems.assert_trees_close(after, state, rtol=0, atol=0)  # not even momentum moves it
    assert metrics["outer_steps"] == 0
    assert not metrics["replicas/bits"].any()
    assert metrics["loss"] == 0


@pytest.mark.parametrize("steps", [4, lambda outer: jnp.where(outer < 2, 1, 5)])
def test_the_number_of_inner_steps_can_be_a_schedule(data, steps):
    """A period may go on in the next round: after 1, 1, 5, 5, ... of 4, 4, 4, 4 steps."""
    rounds = first(4, cohorts(data, 4))
    algorithm = local_sgd(
        losses_of(Quadratic),
        optax.sgd(INNER, momentum=0.5),
        replicas=REPLICAS,
        steps=steps if callable(steps) else lambda outer: steps,
    )
    state, metrics = train(algorithm, Quadratic.start(), rounds)

    class Momentum:
        v = None

        def __call__(self, params, gradient):
            self.v = combine(lambda g, v: g + 0.5 * v, gradient, self.v) if self.v else gradient
            return combine(lambda x, v: x - INNER * v, params, self.v)

    expected = numpy_diloco(
        Quadratic,
        rounds,
        (lambda n: 1 if n < 2 else 5) if callable(steps) else lambda n: steps,
        Momentum,
        lambda theta, delta: combine(np.subtract, theta, delta),
    )
    assert_same(state, expected)
    assert state.clock.since == (4 if callable(steps) else 0)
    assert state.clock.outer_steps == 4
    assert metrics["outer_steps"] == (0 if callable(steps) else 1)
    if not callable(steps):
        static = local_sgd(
            losses_of(Quadratic), optax.sgd(INNER, momentum=0.5), replicas=REPLICAS, steps=4
        )
        other, others = train(static, Quadratic.start(), rounds)
        problems.assert_trees_close(other._replace(clock=state.clock), state)
        problems.assert_trees_close(others, metrics)


def test_padding_costs_nothing_where_there_is_none(data):
    """Inner steps neither branch nor select, unless another mask takes the place of the stream's.

    Results are the same, and with a mask that has padding its steps are left out.
    """
    (cohort,) = first(1, cohorts(data, 3))
    algorithm = diloco(losses_of(Logistic), optax.adamw(INNER), replicas=REPLICAS)
    start, shapes = algorithm.init(Logistic.start()), {(4, 3), (3,)}
    mask = np.array(cohort.mask)
    mask[2, 1:] = False
    padded = dataclasses.replace(cohort, mask=jnp.array(mask))
    same = dataclasses.replace(cohort, mask=cohort.mask & True)
    for batches, expected in ((cohort, 0), (same, 1), (padded, 1)):
        loops = [
            eqn
            for eqn in jaxprs.equations(jax.make_jaxpr(algorithm.round)(start, batches))
            if eqn.primitive.name == "scan" and eqn.params["length"] == 3
        ]
        assert len(loops) == 1
        found = [
            eqn.primitive.name
            for eqn in jaxprs.equations(loops[0].params["jaxpr"])
            if eqn.outvars[0].aval.shape in shapes or eqn.primitive.name == "cond"
        ]
        assert "cond" not in found
        assert bool(found.count("select_n")) == expected
    step = jax.jit(algorithm.round)
    results = [step(start, batches) for batches in (cohort, same, padded)]
    problems.assert_trees_close(results[0], results[1], rtol=1e-12)
    trained = np.ones((3, REPLICAS), bool)
    trained[1:, 2] = False
    expected = numpy_diloco(
        Logistic,
        [cohort],
        lambda n: 3,
        lambda: AdamW(INNER),
        Nesterov(0.7, 0.9),
        trained=trained,
    )
    assert_same(results[2][0], expected)


# What it is in special cases


def test_one_step_of_sgd_is_data_parallel_sgd(data):
    rounds = first(2, cohorts(data))
    algorithm = diloco(
        losses_of(Logistic), optax.sgd(0.3), optax.sgd(1.0), replicas=REPLICAS, steps=1
    )
    state, _ = train(algorithm, Logistic.start(), rounds)
    theta = Logistic.start()
    for cohort in rounds:
        for batches in zip(*numpy_batches(cohort)):
            x, y = (np.concatenate(parts) for parts in zip(*batches))
            _, gradient = Logistic.losses_and_gradient(theta, x, y)
            theta = combine(lambda p, g: p - 0.3 * g, theta, gradient)
    problems.assert_trees_close(state.params, theta)


@pytest.mark.long
def test_one_replica_is_lookahead():
    """optax has it: fast steps, and a slow one from the last place where both were."""
    rng = np.random.default_rng(0)
    shard = {"x": rng.normal(size=(20, 4)), "y": rng.integers(0, 3, 20)}
    rounds = fax.data.cohorts(
        fax.data.InMemory({"all": shard}), 1, 2, sampler="stream", max_steps=12
    )
    cohort = next(rounds)
    algorithm = diloco(losses_of(Logistic), optax.adam(INNER), optax.sgd(0.5), replicas=1, steps=4)
    state, _ = train(algorithm, Logistic.start(), [cohort])

    optimizer = optax.lookahead(optax.adam(INNER), sync_period=4, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(jax.tree.map(jnp.asarray, Logistic.start()))
    lookahead = optimizer.init(params)
    for x, y in numpy_batches(cohort)[0]:
        _, gradient = Logistic.losses_and_gradient(jax.tree.map(np.asarray, params.fast), x, y)
        updates, lookahead = optimizer.update(gradient, lookahead, params)
        params = optax.apply_updates(params, updates)
    problems.assert_trees_close(state.params, params.slow)


@pytest.mark.long
def test_local_sgd_is_federated_averaging(data):
    rounds = fax.data.cohorts(data, REPLICAS, 2, epochs=1)  # ragged, and weighted by size
    rounds = first(2, rounds)
    one = local_sgd(losses_of(Logistic), optax.sgd(0.1), replicas=REPLICAS, weighted=True)
    other = fedavg(losses_of(Logistic), optax.sgd(0.1))
    state, metrics = train(one, Logistic.start(), rounds)
    expected, others = train(other, Logistic.start(), rounds)
    problems.assert_trees_close(state.params, expected.params)
    np.testing.assert_allclose(metrics["replicas/loss"], others["clients/loss"], rtol=1e-10)
    np.testing.assert_allclose(metrics["loss"], others["loss"], rtol=1e-10)


# Traps


def test_replicas_start_identical_whatever_the_mesh():
    algorithm = diloco(losses_of(Logistic), optax.adamw(INNER), replicas=REPLICAS)
    for axes in ({}, {"replicas": 2}, {"replicas": 2, "model": 2}):
        with jax.set_mesh(meshes.mesh(**axes)) if axes else jax.set_mesh(None):
            state = algorithm.init(Logistic.start())
        for name, rows in jax.device_get(state.replicas.rows.params).items():
            assert len(rows) == REPLICAS
            np.testing.assert_array_equal(rows, np.stack([Logistic.start()[name]] * REPLICAS))


def test_schedules_and_populations_on_explicit_axes():
    """Where types say how rows are spread: of metrics, of models, and of the cohort's batches."""

    def loss(p, batch, key):
        return (p - batch["x"]) ** 2

    def run(algorithm):
        data = fax.data.InMemory({"a": {"x": np.ones(4)}, "b": {"x": np.full(4, 3.0)}})
        cohort = next(fax.data.cohorts(data, 2, 2, max_steps=2, placement="replicas"))
        state, metrics = jax.jit(algorithm.round)(algorithm.init(0.5), cohort)
        return algorithm.params(state), metrics, cohort.batches["x"]

    for algorithm in (
        local_sgd(loss, optax.sgd(0.1), replicas=2, steps=lambda averages: 2),
        papa(loss, optax.sgd(0.1), replicas=2, steps=1, aggregator=fax.aggregators.median()),
    ):
        expected = run(algorithm)
        with jax.set_mesh(meshes.mesh("first-explicit", replicas=2, model=2)):
            problems.assert_trees_close(jax.device_get(run(algorithm)), expected, rtol=1e-12)


def test_the_outer_step_goes_where_the_replicas_went():
    shards = {"a": {"x": np.ones(4)}, "b": {"x": np.full(4, 3.0)}}
    rounds = fax.data.cohorts(fax.data.InMemory(shards), 2, 4)
    for rate in (0.5, 1.0):
        algorithm = diloco(
            lambda p, batch, key: (p - batch["x"]) ** 2 / 2,
            optax.sgd(0.5),
            optax.sgd(rate),
            replicas=2,
        )
        state, _ = algorithm.round(algorithm.init(0.0), next(rounds))
        assert state.params == pytest.approx(rate * (0.5 + 1.5) / 2)


def test_a_restored_state_goes_on_as_if_nothing_had_happened(data, tmp_path):
    algorithm = diloco(losses_of(Logistic), optax.adamw(INNER), replicas=REPLICAS)
    rounds = first(4, cohorts(data, 3))
    expected, _ = train(algorithm, Logistic.start(), rounds)
    state, _ = train(algorithm, Logistic.start(), rounds[:2])
    leaves, structure = jax.tree.flatten(state)
    path = tmp_path / "state"
    path.write_bytes(pickle.dumps([np.asarray(leaf) for leaf in leaves]))
    restored = jax.tree.unflatten(structure, pickle.loads(path.read_bytes()))
    step, again = jax.jit(algorithm.round), restored
    for cohort in first(2, cohorts(data, 3, start=2)):
        again, _ = step(again, cohort)
    problems.assert_trees_close(again, expected)
    # The state of the outer optimizer is what peers have lost.
    lost = restored._replace(optimizer=jax.tree.map(jnp.zeros_like, restored.optimizer))
    for own in rounds[2:]:
        lost, _ = step(lost, own)
    difference = np.abs(np.asarray(lost.params["w"] - expected.params["w"])).max()
    assert difference > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, r"diloco: steps is 0, expected an int of at least 1\."),
        ({"steps": -3}, r"steps is -3, expected"),
        ({"steps": 2.0}, r"steps is 2\.0, expected"),
        ({"replicas": 0}, r"replicas is 0, expected"),
        ({"replicas": True}, r"replicas is True, expected"),
        # H is never rounded.
        ({"steps": 4}, r"cohort has 6 batches for each replica, expected a multiple of steps=4"),
        ({"steps": 7}, r"cohort has 6 batches for each replica, expected a multiple of steps=7"),
        ({"replicas": 5}, r"the cohort has 6 clients, expected one for each replica: replicas=5\."),
    ],
)
def test_mistakes(data, arguments, message):
    arguments = {"replicas": REPLICAS, **arguments}

    def run():
        algorithm = diloco(losses_of(Logistic), optax.sgd(INNER), **arguments)
        algorithm.round(algorithm.init(Logistic.start()), next(cohorts(data)))

    with pytest.raises(ValueError, match=message):
        run()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"replicas": 4},
            r"round: state\.replicas\.rows\.params\['b'\] has shape \(4, 3\), expected a row "
            r"for each of the replicas=6\. .*x\[jnp\.arange\(6\) % 4\], state\.replicas\)\)\.",
        ),
        (
            {"inner_optimizer": optax.sgd(INNER)},
            r"state\.replicas\.rows\.optimizer is .*Empty.*, expected .*Adam.*, as init makes it",
        ),
        ({"outer_optimizer": optax.sgd(1.0)}, r"state\.optimizer is .*Empty.*, expected .*Trace"),
        ({"steps": 3}, r"state\.clock is None, expected Clock\(.*replace\(clock=algorithm\.init"),
    ],
)
def test_a_state_goes_on_with_the_algorithm_that_made_it(data, arguments, message):
    """Its number of replicas can be changed, as the message says. Rounds draw no secret keys."""
    given = {"inner_optimizer": optax.adamw(INNER), "replicas": REPLICAS, "steps": lambda n: 3}
    given["aggregator"] = fax.aggregators.gaussian(1.0, 1.0)
    algorithm = diloco(losses_of(Logistic), **given)
    other = diloco(losses_of(Logistic), **{**given, **arguments})
    state, cohort = other.init(Logistic.start()), next(cohorts(data))
    with pytest.raises(ValueError, match=message):
        algorithm.round(state, cohort)
    if "replicas" in arguments:
        rows = jax.tree.map(lambda x: x[jnp.arange(REPLICAS) % 4], state.replicas)
        found = jax.eval_shape(algorithm.round, state._replace(replicas=rows), cohort)[0]
        assert algorithm.models(found)["b"].shape == (REPLICAS, 3)


def float32_copies(inner):
    """An optimizer for short parameters that keeps long copies of them and trains these."""

    def long(tree):
        return optax.tree.cast(tree, jnp.float32)

    def init(params):
        return long(params), inner.init(long(params))

    def update(gradient, state, params):
        moves, own = inner.update(long(gradient), state[1], state[0])
        new = optax.apply_updates(state[0], moves)
        return jax.tree.map(lambda x, p: x.astype(p.dtype) - p, new, params), (new, own)

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("make", [diloco, local_sgd, papa, streaming_diloco])
def test_copies_of_parameters_would_undo_an_average(make):
    """Other optimizers have no copy, even if their states have the shapes of parameters."""
    start = jax.tree.map(jnp.bfloat16, Logistic.start())
    kwargs = {"replicas": 2, **({"fragments": 1} if make is streaming_diloco else {}), "steps": 2}
    quiet = optax.MultiSteps(optax.chain(optax.clip(1.0), optax.adamw(INNER)), 2)
    for inner, where in [
        (float32_copies(optax.adam(INNER)), r"state\[0\]\['b'\] float32\[3\]"),
        (optax.contrib.schedule_free_adamw(INNER), r"state\.z\['b'\]"),
        (optax.apply_if_finite(quiet.gradient_transformation(), 5), None),
    ]:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            jax.eval_shape(make(losses_of(Logistic), inner, **kwargs).init, start)
        assert len(found) == (where is not None)
        assert all(re.search(f"copy of the parameters, in {where}", str(w.message)) for w in found)


def test_names_of_metrics_are_not_taken(data):
    def loss(params, batch, key):
        return Logistic.loss(params, batch, key)[0], {"replicas/loss": batch["y"]}

    algorithm = diloco(loss, optax.sgd(INNER), replicas=REPLICAS)
    with pytest.raises(ValueError, match="not be 'loss' or begin with 'clients/' or 'replicas/'"):
        algorithm.round(algorithm.init(Logistic.start()), next(cohorts(data)))


# Settings


@pytest.mark.long
def test_results_do_not_depend_on_where_replicas_are(data):
    results = []
    for name in problems.SETTINGS:
        context, at_once = problems.setting(name, "replicas")
        with context:
            algorithm = diloco(
                losses_of(Quadratic),
                optax.adamw(INNER),
                replicas=REPLICAS,
                steps=2,
                vectorize=at_once,
            )
            results.append(train(algorithm, Quadratic.start(), first(1, cohorts(data, 4))))
    for found in results[1:]:
        problems.assert_trees_close(found, results[0], rtol=1e-9)


@pytest.mark.always("3-axes1")
@pytest.mark.kinds(axes=alike, steps=alike)
@pytest.mark.parametrize("axes", [{"replicas": 2}, {"replicas": 2, "model": 2}])
@pytest.mark.parametrize("steps", [6, 3])
def test_one_all_reduce_for_each_outer_step_and_none_in_inner_steps(data, axes, steps):
    mesh = meshes.mesh(**axes)
    # Devices need not agree on which of its steps are skipped.
    inner = optax.apply_if_finite(optax.adamw(INNER), 100)
    with jax.set_mesh(mesh):
        algorithm = diloco(losses_of(Logistic), inner, replicas=REPLICAS, steps=steps)
        state, cohort = algorithm.init(Logistic.start()), next(cohorts(data))
        (found,) = fax.inspect.report(algorithm.round, state, cohort).collectives
    assert found.operation == "all-reduce"
    assert found.axes == ("replicas",)
    # Inner steps are in a loop over replicas or none, and a loop of their own.
    assert found.loops == (0 if steps == 6 else 1)
    assert found.count == 6 // steps
    assert found.bytes < 1.3 * 8 * 15 + 40


@pytest.mark.always("auto")
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_a_replica_can_be_sharded_itself(kind):
    """A hidden layer over `model`, batches over `data`, and a scale on all devices."""
    rng = np.random.default_rng(0)
    shards = {
        f"shard {i}": {"x": rng.normal(size=(8, 4)), "y": rng.normal(size=8)} for i in range(4)
    }
    start = {"in": rng.normal(size=(4, 6)), "out": rng.normal(size=6), "scale": jnp.ones(4)}

    def loss(params, batch, key):
        x = batch["x"] * params["scale"]
        return (jnp.tanh(x @ params["in"]) @ params["out"] - batch["y"]) ** 2

    def sharded(params, batch, key):
        split = jax.sharding.reshard if kind == "explicit" else jax.lax.with_sharding_constraint
        x, y = split(batch["x"], P("data")), split(batch["y"], P("data"))
        x = x * params["scale"]
        hidden = split(jnp.tanh(x @ params["in"]), P("data", "model"))
        out = P("data") if kind == "explicit" else None
        return (jnp.einsum("bh,h->b", hidden, params["out"], out_sharding=out) - y) ** 2

    specs = {"in": P(None, "model"), "out": P("model"), "scale": P()} if kind == "auto" else None

    def run(loss, params):
        algorithm = diloco(loss, optax.adamw(INNER), replicas=4, steps=2, sharding=specs)
        if kind == "auto":  # `init` shards what comes from the host, also in a program
            for init in (algorithm.init, jax.jit(algorithm.init)):
                states.append(init(start))
        data = fax.data.InMemory(shards)
        (cohort,) = first(
            1, fax.data.cohorts(data, 4, 4, sampler="stream", max_steps=4, placement="replicas")
        )
        state = algorithm.init(params)
        step = jax.jit(algorithm.round).lower(state, cohort).compile()
        return *step(state, cohort), step

    states = []
    expected = run(loss, start)[:2]
    states.clear()
    mesh = meshes.mesh(kind, replicas=2, data=2, model=2)
    with jax.set_mesh(mesh):
        params = {
            "in": meshes.put(start["in"], None, "model"),
            "out": meshes.put(start["out"], "model"),
            "scale": meshes.put(start["scale"]),
        }
        state, metrics, step = run(sharded, params)
        found = fax.inspect.report(step).over("replicas")
    problems.assert_trees_close((state, metrics), expected, rtol=1e-9)
    # What layers and batches exchange stays among the devices of a replica.
    assert [(c.operation, c.axes) for c in found] == [("all-reduce", ("replicas",))]
    # Of "in" and "scale", each of a replica's four devices sends a fourth. The half of "out" that
    # two devices have in common has three numbers, which cannot be divided. And a few numbers more.
    numbers = 24 / 4 + 6 / 2 + 4 / 4
    assert 8 * numbers < found[0].bytes <= 8 * numbers + 40
    for each in (state, *states):
        rows = each.replicas.rows
        for tree in (rows.params, rows.optimizer[0].mu):
            assert tree["in"].sharding.shard_shape((4, 4, 6)) == (2, 4, 3)
        for tree in (each.params, each.optimizer[0].trace):
            assert tree["in"].sharding.shard_shape((4, 6)) == (4, 3)


@pytest.mark.parametrize(
    ("sharding", "message"),
    [
        ({"w": P()}, "diloco: params has a leaf 'b', but sharding does not. Pass a"),
        ({"w": P(), "b": P(), "c": P()}, "sharding has a leaf 'c', but params does not"),
        ({"w": P(), "b": P(None, "model")}, r"for 'b', which has only 1 axes"),
        ({"w": P(), "b": "model"}, "sharding has 'model' for 'b', expected a jax.sharding.Part"),
        (P("model"), r"is P\('model',\), expected a pytree with a .* of the parameters: b, w"),
        ({"w": P("model", "model"), "b": P()}, "for 'w', which has the mesh axis 'model' twice"),
        ({"w": P("model"), "b": P("replicas")}, "the mesh axis 'replicas' is that of the replicas"),
        ({"w": P("data"), "b": P()}, "the mesh axis 'data' is not in the mesh in scope"),
        ({"boxed": P()}, "params has 'boxed/value', in a box of flax.* flax.linen.unbox"),
    ],
)
def test_shardings_of_replicas_have_to_fit(data, sharding, message):
    def run():
        algorithm = diloco(
            losses_of(Logistic), optax.sgd(INNER), replicas=REPLICAS, sharding=sharding
        )
        boxed = {"boxed": Partitioned(jnp.ones(()), ())}
        start = algorithm.init(boxed if "boxed" in sharding else Logistic.start())
        jax.eval_shape(algorithm.round, start, next(cohorts(data)))

    with jax.set_mesh(meshes.mesh(replicas=2, model=2)), pytest.raises(ValueError, match=message):
        run()


# Transformations


@pytest.mark.long
def test_rates_can_be_differentiated_and_swept(data):
    cohort = next(cohorts(data))

    def after(rates):
        algorithm = diloco(
            losses_of(Quadratic),
            optax.adamw(rates[0]),
            optax.sgd(rates[1], momentum=0.9, nesterov=True),
            replicas=REPLICAS,
            steps=3,
        )
        state, _ = algorithm.round(algorithm.init(Quadratic.start()), cohort)
        batch = {"x": jnp.eye(4), "y": jnp.arange(4)}
        return Quadratic.loss(algorithm.params(state), batch, None)[0].mean()

    rates = jnp.array([0.05, 0.7])
    check_grads(jax.jit(after), (rates,), order=1, modes=("fwd", "rev"), rtol=1e-6)
    sweep = jnp.array([[0.05, 0.7], [0.1, 0.4]])
    np.testing.assert_allclose(
        jax.jit(jax.vmap(after))(sweep), [after(r) for r in sweep], rtol=1e-10
    )


@pytest.mark.long
def test_a_schedule_can_be_differentiated(data):
    cohort = next(cohorts(data))

    def after(rate):
        algorithm = diloco(
            losses_of(Quadratic),
            optax.sgd(rate),
            replicas=REPLICAS,
            steps=lambda outer: jnp.where(outer < 1, 1, 4),
        )
        state, _ = algorithm.round(algorithm.init(Quadratic.start()), cohort)
        return jnp.sum(algorithm.params(state)["w"] ** 2)

    check_grads(jax.jit(after), (0.05,), order=1, modes=("rev",), eps=1e-6, rtol=1e-6)


@pytest.mark.long
def test_memory_of_a_gradient_does_not_grow_with_inner_steps():
    def size(steps):
        shards = {str(i): {"x": np.ones((8, 100))} for i in range(2)}
        cohort = next(
            fax.data.cohorts(fax.data.InMemory(shards), 2, 4, sampler="stream", max_steps=steps)
        )
        algorithm = diloco(
            lambda w, b, k: jnp.sum(jnp.tanh(b["x"] @ w) ** 2, 1), optax.sgd(0.1), replicas=2
        )

        def loss(params):
            state, _ = algorithm.round(algorithm.init(params), cohort)
            return jnp.sum(algorithm.params(state) ** 2)

        compiled = jax.jit(algorithm.round).lower(algorithm.init(np.ones((100, 100))), cohort)
        return compiled.compile().memory_analysis().temp_size_in_bytes / (8 * 100 * 100)

    few, many = size(4), size(64)
    assert many < few + 0.3
    assert few < 10


@pytest.mark.long
def test_many_rounds_run_in_one_program(data):
    algorithm = diloco(losses_of(Quadratic), optax.adamw(INNER), replicas=REPLICAS, steps=2)
    rounds = first(3, cohorts(data, 4, resident=True))
    expected, _ = train(algorithm, Quadratic.start(), rounds)
    found, metrics = many_rounds(
        algorithm, algorithm.init(Quadratic.start()), cohorts(data, 4, resident=True), 3
    )
    problems.assert_trees_close(found, expected)
    assert metrics["replicas/loss"].shape == (3, REPLICAS)


# Models and aggregators


def test_model_state_is_brought_together_too(data):
    """A running mean of the features, and a counter, which is each replica's own."""

    def loss(params, model_state, batch, key):
        mean = 0.5 * model_state["mean"] + 0.5 * batch["x"].mean(0)
        losses = (batch["x"][:, 0] - params) ** 2
        return losses, {}, {"mean": mean, "steps": model_state["steps"] + 1}

    algorithm = diloco(loss, optax.sgd(0.1), replicas=REPLICAS, steps=2, weighted=True)
    state = algorithm.init(0.0, {"mean": np.zeros(4), "steps": 0})
    cohort = next(cohorts(data, 4))
    state, metrics = jax.jit(algorithm.round)(state, cohort)
    np.testing.assert_array_equal(metrics["replicas/bits"], 2 * 64 * (1 + 4))  # with the means
    expected = np.zeros(4)
    for part in (0, 2):
        means = []
        for batches in numpy_batches(cohort):
            own = expected
            for x, _ in batches[part : part + 2]:
                own = 0.5 * own + 0.5 * x.mean(0)
            means.append(own)
        expected = np.average(means, axis=0, weights=SIZES)
    np.testing.assert_allclose(state.model_state["mean"], expected, rtol=1e-10)
    rows = state.replicas.rows.model_state
    np.testing.assert_allclose(rows["mean"], [expected] * REPLICAS, rtol=1e-10)
    np.testing.assert_array_equal(rows["steps"], [4] * REPLICAS)
    assert state.model_state["steps"] == 0


@pytest.mark.long
def test_an_aggregator_makes_the_outer_gradient(data):
    """One that halves, counts its calls, and draws different numbers each time."""

    def aggregate(updates, weights, state, key):
        half = fax.mean(jax.tree.map(lambda x: x / 2, updates), weights=weights)
        bits = jnp.full(REPLICAS, 7.0, jnp.float32)
        return half, state + 1, {"clients/bits": bits, "draw": jax.random.uniform(key)}

    halving = fax.aggregators.Aggregator(lambda params: jnp.int32(0), aggregate)
    rounds, kwargs = first(1, cohorts(data)), {"replicas": REPLICAS, "steps": 3}
    one = diloco(
        losses_of(Quadratic), optax.sgd(INNER), optax.sgd(1.0), aggregator=halving, **kwargs
    )
    other = diloco(losses_of(Quadratic), optax.sgd(INNER), optax.sgd(0.5), **kwargs)
    state, metrics = train(one, Quadratic.start(), rounds)
    expected, _ = train(other, Quadratic.start(), rounds)
    problems.assert_trees_close(state.params, expected.params)
    assert state.aggregator == 2
    np.testing.assert_array_equal(metrics["replicas/bits"], [14.0] * REPLICAS)
    assert "clients/bits" not in metrics
    single, _ = train(
        diloco(losses_of(Quadratic), optax.sgd(INNER), aggregator=halving, replicas=REPLICAS),
        Quadratic.start(),
        rounds,
    )
    assert 0 < metrics["draw"] < 1
    assert single.aggregator == 1
