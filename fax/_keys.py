"""Random keys: each use of randomness has a constant of its own, by which its keys are derived.

Keys form a tree. A key is either drawn from or derived from, never both: JAX's generators number
the blocks of a key, and what is drawn from it are the same blocks as the keys derived from it by
small numbers, and as its parts by `jax.random.split`. The constants are so large that no number of
a participant, a step or a round is one of them.
"""

from __future__ import annotations

import enum
from typing import Any

import jax
import numpy as np


class Use(enum.IntEnum):
    """What a key is for. Numbers are never given to another use."""

    COHORTS = 2**31 + 1  # all cohorts of a seed, by round and client
    SERVER = 2**31 + 2  # the server in a round, from the keys of the cohort
    CLUSTER = 2**31 + 3  # the aggregator of one of several models
    PART = 2**31 + 4  # the aggregator at one of several times in a round
    FRAGMENT = 2**31 + 5  # the aggregator of a fragment of the parameters
    PAIR = 2**31 + 6  # who is drawn for a model
    START = 2**31 + 7  # where something starts
    LINK = 2**31 + 8  # a part of a chain
    SIGNS = 2**31 + 9  # the signs of a rotation
    INSIDE = 2**31 + 10  # the transformation inside of another one
    MASKS = 2**31 + 11
    ROUNDING = 2**31 + 12
    COLUMNS = 2**31 + 13  # columns that start anew
    SECRET = 2**31 + 14  # the key of all noise, from a user's
    RELEASE = 2**31 + 15  # the noise of one release
    COUNT = 2**31 + 16  # the noise of a count
    UPDATE = 2**31 + 17  # the noise of an update, leaf by leaf


def derive(key: jax.Array, use: Use, *numbers: Any) -> jax.Array:
    """The key for one use of a key, and for the number of what uses it."""
    for number in (np.uint32(use), *numbers):
        key = jax.random.fold_in(key, number)
    return key
