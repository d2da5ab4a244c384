"""The interface of federated data: clients by id, and the examples of each."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

ClientId = Hashable
Examples = Mapping[str, np.ndarray]


class DataError(ValueError):
    """Data, or an argument of `fax.data`, that cannot be used.

    If a client's examples are to blame, the message names the client and the feature.

    Example:

      >>> fax.data.InMemory({"ada": {"x": []}})
      Traceback (most recent call last):
      fax.data._protocol.DataError: client 'ada' has no examples. Leave the client out, ...
    """


@runtime_checkable
class FederatedData(Protocol):
    """The interface of all federated data: a read-only collection of clients.

    Every object with these four methods is federated data. They may be called from several threads
    at once. Client ids are hashable; those in files are strings. An unknown id is a `DataError`.

    Example:

      >>> data = fax.data.InMemory({"ada": {"x": jnp.arange(3)}, "bob": {"x": jnp.arange(5)}})
      >>> isinstance(data, fax.data.FederatedData)
      True
    """

    def client_ids(self) -> Sequence[ClientId]:
        """The distinct ids of all clients, in an order that never changes."""
        ...

    def num_examples(self, client_id: ClientId) -> int:
        """How many examples a client has, found without reading them."""
        ...

    def client(self, client_id: ClientId) -> Examples:
        """A client's examples: an array for each feature, all with the same leading axis.

        The arrays may be read-only.
        """
        ...

    def __len__(self) -> int:
        """The number of clients."""
        ...
