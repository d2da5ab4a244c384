"""The figures of runs: what is in them, whether it can be read, and comparisons of several runs."""

import itertools
import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from fax import experiment
from fax.command import _sweep_figure
from fax.experiment import _curves, _figures


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


def test_all_metrics_of_evaluations_are_shown(tmp_path):
    curves = {
        "loss": curve([2.0, 1.0]),
        "clip_norm": curve([1.0, 1.0]),  # of the algorithm, not of an evaluation
        "epsilon": curve([1.0, 2.0]),
        "test/auc": curve([0.5, 0.75]),
        "test/binary_accuracy": curve([0.25, 0.5]),
        "test/mae": curve([3.0, 2.0]),
        "test/gap": curve([0.2, 0.1]),
        "test/non_finite": curve([0, 0]),
        "test/tokens": curve([9, 9]),
        "client.rate=0.1/bits": curve([8, 16]),  # as in a sweep
    }
    found = _figures.figures(curves, {"test/f1": np.ones(3), "clients/alpha": np.ones(2)})
    labels = {name: [axes.get_ylabel() for axes in own.axes] for name, own in found.items()}
    assert labels["rounds"] == ["loss", "AUC", "binary accuracy (%)", "MAE", "gap"]
    assert points(found["rounds"].axes[2]) == {"test": [[1, 25], [2, 50]]}
    assert labels["epsilon"] == ["epsilon", "AUC"]
    assert [axes.get_xlabel() for axes in found["clients"].axes] == ["F1"]
    check_texts(found["rounds"])

    other = {name: (rounds, values / 2) for name, (rounds, values) in curves.items()}
    folders = [write_run(tmp_path / "a", curves), write_run(tmp_path / "b", other)]
    compared = experiment.compare(folders)
    assert compared.table.splitlines() == [
        "run  rounds  loss  epsilon  test/auc  test/binary_accuracy  test/mae  test/gap",
        "a         2    1         2     0.75*                  0.5*        2        0.1",
        "b         2  0.5*        1    0.375                  0.25         1*      0.05",
    ]
    assert len(compared.figure.axes) == 5
    check_texts(compared.figure)


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

    # If only one run has settings of its own, the others are not compared by those of the call.
    named = write_run(tmp_path / "e", {"loss": curve([1])}, settings="rate = 1\n[run]\nseed = 0\n")
    other = write_run(tmp_path / "f", {"loss": curve([1])}, settings="[run]\nseed = 1\n")
    third = write_run(tmp_path / "g", {"loss": curve([1])}, settings="[run]\nseed = 2\n")
    pairs = [[named, other], [other, third]]
    headers = [experiment.compare(own).table.splitlines()[0].split() for own in pairs]
    assert headers == [["run", "rate", "rounds", "loss"], ["run", "seed", "rounds", "loss"]]

    # A setting may have the name of a metric.
    both = [
        write_run(tmp_path / name, {"bits": curve([8])}, settings=f"bits = {bits}\n")
        for name, bits in (("h", 4), ("i", 2))
    ]
    assert experiment.compare(both).table.splitlines() == [
        "run  bits  rounds  bits",
        "h       4       1     8",
        "i       2       1     8",
    ]

    twice = [folders[0], tmp_path / "d" / ".." / "a"]
    with pytest.raises(ValueError, match=r"compare: folders has '.*a' twice"):
        experiment.compare(twice)


@pytest.mark.parametrize("count", [1, 12, 45])
def test_legends_of_many_runs_fit(count, tmp_path):
    folders = [
        write_run(
            tmp_path / f"scaffold for $\\frac$, rate {i / 100:.2f}", {"loss": curve([i, i + 1])}
        )
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


def test_the_figure_of_a_sweep():
    grid = [("fedavg", 0.1), ("fedavg", 0.01), ("scaffold", 0.1)]
    rows = [({"algorithm": a, "client.rate": x}, {"test/accuracy": x}) for a, x in grid]
    rows += [({"algorithm": "scaffold", "client.rate": 0.01}, {})]  # diverged
    figure = _sweep_figure.figure(rows, "test/accuracy")
    check_texts(figure)
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("client.rate", "test accuracy (%)")
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.01", "0.1"]
    found = points(axes)
    assert found["algorithm=fedavg"] == [[0.01, 1.0], [0.1, 10.0]]
    assert found["algorithm=scaffold"][1] == [0.1, 10.0]
    assert math.isnan(found["algorithm=scaffold"][0][1])
    assert _sweep_figure.figure([({"algorithm": "fedavg"}, {})], "test/accuracy") is None


WRONG = {
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
