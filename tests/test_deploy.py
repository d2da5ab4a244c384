"""Plans give what the jitted program gives, and clients send what the audit says."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import fax
from fax import aggregators, algorithms, deploy

N = len(problems.SIZES)
PARAMS = problems.Logistic.start()
DATA = ("batches", "mask", "num_examples")


def loss(params, batch, key):
    return problems.Logistic.loss(params, batch, key)


def cohort_of(**settings):
    settings = dict(clients=4, batch_size=2, max_steps=2, resident=False) | settings
    return next(fax.data.cohorts(problems.data(), **settings))


def without_keys(tree):
    def plain(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(plain, tree)


def held_in(tree):
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, deploy.Held))
    return [x for x in leaves if isinstance(x, deploy.Held)]


def check_plan(fn, args, *, held=DATA, pull=False, clients=None, backend=None):
    """The plan's results, compared with those of the jitted function."""
    plan = deploy.cut(fn, *args, held=held, pull=pull)
    backend = backend or deploy.InProcess()
    found = plan.run(backend, *args, clients=clients)
    expected = without_keys(jax.jit(fn)(*args))
    for own, other in zip(
        jax.tree.leaves(without_keys(plan.fetch(backend, found))),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_allclose(own, other, rtol=1e-12, atol=1e-13)
    return plan, found


# Algorithms


def sgd():
    return optax.sgd(0.1)


FEDAVG = {
    "mean": None,
    "clipped, Gaussian": lambda: aggregators.gaussian(1.0, 1.0, expected_clients=4),
    "quantized": lambda: aggregators.uniform_quantization(16),
    "secure sum": lambda: aggregators.secure_sum(1.0, 64.0),
}


@pytest.mark.always("mean", "secure sum")
@pytest.mark.parametrize("name", FEDAVG)
def test_federated_averaging(name):
    aggregator = FEDAVG[name] and FEDAVG[name]()
    algorithm = algorithms.fedavg(loss, sgd(), optax.adam(0.1), aggregator=aggregator)
    args = algorithm.init(PARAMS), cohort_of()
    plan, _ = check_plan(algorithm.round, args)
    statements = plan.audit().statements
    assert set(statements.values()) <= {"never", "only through sums over 4"}
    assert statements["[1].batches['x']"] == "only through sums over 4"


def test_state_of_clients_stays_there():
    algorithm = algorithms.scaffold(loss, 0.1, num_clients=N)
    cohort = cohort_of()
    args = algorithm.init(PARAMS), cohort
    clients = np.asarray(cohort.positions).tolist()
    plan, (state, _) = check_plan(algorithm.round, args, held=(*DATA, "clients"), clients=clients)
    assert all(isinstance(x, deploy.Held) for x in jax.tree.leaves(state.clients.rows))
    assert state.clients.rows["w"].clients == tuple(range(N))
    assert plan.audit().chosen["[0].clients.rows['w']"] == ("rows chosen by number",)
    with pytest.raises(ValueError, match="rows that are with different clients"):
        plan.run(deploy.InProcess(), *args)


@pytest.mark.long
def test_two_maps_in_a_round():
    algorithm = algorithms.mime(loss, optax.sgd(0.1, momentum=0.9))
    check_plan(algorithm.round, (algorithm.init(PARAMS), cohort_of()))


def test_replicas_in_a_scan():
    """Replicas stay with the clients between the parts of a round."""
    algorithm = algorithms.diloco(loss, sgd(), replicas=N, steps=2)
    cohort = cohort_of(clients=N, max_steps=4, sampler="stream", placement="replicas")
    args = algorithm.init(PARAMS), cohort
    plan, _ = check_plan(algorithm.round, args, held=(*DATA, "replicas"))
    assert 2 in {exchange.times for exchange in plan.audit().exchanges}


def test_rows_are_fetched_only_if_the_plan_may():
    algorithm = algorithms.fedavg(loss, sgd(), aggregator=aggregators.krum(1))
    args = algorithm.init(PARAMS), cohort_of(clients=5)
    with pytest.raises(deploy.CutError, match=r"rows of .*_krum.py:\d+.*pull=True"):
        deploy.cut(algorithm.round, *args)
    plan, _ = check_plan(algorithm.round, args, pull=True)
    assert plan.audit().statements["[1].batches['x']"] == "as rows"


# Programs


@fax.program(clients=3)
def squares(scale, rows):
    return fax.mean(fax.map(lambda s, x: jnp.sum((s * x) ** 2), fax.broadcast(scale), rows["x"]))


ROWS = {"x": np.random.default_rng(0).normal(size=(3, 4))}
HALF = np.full((3, 2), 40000, np.float16)  # their sum is infinite


def test_clients_do_not_send_what_nobody_needs():
    """The gradient does not need the value."""
    exchanges = deploy.cut(jax.grad(squares), 1.0, ROWS, held=["x"]).audit().exchanges
    assert [exchange.bytes("sum") for exchange in exchanges] == [0, 8]


def many(scale, rows):
    def again(scale, _):
        return scale - 0.1 * squares(scale, rows), scale

    return jax.lax.scan(again, scale, None, length=3)


TRANSFORMED = {
    "value": squares,
    "gradient": jax.grad(squares),
    "gradient by the data": jax.grad(lambda s, rows: jnp.tanh(squares(s, rows)), 1),
    "Hessian": jax.hessian(squares),
    "tangent": lambda s, rows: jax.jvp(lambda s: squares(s, rows), (s,), (1.0,))[1],
    "vectorized": lambda s, rows: jax.vmap(lambda t: squares(s * t, rows))(jnp.arange(3.0)),
    "vectorized rows": lambda s, rows: jax.vmap(
        fax.program(clients=3)(lambda t: fax.mean(rows["x"] * t))
    )(jnp.arange(2.0)),
    "scan": many,
    "gradient of a scan": jax.grad(lambda s, rows: many(s, rows)[0]),
    "while": lambda s, rows: jax.lax.while_loop(
        lambda s: s < 100, lambda s: s + squares(s, rows), s
    ),
    "branch": lambda s, rows: jax.lax.cond(s > 1, lambda: squares(s, rows), lambda: s),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformations(name):
    check_plan(TRANSFORMED[name], (1.5, ROWS), held=["x"])


@fax.program(clients=3)
def extremes(rows, mask):
    x = rows["x"]
    top = fax.map(jnp.max, x)
    centered = x - fax.broadcast(fax.mean(x))
    return fax.max(top, where=mask), fax.min(top), fax.sum(centered**2), jnp.sum(x, 1) / 2


@fax.program(regions=2, clients=3)
def nested(rows):
    def region(x):
        return fax.mean(fax.map(jnp.sum, x, placement="clients"), placement="clients")

    return fax.max(fax.map(region, rows["x"], placement="regions"), placement="regions")


@fax.program(clients=3)
def loop_of_rows(rows):
    """Rows are carried and stacked by loops, and returned by branches, that the server runs."""

    def step(x, scale):
        x = fax.map(lambda x: jnp.sin(scale * x), x)
        return x, x[:, 0]

    x, each = jax.lax.scan(step, rows["x"], jnp.arange(1.0, 4.0))
    x = jax.lax.cond(fax.sum(fax.map(jnp.sum, x)) > 0, lambda x: x, lambda x: -x, x)
    zeros = jnp.zeros_like(x)  # at the server at first
    later = jax.lax.fori_loop(0, 2, lambda i, z: fax.map(jnp.add, z, x), zeros)
    return x, each, later, jax.lax.map(lambda row: fax.sum(row), each)


PROGRAMS = {
    "extremes": (lambda rows: extremes(rows, jnp.array([True, False, True])), ROWS),
    "nested": (nested, {"x": np.arange(24.0).reshape(2, 3, 4)}),
    "loops of rows": (loop_of_rows, ROWS),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name):
    fn, rows = PROGRAMS[name]
    check_plan(fn, (rows,), held=["x"])


def test_rows_are_freed():
    plan = deploy.cut(loop_of_rows, ROWS, held=["x"])
    backend = deploy.InProcess()
    found = plan.run(backend, ROWS)
    gc.collect()
    count = len(held_in(found)) * 3
    assert len(backend._values) == count
    del found
    gc.collect()
    assert not backend._values


def test_random_keys_travel():
    @fax.program(clients=3)
    def noisy(rows, key):
        return fax.sum(fax.map(lambda x, k: x + jax.random.normal(k), rows["x"], fax.keys(key)))

    check_plan(noisy, (ROWS, jax.random.key(1)), held=["x"])


def test_a_mean_of_short_floats_does_not_overflow():
    check_plan(fax.program(clients=3)(lambda r: fax.mean(r["x"])), ({"x": HALF},), held=["x"])


def test_rows_that_are_replaced_stay_with_their_clients():
    @fax.program(clients=3)
    def replaced(rows, numbers):
        return rows["x"].at[numbers].set(jnp.ones((2, 4)))

    @fax.program(clients=3)
    def exchanged(rows, numbers):
        return rows["x"].at[numbers].set(rows["x"][numbers[::-1]])

    args = ROWS, np.array([2, 1])
    _, found = check_plan(replaced, args, held=["x"])
    assert [row.client for row in found.rows] == [0, 1, 2]
    plan = deploy.cut(exchanged, *args, held=["x"])
    with pytest.raises(ValueError, match="Row 2 is with the client 2, and would be replaced"):
        plan.run(deploy.InProcess(), *args)


def test_one_row_that_is_repeated():
    @fax.program(clients=1)
    def repeated(rows):
        return fax.mean(rows["x"]), rows["x"] * jnp.arange(3.0)[:, None]

    with pytest.raises(deploy.CutError, match="mul uses the rows of several clients"):
        deploy.cut(repeated, {"x": np.ones((1, 4))}, held=["x"])
    check_plan(repeated, ({"x": np.ones((1, 4))},), held=["x"], pull=True)


def test_what_the_server_prints(capfd):
    @fax.program(clients=3)
    def printed(rows):
        total = fax.sum(rows["x"])
        jax.debug.print("the sum is {}", total.sum())
        return total

    deploy.cut(printed, ROWS, held=["x"]).run(deploy.InProcess(), ROWS, quorum=2)
    jax.effects_barrier()
    assert f"the sum is {ROWS['x'].sum():.4f}"[:16] in capfd.readouterr().out


def test_rows_along_another_axis():
    """The type does not say along which axis the rows are."""

    @fax.program(clients=3)
    def turned(rows):
        return {"x": rows["x"].T}

    rows = {"x": ROWS["x"][:, :3]}
    plan = deploy.cut(turned, rows, held=["x"])
    backend = deploy.InProcess()
    with pytest.raises(ValueError, match="rows along axis 1, expected axis 0"):
        plan.run(backend, plan.run(backend, rows))


# Clients that fail


class Failing(deploy.InProcess):
    """Some clients fail when a stage runs for the nth time, and from then on."""

    def __init__(self, clients, nth=1):
        super().__init__()
        self.clients, self.left = set(clients), nth

    def run(self, stage, clients, operands):
        self.left -= 1
        failed = self.clients.intersection(clients)
        if self.left <= 0 and failed:
            raise deploy.ClientError("failed", failed)
        return super().run(stage, clients, operands)


CLIPPED = aggregators.chain(aggregators.clip_by_norm(0.1), aggregators.mean())


@pytest.mark.always("fedavg")
@pytest.mark.parametrize("name", ["fedavg", "mime", "clipped"])
def test_a_round_without_clients_that_fail(name):
    """It is the round in which they have no examples."""
    algorithm = {
        "fedavg": lambda: algorithms.fedavg(loss, sgd(), optax.adam(0.1)),
        "mime": lambda: algorithms.mime(loss, optax.sgd(0.1, momentum=0.9)),
        "clipped": lambda: algorithms.fedavg(
            loss,
            sgd(),
            aggregator=CLIPPED,
        ),
    }[name]()
    cohort = cohort_of()
    args = algorithm.init(PARAMS), cohort
    plan = deploy.cut(algorithm.round, *args)
    backend = Failing([1, 3])
    state, metrics = plan.run(backend, *args, quorum=2)
    left = np.array([True, False, True, False])
    absent = dataclasses.replace(
        cohort,
        mask=cohort.mask & left[:, None, None],
        num_examples=cohort.num_examples * left,
    )
    expected, others = jax.jit(algorithm.round)(args[0], absent)
    for own, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(metrics["loss"], others["loss"], rtol=1e-12)
    assert [row is None for row in metrics["clients/loss"].rows] == [False, True, False, True]
    with pytest.raises(deploy.ClientError, match=r"no rows of the clients \[1, 3\]"):
        plan.fetch(backend, metrics)
    with pytest.raises(deploy.ClientError, match="2 of 4 clients are left, fewer than the quorum"):
        plan.run(Failing([1, 3]), *args, quorum=3)
    with pytest.raises(deploy.ClientError, match="failed"):
        plan.run(Failing([1, 3]), *args)


def test_a_client_that_fails_in_the_middle_of_a_loop():
    @fax.program(clients=3)
    def mean(scale, rows):
        losses = fax.map(lambda s, x: jnp.sum((s * x) ** 2), fax.broadcast(scale), rows["x"])
        return fax.mean(losses, weights=fax.map(lambda x: jnp.ones(()), rows["x"]))

    def train(scale, rows):
        return jax.lax.fori_loop(0, 4, lambda i, s: s - 0.1 * jax.grad(mean)(s, rows), scale)

    plan = deploy.cut(train, 1.5, ROWS, held=["x"])
    # In the second half of the third step: the first half has counted the client already.
    found = plan.run(Failing([1], nth=6), 1.5, ROWS, quorum=1)
    left = ROWS["x"][[0, 2]]
    expected = 1.5
    for _ in range(4):
        expected -= 0.1 * 2 * expected * (left**2).sum() / 2
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_state_of_a_client_that_fails_stays():
    @fax.program(clients=2)
    def advance(state, numbers, rows):
        own = state["x"][numbers]
        new = fax.map(lambda s, x: s + x, own, rows["x"])
        return {"x": state["x"].at[numbers].set(new)}

    state, rows = {"x": np.arange(8.0).reshape(4, 2)}, {"x": np.ones((2, 2))}
    numbers = np.array([3, 1])
    plan = deploy.cut(advance, state, numbers, rows, held=["x"])
    backend = Failing([3])
    found = plan.run(backend, state, numbers, rows, clients=[3, 1], quorum=1)
    expected = state["x"].copy()
    expected[1] += 1
    np.testing.assert_array_equal(plan.fetch(backend, found)["x"], expected)


def count(rows):
    return fax.sum(fax.map(lambda x: jnp.ones(()), rows["x"]))


def test_rows_that_are_missing_from_the_start():
    """The client is left out of all sums, also of those that do not need the missing row."""

    @fax.program(clients=3)
    def mean(rows):
        return fax.sum(rows["x"]) / fax.sum(fax.map(lambda y: jnp.ones(()), rows["y"]))

    rows = {"x": ROWS["x"], "y": ROWS["x"]}
    plan = deploy.cut(mean, rows, held=["x", "y"])
    backend = deploy.InProcess()
    own = backend.put([0, 1, 2], list(ROWS["x"]))
    own[1] = None
    rows["x"] = deploy.Held(tuple(own), (0, 1, 2), (3, 4), ROWS["x"].dtype)
    found = plan.run(backend, rows, quorum=2)
    np.testing.assert_allclose(found, ROWS["x"][[0, 2]].mean(0))
    with pytest.raises(deploy.ClientError, match=r"no rows of the clients \['1'\]"):
        plan.run(backend, rows)


UNWEIGHTED = r"divided by their number, 3, at .*test_deploy.py.*pass weights="
STATIC = {
    "a mean": (lambda rows: fax.mean(rows["x"]), UNWEIGHTED),
    "a mean by hand": (lambda rows: fax.sum(rows["x"]) / 3, UNWEIGHTED),
    "a mean by multiplication": (lambda rows: fax.sum(rows["x"]) * (1 / 3), UNWEIGHTED),
    "a sum and a number": (lambda rows: fax.sum(rows["x"]) + 1, "degrees 0 and 1"),
    "a function of a sum": (lambda rows: jnp.exp(fax.sum(rows["x"])), "exp is applied to it"),
    "a sum that is sent": (
        lambda rows: fax.sum(fax.map(jnp.add, rows["x"], fax.broadcast(fax.sum(rows["x"])))),
        "degrees 0 and 1",
    ),
    "a branch": (
        lambda rows: jax.lax.cond(fax.sum(rows["x"])[0] > 1, fax.max, fax.min, rows["x"]),
        "degrees 0 and 1",
    ),
    "unsigned": (lambda rows: fax.sum(rows["x"].astype(jnp.uint32)), "unsigned"),
    "a gradient of a mean": (
        lambda rows: jax.grad(lambda s: fax.mean(fax.broadcast(s) * rows["x"][:, 0]))(1.0),
        "divided by their number, 3",
    ),
    "a guard of another value": (
        lambda rows: fax.sum(rows["x"]) / (count(rows) + (jnp.sum(fax.sum(rows["x"])) == 0)),
        "degrees 0 and 1",
    ),
    "zero is zero": (
        lambda rows: fax.sum(rows["x"]) / (count(rows) + (jnp.zeros(()) == 0)),
        "degrees 0 and 1",
    ),
    "a choice of the server": (
        lambda rows: fax.sum(rows["x"]) / jnp.where(fax.max(rows["x"]) > 0, count(rows), 1),
        "degrees 0 and 1",
    ),
    "the wrong case": (
        lambda rows: (lambda n: fax.sum(rows["x"]) / jnp.where(n != 0, 1, n))(count(rows)),
        "degrees 0 and 1",
    ),
    "a bound": (lambda rows: jnp.minimum(fax.sum(rows["x"]), 1.0), "degrees 0 and 1"),
    "a clipped sum": (
        lambda rows: fax.sum(rows["x"]) / jnp.maximum(1, optax.tree.norm(fax.sum(rows["x"]))),
        "degrees 0 and 1",
    ),
    "a bool": (lambda rows: 1 + fax.sum(rows["x"]) / count(rows).astype(bool), "degrees 0 and 1"),
    "a truncated sum": (lambda rows: fax.sum(rows["x"]).astype(int), "truncated"),
    "a square": (lambda rows: fax.sum(rows["x"]) ** 2, "degree 2"),
}


@pytest.mark.parametrize("name", STATIC)
def test_results_that_would_be_wrong_without_some_clients(name):
    fn, message = STATIC[name]
    plan = deploy.cut(fax.program(clients=3)(fn), ROWS, held=["x"])
    with pytest.raises(deploy.CutError, match=message):
        plan.run(deploy.InProcess(), ROWS, quorum=2)
    plan.run(deploy.InProcess(), ROWS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: algorithms.scaffold(loss, 0.1, num_clients=N),
        lambda: algorithms.fedavg(loss, sgd(), aggregator=FEDAVG["secure sum"]()),
        lambda: algorithms.fedavg(loss, sgd(), aggregator=FEDAVG["clipped, Gaussian"]()),
    ],
    ids=["scaffold", "secure sum", "Gaussian"],
)
def test_algorithms_that_need_all_clients(make):
    algorithm = make()
    args = algorithm.init(PARAMS), cohort_of()
    held = [*DATA, "clients"] if hasattr(args[0].clients, "rows") else DATA
    plan = deploy.cut(algorithm.round, *args, held=held)
    with pytest.raises(deploy.CutError, match=r"smaller|cancel only if all clients"):
        plan.run(deploy.InProcess(), *args, quorum=2)


def test_results_that_are_right_without_some_clients():
    """Ratios of sums, of any form, extrema, and sums as they are."""

    @fax.program(clients=3)
    def right(rows):
        x = rows["x"]
        ones = fax.map(lambda x: jnp.ones(()), x)
        number, total, squares = fax.sum(ones), fax.sum(x), fax.sum(x**2)
        mean = total / jnp.maximum(number, 1)
        deviation = jnp.sqrt(squares / number - mean**2)
        fraction = jnp.where(number > 0, jnp.sqrt(squares * number) / number, 0.0)
        mean = (
            mean + total / (number + (number == 0)) + total / jnp.where(number > 0, number, 1)
        ) / 3
        return fax.max(x), total, total * 2, jnp.exp(mean), deviation, fraction

    plan = deploy.cut(right, ROWS, held=["x"])
    found = plan.run(Failing([0]), ROWS, quorum=2)
    x = ROWS["x"][1:]
    mean = x.mean(0)
    fraction = np.sqrt((x**2).mean(0))
    expected = x.max(0), x.sum(0), 2 * x.sum(0), np.exp(mean), x.std(0), fraction
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-12)


# Mistakes


def test_names_that_no_leaf_has():
    with pytest.raises(deploy.CutError, match=r"held names 'y'.*\['x'\]"):
        deploy.cut(squares, 1.0, ROWS, held=["x", "y"])
    with pytest.raises(deploy.CutError, match=r"'batches'.*pass held=\(\)"):
        deploy.cut(squares, 1.0, ROWS)  # or the server would send all rows
    assert not deploy.cut(squares, 1.0, ROWS, held=()).audit().inputs


def test_examples_on_the_server():
    algorithm = algorithms.fedavg(loss, sgd())
    cohort = cohort_of(resident=True)
    with pytest.raises(deploy.CutError, match=r"resident=False"):
        deploy.cut(algorithm.round, algorithm.init(PARAMS), cohort)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda r: fax.collect(r["x"]).sum(), r"collect uses the rows.*test_deploy.py"),
        (lambda r: jnp.sort(r["x"], 0)[0], r"sort uses the rows of several clients"),
        (lambda r: jnp.cumsum(r["x"], 0), r"cumsum uses the rows of several clients"),
        (lambda r: jax.lax.scan(lambda c, x: (c + x.sum(), x), 0.0, r["x"]), "goes through"),
        (lambda r: jax.lax.cond(r["x"][0, 0] > 0, jnp.sin, jnp.cos, 1.0), "gather|slice"),
        (
            lambda r: fax.sum(fax.map(lambda x: jax.debug.print("{}", x) or x, r["x"])),
            "has effects",
        ),
        (
            lambda r: jax.lax.custom_linear_solve(
                lambda x: fax.sum(fax.broadcast(x)), 1.0, lambda matvec, b: matvec(b)
            ),
            r"custom_linear_solve calls operators of fax, at .*test_deploy.py",
        ),
    ],
    ids=["collect", "sort", "cumulative sum", "scan", "branch", "effect", "linear solve"],
)
def test_programs_that_cannot_be_cut(fn, message):
    program = fax.program(clients=3)(fn)
    with pytest.raises(deploy.CutError, match=message):
        deploy.cut(program, ROWS, held=["x"])


def test_arguments_that_differ():
    plan = deploy.cut(squares, 1.0, ROWS, held=["x"])
    wrong = {"x": np.ones((3, 5))}
    with pytest.raises(
        ValueError, match=r"\[1\]\['x'\] is float64\[3, 5\], expected float64\[3, 4\]"
    ):
        plan.run(deploy.InProcess(), 1.0, wrong)
    with pytest.raises(ValueError, match="structure"):
        plan.run(deploy.InProcess(), 1.0)
    with pytest.raises(ValueError, match=r"clients names 2 clients, expected .* take part: 3"):
        plan.run(deploy.InProcess(), 1.0, ROWS, clients=["ann", "bob"])


# The audit


def test_what_moves():
    plan = deploy.cut(squares, 1.0, ROWS, held=["x"])
    (exchange,) = plan.audit().exchanges
    assert (exchange.clients, exchange.times) == (3, 1)
    assert exchange.bytes("down") == exchange.bytes("sum") == 8
    assert exchange.bytes("stays") == 32
    text = str(plan.audit())
    assert "[1]['x']  only through sums over 3" in text


def statement(fn, **args):
    plan = deploy.cut(fn, *args.values(), held=["x"], pull=True)
    return plan.audit()


def test_a_sum_under_a_mask_of_the_server_is_flagged():
    @fax.program(clients=3)
    def of_one(rows, who):
        return fax.sum(rows["x"], where=who)

    audit = statement(of_one, rows=ROWS, who=np.arange(3) == 1)
    assert audit.chosen == {"[0]['x']": ("bool[]",)}


def test_a_cohort_of_one_sends_rows():
    @fax.program(clients=1)
    def total(rows):
        return fax.sum(rows["x"])

    assert statement(total, rows={"x": np.ones((1, 2))}).statements == {"[0]['x']": "as rows"}


def test_what_leaves_in_a_loop_that_carries_it():
    """What is carried depends on the input only from the second iteration on."""

    @fax.program(clients=3)
    def slow(rows):
        def step(carry, _):
            late, later = carry
            return (fax.map(jnp.add, late, rows["x"]), late), fax.sum(later)

        zeros = jnp.zeros((3, 4))
        return jax.lax.scan(step, (zeros, zeros), None, length=3)[1]

    assert statement(slow, rows=ROWS).statements == {"[0]['x']": "only through sums over 3"}


class Replay(deploy.InProcess):
    """Clients whose input changed, while the server still gets what it may have depended on."""

    def __init__(self, attributed, before=None):
        super().__init__()
        self.attributed, self.before, self.now = attributed, before, []

    def run(self, stage, clients, operands):
        found = super().run(stage, clients, operands)
        totals = [None if mode == "placed" else x for x, mode in zip(found, stage.outputs)]
        self.now.append(totals)
        if self.before is None:
            return found
        old = self.before.now[len(self.now) - 1]
        sent = [k for k, mode in enumerate(stage.outputs) if mode != "placed"]
        for place, k in enumerate(sent):
            if (stage.name, place) in self.attributed:
                found[k] = old[k]
            else:
                np.testing.assert_array_equal(found[k], old[k])
        return found

    def fetch(self, rows):
        found = super().fetch(rows)
        self.now.append(found)
        if self.before is None or "fetched" in self.attributed:
            return found if self.before is None else self.before.now[len(self.now) - 1]
        np.testing.assert_array_equal(found, self.before.now[len(self.now) - 1])
        return found


def random_program(rng, names):
    """A program of random operations, whose inputs may leave in any way or not at all."""
    kinds = ("map", "map", "mix", "sum", "max", "mask", "loop", "branch", "collect", "hide")
    plan = [(kinds[rng.integers(len(kinds))], rng.integers(100, size=3).tolist()) for _ in range(7)]

    @fax.program(clients=4)
    def program(rows, who):
        placed, server = [rows[name] for name in names], [jnp.ones(2)]
        for kind, (i, j, k) in plan:
            x, y, s = placed[i % len(placed)], placed[j % len(placed)], server[k % len(server)]
            if kind == "map":
                placed.append(fax.map(lambda x, s: jnp.sin(x + s), x, fax.broadcast(s)))
            elif kind == "mix":
                placed.append(x * y)
            elif kind == "sum":
                server.append(fax.sum(x))
            elif kind == "max":
                server.append(fax.max(x, where=y[:, 0] > 0) if j % 2 else fax.min(x))
            elif kind == "mask":
                server.append(fax.mean(x, weights=who))
            elif kind == "loop":
                step = lambda c, _: ((fax.map(jnp.add, c[1], c[0]), c[0]), fax.sum(c[1]))  # noqa: E731
                (x, _), sums = jax.lax.scan(step, (x, y), None, length=2)
                placed.append(x)
                server.append(sums[1])
            elif kind == "branch":
                placed.append(jax.lax.cond(s[0] > 1, lambda x, y: x, lambda x, y: y, x, y))
            elif kind == "collect":
                server.append(fax.collect(x)[k % 4])
            else:
                placed.append(fax.map(lambda x: jnp.zeros_like(x) + 1, x))
        return placed, server

    return program


@pytest.mark.parametrize("seed", range(12))
def test_the_audit_of_random_programs(seed):
    """An input changes only what the audit says, given the old values of that."""
    rng = np.random.default_rng(seed)
    names = ["a", "b", "c"]
    rows = {name: rng.normal(size=(4, 2)) for name in names}
    who = rng.random(4)
    program = random_program(rng, names)
    plan = deploy.cut(program, rows, who, held=names, pull=True)
    audit = plan.audit()
    before = Replay(set())
    server = plan.run(before, rows, who)[1]
    for name in names:
        path = f"[0]['{name}']"
        attributed = set()
        for exchange in audit.exchanges:
            leaving = [m for m in exchange.messages if m.mode in ("sum", "max", "min", "fetched")]
            for place, message in enumerate(leaving):
                if path in message.depends_on:
                    own = message.mode == "fetched"
                    attributed.add("fetched" if own else (exchange.stage, place))
        assert bool(attributed) == (audit.statements[path] != "never")
        changed = dict(rows) | {name: rows[name].copy()}
        changed[name][rng.integers(4)] += rng.normal(size=2)
        found = plan.run(Replay(attributed, before), changed, who)[1]
        for own, other in zip(found, server, strict=True):
            np.testing.assert_array_equal(own, other)


def test_every_statement_occurs():
    """The random programs would not test much otherwise."""
    found = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        names = ["a", "b", "c"]
        rows = {name: jax.ShapeDtypeStruct((4, 2), float) for name in names}
        rng.normal(size=(3, 4, 2)), rng.random(4)
        program = random_program(rng, names)
        plan = deploy.cut(program, rows, np.ones(4), held=names, pull=True)
        found |= set(plan.audit().statements.values())
    assert {"never", "as rows"} < found
    assert any(s.startswith("only through sums") for s in found)


def test_plans_are_frozen():
    plan = deploy.cut(squares, 1.0, ROWS, held=["x"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.stages = ()
