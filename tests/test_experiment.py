"""Runs of many rounds: stopped and resumed, restored elsewhere, refused, and what they write."""

import errno
import itertools
import json
import os
import shutil
import signal
import threading
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
import tpus

import fax
from fax import experiment
from fax.experiment import _checkpoints, _folder, _outputs, _toml

ROUNDS = 5


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Figures have tests of their own."""
    monkeypatch.setattr(_outputs, "draw", lambda folder: None)


class StoppedError(Exception):
    pass


class StopAt:
    """Ends the run by an error after a round, before anything of it is saved."""

    def __init__(self, number):
        self.number = number

    def after_round(self, run):
        if run.round == self.number:
            raise StoppedError


def assert_same_state(one, other):
    """Bits, dtypes, weak types and structure."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert jax.typeof(x).dtype == jax.typeof(y).dtype
        assert jax.typeof(x).weak_type == jax.typeof(y).weak_type
        x, y = np.asarray(x), np.asarray(y)
        assert x.tobytes() == y.tobytes()


def assert_same_run(one, other):
    assert_same_state(one.state, other.state)
    # NaN is equal to NaN here
    assert json.dumps(one.history) == json.dumps(other.history)


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


# Rows that stay with clients, and noise; one of each kind of state.
@pytest.mark.always("fedavg-gaussian", "apfl-error_feedback")
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


# Below, all runs are of one algorithm, which is compiled once.


def loss(params, batch, key):
    # NaN below -1
    return ((batch["x"][:, None] - params["w"]) ** 2).sum(1) * jnp.sqrt(1 + batch["x"])


PARAMS = {"w": np.zeros(3)}
DATA = fax.data.InMemory({f"client {i}": {"x": np.arange(i + 1.0)} for i in range(8)})
ALGORITHM = fax.algorithms.fedavg(loss, optax.sgd(0.1), optax.adam(0.1))
PERSONAL = fax.algorithms.apfl(loss, optax.sgd(0.1), num_clients=8)


def train(folder, *, algorithm=ALGORITHM, state=None, data=DATA, seed=0, **options):
    """Six rounds, with evaluation and a checkpoint after each second one."""
    options = dict(rounds=6, every=2, evaluate=lambda params: {"sum": params["w"].sum()}) | options
    if state is None:
        state = algorithm.init(PARAMS)
    with fax.data.cohorts(data, clients=4, batch_size=8, seed=seed) as cohorts:
        return experiment.run(algorithm, state, cohorts, folder=folder, **options)


def stopped(folder, number, **options):
    """A run that has ended by an error after a round."""
    with pytest.raises(StoppedError):
        train(folder, callbacks=[*options.pop("callbacks", []), StopAt(number)], **options)


def rounds_of(folder):
    return sorted(int(path.name) for path in Path(folder, "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without interruption, and its folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_outputs, "draw", lambda folder: None)
        return train(folder), folder


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
    assert len((folder / "clients.csv").read_text().splitlines()) == 5
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
        evaluate=lambda params: {"loss": each}, every={"evaluate": 4, "checkpoint": 2}, rounds=8
    )
    stopped(tmp_path / "run", 5, **options)
    stopped(tmp_path / "run", 7, **options)
    assert rounds_of(tmp_path / "run") == [4, 6]
    assert (tmp_path / "run" / "clients.csv").read_text() == "test/loss\n0.0\n1.0\n2.0\n"


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
    ],
)
def test_metrics_are_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        train(None, **options)


def test_a_round_may_donate_its_state(tmp_path):
    """A checkpoint that is being written has the state as it was."""

    def step(state, cohort):
        return state * 3 + 1, {"loss": state[0]}

    step = jax.jit(step, donate_argnums=0)
    algorithm = fax.algorithms.Algorithm(lambda params: params, step, lambda state: state)
    state = jnp.zeros(1_000_000)
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


@pytest.mark.parametrize("where", ["after a checkpoint", "before the first"])
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
    with pytest.raises(ValueError, match="had a ClientStore"):
        train(tmp_path / "run", algorithm=PERSONAL, force=True)


def test_restore_on_other_devices(whole, tmp_path):
    """From one device to 4 x 2, from these to two and one, and on with the rounds."""
    state = PERSONAL.init(PARAMS)
    settings = [None, {"clients": 2}, {"clients": 4, "model": 2}]

    def on(axes):
        return meshes.mesh("auto", **axes) if axes else None

    def spread(tree, mesh):
        rows = jax.NamedSharding(mesh, jax.P("clients"))
        whole = jax.NamedSharding(mesh, jax.P())
        return jax.tree.map(lambda x: jax.device_put(x, rows if len(x.shape) > 1 else whole), tree)

    with jax.set_mesh(on(settings[2])):
        stopped(tmp_path / "run", 5, algorithm=PERSONAL, state=spread(state, on(settings[2])))
    plain = experiment.restore(tmp_path / "run")
    assert plain.round == plain.cohort == 4
    for axes in settings:
        with jax.set_mesh(on(axes)) if axes else jax.default_device(None):
            found = experiment.restore(tmp_path / "run", state).state
        leaves = jax.tree_util.tree_leaves_with_path(found)
        for (path, x), size in zip(leaves, map(len, itertools.repeat(axes or ()))):
            expected = plain.state[f"state{jax.tree_util.keystr(path)}"]
            assert np.asarray(x).tobytes() == np.asarray(expected).tobytes()
            assert len(x.sharding.device_set) == (np.prod(list(axes.values())) if size else 1)
            if size and x.ndim > 1:
                assert x.sharding.spec[0] == "clients"
    expected = train(None, algorithm=PERSONAL)
    with jax.set_mesh(on(settings[1])):
        found = train(tmp_path / "run", algorithm=PERSONAL, state=state)
    assert found.history[:4] == plain.history
    for x, y in zip(jax.tree.leaves(found.state), jax.tree.leaves(expected.state), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-10)


# What goes wrong


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def damage(what, checkpoint):
    if what == "deleted":
        shutil.rmtree(checkpoint)
        return
    parts = {"arrays": checkpoint / "arrays", "facts": checkpoint / "facts", "all": checkpoint}
    for path in parts[what].rglob("*"):
        if path.is_file():
            halve(path)


@pytest.mark.parametrize("what", ["arrays", "facts", "all", "deleted"])
def test_a_damaged_checkpoint_is_passed_over(what, whole, tmp_path):
    result, folder = whole
    shutil.copytree(folder, tmp_path / "run")
    damage(what, tmp_path / "run" / "checkpoints" / "6")
    if what == "deleted":
        found = train(tmp_path / "run")
    else:
        says = "checkpoint of round 6 cannot be read .*That of round 4 is used instead"
        with pytest.warns(UserWarning, match=says):
            assert experiment.restore(tmp_path / "run").round == 4
        with pytest.warns(UserWarning, match=says):
            found = train(tmp_path / "run")
        assert "round 4 is used instead" in (tmp_path / "run" / "log.txt").read_text()
    assert_same_run(found, result)
    assert rounds_of(tmp_path / "run") == [4, 6]
    one, two = (Path(path, "metrics.csv").read_bytes() for path in (folder, tmp_path / "run"))
    assert one == two


def test_if_no_checkpoint_can_be_read(whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "run")
    for number in (4, 6):
        damage("arrays", tmp_path / "run" / "checkpoints" / f"{number}")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read: .*round 6.*round 4"):
        train(tmp_path / "run")


def test_a_run_that_has_no_checkpoint_or_more_rounds(whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "run")
    with pytest.raises(ValueError, match=r"rounds is 4, but the run in .* has 6 already"):
        train(tmp_path / "run", rounds=4)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match=r"has metrics of a run, but no checkpoint"):
        train(tmp_path / "run")


def test_a_line_that_was_cut_off_is_removed(whole, tmp_path):
    result, folder = whole
    stopped(tmp_path / "run", 5)
    with open(tmp_path / "run" / "metrics.csv", "a") as file:
        file.write("5,0.1")
    assert_same_run(train(tmp_path / "run"), result)
    one, two = (Path(path, "metrics.csv").read_bytes() for path in (folder, tmp_path / "run"))
    assert one == two


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in orbax
def test_if_the_disk_is_full(tmp_path):
    """The run ends with an error, and goes on when there is space again."""
    resource = pytest.importorskip("resource", reason="Windows has no such limits")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    rng = np.random.default_rng(0)
    big = {"w": rng.normal(size=20_000)}

    class Full:
        def after_round(self, run):
            if run.round == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))

    try:
        with pytest.raises(
            OSError, match=r"of round \d could not be written .*newest complete one is of round"
        ):
            train(tmp_path / "run", state=ALGORITHM.init(big), callbacks=[Full()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    found = train(tmp_path / "run", state=ALGORITHM.init(big))
    assert_same_run(found, train(None, state=ALGORITHM.init(big)))


def test_a_folder_that_is_read_only(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:  # who may write everywhere
            tmp_path.chmod(0o755)
            os.seteuid(65534)
        with pytest.raises(PermissionError, match="nothing can be written to folder"):
            train(tmp_path / "run")
    finally:
        os.seteuid(user)


def test_a_clock_that_jumps_back(whole, tmp_path, monkeypatch):
    import time

    stopped(tmp_path / "run", 5)
    now = itertools.count(time.time() - 10_000, -1)
    monkeypatch.setattr(time, "time", lambda: next(now))
    assert_same_run(train(tmp_path / "run"), whole[0])
    assert rounds_of(tmp_path / "run") == [4, 6]


def test_a_folder_in_use_is_refused(tmp_path):
    class Second:
        def start(self, run):
            train(run.folder)

    with pytest.raises(experiment.FolderInUseError, match=r"another run is using folder=.*run'"):
        train(tmp_path / "run", callbacks=[Second()])
    train(tmp_path / "run")  # it is free again


def test_a_disk_without_locks(tmp_path, monkeypatch):
    def locked(file):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(_folder, "locked", locked)
    with pytest.raises(OSError, match=r"no file in folder can be locked .*supports locks") as error:
        train(tmp_path / "run")
    assert error.value.errno == errno.ENOLCK


def test_blocks_of_rounds_count_as_settings(tmp_path):
    times = {"rounds": 9, "rounds_per_call": 3, "evaluate": 3, "checkpoint": 3, "log": 1}
    text = _folder.compare(tmp_path, {}, {}, times, force=False).text
    (tmp_path / "config.toml").write_text(text)
    for other, same in [({}, True), ({"evaluate": 2}, False), ({"rounds_per_call": 1}, True)]:
        assert _folder.compare(tmp_path, {}, {}, times | other, force=False).same == same


def test_settings_that_are_the_same_are_not_refused(tmp_path):
    class Own:  # its repr has an address
        init, round, params = map(staticmethod, (ALGORITHM.init, ALGORITHM.round, ALGORITHM.params))

    for _ in range(2):
        config = {"rate": np.float64(0.1), "most": float("nan"), "rounds": "few"}
        train(tmp_path / "run", algorithm=Own(), config=config, rounds=2)
    with pytest.raises(ValueError, match=r"rounds was 'few', and is 'many'"):
        train(tmp_path / "run", algorithm=Own(), config={**config, "rounds": "many"}, rounds=2)


def test_a_run_that_is_refused_leaves_no_folder(tmp_path):
    def step(state, cohort):
        raise ValueError("the first round")

    refused = fax.algorithms.Algorithm(lambda params: params, step, lambda state: state)
    with pytest.raises(ValueError, match="the first round"):
        train(tmp_path / "run", algorithm=refused)
    with pytest.raises(ValueError, match="config has 'run'"):
        train(tmp_path / "run", config={"run": 1})
    assert not (tmp_path / "run").exists()
    # A folder that was there before stays, and so does one with a round.
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="the first round"):
        train(tmp_path / "run", algorithm=refused)
    assert (tmp_path / "run").exists()
    stopped(tmp_path / "other", 1)
    assert rounds_of(tmp_path / "other") == [0]


def test_a_folder_of_something_else_is_refused(whole, tmp_path):
    (tmp_path / "metrics.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"has metrics.csv but no config.toml, so it is not"):
        train(tmp_path)
    _, folder = whole
    shutil.copytree(folder, tmp_path / "run")
    with pytest.raises(ValueError, match="other settings") as refused:
        train(tmp_path / "run", seed=1, config={"rate": 0.1})
    assert "rate was 'not set', and is 0.1" in str(refused.value)
    assert "run.cohorts.seed was 0, and is 1" in str(refused.value)
    train(tmp_path / "run", config={"rate": 0.1}, force=True)
    assert "a setting has changed: rate" in (tmp_path / "run" / "log.txt").read_text()
    with pytest.raises(ValueError, match=r"rate was 0.1, and is 0.2"):
        train(tmp_path / "run", config={"rate": 0.2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"state": ALGORITHM.init({"w": np.zeros(4)})},
            r"state.params\['w'\] is float64\[3\] in the checkpoint, but float64\[4\] in state",
        ),
        (
            {"state": ALGORITHM.init({"w": np.zeros(3), "b": np.zeros(3)})},
            r"the checkpoint has no state.params\['b'\], which is float64\[3\] in state",
        ),
        (
            {"algorithm": PERSONAL, "force": True},
            r"of Algorithm\(fedavg\)\): the checkpoint has no state.clients.rows",
        ),
    ],
)
def test_a_checkpoint_of_another_algorithm_or_shape(options, message, whole):
    with pytest.raises(ValueError, match=message):
        train(whole[1], **options)
    state = options.get("state", PERSONAL.init(PARAMS))
    with pytest.raises(ValueError, match=message):
        experiment.restore(whole[1], state)


def test_what_restore_refuses(whole, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no checkpoints"):
        experiment.restore(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="round is 5, but the checkpoints are of rounds 4, 6"
    ):
        experiment.restore(whole[1], round=5)
    with pytest.raises(FileNotFoundError, match="is the best: pass keep="):
        experiment.restore(whole[1], round="best")
    with pytest.raises(
        ValueError, match="round is 'worst', expected a number of rounds, or 'best'"
    ):
        experiment.restore(whole[1], round="worst")


# NaN

BROKEN = fax.data.InMemory(
    {f"client {i}": {"x": np.full(i + 1, -2.0 if i == 5 else 1.0)} for i in range(8)}
)


def rounds_with(client, seed):
    """In which of the first five rounds this client takes part."""
    with fax.data.cohorts(DATA, clients=4, batch_size=8, seed=seed) as cohorts:
        return [r + 1 for r in range(5) if client in cohorts.client_ids(r)]


SEED = next(seed for seed in itertools.count() if rounds_with("client 5", seed) == [4])


def test_nan_stops_the_run_and_names_the_client(tmp_path):
    says = r"loss is nan in round 4\. It is not finite for 1 of 4 clients: 'client 5'\."
    with pytest.raises(experiment.NotFiniteError, match=says):
        train(tmp_path / "run", data=BROKEN, seed=SEED)
    assert rounds_of(tmp_path / "run") == [0, 2]
    with pytest.raises(experiment.NotFiniteError, match=says):
        train(tmp_path / "run", data=BROKEN, seed=SEED, every={"log": 6, "checkpoint": 2})


def test_nan_goes_back_to_a_checkpoint(tmp_path):
    """The result is that of the rounds without the client, starting from the checkpoint."""
    state, every = ALGORITHM.init(PARAMS), {"checkpoint": 3}
    with pytest.warns(UserWarning, match="'client 5'.* continues with the state after round 3"):
        found = train(
            tmp_path / "run", data=BROKEN, seed=SEED, on_nan="restore", every=every, rounds=5
        )
    step = jax.jit(ALGORITHM.round)
    with fax.data.cohorts(BROKEN, clients=4, batch_size=8, seed=SEED) as cohorts:
        for number, cohort in zip(range(1, 6), cohorts):
            if number != 4:
                state, _ = step(state, cohort)
    assert_same_state(found.state, state)
    assert np.isnan(found.history[3]["loss"])
    assert [row["round"] for row in found.history] == [1, 2, 3, 4, 5]
    assert train(None, data=BROKEN, seed=SEED, on_nan="ignore").history[3]["round"] == 4


def test_what_cannot_go_back(tmp_path):
    with pytest.raises(ValueError, match="on_nan='restore' needs folder="):
        train(None, on_nan="restore")
    private = fax.algorithms.fedavg(
        loss, optax.sgd(0.1), aggregator=fax.aggregators.gaussian(1.0, 1.0)
    )
    with pytest.raises(ValueError, match="would use the noise of this private algorithm twice"):
        train(tmp_path / "run", algorithm=private, on_nan="restore")


# Signals


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_saves_and_leaves(number, error, whole, tmp_path):
    class Send:
        def after_round(self, run):
            if run.round == 3:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(error) as left:
        train(tmp_path / "run", callbacks=[Send()])
    if error is SystemExit:
        assert left.value.code == 143
    assert signal.getsignal(number) is before
    assert max(rounds_of(tmp_path / "run")) == 3
    assert_same_run(train(tmp_path / "run"), whole[0])


def test_a_signal_after_the_last_round_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(_outputs, "draw", lambda folder: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as left:
        train(tmp_path / "run")
    assert left.value.code == 143
    assert max(rounds_of(tmp_path / "run")) == 6


def test_a_run_in_a_thread_handles_no_signals(whole):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(None)))
    thread.start()
    thread.join()
    assert_same_run(found[0], whole[0])


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


# A private run


@pytest.mark.long
def test_private_rounds_are_not_repeated_elsewhere(tmp_path, monkeypatch):
    """With the same noise, sums that are rounded differently would say something."""
    private = fax.algorithms.fedavg(
        loss, optax.sgd(0.1), aggregator=fax.aggregators.gaussian(1.0, 20.0)
    )
    state = private.init(PARAMS)

    def run(*callbacks):
        budget = fax.aggregators.Budget(1.0, 1e-5, 20.0)
        spends = experiment.StopAtBudget(budget)
        return train(
            tmp_path / "run", algorithm=private, state=state, callbacks=[spends, *callbacks]
        )

    class StopAtStart:
        def start(self, run):
            raise StoppedError

    with pytest.raises(StoppedError):
        run(StopAt(4))
    with pytest.raises(StoppedError):
        run(StopAtStart())  # it takes round 3 out of metrics.csv, but round 3 was released
    with monkeypatch.context() as patch:
        now = _folder.environment()
        devices = now["devices"] | {"count": 1}
        patch.setattr(_folder, "environment", lambda: now | {"devices": devices})
        with pytest.raises(ValueError, match="rounds 3 to 3 of this private run were released"):
            run()
    # The refusal has changed nothing.
    result = run()
    assert [row["epsilon"] for row in result.history] == sorted(
        row["epsilon"] for row in result.history
    )
    assert fax.aggregators.releases(result.state) == 6


# Small parts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds is 0, expected an int of at least 1"),
        ({"rounds_per_call": 0}, "rounds_per_call is 0"),
        ({"every": {"eval": 1}}, "every has the key 'eval', expected 'evaluate', 'checkpoint' or"),
        ({"every": 0}, "every is 0, expected an int of at least 1, or a dict"),
        ({"evaluate": {"test": 3}}, r"evaluate\['test'\] is 3, expected a function evaluate\("),
        ({"callbacks": [StopAt]}, r"callbacks\[0\] is the class .*StopAt, expected an object"),
        ({"writers": [3]}, r"writers\[0\] is 3, expected an object with a method write"),
        ({"keep": 0}, "keep is 0, expected an int of at least 1, or a fax.experiment.Keep"),
        ({"on_nan": "skip"}, "on_nan is 'skip', expected 'stop', 'restore' or 'ignore'"),
        ({"config": 3}, "config is 3, expected a dict"),
        ({"config": {"a": {"b": object()}}}, r"config\['a.b'\] is <object"),
        ({"config": {"run": 3}}, "config has 'run', which config.toml needs"),
        (
            {"algorithm": loss, "state": 0},
            "algorithm is the function .*loss, expected an Algorithm",
        ),
    ],
)
def test_invalid_arguments(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", **options)


def test_toml_is_read_back():
    table = {
        "a": 1,
        "b": [1.5, float("inf"), -2e-9],
        "text": 'quotes " and \\ and\nlines \x7f é',
        "of": {"tables": {"x y": True, "list": [{"name": "one", "more": [1, 2]}]}, "e": {}},
        "flag": False,
    }
    assert tomllib.loads(_toml.dumps(table)) == table


def test_cohorts_go_to_another_round():
    with fax.data.cohorts(DATA, clients=4, batch_size=8) as cohorts:
        first = [next(cohorts).positions.tolist() for _ in range(4)]
        cohorts.round = 1
        again = [next(cohorts).positions.tolist() for _ in range(3)]
        assert cohorts.round == 4
        assert cohorts.client_ids(2) == [f"client {p}" for p in first[2]]
    assert again == first[1:]
    with pytest.raises(fax.data.DataError, match="round is -1"):
        cohorts.round = -1


def test_errors_of_orbax_are_errors_of_the_run(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_checkpoints.Keep, "better", fails)
    keep = experiment.Keep(newest=1, best="test/sum")
    with pytest.raises(OSError, match=r"could not be written .*No space left"):
        train(tmp_path / "run", keep=keep)
