"""The example of private training keeps what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import fax

PACKAGE = Path(fax.__file__).parents[1]
EXAMPLES = Path(__file__).parents[1] / "examples"


def test_private_digits_keeps_its_promise(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / "private_digits.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PACKAGE), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    line = r"noise multiplier +([\d.]+): epsilon +([\d.inf]+), test accuracy ([\d.]+)%"
    noise, costs, accuracies = zip(
        *(map(float, m.groups()) for m in re.finditer(line, done.stdout))
    )
    assert len(noise) == 7
    for z, cost in zip(noise, costs):
        assert abs(fax.aggregators.epsilon(z, 40, 1e-4) - cost) <= 0.005 or z == 0
    (last,) = re.finditer(
        r"test accuracy ([\d.]+)% at epsilon ([\d.]+), delta 0.0001, "
        r"and ([\d.]+)% without privacy, see runs/private_digits.png",
        done.stdout,
    )
    private, cost, public = map(float, last.groups())
    assert cost < 3
    assert private > 90
    assert public > 92
    assert accuracies[0] == public
    assert accuracies[-1] < 75  # so much noise has a price
    figure = tmp_path / "runs" / "private_digits.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert figure.stat().st_size > 10_000
