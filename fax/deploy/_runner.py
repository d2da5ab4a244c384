"""Runs the steps of a plan on a backend: who the clients are, and which of them have failed."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, TypeGuard

import jax.numpy as jnp

from fax import _arguments
from fax.deploy._backend import Backend, ClientError
from fax.deploy._hosts import Hosts
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
      take: how many clients to go on with, those that answer first, None for all.

    Attributes:
      failed: the clients that are left out because they failed.
      opened: whether the server knows a secure sum, so that the run cannot start again.
    """

    def __init__(
        self,
        backend: Backend,
        clients: Sequence[Hashable] | None,
        leaves: Iterable[Any],
        quorum: int | None,
        take: int | None,
    ):
        self._backend = backend
        self._clients = clients
        self._quorum = quorum
        self._take = take
        self.failed: set[Hashable] = set()
        self.opened = False
        self._late: set[Hashable] = set()
        self._counted: set[Hashable] = set()  # whose values are in sums, or may be
        self._cause: ClientError | None = None
        self._holders: dict[int, set[Clients]] = {}
        for x in leaves:
            if isinstance(x, Held):
                self._holders.setdefault(len(x.rows), set()).add(x.clients)

    def fail(self, error: ClientError) -> None:
        """Leaves out clients that failed, from the start. Those that were late are asked again."""
        self.failed.update(error.clients)
        self._late.clear()
        self._counted.clear()
        self._cause = error.with_traceback(None)  # which would keep rows that nobody needs

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
                "the same client; name those of a cohort by Plan.run(clients=). A cohort of all "
                "clients has to be in their order: sort its rows by positions."
            )
        clients = next(iter(holders)) if holders else self._names(size)
        given = [
            x if axis is None else x.rows if isinstance(x, Held) else rows_of(jnp.asarray(x), axis)
            for x, axis in zip(operands, axes, strict=True)
        ]
        placed = [x for x, mode in zip(given, stage.inputs, strict=True) if mode == "placed"]

        missing = {clients[i] for x in placed for i, row in enumerate(x) if row is None}
        if missing - self.failed - self._late:  # all sums must be over the same clients
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
        asked = [clients[i] for i in numbers]
        first: Sequence[int]
        if stage.sent and is_secure(self._backend):
            first, found = self._gather(self._backend, stage, asked, own)
        elif self._take is None or len(asked) <= self._take:
            first, found = range(len(asked)), self._backend.run(stage, asked, own)
        else:
            first, found = self._race(stage, asked, own, self._take)
        numbers = [numbers[i] for i in first]
        late = set(asked).difference(clients[i] for i in numbers)
        results = [
            self._spread(rows, numbers, len(clients)) if mode == "placed" else rows
            for mode, rows in zip(stage.outputs, found, strict=True)
        ]
        if late & self._counted:  # all sums must be over the same clients
            raise ClientError(f"The clients {sorted(map(str, late))} were too late.", late)
        self._late |= late
        if self._take is not None:
            self._counted.update(clients[i] for i in numbers)
        return clients, results

    def _race(
        self, stage: Stage, asked: Sequence[Hashable], own: Sequence[Any], take: int
    ) -> tuple[list[int], list[Any]]:
        """Runs a stage, and returns whose answers came first, and their results."""
        if not hasattr(self._backend, "race"):
            raise ValueError(
                f"Plan.run: {type(self._backend).__name__} cannot take the clients that answer "
                "first. Leave out take=, or use a backend with a method race, such as Processes."
            )
        if len(set(asked)) < len(asked):
            raise ValueError("Plan.run: with take=, no client may be in a cohort twice.")
        return self._backend.race(stage, asked, own, take)

    def _gather(
        self, backend: Hosts, stage: Stage, asked: Sequence[Hashable], own: Sequence[Any]
    ) -> tuple[Sequence[int], list[Any]]:
        """Runs a stage by a secure sum, and returns who is in it, and the results."""
        size = len(asked)
        take = size if self._take is None or self.opened else min(self._take, size)
        # All sums must be over the same clients.
        least = size if self._quorum is None or self.opened else min(self._quorum, take)
        try:
            found = backend.gather(stage, asked, own, take, least)
        except ClientError as error:
            if error.clients or self._cause is None:
                raise
            raise self._too_few(str(error)) from self._cause
        self.opened = True
        return found

    def send(self, rows: Sequence[Any], like: Held | None) -> tuple[Clients, list[Row | None]]:
        clients = self._names(len(rows)) if like is None else like.clients
        numbers = self._left(clients, range(len(clients)))
        found = self._backend.put([clients[i] for i in numbers], [rows[i] for i in numbers])
        return clients, self._spread(found, numbers, len(clients))

    def fetch(self, held: Held) -> list[Any]:
        return fetch(self._backend, [held])[0]

    def _left(self, clients: Clients, numbers: Iterable[int]) -> list[int]:
        """The participants whose clients have not failed."""
        gone = self.failed | self._late
        left = [i for i in numbers if clients[i] not in gone]
        if self._quorum is not None and len(left) < self._quorum:
            raise self._too_few(
                f"{len(left)} of {len(clients)} clients are left, fewer than the quorum of "
                f"{self._quorum}."
            ) from self._cause
        return left

    def _too_few(self, message: str) -> ClientError:
        """The error that ends a run, with who failed before, and how."""
        if self._cause is None:
            return ClientError(message)
        failed = sorted(map(str, self.failed))
        return ClientError(f"{message} Failed: {failed}. The last error: {self._cause}")

    def _spread(self, rows: Sequence[Row], numbers: Sequence[int], size: int) -> list[Row | None]:
        """The rows of some participants among all, which are freed when nobody refers to them."""
        found: list[Row | None] = [None] * size
        for number, row in zip(numbers, rows, strict=True):
            found[number] = row
        for row in dict.fromkeys(rows):  # one may stand for the rows of all clients
            weakref.finalize(row, self._backend.free, [(row.client, row.slot)]).atexit = False
        return found


def is_secure(backend: Backend) -> TypeGuard[Hosts]:
    """Whether clients send nothing but masked integers."""
    return isinstance(backend, Hosts) and backend.secure is not None


def fetch(backend: Backend, values: Sequence[Held]) -> list[list[Any]]:
    """The rows of values.

    Raises:
      ClientError: if a client has failed, or if one had failed when a value was made, or if what
        comes has another shape or dtype.
    """
    wanted = []
    for held in values:
        rows = [row for row in held.rows if row is not None]
        if len(rows) < len(held.rows):
            missing = [c for c, row in zip(held.clients, held.rows, strict=True) if row is None]
            raise ClientError(
                f"{held} has no rows of the clients {missing}, which had failed when it was made."
            )
        wanted += rows
    found = iter(backend.fetch(wanted))  # at once, because each call may take long
    return [[_checked(held, client, next(found)) for client in held.clients] for held in values]


def _checked(held: Held, client: Hashable, row: Any) -> Any:
    """The row that a client sent, if it can be one of these."""
    expected = (*held.shape[: held.axis], *held.shape[held.axis + 1 :])
    is_array = hasattr(row, "dtype") and row.dtype == held.dtype and row.ndim == len(expected)
    if not is_array or any(n not in (None, m) for n, m in zip(expected, row.shape, strict=True)):
        raise ClientError(
            f"The client {client!r} sent {_arguments.shown(row)}, expected a row of {held}.",
            [client],
        )
    return row
