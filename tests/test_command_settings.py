"""Sweeps, and the configurations that the command runs."""

import argparse
import functools
import re
import shlex
import tomllib
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from commands import OPTIONS, SMALL, rows_of, small_in
from scripts import is_figure

import fax
from fax.command import _run as _command_run
from fax.command import _sweep as _command_sweep
from fax.command import _values, main
from fax.experiment import _build, _catalog, _config, _sweep, _toml
from fax.tasks import _settings


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with a small configuration, in which the command runs."""
    return small_in(tmp_path, monkeypatch)


# Sweeps


def test_a_sweep_finds_what_single_runs_find(small, capsys):
    grid = ["client.rate=.02,.2", "cohorts.clients=4"]
    assert main(["sweep", "small.toml", "--grid", *grid, "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "Part 1 of 1: cohorts.clients=4, 2 at once" in printed
    rows = rows_of("runs/small-sweep/sweep.csv")
    assert [(row["client.rate"], row["cohorts.clients"]) for row in rows] == [
        ("0.02", "4"),
        ("0.2", "4"),
    ]
    changes = {"client": {"rate": 0.2}, "cohorts": {"clients": 4}}
    with jax.set_mesh(fax.sharding.make_mesh(clients=-1)):
        single = _build.build(_config.configure("small.toml", changes))
        with single.cohorts:
            history = single.run().history
    for name in ("loss", "accuracy", "test/loss", "test/accuracy"):
        assert float(rows[1][name]) == pytest.approx(history[-1][name], rel=1e-4)
    assert float(rows[0]["loss"]) > 1.1 * float(rows[1]["loss"])
    assert "To train with it: fax run small.toml --set cohorts.clients=4 client.rate=0.2\n" in (
        printed
    )
    (marked,) = [line for line in printed.splitlines() if line.startswith("*")]
    assert marked.split()[:3] == ["*", "4", "0.2"]

    # Run again, it finds that everything is done. Another grid in its folder is refused.
    assert main(["sweep", "small.toml", "--grid", *grid, "--quiet"]) == 0
    assert capsys.readouterr().out == printed
    assert rows_of("runs/small-sweep/sweep.csv") == rows
    assert main(["sweep", "small.toml", "--grid", "client.rate=.02,.3", grid[1]]) == 2
    error = capsys.readouterr().err
    assert "client.rate was [0.02, 0.2], and is [0.02, 0.3]. Pass another --folder" in error
    for folder in ("runs/small-sweep/cohorts.clients=4", "runs/small-sweep"):
        assert main(["resume", folder]) == 2
        assert "sweep. Run the same fax sweep again" in capsys.readouterr().err

    # A part that cannot be trained does not hide the results of those before it.
    Path("runs/small-sweep/sweep.csv").unlink()
    assert main(["sweep", "small.toml", "--grid", grid[0], grid[1] + ",1000", "--quiet"]) == 2
    shown = capsys.readouterr()
    assert "fax sweep: part 2, cohorts.clients=1000: fax.data.cohorts: clients is" in shown.err
    assert marked in shown.out
    assert rows_of("runs/small-sweep/sweep.csv") == rows


def test_a_sweep_chooses_the_smallest_error_and_shows_all_results(capsys, tmp_path):
    fixed = {"cohorts.drop_remainder": True}
    rows = [
        ({"client.rate": x, **fixed}, {"test/mae": x, "test/auc": 1, "clip": 1}) for x in (0.3, 0.1)
    ]
    options = {"algorithm": "fedprox", "aggregator": None, "seed": 3, "rounds": 2}
    settings = ["algorithm.mu=.1", "client.rate=9", "task.model=two words"]
    arguments = argparse.Namespace(by="test/mae", source="my own.toml", set=settings, **options)
    _command_sweep._show(arguments, tmp_path, rows)
    text = capsys.readouterr().out
    assert text.split()[:4] == ["client.rate", "cohorts.drop_remainder", "test/mae", "test/auc"]
    (last,) = [line for line in text.splitlines() if line.startswith("Best by test/mae")]
    words = shlex.split(last.partition("To train with it: ")[2])
    assert words[:3] == ["fax", "run", "my own.toml"]
    assert words[3:8] == ["--algorithm", "fedprox", "--seed", "3", "--set"]
    best = ["client.rate=0.1", "cohorts.drop_remainder=true"]  # as --set takes them
    assert words[8:] == ["algorithm.mu=.1", "task.model=two words", *best]
    assert f"Figure: {tmp_path / 'sweep.png'}" in text
    assert is_figure(tmp_path / "sweep.png")


def test_the_algorithm_to_try_next_takes_the_aggregator():
    private = {"name": "gaussian", "clip_norm": 1.0, "noise_multiplier": 1.0}
    found = []
    for algorithm, aggregator in (("fedavg", []), ("fedavg", private), ("fedprox", private)):
        options = {"name": algorithm, **OPTIONS.get(algorithm, {})}
        own = {**SMALL, "algorithm": options, "aggregator": aggregator}
        config = _config.configure(own)
        lines = _command_run._next("small.toml", Path("runs/a b"), config, " --seed 3")
        line = shlex.split(lines[1])
        assert line[-4:-2] == ["--seed", "3"]
        assert shlex.split(lines[2])[2:] == ["runs/a b", line[-1]]
        name, *other = line[line.index("--algorithm") + 1 : line.index("--seed")]
        changes = {"algorithm": {"name": name, **({"mu": 0.1} if other else {})}}
        _build.build(_config.configure({**own, **changes}))  # refuses what does not go together
        found.append([name, *other])
    mu = ["--set", "algorithm.mu=0.1"]
    assert found == [["scaffold"], ["fedprox", *mu], ["fedavg"]]


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
    # A configuration does not change with the dict that it was made of.
    private = {"name": "gaussian", **OPTIONS["gaussian"]}
    tables = {"task": "digits", "aggregator": private, "budget": {"epsilon": 1.0, "delta": 1e-5}}
    config = _config.configure(tables)
    tables["budget"]["epsilon"] = 2.0
    assert config.budget["epsilon"] == 1.0


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
    "no option of an aggregator": (
        {"aggregator": {"name": "error_feedback", "transformation": "top_k"}},
        "aggregator.transformation.k is missing. top_k needs it, and has no default for it.",
    ),
    "no rate above 0": ({"client": {"rate": -0.1}}, "client.rate is -0.1, expected a number above"),
    "no rounds": ({"rounds": 0}, "rounds is 0, expected an int of at least 1."),
    "no clients": ({"cohorts": {"clients": 0}}, "cohorts.clients is 0, expected an int of"),
    "a seed": ({"seed": -1}, "seed is -1, expected an int from 0 to 2147483647."),
    "a policy": ({"on_nan": "skip"}, "on_nan is 'skip', expected 'stop', 'restore' or 'ignore'."),
    "no option": ({"algorithm": "fedprox"}, "algorithm.mu is missing. fedprox needs it"),
    "a string": ({"rounds": "many"}, "rounds is 'many', expected an int."),
    "a float": ({"cohorts": {"clients": 2.5}}, "cohorts.clients is 2.5, expected an int."),
    "a bool": ({"seed": True}, "seed is True, expected an int."),
    "no bool": ({"cohorts": {"drop_remainder": 1}}, "drop_remainder is 1, expected true or false."),
    "no table": ({"client": 0.1}, "client is 0.1, expected a table, such as"),
    "no model": ({"model": False}, "model is False, expected a name, or a table with a name and"),
    "an empty model": ({"model": {}}, "model is {}, expected a name, or a table with a name and"),
    "no name": ({"algorithm": {"mu": 0.1}}, "algorithm is {'mu': 0.1}, expected a name, or"),
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
