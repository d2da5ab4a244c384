"""Samplers: which clients take part in a round, as functions of the seed and the round."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fax import _arguments, _functions
from fax.data._protocol import DataError

# sampler(pool, count, number, seed): ``count`` positions from a pool, for round ``number``.
Sampler = Callable[[np.ndarray, int, int, tuple[int, ...]], np.ndarray]


def uniform(pool: np.ndarray, count: int, number: int, seed: tuple[int, ...]) -> np.ndarray:
    """All sets of ``count`` clients are equally likely."""
    return np.random.default_rng((*seed, number)).choice(pool, count, replace=False)


def shuffled(pool: np.ndarray, count: int, number: int, seed: tuple[int, ...]) -> np.ndarray:
    """Passes through all clients, each in a new random order.

    If the number of clients is not a multiple of the cohort's size, the last clients of a pass
    do not take part in it; they are different ones in each pass.
    """
    epoch, part = divmod(number, len(pool) // count)
    return pool[_permutation(len(pool), (*seed, epoch))[part * count : (part + 1) * count]]


def minimum_reuse(pool: np.ndarray, count: int, number: int, seed: tuple[int, ...]) -> np.ndarray:
    """Passes through all clients in one order, so that rounds of a client are far apart."""
    order = _permutation(len(pool), seed)
    return pool[order[np.arange(number * count, (number + 1) * count) % len(pool)]]


def weighted(weights: np.ndarray) -> Sampler:
    """Draws clients one by one, without replacement, with probabilities proportional to weights.

    That is the order of the sums of log-weights and Gumbel variables (the Gumbel-top-k trick),
    which neither overflow nor tie, however different the weights are.
    """
    with np.errstate(divide="ignore"):
        logs = np.log(weights)

    def sample(pool: np.ndarray, count: int, number: int, seed: tuple[int, ...]) -> np.ndarray:
        draws = np.random.default_rng((*seed, number)).gumbel(size=len(pool))
        first = np.argpartition(-draws - logs[pool], count - 1)[:count]
        return pool[np.sort(first)]  # the order of argpartition depends on the processor

    return sample


@functools.lru_cache(maxsize=8)
def _permutation(size: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size)


WEIGHTED, STREAM = "weighted", "stream"
SAMPLERS: dict[str, Sampler] = {
    "uniform": uniform,
    "shuffled": shuffled,
    "minimum_reuse": minimum_reuse,
}

_SAMPLING = 3  # another use of the seed than those in _batching.py
_WHERE = "fax.data.cohorts"


def check_sampler(sampler: Any, weights: Any) -> None:
    """Checks that there is such a sampler, and that weights are passed if it needs them."""
    known = [*SAMPLERS, WEIGHTED, STREAM]
    if callable(sampler):
        form = {1: "sampler(round)"}
        _functions.function(_WHERE, "sampler", sampler, form, error=DataError)
    elif not isinstance(sampler, str) or sampler not in known:
        raise DataError(
            f"{_WHERE}: sampler is {sampler!r:.80}, expected {_arguments.either(known)}, or a "
            "function sampler(round)."
        )
    if sampler == WEIGHTED and weights is None:
        raise DataError(
            f"{_WHERE}: sampler='weighted' needs weights=, a number for each client of the data."
        )
    if weights is not None and sampler != WEIGHTED:
        raise DataError(
            f"{_WHERE}: weights are for sampler='weighted' only, but sampler is "
            f"{_arguments.shown(sampler)}."
        )


def make_sampler(
    sampler: str | Callable[[int], Sequence[int]],
    weights: Sequence[float] | None,
    clients: int,
    seed: int,
    pools: Sequence[np.ndarray],
) -> Callable[[int], np.ndarray]:
    """A function from the number of a round to the positions of its clients, pool by pool.

    Args:
      sampler: see `cohorts`.
      weights: see `cohorts`.
      clients: see `cohorts`.
      seed: see `cohorts`.
      pools: positions of clients. Equally many clients are drawn from each pool.
    """
    count = sum(map(len, pools))
    if sampler == STREAM:
        return lambda number: np.arange(count)
    if callable(sampler):
        return functools.partial(_checked, sampler, clients, count)
    if sampler == WEIGHTED:
        what = "one for each client of the data"
        given = _arguments.numbers(
            _WHERE, "weights", weights, count, what, least=0, error=DataError
        )
        for pool in pools:
            positive, needed = (given[pool] > 0).sum(), clients // len(pools)
            if positive < needed:
                of = "" if len(pools) == 1 else f" of those on one of the {len(pools)} devices"
                raise DataError(
                    f"{_WHERE}: only {positive} clients{of} have a positive weight, but "
                    f"clients={clients} needs {needed}."
                )
        sample = weighted(given)
    else:
        sample = SAMPLERS[sampler]
    each = clients // len(pools)

    def choose(number: int) -> np.ndarray:
        return np.concatenate(
            [
                sample(pool, each, number, (seed, _SAMPLING, shard))
                for shard, pool in enumerate(pools)
            ]
        )

    return choose


def _checked(
    sampler: Callable[[int], Sequence[int]], clients: int, count: int, number: int
) -> np.ndarray:
    positions = np.asarray(sampler(number))
    if positions.shape != (clients,) or not np.issubdtype(positions.dtype, np.integer):
        raise DataError(
            f"{_WHERE}: sampler({number}) returned {positions.dtype}{[*positions.shape]}, expected "
            f"{clients} ints, the positions of clients."
        )
    if positions.min() < 0 or positions.max() >= count:
        raise DataError(
            f"{_WHERE}: sampler({number}) returned positions from {positions.min()} to "
            f"{positions.max()}, but the data have clients 0 to {count - 1}."
        )
    if len(np.unique(positions)) < clients:
        raise DataError(
            f"{_WHERE}: sampler({number}) returned the same client more than once. The clients of "
            "a round must be distinct, as each has its own key and state."
        )
    return positions
