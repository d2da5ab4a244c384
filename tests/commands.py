"""The command `fax` in processes of its own, and a small experiment for it."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import jax
from scripts import PACKAGE

from fax.experiment import _toml

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


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def small_in(folder, monkeypatch):
    """Makes a folder with a small configuration the one in which the command runs."""
    monkeypatch.chdir(folder)
    Path("small.toml").write_text(_toml.dumps(SMALL))
    return folder
