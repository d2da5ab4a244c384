"""Which clients take part in a round. Each sampler is a function of the seed and the round."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fax import _arguments
from fax.data._protocol import DataError

# sample(pool, count, number, seed): positions of clients, out of a pool of positions.
Sampler = Callable[[np.ndarray, int, int, tuple[int, ...]], np.ndarray]


def uniform(pool: np.ndarray, count: int, number: int, seed: tuple[int, ...]) -> np.ndarray:
    """Any set of clients is as likely as any other."""
    return np.random.default_rng((*seed, number)).choice(pool, count, replace=False)


def shuffled(pool: np.ndarray, count: int, number: int, seed: tuple[int, ...]) -> np.ndarray:
    """Passes through all clients, each in an order of its own.

    If the number of clients is no multiple of the cohort's size, those that come last in a
    pass sit it out, others in every pass.
    """
    epoch, part = divmod(number, len(pool) // count)
    return pool[_permutation(len(pool), (*seed, epoch))[part * count : (part + 1) * count]]


def minimum_reuse(pool: np.ndarray, count: int, number: int, seed: tuple[int, ...]) -> np.ndarray:
    """Passes through all clients in the same order, so that each waits as long as it can."""
    order = _permutation(len(pool), seed)
    return pool[order[np.arange(number * count, (number + 1) * count) % len(pool)]]


def weighted(weights: np.ndarray) -> Sampler:
    """Draws one client after the other, with probabilities in proportion to their weights.

    The order of Gumbel variables with the logarithms of the weights added is the order of such
    draws. They neither overflow nor tie, however far apart the weights are.
    """
    with np.errstate(divide="ignore"):
        logs = np.log(weights)

    def sample(pool, count, number, seed):
        draws = np.random.default_rng((*seed, number)).gumbel(size=len(pool))
        first = np.argpartition(-draws - logs[pool], count - 1)[:count]
        return pool[np.sort(first)]  # a partition's own order depends on the processor

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

_SAMPLING = 3  # what the seed is used for, beside the uses in _batching.py
_WHERE = "fax.data.cohorts"


def check_sampler(sampler: Any, weights: Any) -> None:
    """Checks that there is such a sampler, and weights if it needs them."""
    known = [*SAMPLERS, WEIGHTED, STREAM]
    if callable(sampler):
        form = {1: "sampler(round)"}
        _arguments.function(_WHERE, "sampler", sampler, form, error=DataError)
    elif not isinstance(sampler, str) or sampler not in known:
        raise DataError(
            f"{_WHERE}: sampler={sampler!r:.80}, expected a function or one of "
            f"{', '.join(map(repr, known))}."
        )
    if sampler == WEIGHTED and weights is None:
        raise DataError(
            f"{_WHERE}: sampler='weighted' needs weights=, a number for each client of the data."
        )
    if weights is not None and sampler != WEIGHTED:
        raise DataError(
            f"{_WHERE}: weights= belongs to sampler='weighted', but sampler is "
            f"{_arguments.shown(sampler)}."
        )


def chooser(
    sampler: str | Callable[[int], Sequence[int]],
    weights: Sequence[float] | None,
    clients: int,
    seed: int,
    pools: Sequence[np.ndarray],
) -> Callable[[int], np.ndarray]:
    """A function from a round's number to the positions of its clients, pool after pool.

    Args:
      sampler, weights, clients, seed: see `cohorts`.
      pools: positions of clients; equally many are drawn from each pool.
    """
    count = sum(map(len, pools))
    if sampler == STREAM:
        return lambda number: np.arange(count)
    if callable(sampler):
        return functools.partial(_checked, sampler, clients, count)
    if sampler == WEIGHTED:
        try:
            given = np.asarray(weights, float)
        except (TypeError, ValueError):
            given = np.array(np.nan)
        if given.shape != (count,) or not np.isfinite(given).all() or (given < 0).any():
            raise DataError(
                f"{_WHERE}: weights has shape {given.shape}, expected {count} finite numbers that "
                "are not negative, one for each client of the data."
            )
        for pool in pools:
            positive, least = (given[pool] > 0).sum(), clients // len(pools)
            if positive < least:
                of = (
                    ""
                    if len(pools) == 1
                    else f" of those whose examples one of {len(pools)} devices has"
                )
                raise DataError(
                    f"{_WHERE}: only {positive} clients{of} have a positive weight, fewer than the "
                    f"{least} that clients={clients} asks for."
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
            "a round must be different, as they have different keys and states."
        )
    return positions
