"""What a run shows and leaves: events for TensorBoard, files, and a progress bar."""

import io
import pathlib
import re
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scalars import shown

import fax
from fax import aggregators, experiment
from fax.experiment import _curves, _history
from fax.experiment._progress import Progress

# TensorBoard


def test_tensorboard_shows_no_round_twice_after_a_resume(tmp_path, monkeypatch):
    def write(writer, rounds):
        for r in rounds:
            writer.write(r, {"loss": 1 / 2**r, "test/accuracy": r / 16})

    expected = [x for r in range(1, 10) for x in ((r, "loss", 2**-r), (r, "test/accuracy", r / 16))]
    now, writers = time.time(), []
    for start, clock in ((1, now), (4, now), (6, now - 5000)):  # within a second, and set back
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        writers.append(experiment.TensorBoard(tmp_path))
        write(writers[-1], range(start, 10 if start == 6 else start + 5))
    # They are not closed, as if they were killed: everything is in the files nevertheless.
    assert shown(tmp_path) == expected
    assert len(list(tmp_path.iterdir())) == 3

    for writer in (*writers, *writers):
        writer.close()
    write(writers[0], [10])
    writers[0].close()
    assert shown(tmp_path)[-1] == (10, "test/accuracy", 10 / 16)


def test_a_full_disk_is_an_error(tmp_path):
    writer = experiment.TensorBoard(tmp_path)
    writer.write(1, {"loss": 0.5})
    with open("/dev/full", "wb", buffering=0) as full:
        file, writer._file = writer._file, full
        with pytest.raises(OSError, match="No space left"):
            writer.write(2, {"loss": 0.5})
        partial = types.SimpleNamespace(write=lambda record: 5, name="events")
        writer._file = partial
        with pytest.raises(OSError, match="TensorBoard: no space is left on the disk"):
            writer.write(2, {"loss": 0.5})
    file.close()


def test_tensorboard_makes_no_file_without_numbers(tmp_path):
    experiment.TensorBoard(tmp_path / "events").close()
    assert not (tmp_path / "events").exists()
    with pytest.raises(ValueError, match="TensorBoard: folder is None, expected a"):
        experiment.TensorBoard(None)


# A run


def loss(params, batch, key):
    return (batch["x"] - params) ** 2


class Fail:
    """Ends a run as if its process were killed."""

    def __init__(self, number):
        self._number = number

    def after_round(self, run):
        if run.round >= self._number:
            raise TimeoutError


@pytest.mark.parametrize("per_call", [pytest.param(1, marks=pytest.mark.long), 3])
def test_a_run_that_was_interrupted_leaves_what_another_one_does(per_call, tmp_path):
    key = jax.random.key(0)
    private = aggregators.gaussian(1.0, 20.0, key=key)
    algorithm = fax.algorithms.fedavg(loss, optax.sgd(0.1), aggregator=private)
    rng = np.random.default_rng(0)
    data = fax.data.InMemory({name: {"x": rng.normal(size=3)} for name in "abcd"})
    start = algorithm.init(jnp.ones(()))

    def run(name, *more):
        """The result, and what callbacks have found."""
        average = experiment.EMA(0.9)
        stopping = experiment.EarlyStopping("test/distance", 50, "min")
        budget = experiment.StopAtBudget(aggregators.Budget(0.7, 1e-5, 20.0))
        with fax.data.cohorts(data, 2, 2, seed=1) as cohorts:
            result = experiment.run(
                algorithm,
                start,
                cohorts,
                rounds=30,
                rounds_per_call=per_call,
                folder=tmp_path / name,
                evaluate=lambda params: {"distance": abs(float(params))},
                every={"evaluate": 2, "checkpoint": 5},
                callbacks=[average, stopping, budget, *more],
                progress=False,
            )
        return result, [np.asarray(average.state), stopping.state, budget.state]

    expected, kept = run("whole", experiment.Profile([4]))
    assert list((tmp_path / "whole/profile").glob("**/*.xplane.pb"))
    for number in (3, 9):  # before the first checkpoint, and after that of round 5
        with pytest.raises(TimeoutError):
            run("interrupted", Fail(number))
    assert "the privacy budget is spent" in expected.reason
    for _ in range(2):  # the second time, there is nothing left to do
        result, found = run("interrupted")
        assert result.history == expected.history
        assert result.reason == expected.reason
        assert float(result.state.params) == float(expected.state.params)
        np.testing.assert_equal(found, kept)

    whole, other = tmp_path / "whole", tmp_path / "interrupted"
    for name in ("metrics.csv", "clients.csv"):
        assert (whole / name).read_bytes() == (other / name).read_bytes()
    assert len(list((other / "tensorboard").iterdir())) > 2
    assert shown(whole / "tensorboard") == shown(other / "tensorboard")
    for folder in (whole, other):
        names = sorted(path.name for path in (folder / "figures").iterdir())
        assert names == ["bits.png", "clients.png", "epsilon.png", "rounds.png"]

    rows, curves = expected.history, _curves.read(whole)
    events = [x for x in shown(whole / "tensorboard") if x[1] == "bits"]
    assert [x[0] for x in events] == list(range(1, len(rows) + 1))
    assert rows[-1]["epsilon"] == aggregators.epsilon(20.0, len(rows), 1e-5)
    np.testing.assert_array_equal(curves["bits"][1], [128.0 * r for r in range(1, len(rows) + 1)])
    assert curves["test/distance"][0].tolist()[:3] == [2, 4, 6]


def test_ids_that_are_not_text(tmp_path):
    """Bytes that are no UTF-8 are surrogates in the ids of files."""
    ids = np.array(["caf\udce9", "é", "a\n,"])
    text = _history.text_of({"clients/id": ids, "clients/loss": np.array([0.5, 1.0, 2.0])})
    _history.replace(tmp_path / "clients.csv", text)
    found = _curves.read_clients(tmp_path)
    assert found["clients/id"].tolist() == [r"caf\udce9", "é", "a\n,"]
    assert found["clients/loss"].tolist() == [0.5, 1.0, 2.0]


# Writers of the documentation


def documented(module, fake, monkeypatch):
    """The class in the block of the page that imports a module, which is replaced by a fake."""
    monkeypatch.setitem(sys.modules, module, fake)
    page = (pathlib.Path(__file__).parent.parent / "docs/experiments.md").read_text("utf-8")
    (source,) = re.findall(rf"```python\n(import {module}\n.*?)```", page, re.DOTALL)
    names = {}
    exec(source, names)
    return next(own for own in names.values() if isinstance(own, type))


def test_the_writer_for_weights_and_biases(monkeypatch):
    log = []
    started = types.SimpleNamespace(
        log=lambda values, step: log.append((step, values)), finish=lambda: log.append("finished")
    )
    fake = types.SimpleNamespace(init=lambda **how: log.append(how) or started)
    writer = documented("wandb", fake, monkeypatch)("digits", "first")
    writer.write(1, types.MappingProxyType({"loss": 0.5}))
    writer.close()
    how = {"project": "digits", "id": "first", "resume": "allow"}
    assert log == [how, (1, {"loss": 0.5}), "finished"]


def test_the_writer_for_mlflow_writes_no_round_twice(monkeypatch):
    log, runs = [], []

    def start_run(run_name):
        runs.append(types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_name)))
        return runs[0]

    fake = types.SimpleNamespace(
        set_experiment=lambda name: None,
        search_runs=lambda filter_string, output_format: list(runs),
        start_run=start_run,
        end_run=lambda: None,
        MlflowClient=lambda: types.SimpleNamespace(
            get_metric_history=lambda own, name: [types.SimpleNamespace(step=x[0]) for x in log]
        ),
        log_metrics=lambda values, step, run_id: log.append((step, values, run_id)),
    )
    make = documented("mlflow", fake, monkeypatch)
    for rounds in ((1, 2, 3), (2, 3, 4)):
        writer = make("digits", "first")
        for r in rounds:
            writer.write(r, {"loss": 1 / r})
    assert log == [(r, {"loss": 1 / r}, "first") for r in (1, 2, 3, 4)]
    assert len(runs) == 1


# The progress bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar(monkeypatch):
    data = fax.data.InMemory({"ann": {"x": np.ones(6)}, "bob": {"x": np.ones(3)}})
    with fax.data.cohorts(data, 2, 3, epochs=2) as cohorts:
        run = types.SimpleNamespace(round=3, rounds=8, cohorts=cohorts, history=[], results={})
        monkeypatch.setattr(sys, "stderr", Terminal())
        bar = Progress()
        bar.start(run)
        for r in range(4, 8):
            next(cohorts)
            run.round, run.results = r, {"test/accuracy": 0.5} if r == 4 else {}
            run.history.append({"round": r, "loss": 1 / r, "grad_norm": 1.0})
            bar.after_round(run)
        bar._bar.refresh()
        last = sys.stderr.getvalue().split("\r")[-1]
        assert cohorts.examples == 4 * 2 * 9
        cohorts.take(2)
        assert cohorts.examples == 6 * 2 * 9
        bar.close()
    assert " 7/8 " in last
    for part in ("round/s", "loss=0.1429", "test/accuracy=0.5", "compilations=1", "padding="):
        assert part in last
    assert "examples/s=" in last
    assert "norm" not in last
    assert sys.stderr.getvalue().endswith("\n")


def test_the_bar_is_quiet_without_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar, cohorts = Progress(), types.SimpleNamespace(examples=0)
    run = types.SimpleNamespace(round=0, rounds=8, cohorts=cohorts)
    bar.start(run)
    bar.after_round(run)
    bar.close()
    assert sys.stderr.getvalue() == ""
