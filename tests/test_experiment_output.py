"""What runs show and write, and when they stop: callbacks, writers, the bar, and figures."""

import io
import itertools
import math
import struct
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

import fax
from fax import aggregators, experiment
from fax.experiment import _curves, _figures
from fax.experiment._progress import Progress

# TensorBoard


def records(path):
    """The events of a file, whose lengths and checksums have to be right."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        body, rest = data[12 : 12 + length], data[12 + length :]
        assert struct.unpack("<I", data[8:12]) == (masked_crc32c(data[:8]),)
        assert struct.unpack("<I", rest[:4]) == (masked_crc32c(body),)
        yield Event.FromString(body)
        data = rest[4:]


def shown(folder):
    """What TensorBoard shows: it reads files by name, and a start drops what is at its step."""
    found = []
    for path in sorted(folder.iterdir()):
        first, *events = records(path)
        assert first.file_version == "brain.Event:2"
        for event in events:
            if event.session_log.status == SessionLog.START:
                found = [own for own in found if own[0] < event.step]
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return found


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


def test_tensorboard_makes_no_file_without_numbers(tmp_path):
    experiment.TensorBoard(tmp_path / "events").close()
    assert not (tmp_path / "events").exists()


# Callbacks


class Run:
    """The fields of a run that callbacks read."""

    def __init__(self, rounds, folder=None, rounds_per_call=1, cohorts=None):
        self.round, self.rounds, self.rounds_per_call = 0, rounds, rounds_per_call
        self.folder, self.cohorts = folder, cohorts
        self.metrics, self.results, self.params, self.state = {}, {}, None, None
        self.history = []

    def go(self, *callbacks, until=None, values=lambda r: ({}, {}, None)):
        """Runs rounds, and returns the reason why a callback stops them."""
        starts = [own.start(self) for own in callbacks if hasattr(own, "start")]
        if reasons := list(filter(None, starts)):
            return reasons[0]
        while self.round < (until or self.rounds):
            self.round += min(self.rounds_per_call, self.rounds - self.round)
            self.metrics, self.results, self.params = values(self.round)
            self.state = self.params
            self.history.append({"round": self.round, **self.metrics, **self.results})
            if reasons := list(filter(None, [own.after_round(self) for own in callbacks])):
                return reasons[0]
        return None


def evaluated(values, every=2):
    """Every second round has the next value as the result of an evaluation."""
    return lambda r: ({"loss": 1.0}, {} if r % every else {"test/loss": values[r // every - 1]}, 0)


@pytest.mark.parametrize(("sign", "mode"), [(1, "min"), (-1, "max")])
@pytest.mark.parametrize(
    ("values", "stops", "best"),
    [
        ([3, 2, 2.5, 1, 1, 2, 1.5, 0], 14, (1, 8)),  # equal is no improvement
        ([math.nan, math.nan, math.nan, 0], 6, (math.inf, 0)),
        ([2, math.nan, 1, math.nan, math.nan, 0.5, 3, 4], None, (0.5, 12)),
    ],
)
def test_early_stopping(sign, mode, values, stops, best):
    values = [sign * value for value in values]
    whole = experiment.EarlyStopping("test/loss", 3, mode)
    run = Run(2 * len(values))
    reason = run.go(whole, values=evaluated(values))
    assert (run.round if reason else None) == stops
    assert (whole.state["best"], whole.state["round"]) == (sign * best[0], best[1])
    if stops:
        assert f"test/loss has not improved on {sign * best[0]:.6g} in round {best[1]}" in reason

    # A run that is resumed in any round stops in the same round, with the same state.
    for middle in range(1, run.round):
        first = experiment.EarlyStopping("test/loss", 3, mode)
        part = Run(run.rounds)
        assert part.go(first, until=middle, values=evaluated(values)) is None
        second = experiment.EarlyStopping("test/loss", 3, mode)
        second.state = dict(first.state)
        for _ in range(2):  # the second time, it stays stopped
            assert part.go(second, values=evaluated(values)) == reason
            assert (part.round, second.state) == (run.round, whole.state)


def test_early_stopping_forgets_an_earlier_run():
    callback = experiment.EarlyStopping("loss", 2, "min")
    for _ in range(2):
        run = Run(5)
        assert run.go(callback, values=lambda r: ({"loss": 1.0}, {}, 0))
        assert run.round == 3


@pytest.mark.parametrize(("sign", "mode"), [(1, "min"), (-1, "max")])
def test_a_target_stops_a_run(sign, mode):
    values = [sign * x for x in (3, math.nan, 2, 1.5, 1, 0)]
    run = Run(12)
    for _ in range(2):  # the second time, it stays stopped
        reason = run.go(experiment.StopAt("test/loss", sign * 1.5, mode), values=evaluated(values))
        assert run.round == 8
        assert reason == f"test/loss is {sign * 1.5}, and the target was {sign * 1.5}"
    assert Run(4).go(experiment.StopAt("test/loss", 0, mode), values=evaluated(values)) is None


@pytest.mark.parametrize(
    "callback",
    [experiment.StopAt("test/los", 1, "min"), experiment.EarlyStopping("test/los", 1, "min")],
)
def test_a_metric_that_is_not_there(callback):
    name = type(callback).__name__
    message = (
        f"fax.experiment.{name}: metric is 'test/los', but the run has 'loss' or 'test/loss'. Did "
        "you mean 'test/loss'?"
    )
    with pytest.raises(ValueError, match=message):
        Run(4).go(callback, values=evaluated([1, 1]))


def test_time_stops_a_run(monkeypatch):
    clock = itertools.count(0, 900)  # it is looked at every quarter of an hour
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    callback = experiment.StopAfter(hours=1.5)
    for _ in range(2):  # a resumed run has the whole time again
        run = Run(100)
        assert run.go(callback) == "1.5 hours are over"
        assert run.round == 6


@pytest.mark.parametrize("per_call", [1, 3])
def test_the_average_of_parameters(per_call):
    rng = np.random.default_rng(0)
    params = rng.normal(size=(8, 5)).astype(np.float32)
    decay, rounds = 0.8, 7

    def values(r):
        return {}, {}, {"w": jnp.array(params[r]), "half": jnp.array(params[r], jnp.bfloat16)}

    def begin(average, run, until):
        run.params = values(run.round)[2]
        run.go(average, until=until, values=values)
        return average

    whole = begin(experiment.EMA(decay), Run(rounds, rounds_per_call=per_call), rounds)
    expected = [params[0], np.array(jnp.array(params[0], jnp.bfloat16), np.float32)]
    for r in range(1, rounds + 1):
        at = params[min(-(-r // per_call) * per_call, rounds)]  # what is there after the block
        new = [at, np.array(jnp.array(at, jnp.bfloat16), np.float32)]
        expected = [decay * e + (1 - decay) * n for e, n in zip(expected, new)]
    np.testing.assert_allclose(whole.state["w"], expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(whole.state["half"], expected[1], rtol=1e-5, atol=1e-6)
    assert {x.dtype.name for x in whole.state.values()} == {"float32"}

    run = Run(rounds, rounds_per_call=per_call)
    first = begin(experiment.EMA(decay), run, 3)
    second = experiment.EMA(decay)
    second.state = first.state
    begin(second, run, rounds)
    for name, own in whole.state.items():
        np.testing.assert_array_equal(second.state[name], own)


def test_the_average_survives_that_the_state_is_donated():
    run = Run(1)
    run.params = jnp.ones(3)
    average = experiment.EMA(0.5)
    average.start(run)
    run.params.delete()
    run.round, run.params = 1, jnp.zeros(3)
    average.after_round(run)
    np.testing.assert_array_equal(average.state, [0.5, 0.5, 0.5])


@pytest.fixture
def traced(monkeypatch):
    """What is traced: the rounds and folders of traces that have ended."""
    log = types.SimpleNamespace(run=None, open=None, done=[])

    def start(folder):
        assert log.open is None
        log.open = (log.run().round, folder)

    def stop():
        first, folder = log.open
        run = log.run()
        log.open = None
        log.done.append((first, run and run.round, str(folder)))

    monkeypatch.setattr("jax.profiler.start_trace", start)
    monkeypatch.setattr("jax.profiler.stop_trace", stop)
    return log


@pytest.mark.parametrize(
    ("rounds", "per_call", "first", "expected"),
    [
        ([3, 4], 1, 0, [(2, 4)]),
        ([1, 4, 10], 1, 0, [(0, 1), (3, 4), (9, 10)]),
        ([3, 4], 4, 0, [(0, 4)]),
        ([4, 5], 4, 0, [(0, 8)]),
        ([9], 4, 0, [(8, 10)]),
        ([2, 6, 7], 1, 5, [(5, 7)]),  # resumed after round 5
        ([], 1, 0, []),
    ],
)
def test_profiles(traced, tmp_path, rounds, per_call, first, expected):
    run = Run(10, tmp_path, rounds_per_call=per_call)
    traced.run = lambda: run
    run.round = first
    run.go(experiment.Profile(rounds))
    assert traced.done == [(*own, str(tmp_path / "profile")) for own in expected]
    assert traced.open is None


def test_a_trace_ends_with_its_run(traced, tmp_path):
    run = Run(10)
    traced.run = lambda: run
    profile = experiment.Profile([5, 6], tmp_path)
    run.go(profile, until=4)  # then another callback stops it, or there is an error
    assert traced.open == (4, tmp_path)
    run = None
    assert traced.done == [(4, None, str(tmp_path))]


def test_profiles_need_a_folder_and_rounds_that_the_run_has():
    with pytest.raises(ValueError, match=r"Profile: the run has no folder, .* Pass folder=."):
        Run(10).go(experiment.Profile([5]))
    with pytest.raises(ValueError, match="rounds has 11, but the run ends after round 10"):
        Run(10).go(experiment.Profile([5, 11], "traces"))


@pytest.mark.parametrize("per_call", [1, 4])
def test_a_spent_budget_stops_a_run(per_call):
    state = aggregators.gaussian(1.0, 20.0).init(jnp.zeros(3))

    def released(r):
        return {}, {}, state._replace(noise=state.noise._replace(releases=np.int32(r)))

    def callback():
        return experiment.StopAtBudget(aggregators.Budget(0.6, 1e-5, 20.0))

    allowed = aggregators.Budget(0.6, 1e-5, 20.0).rounds
    epsilon = aggregators.epsilon(20.0, allowed // per_call * per_call, 1e-5)
    assert 5 < allowed < 20
    assert allowed % 4
    run, whole = Run(20, rounds_per_call=per_call), callback()
    reason = run.go(whole, values=released)
    assert run.round == allowed // per_call * per_call
    assert run.metrics["epsilon"] == pytest.approx(epsilon, rel=1e-6)
    assert f"epsilon is {epsilon:.4g} at delta=1e-05 after {run.round} releases" in reason

    part, first, second = Run(20, rounds_per_call=per_call), callback(), callback()
    assert part.go(first, until=4, values=released) is None
    second.state = first.state
    assert part.go(second, values=released) == reason
    assert (part.round, second.state) == (run.round, whole.state)

    again = callback()
    again.state = whole.state
    assert run.go(again, values=released) == reason
    assert run.round == part.round


WRONG = {
    "mode": (
        lambda: experiment.EarlyStopping("loss", 3, "least"),
        "EarlyStopping: mode is 'least', expected 'min' or 'max'",
    ),
    "patience": (
        lambda: experiment.EarlyStopping("loss", 0, "min"),
        "patience is 0, expected an int of at least 1",
    ),
    "metric": (lambda: experiment.StopAt(0.9, 0.9, "max"), "metric is 0.9, expected a string"),
    "target": (
        lambda: experiment.StopAt("loss", math.nan, "max"),
        "target is nan, expected a number",
    ),
    "hours": (lambda: experiment.StopAfter(0), "hours is 0, expected a number above 0"),
    "decay": (lambda: experiment.EMA(1.0), "decay is 1.0, expected a number of at least 0 and"),
    "rounds": (lambda: experiment.Profile(3), r"rounds is 3, .* as in rounds=range\(10, 13\)"),
    "folder": (lambda: experiment.Profile([3], 5), "folder is 5, expected a path"),
    "budget": (lambda: experiment.StopAtBudget(1.0), r"budget is 1.0, .*fax.aggregators.Budget"),
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


# The progress bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar(monkeypatch):
    data = fax.data.InMemory({"ann": {"x": np.ones(6)}, "bob": {"x": np.ones(3)}})
    with fax.data.cohorts(data, 2, 3, epochs=2) as cohorts:
        run = Run(8, cohorts=cohorts)
        run.round = 3
        assert cohorts.examples == 0

        def values(r):
            next(cohorts)
            return {"loss": 1 / r}, {"test/accuracy": 0.5} if r == 4 else {}, None

        monkeypatch.setattr(sys, "stderr", Terminal())
        bar = Progress()
        run.go(bar, until=7, values=values)
        bar._bar.refresh()
        last = sys.stderr.getvalue().split("\r")[-1]
        assert cohorts.examples == 4 * 2 * 9
        bar.close()
    assert " 7/8 " in last
    for part in ("round/s", "loss=0.1429", "test/accuracy=0.5", "compilations=1", "padding="):
        assert part in last
    assert "examples/s=" in last
    assert sys.stderr.getvalue().endswith("\n")


def test_the_bar_is_quiet_without_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar, cohorts = Progress(), types.SimpleNamespace(examples=0)
    Run(3, cohorts=cohorts).go(bar, values=lambda r: ({"loss": 1.0}, {}, None))
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

    loss, accuracy = found["clients"].axes
    assert sum(bar.get_height() for bar in loss.patches) == 3
    assert "1 of 4" in loss.get_title()
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
