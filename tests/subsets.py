"""Which cases of a test `make test` runs where all of them would take too long.

A test with many parameters runs for a covering part of their product. If nothing else is said, any
two values of different parameters come up together in one case. Where that is still much, the test
says with the marker ``kinds`` which values of a parameter are alike, and a value comes up with one
of each kind of the others. That is, of a table of programs and a table of transformations, every
transformation is applied to programs of every kind, and every program goes through transformations
of every kind. A kind of `alike` for all values asks only that each of them comes up.

`make test-all` runs everything.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Kinds = Mapping[str, Callable[[Any], Any]]


def alike(value: Any) -> None:
    """The kind of values that need not come up with each value of the other parameters."""


def covering(cases: Sequence[Mapping[str, Any]], kinds: Kinds | None = None) -> list[bool]:
    """Marks cases in which all pairs come up that are asked for.

    Args:
      cases: the parameters of each case of a test. Values are told apart by identity.
      kinds: for names of parameters, the kind of a value. Those of other parameters are kinds of
        their own.

    Returns:
      Whether a case is in the part. A test with fewer than three parameters and without kinds runs
      whole, for its pairs are its cases.
    """
    kinds = kinds or {}
    axes = _axes(cases)
    if not axes or (len(axes) < 3 and not kinds):
        return [True] * len(cases)
    wanted = [_pairs(case, axes, kinds) for case in cases]
    # In a full product, the first class of this order has every pair exactly once.
    sizes = [len(set(axis)) for axis in axes.values()]
    order = sorted(range(len(cases)), key=lambda i: sum(a[i] for a in axes.values()) % min(sizes))
    keep, covered = [False] * len(cases), set()
    # First those with the most new pairs, and so on, for a case never gains any.
    for least in range(max(map(len, wanted)), 0, -1):
        for i in order:
            if len(wanted[i] - covered) >= least:
                keep[i] = True
                covered |= wanted[i]
    return keep


def _axes(cases: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """The values of each parameter as numbers; of those that go along with others, one."""
    axes: dict[str, list[int]] = {}
    for name in cases[0]:
        numbers: dict[int, int] = {}
        own = [numbers.setdefault(id(case[name]), len(numbers)) for case in cases]
        if not any(_follows(own, other) for other in axes.values()):
            axes = {k: other for k, other in axes.items() if not _follows(other, own)}
            axes[name] = own
    return axes


def _follows(one: list[int], other: list[int]) -> bool:
    return len({*zip(one, other, strict=True)}) == len({*other})


def _pairs(case: Mapping[str, Any], axes: Mapping[str, Any], kinds: Kinds) -> set[tuple]:
    """A value of one parameter, and the kind of the value of another one."""
    of_kind = {name: kinds[name](case[name]) if name in kinds else id(case[name]) for name in axes}
    if len(axes) == 1:
        return {(name, id(case[name])) for name in axes}
    return {
        (one, id(case[one]), other, of_kind[other])
        for one, other in itertools.permutations(axes, 2)
    }


def pairs(cases: Sequence[Mapping[str, Any]]) -> set[tuple]:
    """All pairs of two parameters' values."""
    return {pair for case in cases for pair in itertools.combinations(case.items(), 2)}
