"""What a run refuses: other settings, folders and states, losses that are NaN, wrong arguments."""

import itertools
import shutil
import tomllib
from typing import ClassVar

import jax
import numpy as np
import optax
import pytest
from runs import (
    ALGORITHM,
    DATA,
    PARAMS,
    PERSONAL,
    StopAt,
    StoppedError,
    assert_same_state,
    loss,
    rounds_of,
    stopped,
    train,
)

import fax
from fax import experiment
from fax.experiment import _folder, _toml

pytestmark = pytest.mark.usefixtures("no_figures")


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
    with pytest.raises(ValueError, match=r"config\['n'\] is np.float32.*Call its tolist"):
        train(tmp_path / "run", config={"n": np.float32(1)})
    assert not (tmp_path / "run").exists()
    # A folder that was there before stays, and so does one with a round.
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="the first round"):
        train(tmp_path / "run", algorithm=refused)
    assert (tmp_path / "run").exists()
    stopped(tmp_path / "other", 1)
    assert rounds_of(tmp_path / "other") == [0]
    # Where orbax writes checkpoints that it cannot read.
    for name in ("rate[0.1]", "a\\b", "caf\udce9"):
        with pytest.raises(ValueError, match=r"(has brackets or backs|is not UTF-8,).*Choose"):
            train(tmp_path / name)
        assert not (tmp_path / name).exists()


def test_cohorts_that_are_closed():
    with fax.data.cohorts(DATA, clients=4, batch_size=8) as cohorts:
        pass
    for blocks in (1, 2):
        with pytest.raises(ValueError, match="cohorts is closed, and has no more rounds"):
            experiment.run(
                ALGORITHM, ALGORITHM.init(PARAMS), cohorts, rounds=2, rounds_per_call=blocks
            )


def test_a_folder_of_something_else_is_refused(whole, tmp_path):
    (tmp_path / "metrics.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"has metrics.csv but no config.toml, so it is not"):
        train(tmp_path)
    _, folder = whole
    shutil.copytree(folder, tmp_path / "run")
    with pytest.raises(ValueError, match="other settings") as refused:
        train(tmp_path / "run", seed=1, config={"rate": 0.1})
    assert "rate was not set, and is 0.1" in str(refused.value)
    assert "run.cohorts.seed was 0, and is 1" in str(refused.value)
    train(tmp_path / "run", config={"rate": 0.1}, force=True)
    assert "a setting has changed: rate" in (tmp_path / "run" / "log.txt").read_text()
    with pytest.raises(ValueError, match=r"rate was 0.1, and is 0.2"):
        train(tmp_path / "run", config={"rate": 0.2})
    # As a spreadsheet may save it.
    (tmp_path / "run" / "metrics.csv").write_text("round;loss\n1;0.5\n")
    with pytest.raises(ValueError, match=r"metrics.csv has no column round"):
        train(tmp_path / "run", config={"rate": 0.1})
    (tmp_path / "run" / "config.toml").write_text("rate: 0.1")
    with pytest.raises(ValueError, match=r"config.toml: this is not TOML"):
        train(tmp_path / "run", config={"rate": 0.1})


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
        (  # their own states would be mixed up
            {"data": fax.data.InMemory({i: DATA.client(i) for i in reversed(DATA.client_ids())})},
            r"cohorts.ids was 'client 0 to client 7, SHA-256 \w+', and is 'client 7 to client 0, ",
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
    if "data" in options:  # which restore does not need
        return
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
    state, average = ALGORITHM.init(PARAMS), experiment.EMA(0.5)
    options = dict(on_nan="restore", every={"checkpoint": 3}, rounds=5, callbacks=[average])
    with pytest.warns(UserWarning, match="'client 5'.* continues with the state after round 3"):
        found = train(tmp_path / "run", data=BROKEN, seed=SEED, **options)
    expected = PARAMS["w"]
    step = jax.jit(ALGORITHM.round)
    with fax.data.cohorts(BROKEN, clients=4, batch_size=8, seed=SEED) as cohorts:
        for number, cohort in zip(range(1, 6), cohorts):
            if number != 4:
                state, _ = step(state, cohort)
                expected = 0.5 * expected + 0.5 * state.params["w"]
    assert_same_state(found.state, state)
    np.testing.assert_allclose(average.state["w"], expected, rtol=1e-12)
    assert np.isnan(found.history[3]["loss"])
    assert found.history[3]["test/sum"] == found.history[2]["test/sum"]
    assert [row["round"] for row in found.history] == [1, 2, 3, 4, 5]
    assert train(None, data=BROKEN, seed=SEED, on_nan="ignore").history[3]["round"] == 4


def test_callbacks_go_back_to_the_start_of_a_run(tmp_path):
    class Last:
        state = None

        def after_round(self, run):
            self.state = run.round

    average, last = experiment.EMA(0.5), Last()
    often = {"log": 5, "checkpoint": 5, "evaluate": 5}
    options = dict(every=often, rounds=5, callbacks=[average, last])
    with pytest.warns(UserWarning, match="'client 5'.* continues with the state after round 0"):
        train(tmp_path / "run", data=BROKEN, seed=SEED, on_nan="restore", **options)
    np.testing.assert_array_equal(average.state["w"], PARAMS["w"])
    assert last.state is None


def test_what_cannot_go_back(tmp_path):
    with pytest.raises(ValueError, match="on_nan='restore' needs folder="):
        train(None, on_nan="restore")
    private = fax.algorithms.fedavg(
        loss, optax.sgd(0.1), aggregator=fax.aggregators.gaussian(1.0, 1.0)
    )
    with pytest.raises(ValueError, match="would use the noise of this private algorithm twice"):
        train(tmp_path / "run", algorithm=private, on_nan="restore")


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


class Odd:
    state: ClassVar = {"what": object()}

    def start(self, run):
        pass


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
            {"keep": experiment.Keep(best="test/summ")},
            "Keep: best is 'test/summ', but the run has 'loss' or 'test/sum'. Did you mean",
        ),
        ({"callbacks": [Odd()]}, "the state of the callback Odd cannot be saved: .* Make it a"),
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
    # A file whose name is not UTF-8, as on the command line.
    (text,) = tomllib.loads(_toml.dumps({"path": "caf\udce9"}).encode().decode()).values()
    assert text == r"caf\udce9"


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
