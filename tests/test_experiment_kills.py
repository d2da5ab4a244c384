"""Runs whose processes are killed at random moments, also while they save, and then go on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ENV

HERE = Path(__file__).parent
KILLS = 100


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_ends_as_one_that_is_not(processes, tmp_path):
    done = subprocess.run(
        [sys.executable, HERE / "kills.py", *map(str, (tmp_path, KILLS, processes, KILLS))],
        env=ENV | {"PYTHONPATH": os.pathsep.join([ENV["PYTHONPATH"], str(HERE)])},
        capture_output=True,
        text=True,
        timeout=100 + 15 * KILLS,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    whole, killed, counts = map(json.loads, lines)
    assert whole == killed
    assert len(whole["metrics"].splitlines()) == 13
    of_loss = [step for step, name, _ in whole["scalars"] if name == "loss"]
    assert of_loss == list(range(1, 13))
    assert counts["killed"] == KILLS
    assert counts["in a checkpoint"] > 5
