"""The command `fax` from end to end: what it prints, its exit codes, and its messages."""

import re
import shutil
import signal
import tomllib
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
from commands import rows_of, run, small_in
from scripts import is_figure

import fax
from fax._lock import locked
from fax.command import _run, main
from fax.command._parser import make_parser

ROOT = Path(__file__).parents[1]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with a small configuration, in which the command runs."""
    return small_in(tmp_path, monkeypatch)


# From end to end


def test_a_run_and_what_can_be_done_with_it(small, capsys):
    """Here in this process; test_command_processes.py starts some, as a shell does."""
    command = ["run", "small.toml", "--folder", "runs/a", "--set", "client.rate=0.05"]
    assert main(command) == 0
    first, last, *figures, title, one, two, three = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"small: fedavg, 4 rounds, on \d+ cpu devices \(clients=\d+\), in runs/a", first
    )
    assert re.match(r"After 4 rounds: .*training loss [\d.]+.* test accuracy [\d.]+%", last)
    assert "Figure: runs/a/figures/rounds.png" in figures
    assert is_figure(small / "runs/a/figures/rounds.png")
    assert title == "Try next:"
    rows = rows_of(small / "runs/a/metrics.csv")
    assert [row["round"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["test/loss"] != "" for row in rows] == [False, True, False, True]
    saved = tomllib.loads((small / "runs/a/config.toml").read_text())
    assert saved["client"] == {"optimizer": "sgd", "rate": 0.05}

    # The commands that it says to try are commands.
    _, commands = make_parser()
    for line in (one, two, three):
        program, name, *rest = line.split()
        assert program == "fax"
        commands[name].parse_args(rest)


@pytest.mark.long
def test_a_run_is_resumed_evaluated_and_compared(small, capsys):
    assert main(["run", "small.toml", "--folder", "runs/a", "--rounds", "2", "--quiet"]) == 0
    assert main(["resume", "runs/a", "--quiet", "--rounds", "4"]) == 0
    assert "digits: fedavg, 4 rounds" in capsys.readouterr().out
    rows = rows_of("runs/a/metrics.csv")
    assert [row["round"] for row in rows] == ["1", "2", "3", "4"]
    # Other settings are refused.
    other = ["run", "small.toml", "--folder", "runs/a", "--set", "client.rate=0.05"]
    assert main(other) == 2
    message = capsys.readouterr().err
    assert "client.rate was 0.1, and is 0.05" in message
    assert "pass --force to continue" in message
    assert main(["resume", "runs/a", "--rounds", "3"]) == 2
    assert "--rounds is 3, but the run in runs/a has 4 already" in capsys.readouterr().err
    assert main(["resume", "runs/a", "--rounds", "3", "--force"]) == 2
    assert "has 4 already" in capsys.readouterr().err

    assert main(["evaluate", "runs/a", "--on", "test"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("runs/a, test data, after 4 rounds:\n")
    for name in ("loss", "accuracy"):
        (found,) = re.findall(rf"  {name} +([\d.]+)", printed)
        assert float(found) == pytest.approx(float(rows[-1][f"test/{name}"]), rel=1e-5)
    best = min((row for row in rows if row["test/loss"]), key=lambda r: float(r["test/loss"]))
    assert main(["evaluate", "runs/a", "--on", "train", "--round", "best"]) == 0
    together = capsys.readouterr().out
    assert f"runs/a, train data, after {best['round']} rounds:" in together
    assert main(["evaluate", "runs/a", "--on", "train", "--round", "best", "--each"]) == 0
    title, names, *lines = capsys.readouterr().out.splitlines()
    assert title == together.splitlines()[0]
    assert names.split() == ["id", "loss", "accuracy", "non_finite"]
    each = [line.split() for line in lines]
    data = fax.tasks.load("digits", clients=12).train
    assert [own[0] for own in each] == list(data.client_ids())
    counts = [data.num_examples(own[0]) for own in each]
    for column, name in enumerate(("loss", "accuracy"), 1):
        mean = np.average([float(own[column]) for own in each], weights=counts)
        assert mean == pytest.approx(float(re.findall(rf"{name} +(.*)", together)[0]), rel=1e-4)

    shutil.copytree("runs/a", "runs/b")
    Path("runs/sweep").mkdir()
    Path("runs/old.png").touch()
    given = [f"runs/{name}" for name in ("a", "b", "old.png", "sweep")]  # runs/*
    assert main(["compare", *given, "--figure", "both.png"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Left out, because no run is there: runs/old.png, runs/sweep\n")
    assert re.search(r"^a +.*4 ", printed, re.M)
    assert re.search(r"^b +.*4 ", printed, re.M)
    assert printed.endswith("Figure: both.png\n")
    assert is_figure(Path("both.png"))


@pytest.mark.long
def test_the_quickstart_keeps_its_promise(tmp_path):
    printed = run(tmp_path, "run", "digits")
    assert "digits: fedavg, 300 rounds" in printed
    (accuracy,) = re.findall(r"test accuracy ([\d.]+)%", printed)
    assert float(accuracy) >= 97
    assert "Figure: runs/digits/figures/rounds.png" in printed
    assert is_figure(tmp_path / "runs/digits/figures/rounds.png")
    assert len(printed.partition("Try next:\n")[2].splitlines()) == 3
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^quickstart: .*\n\t\$\(BIN\)/fax run digits$", makefile, re.M)


MODULE = """
import dataclasses, os, pathlib
import fax

class Interrupts:
    def after_round(self, run):
        path = pathlib.Path("signal")
        if path.exists():
            number = int(path.read_text())
            path.unlink()
            os.kill(os.getpid(), number)

def experiment():
    one = fax.experiment.build(fax.experiment.configure("small.toml"))
    return dataclasses.replace(one, options={**one.options, "callbacks": [Interrupts()]})

nothing = 3
"""


@pytest.mark.long
def test_an_experiment_of_a_module(small, capsys, monkeypatch):
    Path("own_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(small))
    # It is interrupted twice on its way, by Ctrl-C and by SIGTERM.
    for command, number, code in [
        (["run", "own_module:experiment"], signal.SIGINT, 130),
        (["resume", "runs/experiment"], signal.SIGTERM, 143),
        (["resume", "runs/experiment"], None, 0),
    ]:
        if number:
            Path("signal").write_text(str(int(number)))
        assert main([*command, "--quiet"]) == code
        captured = capsys.readouterr()
        assert captured.out.startswith("experiment: fedavg, 4 rounds")
        assert "Try next" not in captured.out  # its settings are not changed from the shell
        if code:
            assert captured.err.endswith("To continue: fax resume runs/experiment\n")
    rows = rows_of("runs/experiment/metrics.csv")
    assert [row["round"] for row in rows] == ["1", "2", "3", "4"]
    found = tomllib.loads(Path("runs/experiment/config.toml").read_text())
    assert found["experiment"] == "own_module:experiment"
    assert main(["evaluate", "runs/experiment"]) == 0
    assert "after 4 rounds" in capsys.readouterr().out
    for arguments, message in [
        (["run", "own_module:nothing"], "own_module:nothing is 3, expected a fax.experiment.Exper"),
        (["run", "own_module:other"], "the module own_module has no other."),
        (["run", "own_module:experiment", "--rounds", "3"], "is made by a program. Change rounds"),
        (["resume", "runs/experiment", "--rounds", "9"], "is made by a program. Change rounds"),
        (["evaluate", "runs/experiment", "--on", "train"], "can be evaluated on test, and not on"),
        (
            ["evaluate", "runs/experiment", "--each"],
            "of its own, and --each needs a task",
        ),
        (["sweep", "own_module:experiment", "--grid", "client.rate=1"], "is made by a program."),
    ]:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_a_loss_that_is_not_finite(small, capsys):
    assert main(["run", "small.toml", "--set", "client.rate=1e38", "--folder", "nan"]) == 1
    message = capsys.readouterr().err
    assert re.match(r"fax run: loss is \w+ in round \d. .*use --set on_nan=restore", message)


def test_a_folder_that_is_a_file(small, capsys):
    assert main(["run", "small.toml", "--folder", "small.toml"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("fax run: nothing can be written to folder (File exists). ")
    assert message.endswith(": small.toml\n")


# Messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu", "digits"], "fax: there is no command 'rnu'. Did you mean 'run'?"),
        (["run", "digits", "--round", "3"], "there is no option --round. Did you mean '--rounds'?"),
        (["run", "digits", "--rounds", "x"], "argument --rounds: invalid int value: 'x'"),
        (["run", "digitz"], "fax run: digitz is neither a task nor a TOML file, nor module:name."),
        (["run", "none.toml"], "fax run: there is no file none.toml."),
        (["run", "digits", "--set", "rate"], "'rate' is not of the form KEY=VALUE"),
        (["run", "digits", "--set", "client.rat=1"], "digits: there is no key client.rat for sgd."),
        (["run", "digits", "--algorithm", "scafold"], "Did you mean 'scaffold'?"),
        (
            [
                "run",
                "digits",
                "--algorithm",
                "scaffold",
                "--set",
                "algorithm=fedprox",
                "algorithm.mu=1",
            ],
            "--algorithm scaffold and --set algorithm=fedprox are both given",
        ),
        (["list", "algorithm"], "there is no list 'algorithm'. Did you mean 'algorithms'?"),
        (["resume", "nowhere"], "nowhere is not the folder of a run: it has no config.toml."),
        (
            ["evaluate", "nowhere", "--on", "tset"],
            "there is no data set 'tset'. Did you mean 'test'",
        ),
        (["evaluate", "nowhere", "--round", "last"], "'last' is neither a round nor best."),
        (["compare", "nowhere"], "fax compare: "),
        (["sweep", "digits", "--grid", "rounds=1,1"], "'rounds=1,1' has the same value twice."),
        (
            ["sweep", "digits", "--grid", "client.rate=x,y"],
            "client.rate is 'x', expected a number above 0",
        ),
        # What the grid has, the configuration need not have. All of its values are checked.
        (
            ["sweep", "digits", "--grid", "client.rate=.1,-.1"],
            "client.rate is -0.1, expected a number above 0",
        ),
        (
            ["sweep", "digits", "--algorithm", "fedprox", "--grid", "algorithm.mu=.1,-1"],
            "mu is -1, expected a number of at least 0",
        ),
        (
            ["report", "digits", "--on", "v5e"],
            "name is 'v5e', expected a generation and the number",
        ),
        (
            ["report", "digits", "--set", "mesh.clients=16"],
            "{'clients': 16} do not multiply",
        ),
        (["report", "digits", "--slices", "2"], "--slices is about TPUs. Pass --on"),
        (["run", "digits", "--algorithm", ""], "digits: algorithm '' does not exist. Choose from"),
        (["run", "digits", "--seed", f"{10**20}"], "expected an int from 0 to 2147483647."),
        (["run", "digits", "--set", "rounds=3", "rounds.x=4"], "needs a table, but rounds is 3."),
        (["run", "digits", "--set", "client.optimizer=[]"], "client.optimizer [] does not exist."),
        (
            ["run", "digits", "--set", "model=emnist_dense"],
            "fax.models: feature 'x' has shape (5, 64)",
        ),
        (["sweep", "digits", "--grid", "client.rate=,"], "'client.rate=,' has no values."),
        (["audit", "json:loads"], "json:loads needs arguments, expected a function without any."),
        (["completion", "fish"], "there is no shell 'fish'. Choose from bash, zsh."),
    ],
)
def test_mistakes(arguments, message, small, capsys):
    try:
        code = main(arguments)
    except SystemExit as left:
        code = left.code
    assert code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("config", "metrics", "arguments", "message"),
    [
        ("experiment = 3", None, "resume", "has a run that was started by a program"),
        ("experiment = 'x'", None, "evaluate", "experiment is 'x', which is not module:name."),
        ("task = 'digits'", None, "evaluate --round best", "folder='own' has no checkpoints"),
        ("a = = 3", None, "resume", "own/config.toml: this is not TOML: Invalid value"),
        ("a = = 3", "round,loss\n1,2\n", "compare", "own/config.toml: this is not TOML: Invalid"),
        ("", "loss\n1\n", "compare", "own/metrics.csv has no column round"),
        ("", "round,loss\n1,a\n", "compare", "row 1 has 'a' in the column 'loss', expected a n"),
        ("", "round,loss\n1,2\n,3\n", "compare", "row 2 has '' in the column 'round', expected"),
        ("", "round,loss\n1,2,3\n", "compare", "row 1 has more cells than there are columns."),
    ],
)
def test_folders_that_were_changed_by_hand(config, metrics, arguments, message, small, capsys):
    Path("own").mkdir()
    Path("own/config.toml").write_text(config)
    if metrics is not None:
        Path("own/metrics.csv").write_text(metrics)
    command, *others = arguments.split()
    assert main([command, "own", *others]) == 2
    assert message in capsys.readouterr().err


def test_runs_that_start_at_once_have_folders_of_their_own(small, capsys, monkeypatch):
    train, folders = _run.train, []

    def late(source, folder, **options):
        folders.append(str(folder))
        if len(folders) == 1:
            folder.mkdir(parents=True)  # by the other run, which keeps a lock there
            with open(folder / ".lock", "a") as lock:
                assert locked(lock)
                return train(source, folder, **options)
        return fax.experiment.Result(None, [])

    monkeypatch.setattr(_run, "train", late)
    assert main(["run", "small.toml", "--quiet"]) == 0
    assert folders == ["runs/small", "runs/small-2"]
    assert "Another run has just begun in runs/small.\n" in capsys.readouterr().out
    folders.clear()
    assert main(["run", "small.toml", "--quiet", "--folder", "runs/own"]) == 2
    assert "another run is using folder='runs/own'" in capsys.readouterr().err


def test_how_to_continue_after_an_interruption(small, capsys, monkeypatch):
    for arguments, interrupt, message in [
        (["run", "small.toml"], KeyboardInterrupt(), "fax run: interrupted."),  # the second Ctrl-C
        (["run", "small.toml"], KeyboardInterrupt("saved"), "To continue: fax resume runs/small"),
        (
            ["sweep", "small.toml", "--grid", "client.rate=.1"],
            KeyboardInterrupt("saved"),
            "To continue: run the same fax sweep again",
        ),
    ]:
        run = unittest.mock.Mock(side_effect=interrupt)
        monkeypatch.setattr(fax.experiment.Experiment, "run", run)
        assert main(arguments) == 130
        assert capsys.readouterr().err.endswith(f"{message}\n")
