"""What runs the stages of a plan: one protocol of four methods, and clients in this process."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from fax._arithmetic import total_dtype
from fax.deploy._stages import Stage
from fax.deploy._values import Row


class ClientError(RuntimeError):
    """A client failed, is gone, or did not answer in time.

    Attributes:
      clients: the clients that a plan may continue without; see `Plan.run`.
    """

    def __init__(self, message: str, clients: Iterable[Hashable] = ()):
        super().__init__(message)
        self.clients: tuple[Hashable, ...] = tuple(clients)


class Backend(Protocol):
    """Where clients run. Its methods raise `ClientError`, with the names of all that failed.

    A backend that can go on with the clients that answer first has a method ``race``, too, for
    ``take=`` of `Plan.run`. It is called like ``run``, with the number of clients to take. It
    returns the numbers of those clients in ``clients``, in ascending order, and what ``run``
    returns for them. What the others send or keep is dropped.
    """

    def put(self, clients: Sequence[Hashable], rows: Sequence[Any]) -> list[Row]:
        """Gives each client a value, and returns where they are."""
        ...

    def run(self, stage: Stage, clients: Sequence[Hashable], operands: Sequence[Any]) -> list[Any]:
        """Has each client run a stage.

        Args:
          stage: what they run.
          clients: who runs it.
          operands: for each input of mode ``server``, its value; for ``placed``, a sequence with a
            `Row` of the client, or a value for it, for each client.

        Returns:
          For each output that stays with the clients, a list with a `Row` for each; for the others,
          what the clients sent, combined (see `combine`).
        """
        ...

    def fetch(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """The values of rows."""
        ...

    def free(self, rows: Iterable[tuple[Hashable, str]]) -> None:
        """Frees rows that are not needed any more, as pairs of client and slot."""
        ...


# Slots differ between backends, so that one does not take another's rows for its own.
_NUMBERS = itertools.count()


class InProcess:
    """Clients in this process, one after another: to try a plan, and to debug it.

    Example:

      >>> @fax.program(clients=2)
      ... def total(x):
      ...     return fax.sum(fax.map(jnp.square, x))
      >>> data = jnp.array([3.0, 4.0])
      >>> plan = fax.deploy.cut(lambda data: total(data["x"]), {"x": data}, held=["x"])
      >>> float(plan.run(fax.deploy.InProcess(), {"x": data}))
      25.0
    """

    def __init__(self) -> None:
        self._values: dict[tuple[Hashable, str], Any] = {}

    def put(self, clients: Sequence[Hashable], rows: Sequence[Any]) -> list[Row]:
        return [self._keep(client, row) for client, row in zip(clients, rows, strict=True)]

    def run(self, stage: Stage, clients: Sequence[Hashable], operands: Sequence[Any]) -> list[Any]:
        made: list[list[Any]] = [[] for _ in stage.outputs]
        for number, client in enumerate(clients):
            own = [
                self._value(x[number]) if mode == "placed" else x
                for x, mode in zip(operands, stage.inputs, strict=True)
            ]
            for results, value, mode in zip(made, stage.run(*own), stage.outputs, strict=True):
                results.append(self._keep(client, value) if mode == "placed" else value)
        return [
            results if mode == "placed" else combine(mode, results)
            for mode, results in zip(stage.outputs, made, strict=True)
        ]

    def race(
        self, stage: Stage, clients: Sequence[Hashable], operands: Sequence[Any], take: int
    ) -> tuple[list[int], list[Any]]:
        own = [
            x[:take] if mode == "placed" else x
            for x, mode in zip(operands, stage.inputs, strict=True)
        ]
        return list(range(take)), self.run(stage, clients[:take], own)

    def fetch(self, rows: Sequence[Row]) -> list[np.ndarray]:
        return [self._value(row) for row in rows]

    def free(self, rows: Iterable[tuple[Hashable, str]]) -> None:
        for row in rows:
            self._values.pop(row, None)

    def _keep(self, client: Hashable, value: Any) -> Row:
        row = Row(client, f"v{next(_NUMBERS)}")
        self._values[row.client, row.slot] = value
        return row

    def _value(self, x: Any) -> Any:
        if not isinstance(x, Row):
            return x
        if (x.client, x.slot) not in self._values:
            raise ClientError(
                f"The client {x.client!r} has no value {x.slot!r}; another backend may have it."
            )
        return self._values[x.client, x.slot]


def combine(mode: str, contributions: Sequence[Any]) -> np.ndarray:
    """The sum, maximum or minimum of what clients sent.

    Floats are summed in float64, so that the order of clients hardly matters. Integers wrap, as in
    the program.

    Args:
      mode: ``sum``, ``max`` or ``min``.
      contributions: one array from each client, all of the same shape.

    Returns:
      An array of that shape.

    Raises:
      ValueError: if there are no contributions, or their shapes differ.

    Example:

      >>> fax.deploy.combine("sum", [jnp.array([1, 2]), jnp.array([3, 4])]).tolist()
      [4, 6]
    """
    rows = np.stack([np.asarray(x) for x in contributions])
    if mode != "sum":
        return (np.max if mode == "max" else np.min)(rows, axis=0)
    dtype = np.dtype(total_dtype("sum", rows.dtype))
    if jax.numpy.issubdtype(dtype, jax.numpy.floating):
        dtype = np.promote_types(dtype, np.float64)
    return np.sum(rows, axis=0, dtype=dtype)
