"""Which clients take part in a round. Each sampler is a function of the seed and the round."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

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

    The order of exponential variables of these rates is the order of such draws.
    """

    def sample(pool, count, number, seed):
        draws = np.random.default_rng((*seed, number)).exponential(size=len(pool))
        with np.errstate(divide="ignore"):
            arrivals = draws / weights[pool]
        return pool[np.argpartition(arrivals, count - 1)[:count]]

    return sample


@functools.lru_cache(maxsize=8)
def _permutation(size: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size)


SAMPLERS: dict[str, Sampler] = {
    "uniform": uniform,
    "shuffled": shuffled,
    "minimum_reuse": minimum_reuse,
}
