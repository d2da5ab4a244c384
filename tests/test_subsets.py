"""The part of a product of cases that `make test` runs has every pair that is asked for."""

import itertools

import pytest
from subsets import alike, covering, pairs


def product(**sizes):
    """All combinations of numbers, which are small enough to be the same objects each time."""
    return [
        dict(zip(sizes, own, strict=True)) for own in itertools.product(*map(range, sizes.values()))
    ]


def kept(cases, kinds=None):
    return [case for case, keep in zip(cases, covering(cases, kinds), strict=True) if keep]


@pytest.mark.parametrize("sizes", [(3, 4, 2), (21, 23, 3), (2, 2, 2), (5, 3, 3, 4)])
def test_every_pair_comes_up(sizes):
    cases = product(**dict(zip("abcd", sizes, strict=False)))
    found = kept(cases)
    assert len(found) <= len(cases) // min(sizes)
    assert pairs(found) == pairs(cases)


def test_pairs_of_what_is_no_full_product():
    cases = product(a=3, b=4, c=3)[2:-5]
    found = kept(cases)
    assert len(found) < len(cases)
    assert pairs(found) == pairs(cases)


def test_parameters_that_go_along_with_others_are_one():
    cases = [
        {"less": case["a"] // 2, **case, "same": -case["a"]} for case in product(a=3, b=4, c=3)
    ]
    found = kept(cases)
    assert len(found) == len(cases) // 3
    assert pairs(found) == pairs(cases)


@pytest.mark.parametrize("cases", [[{}], product(a=5), product(a=3, b=4)])
def test_two_parameters_run_whole(cases):
    assert all(covering(cases))


def test_values_come_up_with_every_kind():
    """Programs and transformations of five and six kinds."""
    cases = product(program=20, way=24, size=3)
    kinds = {"program": lambda value: value // 4, "way": lambda value: value % 6}
    found = kept(cases, kinds)

    def seen(of_program, of_way):
        return {(of_program(case["program"]), of_way(case["way"])) for case in found}

    assert len(seen(int, kinds["way"])) == 20 * 6
    assert len(seen(kinds["program"], int)) == 5 * 24
    assert len({(case["size"], case["program"]) for case in found}) == 3 * 20
    assert len({(case["size"], case["way"]) for case in found}) == 3 * 24
    assert len(found) < 200


def test_values_that_are_alike_come_up_once():
    cases = product(a=7, b=5)
    found = kept(cases, {"a": alike, "b": alike})
    assert {case["a"] for case in found} == set(range(7))
    assert {case["b"] for case in found} == set(range(5))
    assert len(found) == 7
    assert len(kept(product(a=7), {"a": lambda value: value % 2})) == 7


def test_cases_of_few_kinds():
    """A kind for one of two parameters: every value of the other with each kind of it."""
    found = kept(product(a=6, b=4), {"a": lambda value: value % 2})
    assert {(case["a"] % 2, case["b"]) for case in found} == set(
        itertools.product(range(2), range(4))
    )
    assert {case["a"] for case in found} == set(range(6))
