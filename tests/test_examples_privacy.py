"""The example of private training keeps what it promises."""

import re

import pytest
from scripts import EXAMPLES, is_figure, numbers

import fax


@pytest.mark.long
def test_private_digits_keeps_its_promise(run, tmp_path):
    printed = run(EXAMPLES / "private_digits.py")
    line = r"noise multiplier +([\d.]+): epsilon +([\d.inf]+), test accuracy ([\d.]+)%"
    noise, costs, accuracies = zip(*(map(float, m.groups()) for m in re.finditer(line, printed)))
    assert len(noise) == 7
    for z, cost in zip(noise, costs):
        assert abs(fax.aggregators.epsilon(z, 40, 1e-4) - cost) <= 0.005 or z == 0
    private, cost, public = numbers(
        r"test accuracy ([\d.]+)% at epsilon ([\d.]+), delta 0.0001, "
        r"and ([\d.]+)% without privacy, see runs/private_digits.png",
        printed,
    )
    assert cost < 3
    assert private > 90
    assert public > 92
    assert accuracies[0] == public
    assert accuracies[-1] < 75  # so much noise has a price
    assert is_figure(tmp_path / "runs" / "private_digits.png")
