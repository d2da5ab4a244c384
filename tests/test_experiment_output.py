"""What a run shows and leaves: events for TensorBoard, a progress bar, figures, comparisons."""

import io
import itertools
import math
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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from scalars import shown

import fax
from fax import aggregators, experiment
from fax.experiment import _curves, _figures
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


# Figures


def curve(values, every=1):
    return np.arange(every, every * len(values) + 1, every), np.array(values, float)


def points(axes):
    """The curves of a panel by their labels."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def texts(figure):
    """The visible texts. Ticks outside of the limits are not drawn."""
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                hidden |= {tick.label2} | (
                    {tick.label1} if not low <= tick.get_loc() <= high else set()
                )
    found = [t for t in figure.findobj(Text) if t.get_visible() and t not in hidden]
    return [t for t in found if t.get_text().strip()]


def check_texts(figure):
    """Everything is labelled, within the figure, and no text is on another."""
    FigureCanvasAgg(figure).draw()
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts(figure)]
    width, height = figure.canvas.get_width_height()
    for name, box in boxes:
        assert 0 <= box.x0 < box.x1 <= width, name
        assert 0 <= box.y0 < box.y1 <= height, name
    for (a, one), (b, other) in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), (a, b)
    for axes in figure.axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel()


LONG = {
    "loss": curve(2 / np.arange(1, 201)),
    "bits": curve(np.arange(1, 201) * 3.2e6),
    "epsilon": curve(np.sqrt(np.arange(1, 201)) / 3),
    "test/loss": curve(3 / np.arange(1, 21), 10),
    "test/accuracy": curve(1 - 1 / np.arange(1, 21), 10),
    "validation/accuracy": curve([0.25, math.nan, 0.75], 60),
    "clients/grad_norm": curve(np.ones(200)),
}
CLIENTS = {
    "test/loss": np.array([0.1, 0.2, 0.4, math.nan]),
    "test/accuracy": np.linspace(0.5, 1.0, 90),
    "train/accuracy": np.ones(50),
    "test/non_finite": np.zeros(90),
}


def test_figures_show_what_the_folder_has():
    found = _figures.figures(LONG, CLIENTS)
    assert list(found) == ["rounds", "bits", "clients", "epsilon"]
    for figure in found.values():
        check_texts(figure)

    loss, accuracy = found["rounds"].axes
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("round", "loss")
    assert accuracy.get_ylabel() == "accuracy (%)"
    assert list(points(loss)) == ["training", "test"]
    assert list(points(accuracy)) == ["test", "validation"]
    assert points(loss)["training"] == [[r, 2 / r] for r in range(1, 201)]
    assert points(accuracy)["test"] == [[10 * r, 100 * (1 - 1 / r)] for r in range(1, 21)]
    for axes in (loss, accuracy):
        assert [t.get_text() for t in axes.get_legend().get_texts()] == list(points(axes))

    loss, accuracy = found["bits"].axes
    assert points(loss)["test"] == [[32e6 * r, 3 / r] for r in range(1, 21)]
    assert "bits" in accuracy.get_xlabel()

    loss, accuracy, train = found["clients"].axes
    assert train.get_title() == "train: 50 clients, mean 100 (dashed)"
    assert sum(bar.get_height() for bar in loss.patches) == 3
    title = "test: 3 clients, mean 0.2333 (dashed)\n1 more without a finite value"
    assert loss.get_title() == title
    assert sum(bar.get_height() for bar in accuracy.patches) == 90
    assert accuracy.get_xlim()[1] > 95
    assert loss.lines[0].get_xdata()[0] == pytest.approx(0.7 / 3)

    epsilon, accuracy = found["epsilon"].axes
    assert points(epsilon)["_child0"] == [[r, math.sqrt(r) / 3] for r in range(1, 201)]
    assert points(accuracy)["test"][3] == [math.sqrt(40) / 3, 75.0]
    assert accuracy.get_xlabel() == "epsilon"


@pytest.mark.parametrize(
    ("curves", "clients", "names"),
    [
        ({"loss": curve([1.0])}, {}, ["rounds"]),  # a run of a single round
        ({"loss": curve([math.nan, math.inf])}, {}, ["rounds"]),
        ({"test/accuracy": curve([0.5, 0.5]), "bits": curve([8, 8])}, {}, ["rounds", "bits"]),
        ({"epsilon": curve([1.0, 2.0])}, {}, ["epsilon"]),
        ({}, {"clients/loss": np.array([math.nan])}, ["clients"]),
        ({"loss": curve([1e-30, 1e30])}, {"clients/loss": np.ones(1)}, ["rounds", "clients"]),
        ({}, {}, []),
    ],
)
def test_figures_of_runs_with_few_numbers(curves, clients, names):
    found = _figures.figures(curves, clients)
    assert list(found) == names
    for figure in found.values():
        check_texts(figure)
    if clients:
        assert found["clients"].axes[0].get_title().startswith("last cohort: ")


def write_run(folder, curves, clients=(), settings=""):
    folder.mkdir(parents=True)
    last = max(own[0][-1] for own in curves.values())
    cells = {name: dict(zip(*own)) for name, own in curves.items()}
    lines = [",".join(("round", *curves))]
    for r in range(1, last + 1):
        lines.append(
            ",".join([f"{r}", *(repr(float(own[r])) if r in own else "" for own in cells.values())])
        )
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    if clients:
        rows = itertools.zip_longest(*clients.values())
        text = "\n".join(",".join("" if x is None else repr(float(x)) for x in row) for row in rows)
        (folder / "clients.csv").write_text(",".join(clients) + "\n" + text + "\n")
    (folder / "config.toml").write_text(settings)
    return folder


def test_figures_are_drawn_from_files(tmp_path):
    folder = write_run(tmp_path / "run", LONG, CLIENTS)
    read, clients = _curves.read(folder), _curves.read_clients(folder)
    assert read.keys() == LONG.keys()
    for name, own in LONG.items():
        np.testing.assert_array_equal(read[name], own)
    for name, values in CLIENTS.items():
        np.testing.assert_array_equal(clients[name], values)
    with open(folder / "metrics.csv", "a") as file:
        file.write("201,0.1")  # a line that is being written
    assert _curves.read(folder)["loss"][0][-1] == 200
    (folder / "figures").mkdir()
    (folder / "figures" / "rounds.png").write_bytes(b"of an earlier round")
    paths = experiment.draw(str(folder))
    assert [path.stem for path in paths] == ["rounds", "bits", "clients", "epsilon"]
    for path in paths:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(p.name for p in (folder / "figures").iterdir()) == sorted(p.name for p in paths)


# Comparisons


def test_runs_are_compared(tmp_path):
    runs = {
        "a": ([0.5, 0.75], "seed = 0\n[client]\nrate = 0.1\n"),
        "b/c": ([0.5, 0.8, 0.9], "seed = 0\n[client]\nrate = 0.3\n"),
        "d": ([0.25, math.nan], "seed = 0\n[server]\nmomentum = 0.9\n[environment]\nn = 1\n"),
    }
    folders = [
        write_run(
            tmp_path / name,
            {
                "loss": curve(np.arange(4.0, 4 - len(values), -1)),
                "bits": curve(1e6 * np.arange(1, 1 + len(values))),
                "test/accuracy": curve(values),
            },
            settings=settings,
        )
        for name, (values, settings) in runs.items()
    ]
    found = experiment.compare(folders)
    assert found.table.splitlines() == [
        "run  client.rate  server.momentum  rounds  loss   bits  test/accuracy",
        "a            0.1                -       2    3   2e+06          0.75",
        "b/c          0.3                -       3    2*  3e+06           0.9*",
        "d              -              0.9       2    3   2e+06             -",
    ]
    check_texts(found.figure)
    loss, accuracy, cost = found.figure.axes
    (legend,) = found.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b/c", "d"]
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("training loss", "test accuracy (%)")
    assert accuracy.lines[1].get_xydata().tolist() == [[1, 50], [2, 80], [3, 90]]
    assert cost.lines[1].get_xydata().tolist() == [[1e6, 50], [2e6, 80], [3e6, 90]]
    for axes in found.figure.axes:
        colors = [line.get_color() for line in axes.lines]
        assert len({*map(str, colors)}) == 3
        assert str(colors) == str([line.get_color() for line in legend.get_lines()])

    twice = [folders[0], tmp_path / "d" / ".." / "a"]
    with pytest.raises(ValueError, match=r"compare: folders has '.*a' twice"):
        experiment.compare(twice)


@pytest.mark.parametrize("count", [1, 12, 45])
def test_legends_of_many_runs_fit(count, tmp_path):
    folders = [
        write_run(tmp_path / f"scaffold on digits, rate {i / 100:.2f}", {"loss": curve([i, i + 1])})
        for i in range(count)
    ]
    found = experiment.compare(folders)
    check_texts(found.figure)
    assert len(found.table.splitlines()) == count + 1
    (axes,) = found.figure.axes
    assert axes.bbox.width > 250
    assert len({str(line.get_color()) for line in axes.lines}) == count


def test_runs_without_a_loss_have_a_table_and_no_figure(tmp_path):
    found = experiment.compare([write_run(tmp_path / "a", {"bits": curve([8])})])
    assert found.figure is None
    assert found.table.split() == ["run", "rounds", "bits", "a", "1", "8"]


WRONG = {
    "writer": (lambda: experiment.TensorBoard(None), "TensorBoard: folder is None, expected a"),
    "no run": (lambda: experiment.draw("tests"), "folder is 'tests', which has no metrics.csv"),
    "no runs": (lambda: experiment.compare([]), r"folders is \[\], expected the folders of runs"),
    "one folder": (lambda: experiment.compare("a"), "folders is 'a', expected the folders of"),
    "no second": (lambda: experiment.compare(["tests"]), r"folders\[0\] is 'tests', which has no"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes(name):
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        make()
