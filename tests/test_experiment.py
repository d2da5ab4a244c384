"""Runs of many rounds: what they leave, and that a resumed one is as one without interruption."""

import shutil
import tomllib

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import tpus
from runs import (
    ALGORITHM,
    DATA,
    PARAMS,
    PERSONAL,
    StopAt,
    StoppedError,
    assert_same_run,
    assert_same_state,
    rounds_of,
    stopped,
    train,
)

import fax
from fax import experiment
from fax.experiment import _curves

pytestmark = pytest.mark.usefixtures("no_figures")
ROUNDS = 5

# Every algorithm, with an aggregator that it can have: each of them comes up.
PAIRS = {
    "agnostic_fedavg": "adaptive_clip",
    "apfl": "error_feedback",
    "branch_train_merge": None,
    "diloco": "power_sgd",
    "ditto": "drive",
    "fedavg": "gaussian",
    "fedbn": "e3m0",
    "feddyn": "hadamard",
    "fednova": "geometric_median",
    "fedopt": "dp_ftrl",
    "fedper": "krum",
    "fedprox": "laplace",
    "hyp_cluster": "mean",
    "local_sgd": "median",
    "maml": "multi_krum",
    "mime": "clip_by_norm",
    "mime_lite": "secure_sum",
    "papa": "top_k",
    "papa_2": None,
    "papa_all": "trimmed_mean",
    "qfedavg": "terngrad",
    "reptile": "non_finite",
    "scaffold": "uniform_quantization",
    "streaming_diloco": "int8",
}
# There are more aggregators than algorithms.
ALL = [*PAIRS.items(), ("fedprox", "e4m3")]


def test_every_algorithm_and_aggregator_is_resumed():
    names, aggregators = map(set, zip(*ALL, strict=True))
    assert names == set(tpus.ALGORITHMS)
    assert aggregators - {None} == set(tpus.AGGREGATORS)


# Rows that stay with clients, of an algorithm and of an aggregator.
@pytest.mark.always("apfl-error_feedback")
@pytest.mark.parametrize(("name", "aggregator"), ALL)
def test_a_resumed_run_is_that_without_interruption(name, aggregator, tmp_path):
    own = {} if aggregator is None else {"aggregator": tpus.AGGREGATORS[aggregator]}
    algorithm = tpus.ALGORITHMS[name](**own)
    state = algorithm.init(tpus.TWO if name == "hyp_cluster" else tpus.PARAMS)
    of_replicas = dict(placement="replicas", sampler="stream")

    def run(folder, *callbacks):
        with tpus.cohorts(**of_replicas if name in tpus.OF_REPLICAS else {}) as cohorts:
            return experiment.run(
                algorithm,
                state,
                cohorts,
                rounds=ROUNDS,
                folder=folder,
                every=2,
                callbacks=callbacks,
            )

    expected = run(tmp_path / "one")
    with pytest.raises(StoppedError):
        run(tmp_path / "two", StopAt(4))
    found = run(tmp_path / "two")
    assert_same_run(found, expected)
    one, two = ((tmp_path / x / "metrics.csv").read_bytes() for x in ("one", "two"))
    assert one == two
    assert len(one.splitlines()) == 1 + ROUNDS


def test_the_loop_is_that_of_an_algorithm(whole):
    result, folder = whole
    state, losses = ALGORITHM.init(PARAMS), []
    step = jax.jit(ALGORITHM.round)
    with fax.data.cohorts(DATA, clients=4, batch_size=8) as cohorts:
        for _ in range(6):
            state, metrics = step(state, next(cohorts))
            losses.append(metrics["loss"])
    assert_same_state(result.state, state)
    assert [row["round"] for row in result.history] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in result.history] == losses
    assert [row.get("test/sum") for row in result.history][::2] == [None] * 3
    assert result.history[-1]["test/sum"] == state.params["w"].sum()
    assert result.reason == ""
    columns, *lines = (folder / "metrics.csv").read_text().splitlines()
    assert columns == "round,loss,test/sum"
    assert [float(line.split(",")[1]) for line in lines] == losses
    table = tomllib.loads((folder / "config.toml").read_text())
    assert table["run"]["cohorts"]["batch_size"] == 8
    assert table["environment"]["versions"]["jax"] == jax.__version__
    with fax.data.cohorts(DATA, clients=4, batch_size=8) as cohorts:
        ids = cohorts.client_ids(5)  # of the last cohort
    lines = (folder / "clients.csv").read_text().splitlines()
    assert lines[0].startswith("clients/id,clients/")
    assert [line.split(",")[0] for line in lines[1:]] == list(map(str, ids))
    assert rounds_of(folder) == [4, 6]
    assert "ends after round 6" in (folder / "log.txt").read_text()


def test_what_is_found_between_two_logs_is_logged(tmp_path):
    """Evaluations, and what callbacks add, which may be any kind of number."""

    class Add:
        def after_round(self, run):
            run.metrics["twice"] = jnp.bfloat16(2 * run.round)
            run.metrics["odd"] = run.round % 2 == 1

    every = {"evaluate": 2, "checkpoint": 6, "log": 6}
    found = train(tmp_path / "run", callbacks=[Add()], every=every).history
    assert [row["twice"] for row in found] == [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    assert ["test/sum" in row for row in found] == [False, True] * 3
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert lines[0] == "round,loss,twice,odd,test/sum"
    assert [line.split(",")[2:4] for line in lines[1:3]] == [["2.0", "1"], ["4.0", "0"]]
    assert experiment.restore(tmp_path / "run").history == found


def test_what_clients_had_is_kept_until_they_are_measured_again(tmp_path):
    each = jnp.arange(3.0)
    options = dict(
        evaluate=lambda params: {"id": ("ann", "bob", 'c"y'), "loss": each},
        every={"evaluate": 4, "checkpoint": 2},
        rounds=8,
    )
    stopped(tmp_path / "run", 5, **options)
    stopped(tmp_path / "run", 7, **options)
    assert rounds_of(tmp_path / "run") == [4, 6]
    text = (tmp_path / "run" / "clients.csv").read_text()
    assert text == 'test/id,test/loss\nann,0.0\nbob,1.0\n"c""y",2.0\n'
    clients = _curves.read_clients(tmp_path / "run")
    assert clients["test/id"].tolist() == ["ann", "bob", 'c"y']
    assert clients["test/loss"].tolist() == [0.0, 1.0, 2.0]


class Adds:
    def __init__(self, name, value):
        self.name, self.value = name, value

    def after_round(self, run):
        run.metrics[self.name] = self.value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"callbacks": [Adds("some", "text")]}, "the metric 'some' is 'text', expected a number"),
        (
            {"callbacks": [Adds("some", np.zeros(1))]},
            r"the metric 'some' is float64\[1\], expected a number",
        ),
        ({"callbacks": [Adds("round", 1)]}, "two numbers of a round have the name 'round'"),
        (
            {"evaluate": {"loss": lambda params: 1.0}, "every": 1},
            "two numbers of a round have the name 'loss'",
        ),
        (
            {"evaluate": lambda params: None, "every": 1},
            "the metric 'test' is None, expected a number",
        ),
        ({"callbacks": [Adds(3, 1)]}, "a metric has the name 3, expected a string"),
        (  # clients.csv could not be read again
            {"evaluate": lambda params: {"name": ["ann", "bob"]}, "every": 1},
            r"'test/name' is <U3\[2\], expected numbers. Only ids of clients may be text",
        ),
    ],
)
def test_metrics_are_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        train(None, **options)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_round_may_donate_its_state(devices, tmp_path):
    """A checkpoint that is being written has the state as it was."""

    def step(state, cohort):
        return state * 3 + 1, {"loss": state[0]}

    step = jax.jit(step, donate_argnums=0)
    algorithm = fax.algorithms.Algorithm(lambda params: params, step, lambda state: state)
    everywhere = jax.NamedSharding(meshes.mesh("auto", clients=devices), jax.P())
    state = jax.device_put(jnp.zeros(1_000_000), everywhere if devices > 1 else None)
    options = dict(evaluate=None, every=1, rounds=4, keep=5)
    train(tmp_path / "run", algorithm=algorithm, state=state + 0, **options)
    for number, value in enumerate([0, 1, 4, 13, 40]):
        saved = experiment.restore(tmp_path / "run", state, round=number).state
        assert np.all(np.asarray(saved) == value)


def test_a_finished_run_is_read_and_more_rounds_continue_it(whole, tmp_path):
    result, folder = whole
    shutil.copytree(folder, tmp_path / "run")
    assert_same_run(train(tmp_path / "run"), result)
    longer = train(tmp_path / "run", rounds=8)
    assert_same_run(longer, train(None, rounds=8))


# Blocks that stop before the first checkpoint are in test_experiment_output.py, too.
@pytest.mark.parametrize(
    "where", ["after a checkpoint", pytest.param("before the first", marks=pytest.mark.long)]
)
def test_blocks_of_rounds_are_resumed(where, whole, tmp_path):
    options = dict(rounds_per_call=3, every={"evaluate": 4, "checkpoint": 4, "log": 2})
    ends = []

    class Note:
        def after_round(self, run):
            ends.append(run.round)

    stopped(
        tmp_path / "run", 4 if where == "before the first" else 6, callbacks=[Note()], **options
    )
    found = train(tmp_path / "run", callbacks=[Note()], **options)
    done = [3, 4] if where == "before the first" else [3, 4, 6]
    assert ends == [*done, *([3, 4, 6] if len(done) == 2 else [6])]
    expected = train(None, **options)
    assert_same_run(found, expected)
    np.testing.assert_allclose(found.state.params["w"], whole[0].state.params["w"], rtol=1e-12)


@pytest.mark.always("True")
@pytest.mark.parametrize("in_file", [False, True])
def test_rows_of_a_store_are_resumed(in_file, tmp_path):
    """Those of the checkpoint, not those of the rounds after it."""

    def run(folder, path=None, *callbacks):
        resume = path is not None and path.exists()
        store = fax.algorithms.ClientStore(PERSONAL, path, resume=resume)
        try:
            state = store.init(PARAMS)
            result = train(folder, algorithm=store, state=state, callbacks=callbacks)
            return result, store.rounds, store.models(result.state, range(8))
        finally:
            store.close()

    expected, *rest = run(None)
    path = tmp_path / "rows" if in_file else None
    with pytest.raises(StoppedError):
        run(tmp_path / "run", path, StopAt(3))
    found, *others = run(tmp_path / "run", path)
    assert_same_run(found, expected)
    assert_same_state(others, rest)
    assert others[0] == 6
    on_devices = train(None, algorithm=PERSONAL)
    assert_same_state(PERSONAL.models(on_devices.state), others[1])
    # Rows in a checkpoint can be read without the run.
    with fax.algorithms.ClientStore(PERSONAL) as store:
        state = store.init(PARAMS)
        checkpoint = experiment.restore(tmp_path / "run", state)
        store.load(checkpoint.clients)
        assert_same_state(store.models(checkpoint.state, range(8)), others[1])
        # A checkpoint whose rows are damaged or lost is passed over, like any other.
        content = checkpoint.clients.read_bytes()
        for damaged in (content[: len(content) // 2], content.replace(b"\x3f", b"\x3e"), b""):
            checkpoint.clients.write_bytes(damaged)
            with pytest.warns(UserWarning, match=r"round 6 cannot be read .*That of round 4 is"):
                assert experiment.restore(tmp_path / "run", state).round == 4
            with pytest.raises(ValueError, match=r"clients.sqlite' is damaged"):
                store.load(checkpoint.clients)
        checkpoint.clients.unlink()
        with pytest.warns(UserWarning, match=r"round 6 cannot be read .*That of round 4 is"):
            assert experiment.restore(tmp_path / "run", state).round == 4
        checkpoint.clients.write_bytes(content)
    with pytest.raises(ValueError, match="had a ClientStore"):
        train(tmp_path / "run", algorithm=PERSONAL, force=True)


# Callbacks' states, and checkpoints that are kept


class Sums:
    """Its state is a pytree that is there from the start."""

    def __init__(self):
        self.state = (jnp.zeros(3), {"rounds": 0})

    def after_round(self, run):
        total, counts = self.state
        self.state = (total + run.params["w"], {"rounds": counts["rounds"] + 1})


def test_states_of_callbacks_are_resumed(tmp_path):
    def callbacks():
        return [
            Sums(),
            experiment.EMA(0.9),
            experiment.EarlyStopping("loss", 20, "min"),
        ]

    expected, found = callbacks(), callbacks()
    train(None, callbacks=expected)
    stopped(tmp_path / "run", 5, callbacks=callbacks())
    train(tmp_path / "run", callbacks=found)
    for one, other in zip(expected, found):
        assert jax.tree.structure(one.state) == jax.tree.structure(other.state)
        for x, y in zip(jax.tree.leaves(one.state), jax.tree.leaves(other.state)):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert experiment.restore(tmp_path / "run").callbacks["EarlyStopping"] == found[2].state


def test_the_best_and_the_newest_checkpoints_are_kept(tmp_path):
    """Also by another process: the run is resumed after round 3."""
    values = {1: 0.1, 2: 0.9, 3: np.nan, 4: 0.3, 5: 0.2}

    def run(*callbacks):
        options = dict(rounds=5, every=1, keep=experiment.Keep(1, "test/value", "max"))
        current = Current()
        options["evaluate"] = lambda params: {"value": values[current.run.round]}
        return train(tmp_path / "run", callbacks=[current, *callbacks], **options)

    class Current:
        def start(self, run):
            self.run = run

    with pytest.raises(StoppedError):
        run(StopAt(4))
    assert rounds_of(tmp_path / "run") == [2, 3]
    run()
    assert rounds_of(tmp_path / "run") == [2, 5]
    assert experiment.restore(tmp_path / "run", round="best").round == 2
    assert experiment.restore(tmp_path / "run").round == 5


def test_a_callback_stops_the_run_and_it_stays_so(tmp_path):
    def run():
        stop = experiment.EarlyStopping("loss", 1, "max")
        return train(tmp_path / "run", callbacks=[stop], rounds=20, every=8)

    first = run()
    assert "loss has not improved" in first.reason
    assert len(first.history) < 20
    assert run().history == first.history
