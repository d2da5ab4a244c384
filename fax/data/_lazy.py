"""What sources have in common that read a client's examples whenever they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fax.data._check_examples import Schema, checked_examples, contains, unknown_client
from fax.data._protocol import ClientId, DataError


class Listed:
    """What all federated data have that know the ids of their clients in advance."""

    def __init__(self, ids: Iterable[ClientId]) -> None:
        self._ids = tuple(ids)
        self._known = frozenset(self._ids)

    def client_ids(self) -> tuple[ClientId, ...]:
        return self._ids

    def _own(self, client_id: ClientId) -> ClientId:
        if not contains(self._known, client_id):
            own: Any = self
            raise unknown_client(client_id, own)
        return client_id

    def __len__(self) -> int:
        return len(self._ids)


class Lazy(Listed):
    """Federated data whose subclasses say how a client is read: `_length` and `_read`.

    Args:
      ids: the distinct ids of the clients, in order.
    """

    def __init__(self, ids: Iterable[ClientId]) -> None:
        super().__init__(ids)
        self._schema = Schema()
        if not self._ids:
            raise DataError(f"{type(self).__name__}: there are no clients.")

    def _length(self, client_id: ClientId) -> int:
        """How many examples a client has. It is one of the ids."""
        raise NotImplementedError

    def _read(self, client_id: ClientId) -> Mapping[str, Any]:
        """A client's examples, before checks. Errors need not name the client."""
        raise NotImplementedError

    def num_examples(self, client_id: ClientId) -> int:
        return self._length(self._own(client_id))

    def client(self, client_id: ClientId) -> dict[str, np.ndarray]:
        own = self._own(client_id)
        try:
            examples = self._read(own)
        except DataError as error:
            raise DataError(f"client {client_id!r}: {error}") from error
        except Exception as error:
            error.add_note(f"This came from reading the examples of client {client_id!r}.")
            raise
        checked = checked_examples(client_id, examples)
        self._schema.check(client_id, checked)
        return checked

    def __repr__(self) -> str:
        return f"{type(self).__name__}(clients={len(self)})"
