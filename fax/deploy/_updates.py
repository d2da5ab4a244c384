"""What learners send, and what a merge makes of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fax.deploy import _merges
from fax.deploy._backend import ClientError, combine


class Merge(NamedTuple):
    """One outer step on one fragment.

    Attributes:
      number: of the merge, from 0.
      fragment: which fragment it changed.
      tokens: how many tokens are behind the update of each learner that counted, by learner.
      late: the learners of which an update counted that had missed the merge before.
      steps: the inner steps behind all of these updates.
      seconds: how long the learners worked on these steps.
      loss: the mean training loss of the examples that these learners saw since they last sent
        anything, NaN if there were none.
    """

    number: int
    fragment: int
    tokens: dict[Any, int]
    late: frozenset[Any]
    steps: int
    seconds: float
    loss: float


class Update(NamedTuple):
    """An update of a fragment, and what it is made of.

    Attributes:
      learner: who sent it.
      number: of the merge that it was made for.
      values: of each leaf of the fragment.
      tokens, steps, seconds: behind it.
      loss: the sum of losses, and the number of its terms.
    """

    learner: Hashable
    number: int
    values: list[np.ndarray]
    tokens: int
    steps: int
    seconds: float
    loss: tuple[float, float]


def checked(learner: Hashable, message: Mapping[str, Any], expected: list[list[Any]]) -> Update:
    """The update in a message, whose leaves have to be those of a fragment.

    Args:
      learner: who sent it.
      message: see `fax.deploy.Elastic.received`.
      expected: the leaves of the fragment, see `_merges.types`.
    """
    try:
        values = [np.asarray(x) for x in message["values"]]
        tokens = message["tokens"]
        total, count = map(float, message.get("loss", (0, 0)))
        steps, seconds = int(message.get("steps", 0)), float(message.get("seconds", 0))
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise ClientError(
            f"Learner {learner!r} sent what is not an update: {error!r:.80}.", [learner]
        ) from error
    found = f"{len(values) or 'no'} leaves"
    if len(values) == len(expected):
        paths = [path for path, *_ in expected]
        found = _shown(_merges.types(dict(zip(paths, values, strict=True))))
    if found != _shown(expected):
        raise ClientError(
            f"Learner {learner!r} sent an update of {found}, expected {_shown(expected)}.",
            [learner],
        )
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
        raise ClientError(
            f"Learner {learner!r} sent an update whose tokens is {tokens!r:.80}, expected an int "
            "of at least 0.",
            [learner],
        )
    return Update(learner, message["number"], values, tokens, steps, seconds, (total, count))


def weighted_mean(updates: Sequence[Update]) -> list[np.ndarray]:
    """The mean of updates, weighted by tokens and summed in float64. Some must have tokens."""
    total = sum(own.tokens for own in updates)

    def mean(leaves: tuple[np.ndarray, ...]) -> np.ndarray:
        weighted = [x.astype(np.float64) * own.tokens for own, x in zip(updates, leaves)]
        return (combine("sum", weighted) / total).astype(leaves[0].dtype)

    return [mean(leaves) for leaves in zip(*(own.values for own in updates), strict=True)]


def record(number: int, fragment: int, updates: Sequence[Update]) -> Merge:
    """What a merge was made of."""
    tokens: dict[Hashable, int] = defaultdict(int)
    for own in updates:
        tokens[own.learner] += own.tokens
    late = frozenset(own.learner for own in updates if own.number < number)
    steps = sum(own.steps for own in updates)
    seconds = sum(own.seconds for own in updates)
    total, count = (sum(own.loss[i] for own in updates) for i in range(2))
    loss = total / count if count else float("nan")
    return Merge(number, fragment, dict(tokens), late, steps, seconds, loss)


def _shown(types: list[list[Any]]) -> str:
    return ", ".join(f"{path or 'params'}: {dtype}{shape}" for path, dtype, shape in types)
