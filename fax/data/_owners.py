"""Who owns which example of central arrays, so that nobody has too few."""

from __future__ import annotations

from typing import Any

import numpy as np


def by_proportions(n: int, proportions: np.ndarray) -> np.ndarray:
    """Divides ``0, ..., n - 1`` into runs of these proportions: the run of each, ``[n]``."""
    ends = n * np.cumsum(proportions / proportions.sum())
    return np.searchsorted(ends[:-1], np.arange(n) + 0.5)


def by_owner(
    owner: np.ndarray, clients: int, min_examples: int = 1, rng: Any = None
) -> list[np.ndarray]:
    """Each client's examples, after those with too few got more from whoever has most."""
    sizes = np.bincount(owner, minlength=clients)
    lacking = np.maximum(min_examples - sizes, 0)
    if not lacking.any():
        return grouped(owner, clients)
    donors, left = _richest(sizes, int(lacking.sum()))
    picks = (np.cumsum(sizes) - sizes)[donors] + rng.integers(left)
    # What a client gives does not move the examples of the clients before it. So the gifts of the
    # last client come first, and all are picks from one list.
    last_first = np.argsort(-donors, kind="stable")
    given = np.empty_like(picks)
    given[last_first] = _positions(picks[last_first])
    order = np.argsort(owner, kind="stable")
    examples = np.concatenate([np.delete(order, given), order[given]])
    owner = owner[examples]
    owner[len(owner) - len(given) :] = np.repeat(np.arange(clients), lacking)
    return [examples[part] for part in grouped(owner, clients)]


def _richest(sizes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Takes one example after the other from whoever has most, the first of them if several do.

    Returns who that is, ``[count]``, and how many examples the client has before it gives.
    """
    low, high = 0, int(sizes.max())
    while low < high:  # the highest level above which there are enough
        level = (low + high + 1) // 2
        enough = np.maximum(sizes - level, 0).sum() >= count
        low, high = (level, high) if enough else (low, level - 1)
    above = np.maximum(sizes - low, 0)
    donors = np.repeat(np.arange(len(sizes)), above)
    left = np.repeat(sizes, above) - within(above)
    first = np.argsort(-left, kind="stable")[:count]
    return donors[first], left[first]


def _positions(picks: np.ndarray) -> np.ndarray:
    """Where in a list the items were that ``list.pop(pick)`` takes out, pick after pick.

    Picks are resolved in blocks. If a block takes out the positions p_0 < p_1 < ..., item k of what
    it leaves was at position k + #{i: p_i - i <= k}. So two blocks become one of twice the size.
    """
    found = np.zeros(1 << (len(picks) - 1).bit_length(), np.int64)
    found[: len(picks)] = picks
    largest, size = int(picks.max()) + len(found), 1
    while size < len(found):
        earlier, later = np.moveaxis(found.reshape(-1, 2, size), 1, 0)
        block = np.arange(len(earlier))[:, None]
        gone = np.sort(earlier, axis=1) - np.arange(size) + block * largest
        before = np.searchsorted(gone.ravel(), (later + block * largest).ravel(), "right")
        later += before.reshape(later.shape) - block * size
        size *= 2
    return found[: len(picks)]


def grouped(owner: np.ndarray, groups: int) -> list[np.ndarray]:
    """The positions of each owner, in order."""
    ends = np.cumsum(np.bincount(owner, minlength=groups))[:-1]
    return np.split(np.argsort(owner, kind="stable"), ends)


def within(lengths: np.ndarray) -> np.ndarray:
    """``0, 1, ...`` for each of several runs, one after the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
