"""The part of a product of cases that `make test` runs has every pair."""

import itertools

import pytest
from subsets import pairs, pairwise


def product(**sizes):
    """All combinations of numbers, which are small enough to be the same objects each time."""
    return [
        dict(zip(sizes, own, strict=True)) for own in itertools.product(*map(range, sizes.values()))
    ]


@pytest.mark.parametrize("sizes", [(3, 4, 2), (21, 23, 3), (2, 2, 2), (5, 3, 3, 4)])
def test_every_pair_comes_up(sizes):
    cases = product(**dict(zip("abcd", sizes, strict=False)))
    kept = [case for case, keep in zip(cases, pairwise(cases), strict=True) if keep]
    assert len(kept) == len(cases) // min(sizes)
    assert pairs(kept) == pairs(cases)


def test_parameters_that_go_along_with_others_are_one():
    cases = [
        {"less": case["a"] // 2, **case, "same": -case["a"]} for case in product(a=3, b=4, c=3)
    ]
    kept = [case for case, keep in zip(cases, pairwise(cases), strict=True) if keep]
    assert len(kept) == len(cases) // 3
    assert pairs(kept) == pairs(cases)


@pytest.mark.parametrize("cases", [product(a=5), product(a=3, b=4), product(a=2, b=3, c=2)[1:]])
def test_what_is_no_product_of_three_runs_whole(cases):
    assert all(pairwise(cases))
