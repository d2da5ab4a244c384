"""How much of a cohort is padding."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from fax.data._cohort import Cohort


@dataclasses.dataclass(frozen=True)
class Padding:
    """The share of a cohort that is padding, from 0 to 1.

    Attributes:
      examples: of the places for examples in all batches. They take up memory.
      steps: of the steps, those without any example. Most algorithms skip them.
      clients: of the clients, those without any example.
    """

    examples: float
    steps: float
    clients: float


def padding(tree: Any) -> Padding | None:
    """The padding of all cohorts in a pytree, or None if there are none, or none with values."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Cohort))
    masks = [
        np.asarray(x.mask)
        for x in leaves
        if isinstance(x, Cohort)
        and (isinstance(x.mask, np.ndarray) or getattr(x.mask, "is_fully_addressable", False))
    ]
    if not masks:
        return None
    shares = []
    for axes in ((), (-1,), (-2, -1)):  # examples, steps, clients
        real = [mask.any(axis=axes) if axes else mask for mask in masks]
        shares.append(1 - sum(int(x.sum()) for x in real) / max(sum(x.size for x in real), 1))
    return Padding(*shares)
