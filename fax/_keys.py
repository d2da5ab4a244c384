"""Random keys. Each use of randomness derives its keys with a constant of its own.

Keys form a tree. A key is used either to draw numbers or to derive other keys, never both: JAX's
generators number the blocks of a key, and the numbers drawn from it come from the same blocks as
keys derived by folding in small numbers or by `jax.random.split`. The constants are larger than any
number of a participant, a step or a round.
"""

from __future__ import annotations

import enum
from typing import Any

import jax
import numpy as np


class Use(enum.IntEnum):
    """The uses of keys. The number of a use is never assigned to another one."""

    COHORTS = 2**31 + 1  # the cohorts of a seed, by round and client
    SERVER = 2**31 + 2  # the server in a round, derived from the cohort's keys
    CLUSTER = 2**31 + 3  # the aggregator of one of several models
    PART = 2**31 + 4  # the aggregator at one of several times in a round
    FRAGMENT = 2**31 + 5  # the aggregator of a fragment of the parameters
    PAIR = 2**31 + 6  # the partners drawn for a model
    START = 2**31 + 7  # initial values
    LINK = 2**31 + 8  # a transformation in a chain of aggregators
    SIGNS = 2**31 + 9  # the signs of a rotation
    INSIDE = 2**31 + 10  # a transformation nested in another one
    MASKS = 2**31 + 11
    ROUNDING = 2**31 + 12
    COLUMNS = 2**31 + 13  # columns that are drawn again
    SECRET = 2**31 + 14  # the key of all noise, from the user's key
    RELEASE = 2**31 + 15  # the noise of one release
    COUNT = 2**31 + 16  # the noise of a count
    UPDATE = 2**31 + 17  # the noise of an update, leaf by leaf


def derive(key: jax.Array, use: Use, *numbers: Any) -> jax.Array:
    """Derives the key for one use, and for the numbers of its user, such as a round."""
    for number in (np.uint32(use), *numbers):
        key = jax.random.fold_in(key, number)
    return key
