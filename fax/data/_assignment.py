"""Assigns the examples of central arrays to clients, so that no client has too few."""

from __future__ import annotations

from typing import Any

import numpy as np


def owners_by_proportions(n: int, proportions: np.ndarray) -> np.ndarray:
    """The owner of each of ``n`` examples, which are divided into runs of these proportions."""
    ends = n * np.cumsum(proportions / proportions.sum())
    return np.searchsorted(ends[:-1], np.arange(n) + 0.5)


def examples_by_client(
    owner: np.ndarray, clients: int, min_examples: int = 1, rng: Any = None
) -> list[np.ndarray]:
    """The examples of each client. Clients with too few are given some of the largest clients."""
    sizes = np.bincount(owner, minlength=clients)
    lacking = np.maximum(min_examples - sizes, 0)
    if not lacking.any():
        return group_by_owner(owner, clients)
    donors, left = _donors(sizes, int(lacking.sum()))
    picks = (np.cumsum(sizes) - sizes)[donors] + rng.integers(left)
    # Taking an example from a client does not move the examples of earlier clients. So if the
    # examples of the last client are taken first, all of them are picks from one list.
    last_first = np.argsort(-donors, kind="stable")
    given = np.empty_like(picks)
    given[last_first] = _original_positions(picks[last_first])
    order = np.argsort(owner, kind="stable")
    examples = np.concatenate([np.delete(order, given), order[given]])
    owner = owner[examples]
    owner[len(owner) - len(given) :] = np.repeat(np.arange(clients), lacking)
    return [examples[part] for part in group_by_owner(owner, clients)]


def _donors(sizes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The clients to take ``count`` examples from: each time one that has the most, the first one.

    Returns these clients, ``[count]``, and how many examples each has before one is taken.
    """
    low, high = 0, int(sizes.max())
    while low < high:  # find the highest level above which there are enough examples
        level = (low + high + 1) // 2
        enough = np.maximum(sizes - level, 0).sum() >= count
        low, high = (level, high) if enough else (low, level - 1)
    above = np.maximum(sizes - low, 0)
    donors = np.repeat(np.arange(len(sizes)), above)
    left = np.repeat(sizes, above) - positions_in_runs(above)
    first = np.argsort(-left, kind="stable")[:count]
    return donors[first], left[first]


def _original_positions(picks: np.ndarray) -> np.ndarray:
    """The original positions in a list of the items that ``list.pop(pick)`` returns, for all picks.

    Picks are resolved in blocks. If a block takes out the positions p_0 < p_1 < ..., item k of the
    rest was at position k + #{i: p_i - i <= k}. So two blocks make one of twice the size.
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


def group_by_owner(owner: np.ndarray, groups: int) -> list[np.ndarray]:
    """The positions of each owner's examples, in order."""
    ends = np.cumsum(np.bincount(owner, minlength=groups))[:-1]
    return np.split(np.argsort(owner, kind="stable"), ends)


def positions_in_runs(lengths: np.ndarray) -> np.ndarray:
    """``0, 1, ..., length - 1`` for each length, one after another."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
