"""The view that applies a function to the examples of each client."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fax import _arguments, _functions
from fax.data._check_examples import (
    Schema,
    check_federated,
    checked_examples,
    contains,
    fetch_client,
    num_rows,
)
from fax.data._protocol import ClientId, DataError, Examples, FederatedData


def map(
    data: FederatedData,
    fn: Callable[[Any, Examples], Mapping[str, Any]],
    *,
    keeps_length: bool = True,
) -> FederatedData:
    """Applies a function to each client's examples, whenever a client is read.

    Args:
      data: federated data.
      fn: ``fn(client_id, examples)`` returns the new examples, a mapping from names to arrays. It
        must return the same for the same client each time, so derive the seed of random numbers
        from the id. The arrays that it is passed are read-only. If the view is sent to other
        processes, the function has to be picklable.
      keeps_length: whether clients have as many examples after ``fn`` as before. If this is False,
        `num_examples` has to read a client and apply ``fn``, once for each client.

    Returns:
      A view.

    Raises:
      DataError: when a client is read, if the result of ``fn`` cannot be used, or has another
        number of examples although ``keeps_length`` is True.

    Example:

      >>> data = fax.data.InMemory({"ada": {"text": ["to be", "or not", "to be"]}})
      >>> words = {"to be": 0, "or not": 1}
      >>> def tokenize(client_id, examples):
      ...     return {"token": [words[text] for text in examples["text"]]}
      >>> fax.data.map(data, tokenize).client("ada")
      {'token': array([0, 1, 0])}
    """
    where = "fax.data.map"
    check_federated(where, "data", data)
    _functions.function(where, "fn", fn, {2: "fn(client_id, examples)"}, error=DataError)
    _arguments.flag(where, "keeps_length", keeps_length, error=DataError)
    return Map(data, fn, keeps_length)


class Map:
    """What `map` returns."""

    def __init__(self, data: FederatedData, fn: Callable[..., Any], keeps_length: bool) -> None:
        self._data, self._fn, self._keeps_length = data, fn, keeps_length
        self._lengths: dict[ClientId, int] = {}
        self._schema = Schema()

    def __repr__(self) -> str:  # without the number of clients, because listing may take long
        return f"Map({self._data!r})"

    def client_ids(self) -> Any:
        return self._data.client_ids()

    def num_examples(self, client_id: ClientId) -> int:
        if self._keeps_length:
            return self._data.num_examples(client_id)
        if not contains(self._lengths, client_id):
            self.client(client_id)
        return self._lengths[client_id]

    def client(self, client_id: ClientId) -> Examples:
        before = fetch_client(self._data, client_id)
        length = num_rows(before)  # fn may change the mapping
        try:
            after = self._fn(client_id, before)
        except StopIteration as error:  # it would end the loop that this is called from
            raise DataError(
                f"client {client_id!r}: fn of fax.data.map raised StopIteration. If it calls next, "
                "pass a default or catch the exception."
            ) from error
        except Exception as error:
            error.add_note(f"This came from fn of fax.data.map, for client {client_id!r}.")
            raise
        if after is None:
            raise DataError(
                f"client {client_id!r}: fn of fax.data.map returned None, expected the client's "
                "examples, a mapping from names to arrays. Does it end without a return statement?"
            )
        examples = checked_examples(client_id, after)
        if self._keeps_length and num_rows(examples) != length:
            raise DataError(
                f"client {client_id!r} has {length} examples before fn of fax.data.map and "
                f"{num_rows(examples)} after it. Pass keeps_length=False."
            )
        self._schema.check(client_id, examples)
        self._lengths[client_id] = num_rows(examples)
        return examples

    def __len__(self) -> int:
        return len(self._data)
