"""What the commands print that train nothing, and their help."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import jax
import optax
import pytest
from commands import DEVICES, small_in
from scripts import PACKAGE

import fax
from fax.command import main
from fax.command._parser import KINDS, make_parser
from fax.experiment import Batches, Config, _catalog, _config

ROOT = Path(__file__).parents[1]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with a small configuration, in which the command runs."""
    return small_in(tmp_path, monkeypatch)


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
    # A run needs the old state until the new one is there, so neither takes the other's place.
    assert re.search(r"in place of arguments +0 B", printed)
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
