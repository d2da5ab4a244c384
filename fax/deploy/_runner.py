"""Runs the steps of a plan on a backend: who the clients are, and which of them have failed."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from fax.deploy._backend import Backend, ClientError
from fax.deploy._stages import Stage
from fax.deploy._steps import Clients, rows_of
from fax.deploy._values import Held, Row


class Runner:
    """Runs steps on a backend, and knows which client each participant is.

    Args:
      backend: where clients run.
      clients: the clients of placements of this size, None if only the arguments name them.
      leaves: the arguments.
      quorum: how many clients of a stage must be left, None if none may fail.

    Attributes:
      failed: the clients that are left out.
    """

    def __init__(
        self,
        backend: Backend,
        clients: Sequence[Hashable] | None,
        leaves: Iterable[Any],
        quorum: int | None,
    ):
        self._backend = backend
        self._clients = clients
        self._quorum = quorum
        self.failed: set[Hashable] = set()
        self._holders: dict[int, set[Clients]] = {}
        for x in leaves:
            if isinstance(x, Held):
                self._holders.setdefault(len(x.rows), set()).add(x.clients)

    def _names(self, size: int) -> Clients:
        """The clients of participants of whom no operand says who they are."""
        if self._clients is not None and len(self._clients) == size:
            return tuple(self._clients)
        known = self._holders.get(size, {tuple(range(size))})
        if len(known) > 1:
            raise ValueError(
                f"Plan.run: arguments with {size} rows are held by different clients, so it is not "
                "known which clients are meant elsewhere; name them with clients=."
            )
        return next(iter(known))

    def on_clients(
        self, stage: Stage, size: int, operands: Sequence[Any], axes: Sequence[int | None]
    ) -> tuple[Clients, list[Any]]:
        holders = {x.clients for x in operands if isinstance(x, Held)}
        if len(holders) > 1:
            raise ValueError(
                f"Stage {stage.name!r} uses rows that are with different clients: "
                f"{' and '.join(map(str, holders))}. Rows of the same participant have to be with "
                "the same client."
            )
        clients = next(iter(holders)) if holders else self._names(size)
        given = [
            x if axis is None else x.rows if isinstance(x, Held) else rows_of(jnp.asarray(x), axis)
            for x, axis in zip(operands, axes, strict=True)
        ]
        placed = [x for x, mode in zip(given, stage.inputs, strict=True) if mode == "placed"]

        missing = {clients[i] for x in placed for i, row in enumerate(x) if row is None}
        if missing - self.failed:  # all sums must be over the same clients
            raise ClientError(
                f"Stage {stage.name!r} uses a value that has no rows of the clients "
                f"{sorted(map(str, missing))}, which had failed when it was made.",
                missing,
            )
        numbers = self._left(clients, range(len(clients)))
        own = [
            [x[i] for i in numbers] if mode == "placed" else x
            for x, mode in zip(given, stage.inputs, strict=True)
        ]
        found = self._backend.run(stage, [clients[i] for i in numbers], own)
        return clients, [
            self._spread(rows, numbers, len(clients)) if mode == "placed" else rows
            for mode, rows in zip(stage.outputs, found, strict=True)
        ]

    def send(self, rows: Sequence[Any], like: Held | None) -> tuple[Clients, list[Row | None]]:
        clients = self._names(len(rows)) if like is None else like.clients
        numbers = self._left(clients, range(len(clients)))
        found = self._backend.put([clients[i] for i in numbers], [rows[i] for i in numbers])
        return clients, self._spread(found, numbers, len(clients))

    def fetch(self, held: Held) -> list[Any]:
        return fetch(self._backend, held)

    def _left(self, clients: Clients, numbers: Iterable[int]) -> list[int]:
        """The participants whose clients have not failed."""
        left = [i for i in numbers if clients[i] not in self.failed]
        if self._quorum is not None and len(left) < self._quorum:
            raise ClientError(
                f"{len(left)} of {len(clients)} clients are left, fewer than the quorum of "
                f"{self._quorum}. Failed: {sorted(map(str, self.failed))}."
            )
        return left

    def _spread(self, rows: Sequence[Row], numbers: Sequence[int], size: int) -> list[Row | None]:
        """The rows of some participants among all, which are freed when nobody refers to them."""
        found: list[Row | None] = [None] * size
        for number, row in zip(numbers, rows, strict=True):
            found[number] = row
        for row in dict.fromkeys(rows):  # one may stand for the rows of all clients
            weakref.finalize(row, self._backend.free, [(row.client, row.slot)]).atexit = False
        return found


def fetch(backend: Backend, held: Held) -> list[Any]:
    """The rows of a value.

    Raises:
      ClientError: if a client has failed, or if one had failed when the value was made.
    """
    rows = [row for row in held.rows if row is not None]
    if len(rows) < len(held.rows):
        missing = [c for c, row in zip(held.clients, held.rows, strict=True) if row is None]
        raise ClientError(
            f"{held} has no rows of the clients {missing}, which had failed when it was made."
        )
    return backend.fetch(rows)
