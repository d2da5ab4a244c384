"""Secure sums are exact, also without clients that fail at any step, and what is refused."""

import dataclasses
import functools

import deploys
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from local_hosts import LocalHosts, identities_of

import fax
from fax import aggregators, deploy
from fax.deploy import _client as runtime
from fax.deploy import _stages

CLIENTS = ["ann", "bob", "cleo", "dora", "emil"]
STEPS = ["keys", "shares", "run", "sign", "unmask"]
RNG = np.random.default_rng(0)
DTYPES = ["int8", "int32", "int64", "bool"]
SHAPES = [(3,), (2, 3), (), (0, 2)]


def integers(dtype, shape):
    if dtype == "bool":
        return RNG.integers(0, 2, shape).astype(bool)
    limits = np.iinfo(dtype)
    return RNG.integers(limits.min, limits.max, shape, dtype, endpoint=True)


ROWS = {dtype: integers(dtype, (5, *shape)) for dtype, shape in zip(DTYPES, SHAPES, strict=True)}


@fax.program(clients=5)
def totals(rows):
    """The sums of everything, and rows that stay."""
    rows, doubled = fax.map(lambda rows: (rows, 2 * rows["int32"]), rows)
    return fax.sum(rows), doubled


@functools.cache
def plan():
    return deploy.cut(totals, ROWS, held=DTYPES)


def expected(present):
    return {name: np.sum(x[list(present)], axis=0, dtype=np.int64) for name, x in ROWS.items()}


def hosts(**settings):
    """Three hosts, of which the first two run two clients each."""
    rows = [{name: x[i] for name, x in ROWS.items()} for i in range(5)]
    data = [{CLIENTS[i]: rows[i] for i in own} for own in ((0, 1), (2, 3), (4,))]
    return LocalHosts(data, **settings)


def check(found, present):
    for name, x in expected(present).items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x)


def steps_of(backend):
    return [step for step, *_ in backend.traffic if not step.startswith("plain")]


@pytest.mark.parametrize("signed", [False, True])
def test_sums_are_exact(signed):
    backend = hosts(identities=identities_of(CLIENTS) if signed else None)
    found, doubled = plan().run(backend, backend.held())
    check(found, range(5))
    assert doubled.present == tuple(CLIENTS)
    steps = STEPS if signed else [step for step in STEPS if step != "sign"]
    assert list(dict.fromkeys(steps_of(backend))) == steps
    check(plan().run(backend, backend.held())[0], range(5))


def test_sums_wrap_as_those_of_numpy():
    """Of every kind of integers, as a program without 64 bits or by `jax.lax` may send them."""
    dtypes = ["int8", "uint16", "int32", "uint32", "int64", "uint64", "bool"]
    shapes = [(3,), (), (0, 2), (2, 3), (4,), (), (5,)]
    rows = [integers(*each) for each in zip(dtypes, [(5, *shape) for shape in shapes], strict=True)]
    avals = [jax.core.ShapedArray(x.shape[1:], x.dtype) for x in rows]
    inputs, outputs = ["placed"] * len(rows), ["sum"] * len(rows)
    stage = _stages.Stages().of("all", lambda *xs: xs, avals, inputs, outputs)
    backend = hosts(threshold=3)
    backend.after["run"] = {0}
    present, found = backend.gather(stage, CLIENTS, [list(x) for x in rows], 5, 2)
    assert present == [2, 3, 4]
    for own, x in zip(found, rows, strict=True):
        right = np.sum(x[2:], axis=0, dtype=x.dtype)
        assert (own.dtype, own.shape) == (right.dtype, right.shape)
        np.testing.assert_array_equal(own, right)


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_client_fails_at_any_step(step, answers):
    """Before it, or after it, when its answer does not arrive. Its row is in the sum if it was."""
    backend = hosts(identities=identities_of(CLIENTS), threshold=3)
    (backend.after if answers else backend.before)[step] = {2}
    found, doubled = plan().run(backend, backend.held(), quorum=3)
    there = range(5) if step in ("sign", "unmask") else range(4)
    check(found, there)
    assert doubled.present == tuple(CLIENTS[i] for i in there)


def test_several_fail_one_after_another():
    """The mask keys of two clients are recovered, and those of who failed before are not needed."""
    rows = {"x": integers("int32", (11, 6))}

    @fax.program(clients=11)
    def total(rows):
        return fax.sum(rows["x"])

    backend = LocalHosts([{i: {"x": rows["x"][i]}} for i in range(11)], 6)
    backend.before = {"keys": {0}, "shares": {1}, "run": {2}}
    backend.after = {"run": {4}, "unmask": {6}}
    found = deploy.cut(total, rows, held=["x"]).run(backend, backend.held(), quorum=2)
    np.testing.assert_array_equal(found, rows["x"][[3, 5, 6, 7, 8, 9, 10]].sum(0, dtype=np.int64))


@pytest.mark.parametrize("step", STEPS)
def test_too_few_are_left(step):
    """It is an error, and at most one client says a share: fewer than three give no secret."""
    backend = hosts(identities=identities_of(CLIENTS), threshold=3)
    backend.after[step] = {0, 1}
    message = "A secure sum needs 3 clients, but only 1 of 5 are left|1 of 5 clients are left"
    with pytest.raises(deploy.ClientError, match=message) as caught:
        plan().run(backend, backend.held(), quorum=3)
    if step == "unmask":  # those who do not answer have said nothing that arrives
        assert "cannot start again" in str(caught.value)
        arrived = [answer for do, host, _, answer in backend.traffic if do == step and host == 2]
        assert len(arrived) == 1
    else:
        assert "unmask" not in steps_of(backend)


def test_one_client_is_left():
    """Which is not a mistake in the settings, and the error still says how the others failed."""
    backend = hosts(threshold=0.5)
    backend.before["keys"] = {0, 1}
    message = "needs two clients, but only one is left. Failed: .*The last error: .*host 0 is gone"
    with pytest.raises(deploy.ClientError, match=message):
        plan().run(backend, backend.held(), quorum=1)


def test_a_client_that_has_not_begun_a_sum():
    (host, *_), session = hosts().hosts, bytes(16)
    host.answer({"do": "secure_keys", "with": {"session": session, "clients": ["ann"]}})
    what = {"session": session, "clients": ["bob"], "present": [1], "signatures": []}
    with pytest.raises(runtime.RefusedError, match="'bob' has no keys in this sum"):
        host.answer({"do": "secure_unmask", "with": what})


def test_without_a_quorum_nobody_may_fail():
    for where in ("keys", "shares", "run"):
        backend = hosts(threshold=3)
        held, backend.after[where] = backend.held(), {2}
        with pytest.raises(deploy.ClientError, match="'emil'") as caught:
            plan().run(backend, held)
        assert caught.value.clients == ("emil",)
        assert "unmask" not in steps_of(backend)


def test_a_run_starts_again_only_if_no_sum_is_known():
    @fax.program(clients=5)
    def two_sums(rows):
        total = fax.sum(rows["int32"])
        return fax.sum(
            fax.map(lambda t, x: jnp.sign(t[0, 0]) * x, fax.broadcast(total), rows["int64"])
        )

    two = deploy.cut(two_sums, ROWS, held=DTYPES)
    backend = hosts(threshold=0.5)
    backend.after["run"] = {0, 2}  # of 5 clients 2 are left, fewer than 3
    total = np.sign(ROWS["int32"][2:4].sum(0, dtype=np.int64)[0, 0])
    np.testing.assert_array_equal(
        two.run(backend, backend.held(), quorum=2), ROWS["int64"][2:4].sum(0) * total
    )
    assert steps_of(backend).count("unmask") == 2  # one for each sum
    backend = hosts(threshold=3)

    def one_is_gone_then(step, host, message):
        if step == "keys" and "unmask" in steps_of(backend):
            backend.gone.add(2)
        return message

    backend.request = one_is_gone_then
    with pytest.raises(deploy.ClientError, match="left after the step 'keys'"):
        two.run(backend, backend.held(), quorum=3)
    assert steps_of(backend).count("unmask") == 2  # the hosts whose answers were enough


def test_taking_those_who_are_first():
    backend = hosts(threshold=0.5)
    found, doubled = plan().run(backend, backend.held(), take=3)
    there = [CLIENTS.index(client) for client in doubled.present]
    assert len(there) == 3
    check(found, there)
    with pytest.raises(ValueError, match=r"take is 2, expected at least the threshold.*3 of 5"):
        plan().run(backend, backend.held(), take=2)


# What is refused


@fax.program(clients=5)
def other(rows, how=None):
    return how(rows["int32"])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda x: fax.mean(x), "sends float.* as sum. Make integers of it"),
        (lambda x: fax.sum(x * 0.5), "sends float.* as sum. Make integers of it"),
        (lambda x: fax.max(x), "sends int32.* as max"),
        (lambda x: fax.collect(x), "sends int32.* as fetched"),
    ],
)
def test_plans_that_send_anything_else(how, message):
    backend = hosts()
    plan = deploy.cut(lambda rows: other(rows, how=how), ROWS, held=DTYPES, pull=True)
    before = len(backend.traffic)
    with pytest.raises(deploy.CutError, match=message):
        plan.run(backend, backend.held())
    assert len(backend.traffic) == before


def test_one_client():
    @fax.program(clients=1)
    def total(rows):
        return fax.sum(rows["x"])

    rows = {"x": np.arange(3)[None]}
    backend = LocalHosts([{0: {"x": rows["x"][0]}}])
    with pytest.raises(deploy.CutError, match="sums over one client"):
        deploy.cut(total, rows, held=["x"]).run(backend, backend.held())


def test_rows_are_not_fetched():
    backend = hosts()
    _, doubled = plan().run(backend, backend.held())
    with pytest.raises(deploy.ClientError, match="sends no rows, only masked sums"):
        plan().fetch(backend, doubled)


@pytest.mark.parametrize("threshold", [0.4, 1.0, 1.5, 0, -1, 1, float("nan"), "2/3", None, True])
def test_thresholds(threshold):
    with pytest.raises((ValueError, TypeError), match="threshold is"):
        deploy.SecureSums(threshold)


def test_a_number_that_is_no_majority_or_more_than_all():
    backend = hosts(threshold=2)
    with pytest.raises(ValueError, match="threshold is 2 of 5 clients, expected more"):
        plan().run(backend, backend.held())
    backend = hosts(threshold=6)
    with pytest.raises(deploy.ClientError, match="needs 6 clients, by its threshold, but only 5"):
        plan().run(backend, backend.held())


def test_no_client_twice():
    backend = hosts()
    with pytest.raises(ValueError, match="no client may be in a cohort twice"):
        plan().run(backend, backend.held(["ann", "ann", "bob", "cleo", "dora"]))


# Averages of updates


@pytest.mark.parametrize("x64", [False, pytest.param(True, marks=pytest.mark.long)])
def test_an_algorithm(x64):
    """FedAvg's round, whose aggregator makes the integers. Without a client, it has weight zero."""
    with jax.enable_x64(x64):
        make = functools.partial(aggregators.secure_sum, 1.0, 64.0)
        algorithms = [
            fax.algorithms.fedavg(deploys.loss, optax.sgd(0.1), aggregator=make(masked=masked))
            for masked in (False, True)
        ]
        state, cohort = algorithms[0].init(deploys.PARAMS), deploys.cohort_of()

        def step(state, cohort, algorithm=algorithms[0]):
            return algorithm.round(state, cohort)[0]

        plan, jitted = deploy.cut(step, state, cohort), jax.jit(step)
        (stage,) = plan.audit().exchanges  # keys are not sent, and sums have 32 bits
        assert [x.type for x in stage.messages if x.mode == "sum"] == ["int32[17]"]
        whole = jitted(state, cohort)
        left = cohort.num_examples * (np.arange(4) != 2)
        without = jitted(state, dataclasses.replace(cohort, num_examples=left))
        backend = LocalHosts([{}] * 4)
        for right, quorum in [(whole, None), (without, 3)]:
            found = plan.run(backend, state, cohort, quorum=quorum)
            for own, other in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
                # Updates are rounded to multiples of 2^-15, some to the next one.
                np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-4)
            backend.after["run"] = {2}
        assert np.abs(whole.params["w"] - without.params["w"]).max() > 1e-2
        # Masks of the program cancel, so they change nothing.
        masked = jax.jit(algorithms[1].round)(state, cohort)[0]
        jax.tree.map(np.testing.assert_array_equal, masked.params, whole.params)
