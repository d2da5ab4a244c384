"""The examples as scripts: how they are run, and what is read from what they print."""

import os
import re
import subprocess
import sys
from pathlib import Path

import fax

PACKAGE = Path(fax.__file__).parents[1]
EXAMPLES = Path(__file__).parents[1] / "examples"


def run_in(folder, *args, timeout=120):
    """Runs Python in a folder, where warnings are errors, and returns what it printed."""
    path = os.pathsep.join([str(PACKAGE), str(EXAMPLES)])
    done = subprocess.run(
        [sys.executable, "-W", "error", *map(str, args)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern, text):
    """The groups of the one place where the pattern is found, as floats."""
    (found,) = re.finditer(pattern, text)
    return [float(x) for x in found.groups()]


def is_figure(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
