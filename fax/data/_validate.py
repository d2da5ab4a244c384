"""Reads all clients of federated data at once, to check them."""

from __future__ import annotations

from fax.data._check_examples import (
    Schema,
    check_federated,
    check_finite,
    num_rows,
    read_client,
    usable_clients,
)
from fax.data._protocol import ClientId, DataError, FederatedData
from fax.data._views import Subset


def validate(data: FederatedData, on_bad: str = "raise") -> FederatedData:
    """Reads and checks all clients, which files and views otherwise do when a client is needed.

    Besides what is checked whenever a client is read, this checks that features are finite, and
    that clients have as many examples as `num_examples` returns.

    Args:
      data: federated data.
      on_bad: ``"raise"``, or ``"skip"`` to leave out clients that cannot be used, with one warning
        that counts them.

    Returns:
      ``data``, or a view of the clients that can be used.

    Raises:
      DataError: with ``"raise"``, for the first client that cannot be used; with ``"skip"``, if no
        client can be used.

    Example:

      >>> data = fax.data.InMemory({"ada": {"x": [1.0]}, "bob": {"x": [float("nan")]}})
      >>> fax.data.validate(data)
      Traceback (most recent call last):
      fax.data._protocol.DataError: client 'bob', feature 'x' has 1 value that is not finite. ...
    """
    where, schema = "fax.data.validate", Schema()
    check_federated(where, "data", data)

    def check(client_id: ClientId) -> None:
        examples = read_client(data, client_id)
        check_finite(client_id, examples)
        found, expected = num_rows(examples), data.num_examples(client_id)
        if found != expected:
            raise DataError(
                f"client {client_id!r} has {found} examples, but num_examples returns {expected}."
            )
        schema.check(client_id, examples)

    ids = data.client_ids()
    good = usable_clients(where, ids, check, on_bad)
    return data if len(good) == len(ids) else Subset(where, data, good)
