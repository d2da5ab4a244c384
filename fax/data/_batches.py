"""What a client and a cohort have in common: batches, and whether they have padding."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax

PyTree = Any


class Batches:
    """What a client and a cohort have in common.

    Whether there may be padding is static in a pytree. In Python it is known of a certain mask, and
    so is no longer known if another one takes its place, as with `dataclasses.replace`.
    """

    mask: Any
    _full: tuple[Any] | None

    @property
    def padded(self) -> bool:
        """Whether there may be padding. If not, ``mask`` is known to be True everywhere."""
        return self._full is None or self._full[0] is not self.mask


Batched = TypeVar("Batched", bound=Batches)


def with_batches(x: Batched, batches: PyTree, mask: jax.Array) -> Batched:
    """Other batches, with a mask that has padding only if that of ``x`` has."""
    replaced: Any = dataclasses.replace  # type checkers do not see that these are dataclasses
    return replaced(x, batches=batches, mask=mask, _full=None if x.padded else (mask,))


def register(cls: type[Batched]) -> type[Batched]:
    """Registers a dataclass as a pytree."""
    kind: Any = cls  # type checkers do not see that it is a dataclass
    own = [field for field in dataclasses.fields(kind) if field.name != "_full"]
    arrays = [field.name for field in own if not field.metadata.get("static")]
    static = [field.name for field in own if field.metadata.get("static")]

    def flatten(x: Any) -> tuple[list[Any], Any]:
        known = *(getattr(x, name) for name in static), x.padded
        return [getattr(x, name) for name in arrays], known

    def flatten_with_keys(x: Any) -> tuple[list[Any], Any]:
        values, known = flatten(x)
        return list(zip(map(jax.tree_util.GetAttrKey, arrays), values)), known

    def unflatten(known: Any, values: Any) -> Any:
        *others, padded = known
        given = dict(zip([*arrays, *static], [*values, *others]))
        return kind(**given, _full=None if padded else (given["mask"],))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
