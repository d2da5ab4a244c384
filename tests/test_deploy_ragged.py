"""Clients with different numbers of steps share a stage: results are those of a padded cohort."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tpus
from deploys import DATA, PARAMS, ROWS, N, cohort_of, loss, sgd, without_keys

import fax
from fax import algorithms, deploy

RAGGED = ("batches", "mask")
# What each process loads: its clients' rows, from a file.
LOAD = """
import pathlib
import numpy as np

def load(number):
    file = np.load(pathlib.Path(__file__).with_name("rows.npz"))
    found = {}
    for name in file.files:
        client, _, what = name.partition(" ")
        if int(client) % 2 == number:
            found.setdefault(int(client), {})[what] = file[name]
    return found
"""


def rows_of(cohort):
    """Each client's rows, without the steps that are padding only."""
    fields = {"x": cohort.batches["x"], "y": cohort.batches["y"], "mask": cohort.mask}
    steps = np.asarray(cohort.mask).any(2).sum(1)
    found = [
        {name: np.asarray(x)[client, :n] for name, x in fields.items()}
        for client, n in enumerate(steps)
    ]
    for client, own in enumerate(found):
        own["num_examples"] = np.asarray(cohort.num_examples)[client]
    return found, set(steps.tolist())


def like(cohort, held):
    """The cohort whose rows are held."""
    fields, tree = jax.tree.flatten(cohort)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(cohort)[0]]
    names = [{getattr(k, "name", getattr(k, "key", None)) for k in path} for path in paths]
    chosen = [
        next((held[name] for name in ("x", "y", "mask", "num_examples") if name in own), x)
        for own, x in zip(names, fields, strict=True)
    ]
    return jax.tree.unflatten(tree, chosen)


def put(backend, clients, rows):
    """Gives clients their rows."""
    found = {}
    for name in rows[0]:
        values = [own[name] for own in rows]
        shape = (len(rows), None, *values[0].shape[1:]) if values[0].ndim else (len(rows),)
        placed = tuple(backend.put(clients, values))
        found[name] = deploy.Held(placed, tuple(clients), shape, values[0].dtype)
    return found


def check(plan, backend, fn, args, held, **options):
    state, cohort = args
    found = plan.run(backend, state, like(cohort, held), **options)
    expected = without_keys(jax.jit(fn)(*args))
    for own, other in zip(
        jax.tree.leaves(without_keys(plan.fetch(backend, found))),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_allclose(own, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["mime", pytest.param("scaffold", marks=pytest.mark.long)])
def test_rounds_of_clients_with_different_numbers_of_steps(name):
    algorithm = {
        "mime": lambda: algorithms.mime(loss, optax.sgd(0.1, momentum=0.9)),
        "scaffold": lambda: algorithms.scaffold(loss, 0.1, num_clients=N),
    }[name]()
    cohort = cohort_of(max_steps=4)
    state = algorithm.init(PARAMS)
    held = [*DATA, *(["clients"] if name == "scaffold" else [])]
    plan = deploy.cut(algorithm.round, state, cohort, held=held, ragged=RAGGED)
    backend = deploy.InProcess()
    rows, steps = rows_of(cohort)
    assert len(steps) > 1
    placed = put(backend, np.asarray(cohort.positions).tolist(), rows)
    check(plan, backend, algorithm.round, (state, cohort), placed)


def test_an_artifact_for_clients_with_different_numbers_of_steps(tmp_path):
    algorithm = algorithms.fedavg(loss, sgd())
    cohort = cohort_of(max_steps=4)
    args = algorithm.init(PARAMS), cohort
    plan = deploy.cut(algorithm.round, *args, ragged=RAGGED)
    assert "[steps,2,4]" in str([m.type for e in plan.audit().exchanges for m in e.messages])
    (exchange,) = plan.audit().exchanges
    with pytest.raises(ValueError, match="differs in size between clients"):
        exchange.bytes("stays")
    plan.save(tmp_path / "plan", ["cpu"])
    assert len(list((tmp_path / "plan").glob("*.stablehlo"))) == 1
    rows, _ = rows_of(cohort)
    flat = {f"{i} {name}": x for i, own in enumerate(rows) for name, x in own.items()}
    np.savez(tmp_path / "rows.npz", **flat)
    (tmp_path / "own.py").write_text(LOAD)
    with deploy.Processes(2, load=f"{tmp_path}/own.py:load", plan=tmp_path / "plan") as backend:
        held = backend.held()
        assert held["x"].shape == (4, None, 2, 4)
        assert "[4,?,2,4]" in repr(held["x"])
        state, metrics = plan.run(backend, args[0], like(cohort, held))
        short = plan.run(backend, args[0], like(cohort, held), take=2, clients=range(4))
        assert len(short[1]["clients/loss"].present) == 2
        nine = backend.put(range(4), [np.ones((9, 2), bool)] * 4)
        wrong = dataclasses.replace(held["mask"], rows=tuple(nine))
        with pytest.raises(deploy.ClientError, match=r"process 0 failed.*steps"):
            plan.run(backend, args[0], like(cohort, held | {"mask": wrong}))
    expected, others = jax.jit(algorithm.round)(*args)
    for own, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(metrics["loss"], others["loss"], rtol=1e-12)


def test_arrays_of_any_number_of_steps():
    """A plan does for cohorts that are padded to other numbers of steps, too."""

    @fax.program(clients=3)
    def total(rows):
        return fax.sum(fax.map(lambda x: jnp.sum(jax.lax.map(jnp.sin, x)), rows["x"]))

    plan = deploy.cut(total, ROWS, held=["x"], ragged=["x"])
    for steps in (1, 6):
        rows = {"x": np.random.default_rng(0).normal(size=(3, steps))}
        np.testing.assert_allclose(plan.run(deploy.InProcess(), rows), np.sin(rows["x"]).sum())
    for wrong in (np.ones((3, 0)), np.ones((2, 4)), np.ones((3, 4, 1)), np.ones((3, 4), int)):
        with pytest.raises(ValueError, match=r"expected float64\[3, steps\]"):
            plan.run(deploy.InProcess(), {"x": wrong})
    fixed = deploy.cut(total, ROWS, held=["x"])
    backend = deploy.InProcess()
    rows = backend.put(range(3), [np.ones(2), np.ones(3), np.ones(4)])
    ragged = deploy.Held(tuple(rows), (0, 1, 2), (3, None), np.dtype(float))
    with pytest.raises(ValueError, match=r"float64\[3, None\], expected float64\[3, 4\]"):
        fixed.run(backend, {"x": ragged})


def mapped(fn):
    return fax.program(clients=3)(lambda rows: fax.map(fn, rows["x"]))


REFUSED = {
    "a sum of steps": (lambda x: fax.sum(mapped(jnp.sin)(x)), "whose size differs"),
    "steps at the server": (lambda x: x["x"].shape[1] * jnp.ones(()), "a number of steps"),
    "an array at the server": (lambda x: jnp.zeros(x["x"].shape[1]), "a number of steps"),
    "a number that is needed": (lambda x: jnp.ones(int(x["x"].shape[1])), "cannot be traced"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_programs_that_need_the_number_of_steps(name):
    fn, message = REFUSED[name]
    with pytest.raises(deploy.CutError, match=message):
        deploy.cut(fax.program(clients=3)(fn), ROWS, held=["x"], ragged=["x"])


def test_what_cannot_be_ragged():
    fn = mapped(jnp.sin)
    args = ROWS, {"z": np.ones(3)}
    both = lambda rows, other: fn(rows)  # noqa: E731
    with pytest.raises(deploy.CutError, match=r"ragged names \[0\]\['x'\], expected what clients"):
        deploy.cut(both, *args, held=["z"], ragged=["x"])
    with pytest.raises(deploy.CutError, match=r"ragged names \[1\]\['z'\].*Its shape is \(3,\)"):
        deploy.cut(both, *args, held=["x", "z"], ragged=["z"])
    with pytest.raises(deploy.CutError, match="ragged names 'y', which is in no path"):
        deploy.cut(both, *args, held=["x"], ragged=["y"])


# They use the number of steps as an int.
NOT_RAGGED = ("papa", "qfedavg", "streaming_diloco")


@pytest.mark.long
@pytest.mark.parametrize("name", tpus.ALGORITHMS)
def test_every_algorithm(name):
    fn, args = tpus.a_round(name)
    cut = lambda: deploy.cut(fn, *args, ragged=RAGGED, pull=True)  # noqa: E731
    if name in NOT_RAGGED:
        with pytest.raises(deploy.CutError, match=r"how many steps|a number of steps"):
            cut()
    else:
        for stage in cut().stages:
            stage.exported(["cpu"])
