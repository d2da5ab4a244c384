"""Which cases of a test to run where all of them would take too long."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(cases: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Marks cases in which every pair of two parameters' values comes up.

    Args:
      cases: the parameters of each case of a test. Values are told apart by identity.

    Returns:
      Whether a case is in the part. If the cases are all combinations of three or more parameters,
      of which the fewest values are m, that is one in m of them. Otherwise, all are.
    """
    axes: list[list[int]] = []
    for name in cases[0]:
        numbers: dict[int, int] = {}
        own = [numbers.setdefault(id(case[name]), len(numbers)) for case in cases]
        # Of parameters that go along with each other, one is enough.
        if not any(_follows(own, other) for other in axes):
            axes = [*(other for other in axes if not _follows(other, own)), own]
    sizes = [len(set(axis)) for axis in axes]
    if len(axes) < 3 or math.prod(sizes) != len(cases):
        return [True] * len(cases)
    return [sum(own) % min(sizes) == 0 for own in zip(*axes, strict=True)]


def _follows(one: list[int], other: list[int]) -> bool:
    return len({*zip(one, other, strict=True)}) == len({*other})


def pairs(cases: Sequence[Mapping[str, Any]]) -> set[tuple]:
    """All pairs of two parameters' values."""
    return {pair for case in cases for pair in itertools.combinations(case.items(), 2)}
