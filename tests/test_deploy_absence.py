"""Plans without clients that fail give what programs give that leave them out."""

import dataclasses
import gc
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from deploys import DATA, FEDAVG, PARAMS, ROWS, Failing, N, cohort_of, loss, sgd

import fax
from fax import aggregators, algorithms, deploy

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


def scanned(step, scale):
    return jax.lax.fori_loop(0, 4, lambda i, s: step(s), scale)


def until_four(step, scale):
    """Every other of eight turns of a loop is a step."""

    def turn(carry):
        i, s = carry
        return i + 1, jax.lax.cond(i % 2 == 0, step, lambda s: s, s)

    return jax.lax.while_loop(lambda carry: carry[0] < 8, turn, (0, scale))[1]


@pytest.mark.parametrize("repeated", [scanned, until_four])
def test_a_client_that_fails_in_the_middle_of_a_loop(repeated):
    @fax.program(clients=3)
    def mean(scale, rows):
        losses = fax.map(lambda s, x: jnp.sum((s * x) ** 2), fax.broadcast(scale), rows["x"])
        return fax.mean(losses, weights=fax.map(lambda x: jnp.ones(()), rows["x"]))

    def train(scale, rows):
        return repeated(lambda s: s - 0.1 * jax.grad(mean)(s, rows), scale)

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


UNWEIGHTED = r"divided by their number, 3, at .*test_deploy_absence.py.*pass weights="
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
    "a loop": (
        lambda rows: jax.lax.while_loop(
            lambda x: jnp.sum(x) > 1, lambda x: fax.min(rows["x"]), fax.sum(rows["x"])
        ),
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


# More clients than are needed


class Racing(Failing):
    """Clients answer in an order of their own, and may fail later."""

    def __init__(self, order, clients=(), nth=1):
        super().__init__(clients, nth)
        self.order, self.races = list(order), 0

    def race(self, stage, clients, operands, take):
        self.races += 1
        places = sorted(range(len(clients)), key=lambda i: self.order.index(clients[i]))
        first = sorted(places[:take])
        own = [
            [x[i] for i in first] if mode == "placed" else x
            for x, mode in zip(operands, stage.inputs, strict=True)
        ]
        return first, self.run(stage, [clients[i] for i in first], own)


def test_the_clients_that_answer_first():
    """A round is the jitted round over a cohort of these clients alone."""
    algorithm = algorithms.fedavg(loss, sgd(), optax.adam(0.1))
    cohort = cohort_of(clients=6)
    state = algorithm.init(PARAMS)
    plan = deploy.cut(algorithm.round, state, cohort)
    backend = Racing([4, 0, 5, 3, 2, 1])
    found, metrics = plan.run(backend, state, cohort, take=4)
    first = [0, 3, 4, 5]
    assert list(metrics["clients/loss"].present) == first
    fields = {name: getattr(cohort, name) for name in DATA}
    rows = jax.tree.map(lambda x: np.asarray(x)[first], fields)
    alone = dataclasses.replace(cohort_of(), **rows)
    expected, others = jax.jit(algorithm.round)(state, alone)
    for own, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(metrics["loss"], others["loss"], rtol=1e-12)
    del found, metrics
    gc.collect()
    assert {slot for _, slot in backend._values} == set()

    with pytest.raises(ValueError, match=r"take is 7, expected at most .* 6"):
        plan.run(backend, state, cohort, take=7)
    with pytest.raises(ValueError, match="quorum is 5, expected at most take, which is 4"):
        plan.run(backend, state, cohort, take=4, quorum=5)
    with pytest.raises(ValueError, match="no client may be in a cohort twice"):
        plan.run(deploy.InProcess(), state, cohort, take=4, clients=[0, 1, 2, 3, 4, 4])
    four = types.SimpleNamespace(put=backend.put, run=backend.run, free=backend.free)
    with pytest.raises(ValueError, match="SimpleNamespace cannot take the clients that answer"):
        plan.run(four, state, cohort, take=4)


@fax.program(clients=4)
def advance(state, rows, scale):
    """Two steps that add a mean to clients' state, and what the second step added."""

    def step(own, _):
        losses = fax.map(lambda s, x, a: jnp.sum((s + a * x) ** 2), own, rows, fax.broadcast(scale))
        mean = fax.mean(losses, weights=fax.map(lambda x: jnp.ones(()), rows))
        return fax.map(lambda s, m: s + m, own, fax.broadcast(mean)), mean

    return jax.lax.scan(step, state, None, length=2)


def test_a_client_that_was_taken_and_fails_later():
    """The others are asked again, from the start, and its state is what it was."""
    rng = np.random.default_rng(0)
    state, rows = {"state": rng.normal(size=(4, 3))}, {"rows": rng.normal(size=(4, 3))}

    def fn(state, rows, scale):
        return advance(state["state"], rows["rows"], scale)

    plan = deploy.cut(fn, state, rows, 1.5, held=["state", "rows"])
    backend = Racing([3, 1, 0, 2], clients=[1], nth=3)
    new, means = plan.run(backend, state, rows, 1.5, take=2)
    assert new.present == (0, 3)
    assert backend.races == 2
    own, expected = state["state"][[0, 3]], []
    for _ in range(2):
        expected.append(np.mean(np.sum((own + 1.5 * rows["rows"][[0, 3]]) ** 2, 1)))
        own = own + expected[-1]
    np.testing.assert_allclose(means, expected, rtol=1e-12)
    left = [row for row in new.rows if row is not None]
    np.testing.assert_allclose(backend.fetch(left), own, rtol=1e-12)
    again = plan.run(Racing([3, 1, 0, 2], [1, 2], nth=3), state, rows, 1.5, take=3, quorum=2)
    assert again[0].present == (0, 3)
    np.testing.assert_allclose(again[1], expected, rtol=1e-12)
    with pytest.raises(deploy.ClientError, match=r"2 of 4 .* fewer than the quorum of 3.*failed"):
        plan.run(Racing([3, 1, 0, 2], [1, 2], nth=3), state, rows, 1.5, take=3)


def test_clients_that_were_counted_and_come_too_late():
    """They are left out of all sums, also of those before."""

    @fax.program(first=2, clients=4)
    def both(some, rows):
        def mean(x, placement):
            ones = fax.map(lambda x: jnp.ones(()), x, placement=placement)
            return fax.mean(x, weights=ones, placement=placement)

        return mean(some, "first"), mean(rows, "clients")

    some, rows = ROWS["x"][:2], np.arange(16.0).reshape(4, 4)
    args = {"some": some}, {"rows": rows}
    plan = deploy.cut(lambda s, r: both(s["some"], r["rows"]), *args, held=["some", "rows"])
    backend = Racing([3, 2, 1, 0])
    one, other = plan.run(backend, *args, take=3, quorum=1)
    np.testing.assert_allclose(one, some[1], rtol=1e-12)
    np.testing.assert_allclose(other, rows[1:].mean(0), rtol=1e-12)
    assert backend.races == 1  # and then there are only three
