"""Plans of programs give what the jitted programs give; what cannot be a plan says why."""

import copy
import dataclasses
import gc
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deploys import PARAMS, ROWS, check_plan, cohort_of, held_in, loss, sgd, squares

import fax
from fax import algorithms, deploy

HALF = np.full((3, 2), 40000, np.float16)  # their sum is infinite


def test_clients_do_not_send_what_nobody_needs():
    """The gradient does not need the value."""
    plan = deploy.cut(jax.grad(squares), 1.0, ROWS, held=["x"])
    assert repr(plan) == "Plan(stages=['clients 3', 'clients 2'])"
    exchanges = plan.audit().exchanges
    assert [exchange.bytes("sum") for exchange in exchanges] == [0, 8]


def test_copies_and_pickles():
    """A copy of a state keeps the rows of clients. In another process, they would mean nothing."""
    backend = deploy.InProcess()
    plan = deploy.cut(lambda rows: {"own": 2 * rows["x"]}, ROWS, held=["x"])
    state = plan.run(backend, ROWS)
    again = copy.deepcopy(state)
    del state
    gc.collect()
    np.testing.assert_array_equal(plan.fetch(backend, again)["own"], 2 * ROWS["x"])
    assert copy.deepcopy(plan) is plan
    for what, instead in [
        (again, "Plan.fetch"),
        (plan, "cut the program again"),
        (plan.stages, ""),
    ]:
        with pytest.raises(TypeError, match=f"fax.deploy: a .* cannot be pickled.*{instead}"):
            pickle.dumps(what)


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


# Mistakes


def test_names_that_no_leaf_has():
    with pytest.raises(deploy.CutError, match=r"held names 'y'.*\['x'\]"):
        deploy.cut(squares, 1.0, ROWS, held=["x", "y"])
    with pytest.raises(deploy.CutError, match=r"'batches'.*pass held=\(\)"):
        deploy.cut(squares, 1.0, ROWS)  # or the server would send all rows
    assert not deploy.cut(squares, 1.0, ROWS, held=()).audit().inputs
    with pytest.raises(ValueError, match=r"held is 'x', expected a list of names"):
        deploy.cut(squares, 1.0, ROWS, held="x")


def test_names_may_be_an_iterator():
    plan = deploy.cut(lambda r: [r["x"], r["y"]], {"x": HALF, "y": HALF}, held=iter(["y", "x"]))
    assert plan.audit().inputs == ("[0]['x']", "[0]['y']")


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


def test_rows_of_another_backend():
    """They are not taken for rows of the same number."""
    plan = deploy.cut(lambda r: r["x"] * 2, ROWS, held=["x"])
    one, other = deploy.InProcess(), deploy.InProcess()
    doubled, _ = plan.run(one, ROWS), plan.run(other, {"x": ROWS["x"] + 1})
    with pytest.raises(deploy.ClientError, match=r"client 0 has no value .*another backend"):
        plan.run(other, {"x": doubled})


def test_rows_that_are_fetched_have_their_types():
    plan = deploy.cut(lambda r: r["x"] * 2, ROWS, held=["x"])
    backend = deploy.InProcess()
    doubled = plan.run(backend, ROWS)
    for wrong in (np.ones(3), np.ones((1, 4)), np.ones(4, np.float32), 1.0, "x", None):
        backend.fetch = lambda rows, wrong=wrong: [wrong] * 3
        with pytest.raises(
            deploy.ClientError, match=r"client 0 sent .* a row of .*float64"
        ) as error:
            plan.fetch(backend, doubled)
        assert error.value.clients == (0,)


def test_plans_are_frozen():
    plan = deploy.cut(squares, 1.0, ROWS, held=["x"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.stages = ()
