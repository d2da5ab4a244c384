"""The arrays that an algorithm keeps for each client, and their encoding as a row of bytes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from fax.aggregators import PerClient
from fax.algorithms._clients import is_per_client
from fax.algorithms._row_file import WHERE

PyTree = Any
_FORMAT = "clients of fax 1"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array in a client's row."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class Layout:
    """The arrays of each client in a state with rows for all clients.

    Args:
      state: as an algorithm's ``init`` returns it, or its shapes.

    Raises:
      ValueError: if there are none, their numbers of rows differ, or they are not plain numbers.
    """

    def __init__(self, state: PyTree):
        flat = tree_leaves_with_path(state, is_leaf=is_per_client)
        parts = [(keystr(path), x.rows) for path, x in flat if is_per_client(x)]
        self._structures: list[Any] = [jax.tree.structure(rows) for _, rows in parts]
        self.leaves: list[Leaf] = []
        counts: dict[Any, str] = {}
        for outer, rows in parts:
            for path, x in tree_leaves_with_path(rows):
                name = f"state{outer}{keystr(path)}"
                if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
                    raise ValueError(
                        f"{WHERE}: {name} is {x.dtype}, which is not a plain number. For a key, "
                        "let the algorithm keep jax.random.key_data(key)."
                    )
                counts[x.shape[0] if x.shape else None] = name
                self.leaves.append(Leaf(name, x.shape[1:], x.dtype.name))
        if len(counts) != 1 or None in counts:
            found = "nothing" if not counts else f"{sorted(map(str, counts))} rows"
            raise ValueError(
                f"{WHERE}: the algorithm keeps {found} for clients, expected arrays in "
                "fax.aggregators.PerClient, each with a row for every client."
            )
        (self.num_clients,) = counts

    def fill(self, state: PyTree, rows: Iterable[jax.Array]) -> PyTree:
        """Puts rows into a state without rows."""
        leaves, structures = iter(rows), iter(self._structures)

        def part(_):
            structure = next(structures)
            own = [next(leaves) for _ in range(structure.num_leaves)]
            return PerClient(jax.tree.unflatten(structure, own))

        return _of_parts(part, state)

    def encode(self, state: PyTree, count: int) -> Iterator[bytes]:
        """Returns the rows of ``count`` clients in a state, as bytes.

        Raises:
          ValueError: if the rows' shapes or dtypes differ from those of the initial state.
        """
        arrays = [np.asarray(x) for x in jax.device_get(rows_in(state))]
        if len(arrays) != len(self.leaves):
            raise ValueError(
                f"{WHERE}: the state to scatter has {len(arrays)} arrays of rows, expected "
                f"{len(self.leaves)}. Pass the state that algorithm.round returns."
            )
        for leaf, x in zip(self.leaves, arrays):
            if x.shape != (count, *leaf.shape) or x.dtype.name != leaf.dtype:
                raise ValueError(
                    f"{WHERE}: {leaf.name} has rows {x.dtype.name}{list(x.shape)} after a round, "
                    f"expected {count} of {leaf}."
                )
        return (b"".join(x.tobytes() for x in row) for row in zip(*arrays))

    def decode(self, rows: Iterable[bytes], count: int) -> list[np.ndarray]:
        """Returns the arrays [count, ...] for rows of bytes."""
        arrays = [
            np.empty((count, *leaf.shape), jax.numpy.dtype(leaf.dtype)) for leaf in self.leaves
        ]
        for number, row in enumerate(rows):
            offset = 0
            for array in arrays:
                size = int(np.prod(array.shape[1:]))
                values = np.frombuffer(row, array.dtype, size, offset)
                array[number] = values.reshape(array.shape[1:])
                offset += values.nbytes
        return arrays

    def facts(self) -> dict[str, str]:
        """Returns the description of such rows in a file."""
        return {
            "format": _FORMAT,
            "num_clients": str(self.num_clients),
            "leaves": json.dumps([dataclasses.astuple(leaf) for leaf in self.leaves]),
        }

    def check(self, found: dict[str, str], path: str | None) -> None:
        """Refuses the `facts` of a file with other rows.

        Raises:
          ValueError: if they differ. The message says how.
        """
        expected = self.facts()
        if found.get("format") != _FORMAT:
            raise ValueError(
                f"{WHERE}: {path!r} has the format {found.get('format')!r}, expected {_FORMAT!r}."
            )
        if found["num_clients"] != expected["num_clients"]:
            raise ValueError(
                f"{WHERE}: {path!r} has {found['num_clients']} clients, but the algorithm has "
                f"{self.num_clients}."
            )
        if found["leaves"] != expected["leaves"]:
            old = {name: Leaf(name, tuple(s), d) for name, s, d in json.loads(found["leaves"])}
            new = {leaf.name: leaf for leaf in self.leaves}
            name = next(name for name in {**new, **old} if new.get(name) != old.get(name))
            raise ValueError(
                f"{WHERE}: {path!r} has {old.get(name, 'no')} rows of {name}, but the algorithm "
                f"has {new.get(name, 'none')}."
            )


def rows_in(state: PyTree) -> list[jax.Array]:
    """The arrays in a state that have a row for each client."""
    parts = jax.tree.leaves(state, is_leaf=is_per_client)
    return [x for part in parts if is_per_client(part) for x in jax.tree.leaves(part)]


def _of_parts(fn: Callable[[PerClient], PerClient], state: PyTree) -> PyTree:
    return jax.tree.map(lambda x: fn(x) if is_per_client(x) else x, state, is_leaf=is_per_client)
