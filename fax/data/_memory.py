"""Federated data in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fax import _arguments
from fax.data._check_examples import (
    Schema,
    checked_examples,
    describe_features,
    frame_hint,
    unknown_client,
    usable_clients,
)
from fax.data._protocol import ClientId, DataError


class InMemory:
    """Federated data in memory, from a mapping of client ids to mappings of features to arrays.

    Everything is checked at once: each client has examples, its features have the same number of
    rows, and all clients have the same features, dtypes and shapes. Arrays are not copied, so do
    not write to them afterwards; `client` returns read-only views of them. Clients are in the order
    of the mapping.

    Args:
      clients: maps ids (strings, bytes or ints) to mappings from names to arrays with a common
        leading axis.
      on_bad: ``"raise"``, or ``"skip"`` to leave out clients that cannot be used, with one warning
        that counts them. The features are those of the first client that can be used.

    Raises:
      DataError: if there are no clients, or one of them cannot be used.

    Example:

      >>> import numpy as np
      >>> data = fax.data.InMemory({
      ...     "ada": {"image": np.zeros((3, 28, 28)), "y": np.array([0, 4, 2])},
      ...     "bob": {"image": np.zeros((1, 28, 28)), "y": np.array([4])},
      ... })
      >>> data.client_ids(), data.num_examples("ada"), data.client("bob")["y"]
      (('ada', 'bob'), 3, array([4]))
    """

    def __init__(self, clients: Mapping[Any, Mapping[str, Any]], *, on_bad: str = "raise") -> None:
        where = "fax.data.InMemory"
        if not isinstance(clients, Mapping) or not clients:
            found = (
                "is empty" if isinstance(clients, Mapping) else f"is {_arguments.of_type(clients)}"
            )
            fix = frame_hint(clients, clients=True)
            raise DataError(
                f"{where}: clients {found}, expected a mapping from client ids to their features."
                f"{fix or ' fax.data.partition makes clients of central arrays.'}"
            )
        self._clients: dict[ClientId, dict[str, np.ndarray]] = {}
        schema = Schema()

        def check(client_id: Any) -> None:
            if not isinstance(client_id, (str, bytes, int, np.integer)):
                raise DataError(
                    f"client {client_id!r} has an id of type {type(client_id).__name__}, expected "
                    "a string, bytes or an int."
                )
            examples = checked_examples(client_id, clients[client_id])
            schema.check(client_id, examples)
            self._clients[client_id] = examples

        self._ids = tuple(usable_clients(where, clients, check, on_bad))

    def client_ids(self) -> tuple[ClientId, ...]:
        return self._ids

    def num_examples(self, client_id: ClientId) -> int:
        return len(next(iter(self._client(client_id).values())))

    def client(self, client_id: ClientId) -> dict[str, np.ndarray]:
        return dict(self._client(client_id))

    def _client(self, client_id: ClientId) -> dict[str, np.ndarray]:
        try:
            return self._clients[client_id]
        except (KeyError, TypeError):
            raise unknown_client(client_id, self) from None

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        examples = sum(map(self.num_examples, self._ids))
        features = describe_features(self._clients[self._ids[0]])
        return f"InMemory(clients={len(self)}, examples={examples}, features={features})"
