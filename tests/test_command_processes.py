"""The command in several processes, as a launcher starts them."""

import csv
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
from processes import ENV, free_port

from fax.command import _processes, main
from fax.command._errors import CommandError

MODULE = """
import os, pathlib, signal

import numpy as np
import optax

import fax

class Fails:
    def after_round(self, run):
        first = pathlib.Path("first")
        if os.environ["JAX_PROCESS_ID"] == "1" and run.round == 3 and first.exists():
            first.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

def experiment():
    loss = lambda params, batch, key: (batch["x"] - params) ** 2
    data = fax.data.InMemory({str(i): {"x": np.arange(i + 1.0)} for i in range(8)})
    cohorts = fax.data.cohorts(data, clients=4, batch_size=8)
    algorithm = fax.algorithms.fedavg(loss, optax.sgd(0.1))
    options = {"every": 2, "callbacks": [Fails()]}
    return fax.experiment.Experiment(algorithm, (0.0,), cohorts, rounds=4, options=options)
"""


def of_gloo(line):
    """Whether Gloo has printed a line, whose threads may put a number of theirs on the next one."""
    return "[Gloo]" in line or line.strip().isdigit()


def run(folder, *arguments):
    """The exit codes of two processes, and what they printed."""
    address = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "fax", *arguments],
            cwd=folder,
            env=ENV | address | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        printed = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    outs = ["".join(x for x in out.splitlines(True) if not of_gloo(x)) for out, _ in printed]
    return [process.returncode for process in processes], outs, [error for _, error in printed]


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.long)])
def test_processes_run_together_and_end_together(killed, tmp_path):
    (tmp_path / "small.py").write_text(MODULE)
    command = ["run", "small:experiment"]
    if killed:
        (tmp_path / "first").touch()
        codes, outs, errors = run(tmp_path, *command)
        assert codes == [3, -9], errors
        assert "process 1" in errors[0]
        assert "died" in errors[0]
        command = ["resume", "runs/experiment"]
    codes, outs, errors = run(tmp_path, *command)
    assert codes == [0, 0], errors
    assert "After 4 rounds" in outs[0]
    assert outs[1] == ""
    folder = tmp_path / "runs" / "experiment"
    environment = tomllib.loads((folder / "config.toml").read_text())["environment"]
    assert environment["devices"]["processes"] == 2
    with open(folder / "metrics.csv", newline="") as file:
        assert [row["round"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]


def test_an_error_in_one_process_ends_all(monkeypatch, capsys):
    """fax.sharding tells the others of an exception that nobody catches."""
    arguments = ["resume", "nowhere"]
    assert main(arguments) == 2
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(CommandError) as found:
        main(arguments)
    _processes._unless_printed(CommandError, found.value, None)
    said = "fax resume: nowhere is not the folder of a run: it has no config.toml.\n"
    assert capsys.readouterr().err == 2 * said


def test_a_launcher_with_wrong_variables(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    assert main(["run", "digits", "--folder", str(tmp_path / "a")]) == 2
    assert "the environment has JAX_NUM_PROCESSES='two', expected an int" in capsys.readouterr().err
    assert not Path(tmp_path, "a").exists()
