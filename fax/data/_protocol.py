"""What federated data are: clients by name, and each client's examples."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

ClientId = Hashable
Examples = Mapping[str, np.ndarray]


class DataError(ValueError):
    """Data that cannot be used as they are. The message names the client and the feature."""


@runtime_checkable
class FederatedData(Protocol):
    """The interface of all federated data: a read-only collection of clients.

    Whatever has these four methods is federated data. They may be called from several threads at
    once. Client ids are hashable; those in files are strings. An unknown id raises `DataError`.

    Example:

      >>> data = fax.data.InMemory({"ada": {"x": jnp.arange(3)}, "bob": {"x": jnp.arange(5)}})
      >>> isinstance(data, fax.data.FederatedData)
      True
    """

    def client_ids(self) -> Sequence[ClientId]:
        """The ids of all clients, each of them once, in an order that never changes."""
        ...

    def num_examples(self, client_id: ClientId) -> int:
        """How many examples a client has. This does not read the examples."""
        ...

    def client(self, client_id: ClientId) -> Examples:
        """A client's examples: for each feature an array, all with the same leading axis.

        The arrays may be read-only.
        """
        ...

    def __len__(self) -> int:
        """The number of clients."""
        ...
