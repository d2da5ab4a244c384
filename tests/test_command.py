"""The command `fax`: what it prints, its exit codes, and the configurations that it runs."""

import csv
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import typing
import unittest.mock
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from scripts import PACKAGE, is_figure

import fax
from fax.command import _sweep as _command_sweep
from fax.command import _values, main
from fax.command._parser import KINDS, make_parser
from fax.experiment import Batches, Config, _build, _catalog, _config, _sweep, _toml
from fax.tasks import _settings

ROOT = Path(__file__).parents[1]
DEVICES = len(jax.devices())  # from now on the command cannot choose another number
# Small enough that a round is compiled quickly.
SMALL = {
    "task": {"name": "digits", "clients": 12},
    "model": {"name": "dense", "sizes": [64, 10]},
    "cohorts": {"clients": 8, "epochs": 1},
    "rounds": 4,
    "every": 2,
}
OPTIONS = {
    "agnostic_fedavg": {"num_domains": 2, "domain_learning_rate": 0.1},
    "clip_by_norm": {"clip_norm": 1.0},
    "ditto": {"mu": 0.1},
    "dp_ftrl": {"clip_norm": 1.0, "noise_multiplier": 1.0, "separation": 2, "participations": 2},
    "error_feedback": {"transformation": {"name": "top_k", "k": 0.1}},
    "feddyn": {"alpha": 0.1},
    "fedper": {"personal": "layers/1"},
    "fedprox": {"mu": 0.1},
    "gaussian": {"clip_norm": 1.0, "noise_multiplier": 1.0},
    "hadamard": {"transformation": {"name": "uniform_quantization", "levels": 4}},
    "hyp_cluster": {"num_clusters": 2},
    "krum": {"byzantine": 1},
    "laplace": {"clip_norm": 1.0, "noise_multiplier": 1.0},
    "multi_krum": {"byzantine": 1, "select": 2},
    "power_sgd": {"rank": 2},
    "qfedavg": {"q": 1.0, "lipschitz": 10.0},
    "secure_sum": {"max_value": 1.0, "max_weight": 100.0},
    "streaming_diloco": {"steps": 2, "fragments": 1},
    "top_k": {"k": 0.1},
    "trimmed_mean": {"count": 1},
    "uniform_quantization": {"levels": 4},
}


def run(folder, *args, code=0):
    """Runs the command in a process of its own, and returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "fax", *map(str, args)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(PACKAGE), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with a small configuration, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(_toml.dumps(SMALL))
    return tmp_path


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# From end to end


def test_a_run_from_the_shell_and_what_can_be_done_with_it(small):
    printed = run(small, "run", "small.toml", "--folder", "runs/a", "--set", "client.rate=0.05")
    first, last, *figures, title, one, two, three = printed.splitlines()
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
    assert "rounds was 4, and is 3" in capsys.readouterr().err
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
    assert f"runs/a, train data, after {best['round']} rounds:" in capsys.readouterr().out

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
        (["sweep", "own_module:experiment", "--grid", "client.rate=1"], "is made by a program."),
    ]:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_a_loss_that_is_not_finite(small, capsys):
    assert main(["run", "small.toml", "--set", "client.rate=1e38", "--folder", "nan"]) == 1
    message = capsys.readouterr().err
    assert re.match(r"fax run: loss is \w+ in round \d. .*use --set on_nan=restore", message)


# Sweeps


def test_a_sweep_finds_what_single_runs_find(small, capsys):
    grid = ["client.rate=.02,.2", "cohorts.batch_size=8"]
    assert main(["sweep", "small.toml", "--grid", *grid, "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "Part 1 of 1: cohorts.batch_size=8, 2 at once" in printed
    rows = rows_of("runs/small-sweep/sweep.csv")
    assert [(row["client.rate"], row["cohorts.batch_size"]) for row in rows] == [
        ("0.02", "8"),
        ("0.2", "8"),
    ]
    changes = {"client": {"rate": 0.2}, "cohorts": {"batch_size": 8}}
    with jax.set_mesh(fax.sharding.make_mesh(clients=-1)):
        single = _build.build(_config.configure("small.toml", changes))
        with single.cohorts:
            history = single.run().history
    for name in ("loss", "accuracy", "test/loss", "test/accuracy"):
        assert float(rows[1][name]) == pytest.approx(history[-1][name], rel=1e-4)
    assert float(rows[0]["loss"]) > 1.1 * float(rows[1]["loss"])
    assert "To train with it: fax run small.toml --set cohorts.batch_size=8 client.rate=0.2\n" in (
        printed
    )
    (marked,) = [line for line in printed.splitlines() if line.startswith("*")]
    assert marked.split()[:3] == ["*", "8", "0.2"]

    # Run again, it finds that everything is done. Another grid in its folder is refused.
    assert main(["sweep", "small.toml", "--grid", *grid, "--quiet"]) == 0
    assert capsys.readouterr().out == printed
    assert rows_of("runs/small-sweep/sweep.csv") == rows
    assert main(["sweep", "small.toml", "--grid", "client.rate=.02,.3", grid[1]]) == 2
    assert "grid.client.rate was [0.02, 0.2], and is [0.02, 0.3]" in capsys.readouterr().err
    assert main(["resume", "runs/small-sweep/cohorts.batch_size=8"]) == 2
    assert "is a part of a sweep. Run the same fax sweep again" in capsys.readouterr().err


def test_the_parts_of_a_sweep():
    values = {
        "cohorts.clients": [4, 8],
        "client.rate": [0.1, 1],
        "algorithm": ["fedavg", "scaffold"],
    }
    plan = _command_sweep._plan(SMALL, values, "small.toml")
    assert [fixed for fixed, _, _ in plan] == [
        {"cohorts.clients": clients, "algorithm": algorithm}
        for clients in (4, 8)
        for algorithm in ("fedavg", "scaffold")
    ]
    for fixed, config, settings in plan:
        assert config.cohorts.clients == fixed["cohorts.clients"]
        assert config.algorithm == {"name": fixed["algorithm"]}
        assert settings == [{"client.rate": 0.1}, {"client.rate": 1}]
    # An optimizer is named in one place, and its rates in another.
    values = {"client.optimizer": ["adam"], "client.rate": [0.1]}
    (part,) = _command_sweep._plan(SMALL, values, "small.toml")
    assert part[1].client == {"optimizer": "adam", "rate": 0.1}


def test_what_can_be_traced():
    config = _config.configure(SMALL, {"algorithm": {"name": "fedprox", "mu": 0.1}})
    for key, values, expected in [
        ("client.rate", [0.1, 1], True),
        ("server.rate", [0.1], True),
        ("algorithm.mu", [0.0, 1.0], True),
        ("algorithm.vectorize", [1, 2], False),
        ("algorithm.name", ["fedavg"], False),
        ("client.momentum", [0.9], False),
        ("client.optimizer", ["adam"], False),
        ("cohorts.clients", [4, 8], False),
        ("rounds", [1, 2], False),
        ("client.rate", ["a", "b"], False),
    ]:
        assert _sweep.traceable(config, key, values) is expected, key
    private = {"aggregator": {"name": "gaussian", **OPTIONS["gaussian"]}}
    assert not _sweep.traceable(_config.configure(SMALL, private), "client.rate", [0.1])
    config = _config.configure(SMALL, {"algorithm": "scaffold"})
    assert not _sweep.traceable(config, "server.rate", [0.1])  # it has none to change


# Configurations


def configurations():
    for name in _catalog.catalog("tasks"):
        yield {"task": name}
    for name in _catalog.catalog("models"):
        yield {"task": "digits", "model": name}
    for kind in ("algorithm", "aggregator"):
        for name in _catalog.catalog(f"{kind}s"):
            yield {"task": "digits", kind: {"name": name, **OPTIONS.get(name, {})}}
    for name in _catalog.catalog("optimizers"):
        yield {"task": "digits", "server": {"optimizer": name, "rate": 0.1}}


def test_configurations_survive_a_file():
    for tables in configurations():
        config = _config.configure(tables)
        written = _toml.dumps(config.to_dict())
        assert _config.configure(tomllib.loads(written)) == config


def test_every_task_algorithm_and_aggregator_can_be_configured():
    task = _build.load(_config.configure(SMALL))
    params = task.model.init(jax.random.key(0))
    refused = {"fedbn": "matches nothing"}  # the models of tasks have no batch norm
    for tables in configurations():
        config = _config.configure(tables)
        name = config.algorithm["name"]
        if "algorithm" in tables and name in refused:
            algorithm = _build.make_algorithm(config, task)
            with pytest.raises(ValueError, match=refused[name]):
                algorithm.init(params)
        elif "algorithm" in tables or "aggregator" in tables or "server" in tables:
            algorithm = _build.make_algorithm(config, task)
            start = params
            if name == "hyp_cluster":
                start = jax.tree.map(lambda x: np.stack([x, x + 1]), params)
            if tables.get("algorithm", {}).get("name") == "fedper":
                continue  # its layers are those of the task's model
            # Private aggregators draw a secret key, which cannot be traced.
            traced = not any(
                "key" in _catalog.parameters("aggregators", own["name"])
                for own in config.aggregator
            )
            state = (
                functools.partial(jax.eval_shape, algorithm.init) if traced else algorithm.init
            )(start)
            found = jax.eval_shape(algorithm.params, state)
            assert jax.tree.structure(found) == jax.tree.structure(params)
        else:
            name = config.task["name"]
            settings = _settings.tuned(name, _config._first_model(name))
            assert config.cohorts.clients == settings.clients
            assert config.client == settings.client


def test_settings_go_where_they_belong():
    config = _config.configure(
        SMALL,
        {
            "algorithm": {"name": "fedprox", "mu": 0.5},
            "client": {"rate": 0.5},
            "server": {"optimizer": "adam", "rate": 0.25, "b1": 0.5},
            "aggregator": [{"name": "clip_by_norm", "clip_norm": 0.125}, "median"],
        },
    )
    task = _build.load(config)
    params = task.model.init(jax.random.key(0))
    aggregator = fax.aggregators.chain(
        fax.aggregators.clip_by_norm(0.125), fax.aggregators.median()
    )
    expected = fax.algorithms.fedprox(
        task.model.loss,
        optax.sgd(0.5),
        optax.adam(0.25, b1=0.5),
        mu=0.5,
        aggregator=aggregator,
    )
    found = _build.make_algorithm(config, task)
    with _build.make_cohorts(config, task) as cohorts:
        cohort = next(cohorts)
    one, other = (
        str(jax.make_jaxpr(own.round)(jax.eval_shape(own.init, params), cohort))
        for own in (found, expected)
    )
    assert one == other
    changed = _config.configure(config.to_dict(), {"server": {"b1": 0.75}})
    third = _build.make_algorithm(changed, task)
    assert str(jax.make_jaxpr(third.round)(jax.eval_shape(third.init, params), cohort)) != one


def test_what_a_named_optimizer_replaces():
    # Without a name the task's optimizer is changed, with a name it is replaced.
    changed = _config.configure("digits", {"server": {"rate": 0.3}})
    assert changed.server == {"optimizer": "sgd", "rate": 0.3, "momentum": 0.9}
    replaced = _config.configure("digits", {"server": {"optimizer": "sgd", "rate": 1.0}})
    assert replaced.server == {"optimizer": "sgd", "rate": 1.0}
    # Algorithms with a step of their own at the server do not get what was tuned for FedAvg.
    assert _config.configure("digits", {"algorithm": "scaffold"}).server is None
    dyn = {"name": "feddyn", "alpha": 0.1}
    assert _config.configure("digits", {"algorithm": dyn}).server is None
    none = _config.configure("digits", {"server": "none"})
    assert none.server == {"optimizer": "sgd", "rate": 1.0}


WRONG = {
    "a key": ({"clients": 3}, "there is no key clients. Did you mean 'client'?"),
    "a key in a table": (
        {"cohorts": {"client": 3}},
        "there is no key cohorts.client. Did you mean 'cohorts.clients'?",
    ),
    "an option": (
        {"client": {"momentun": 0.9}},
        "there is no key client.momentun for sgd. Did you mean 'client.momentum'?",
    ),
    "a task": ({"task": "digit"}, "task 'digit' does not exist. Did you mean 'digits'?"),
    "an algorithm": ({"algorithm": "fedporx"}, "Did you mean 'fedprox'?"),
    "an aggregator": ({"aggregator": "medain"}, "Did you mean 'median'?"),
    "a part": (
        {"aggregator": {"name": "hadamard", "transformation": "topk"}},
        "aggregator.transformation 'topk' does not exist. Did you mean 'top_k'?",
    ),
    "an optimizer": (
        {"server": {"optimizer": "adm", "rate": 1.0}},
        "server.optimizer 'adm' does not exist. Did you mean 'adam'?",
    ),
    "no rate": ({"server": {"optimizer": "adam"}}, "server.rate is missing, the learning rate of"),
    "no option": ({"algorithm": "fedprox"}, "algorithm.mu is missing. fedprox needs it"),
    "a string": ({"rounds": "many"}, "rounds is 'many', expected an int."),
    "a float": ({"cohorts": {"clients": 2.5}}, "cohorts.clients is 2.5, expected an int."),
    "a bool": ({"seed": True}, "seed is True, expected an int."),
    "no bool": ({"cohorts": {"drop_remainder": 1}}, "drop_remainder is 1, expected true or false."),
    "no table": ({"client": 0.1}, "client is 0.1, expected a table, such as"),
    "no name": ({"algorithm": {"mu": 0.1}}, "expected a name, or a table with a name and options"),
    "an axis": ({"mesh": {"clients": "all"}}, "mesh.clients is 'all', expected an int."),
    "momentum": (
        {"algorithm": "scaffold", "client": {"momentum": 0.9}},
        "but scaffold takes a learning rate there",
    ),
    "a server": (
        {"algorithm": "papa", "server": {"rate": 1.0}},
        "papa has no optimizer at the server. Leave out server.",
    ),
    "a budget": (
        {"aggregator": "median", "budget": {"epsilon": 1.0, "delta": 1e-5}},
        "budget needs an aggregator that ends with gaussian or laplace",
    ),
    "no delta": (
        {"aggregator": {"name": "gaussian", **OPTIONS["gaussian"]}, "budget": {"epsilon": 1.0}},
        "budget.delta is None, expected a number above 0.",
    ),
    "no aggregator": ({"algorithm": "papa_2", "aggregator": "mean"}, "papa_2 takes no aggregator."),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_configurations(name):
    change, message = WRONG[name]
    tables = _config.merged({"task": "digits"}, change)
    with pytest.raises(ValueError, match=re.escape(message)) as found:
        _config.configure(tables, where="my.toml")
    assert str(found.value).startswith("my.toml: ")


def test_values_on_the_command_line():
    found = _values.tables(
        ["client.rate=.5", "rounds=3", "a.b=true", "a.c=x=y", "m.sizes=[64, 10]", "n=1e3"]
    )
    assert found == {
        "client": {"rate": 0.5},
        "rounds": 3,
        "a": {"b": True, "c": "x=y"},
        "m": {"sizes": [64, 10]},
        "n": 1000.0,
    }
    for both in (["algorithm=fedprox", "algorithm.mu=1"], ["algorithm.mu=1", "algorithm=fedprox"]):
        assert _values.tables(both) == {"algorithm": {"name": "fedprox", "mu": 1}}
    assert _values.grid(["a.b=.1,1", "c=x,y"]) == {"a.b": [0.1, 1], "c": ["x", "y"]}


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
            "client: rate is 'x', expected a number",
        ),
        (
            ["report", "digits", "--on", "v5e"],
            "name is 'v5e', expected a generation and the number",
        ),
        (
            ["report", "digits", "--set", "mesh.clients=16"],
            "{'clients': 16} do not multiply",
        ),
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


# What the other commands print


def test_lists_have_a_line_for_each_name(capsys):
    for kind in KINDS:
        assert main(["list", kind]) == 0
        printed = capsys.readouterr().out
        for name in _catalog.catalog(kind):
            (line,) = re.findall(rf"^{name}  +(.*)$", printed, re.M)
            assert line
            assert line[0].isupper() or line.startswith(("q-", "The"))
    main(["list", "algorithms"])
    printed = capsys.readouterr().out
    assert re.search(r"^fedprox .*\n +mu \(required\), vectorize$", printed, re.M)


def test_a_report_is_that_of_a_round(small, capsys):
    assert main(["report", "small.toml"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^{DEVICES} devices \(cpu\), mesh clients={DEVICES}", printed)
    (size,) = re.findall(r"clients +all-reduce +float32 +([\d.]+) KiB", printed)
    assert float(size) == pytest.approx(4 * 650 / 1024, abs=0.1)  # the model, and a few metrics
    assert "Padding: " in printed
    assert not Path("runs").exists()


AUDITED = """
import numpy as np, optax
import fax

def program():
    algorithm = fax.algorithms.fedavg(lambda w, batch, key: (batch["x"] - w) ** 2, optax.sgd(0.1))
    data = fax.data.InMemory({str(i): {"x": np.ones(3)} for i in range(6)})
    with fax.data.cohorts(data, clients=4, batch_size=3, resident=False) as cohorts:
        return algorithm.round, (algorithm.init(np.float32(0)), next(cohorts))

def plan():
    fn, args = program()
    return fax.deploy.cut(fn, *args)

@fax.program(clients=2)
def collected(data):
    return fax.collect(fax.map(lambda x: 2 * x, data["batches"]))

def rows():
    return collected, [{"batches": np.ones(2)}]
"""


def test_an_audit_is_that_of_the_plan(small, capsys, monkeypatch):
    Path("audited_module.py").write_text(AUDITED)
    monkeypatch.syspath_prepend(str(small))
    for name in ("program", "plan"):
        assert main(["audit", f"audited_module:{name}"]) == 0
    printed = capsys.readouterr().out
    import audited_module

    assert printed == 2 * f"{audited_module.plan().audit()}\n"
    assert re.search(r"^  \[1\]\.batches\['x'\] +only through sums over 4$", printed, re.M)
    for name, message in [
        ("audited_module", "'audited_module' is not of the form module:name."),
        ("audited_module:other", "the module audited_module has no other."),
        ("fax:__version__", "', expected a function that returns a program and its arguments"),
        ("audited_module:rows", "audited_module.py"),  # the line that needs the rows
    ]:
        assert main(["audit", name]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert not captured.out


def test_the_doctor_says_what_is_there_and_what_is_missing(monkeypatch, capsys):
    versions = {"jax": jax.__version__, "optax": optax.__version__}

    def version(name):
        if name == "orbax-checkpoint":
            raise importlib.metadata.PackageNotFoundError
        return versions.get(name, "1.0")

    required = ["jax>=0.1", 'orbax-checkpoint>=0.11 ; extra == "experiment"', "x; extra == 'test'"]
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)
    monkeypatch.setenv("FAX_CACHE", "/nowhere/at/all")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"fax {fax.__version__}, Python {platform.python_version()} at ")
    assert re.search(rf"^  jax +{re.escape(jax.__version__)}$", printed, re.M)
    assert re.search(r"^  orbax-checkpoint +not installed$", printed, re.M)
    assert f"Devices: {DEVICES} (cpu), " in printed
    assert "Data of tasks: /nowhere/at/all, 0.00 GiB, " in printed
    end = "Missing:\n  orbax-checkpoint: pip install 'fax-jax[experiment]'\n"
    assert printed.endswith(end)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell, capsys, tmp_path):
    assert main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    for word in ("resume", "--algorithm", "scaffold", "uniform_quantization", "pystdlib"):
        assert word in script.read_text()
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", script], check=True)
    if shell == "bash":
        for words, expected in [
            ("fax ru", {"run"}),
            ("fax run dig", {"digits"}),
            ("fax run digits --algorithm scaf", {"scaffold"}),
            ("fax list mo", {"models"}),
        ]:
            ask = (
                f"source {script}; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); "
                'complete -p fax > /dev/null; _shtab_fax; echo "${COMPREPLY[@]}"'
            )
            done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
            assert set(done.stdout.split()) == expected, words


HELP = """
import sys
from fax.command import main
for command in ["", *{commands}]:
    try:
        main([*command.split(), "--help"])
    except SystemExit as left:
        assert left.code == 0
    print("END")
assert not {{"jax", "numpy"}} & sys.modules.keys()

# Without an extra, the message says how to install it.
sys.modules["flax"] = None
assert main(["list", "tasks"]) == 2
"""


def test_help_is_there_at_once_and_has_examples(tmp_path):
    _, commands = make_parser()
    code = HELP.format(commands=list(commands))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PACKAGE), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pip install 'fax-jax[" in done.stderr
    first, *each = done.stdout.split("END\n")[:-1]
    assert "exit codes:" in first
    for (name, parser), text in zip(commands.items(), each, strict=True):
        assert re.search(rf"^  +{name} +\w+", first, re.M), name
        assert text.startswith(f"usage: fax {name}")
        # The examples can be parsed.
        for line in re.findall(r"^  fax (.*)$", text, re.M):
            command, *rest = shlex.split(line.partition("  ")[0])
            assert command == name
            if "*" not in line:
                parser.parse_args(rest)


def test_the_page_lists_the_keys_and_the_commands():
    page = (ROOT / "docs" / "command.md").read_text()
    _, commands = make_parser()
    for name in commands:
        assert f"`fax {name}" in page, name
    for line in re.findall(r"^    (?:\$ )?fax (.*)$", page, re.M):
        name, *arguments = shlex.split(line, comments=True)
        if name in commands and not {"...", ">"} & {*arguments}:
            commands[name].parse_args(arguments)
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.S)
    assert len(_config.configure(tomllib.loads(example)).aggregator) == 2
    listed = re.findall(r"^\| `([\w.]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", page, re.M)
    assert [tuple(map(str.strip, row)) for row in listed] == list(keys())


def keys():
    """The keys of a configuration: their names, types, defaults, and what they mean."""
    for prefix, schema in (("", Config), ("cohorts.", Batches)):
        hints = typing.get_type_hints(schema, include_extras=True)
        for field in dataclasses.fields(schema):
            kind, what = typing.get_args(hints[field.name])
            if kind is Batches:
                continue
            default = "the task's" if field.default is dataclasses.MISSING else shown(field.default)
            default = DEFAULTS.get(field.name, default)
            name = "table" if field.name in ("client", "server", "budget", "mesh") else TYPES[kind]
            yield prefix + field.name, name, default, what


DEFAULTS = {
    "task": "required",
    "algorithm": '`"fedavg"`',
    "aggregator": "the mean",
    "budget": "none",
    "mesh": "all devices",
}
TYPES = {
    int: "int",
    int | None: 'int or `"none"`',
    str: "string",
    bool: "bool",
    dict[str, typing.Any]: "name or table",
    dict[str, typing.Any] | None: "name or table",
    list[dict[str, typing.Any]]: "name, table, or a list of these",
}


def shown(default):
    return '`"none"`' if default is None else f"`{json.dumps(default)}`"
