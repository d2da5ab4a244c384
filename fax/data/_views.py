"""Views that choose clients of federated data, or join several federated data.

Views hold no examples. They read a client from the data behind them when it is asked for, and can
be combined freely.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

from fax import _arguments
from fax.data._check_examples import Schema, check_federated, first_ids, kind_of
from fax.data._lazy import Listed
from fax.data._protocol import ClientId, DataError, Examples, FederatedData


def subset(data: FederatedData, ids: Iterable[ClientId]) -> FederatedData:
    """The clients with the given ids, in the order of these ids.

    Args:
      data: federated data.
      ids: ids of clients of ``data``, each at most once.

    Returns:
      A view.

    Raises:
      DataError: if there are no ids, an id has no client, or an id occurs twice.

    Example:

      >>> data = fax.data.InMemory({name: {"x": jnp.arange(3)} for name in "abcd"})
      >>> fax.data.subset(data, ["d", "a"]).client_ids()
      ('d', 'a')
    """
    where = "fax.data.subset"
    check_federated(where, "data", data)
    if isinstance(ids, (str, bytes)):
        ids = [ids]
    if not isinstance(ids, Iterable) or (hasattr(ids, "ndim") and ids.ndim == 0):
        raise DataError(f"{where}: ids is {_arguments.shown(ids)}, expected a list of client ids.")
    ids, own = list(ids), {i: i for i in data.client_ids()}
    # True equals 1, but a list of bools is no list of positions.
    if strange := [
        i
        for i in ids
        if not isinstance(i, Hashable) or i not in own or _is_bool(i) != _is_bool(own[i])
    ]:
        raise DataError(
            f"{where}: ids has {first_ids(strange)}, but data has no such clients. It has "
            f"{first_ids(data.client_ids())}."
        )
    return Subset(where, data, [own[i] for i in ids])


def _is_bool(client_id: ClientId) -> bool:
    return isinstance(client_id, bool | np.bool_)


def slice(data: FederatedData, start: int | None = None, stop: int | None = None) -> FederatedData:
    """The clients between two positions, like a slice of a sequence.

    Args:
      data: federated data.
      start: the position of the first client. Negative positions count from the end.
      stop: the position after the last client.

    Returns:
      A view.

    Raises:
      DataError: if no clients are left.

    Example:

      >>> data = fax.data.InMemory({name: {"x": jnp.arange(3)} for name in "abcd"})
      >>> fax.data.slice(data, 1, 3).client_ids(), fax.data.slice(data, -1).client_ids()
      (('b', 'c'), ('d',))
    """
    where = "fax.data.slice"
    check_federated(where, "data", data)
    for name, value in (("start", start), ("stop", stop)):
        if value is not None:
            _arguments.count(where, name, value, least=None, error=DataError)
    return Subset(f"{where}({start}, {stop})", data, data.client_ids()[start:stop])


def split(
    data: FederatedData, held_out: float | int = 0.1, *, seed: int = 0
) -> tuple[FederatedData, FederatedData]:
    """Holds out random clients for evaluation.

    Args:
      data: federated data of at least two clients.
      held_out: the share of the clients to hold out, a float between 0 and 1, rounded to at least
        one client; or the number of clients, an int.
      seed: of the random choice, an int.

    Returns:
      Views of the clients to train with and of those held out, both in the order of ``data``.

    Raises:
      DataError: if a side would have no clients.

    Example:

      >>> data = fax.data.InMemory({name: {"x": jnp.arange(3)} for name in "abcdefghij"})
      >>> train, held_out = fax.data.split(data, held_out=0.2)
      >>> len(train), len(held_out), set(train.client_ids()) & set(held_out.client_ids())
      (8, 2, set())
    """
    where = "fax.data.split"
    check_federated(where, "data", data)
    seed, ids = _arguments.seed(where, seed, error=DataError), data.client_ids()
    if len(ids) < 2:
        raise DataError(f"{where}: data has {len(ids)} clients, expected at least 2.")
    if isinstance(held_out, float | np.floating):
        _arguments.number(where, "held_out", held_out, above=0, below=1, error=DataError)
        count = max(1, round(float(held_out) * len(ids)))
    else:
        count = held_out
    most = len(ids) - 1
    what = "so that a client is left to train with, or a share of the clients between 0 and 1"
    count = _arguments.count(where, "held_out", count, most=most, what=what, error=DataError)
    out = np.zeros(len(ids), bool)
    out[np.random.default_rng(seed).choice(len(ids), count, replace=False)] = True
    sides = ([i for i, is_out in zip(ids, out) if is_out == side] for side in (False, True))
    train, evaluate = (Subset(where, data, side) for side in sides)
    return train, evaluate


def concatenate(*datas: FederatedData) -> FederatedData:
    """All clients of several federated data, one after another.

    Args:
      *datas: federated data with the same features, and no client in common.

    Returns:
      A view.

    Raises:
      DataError: if two clients have the same id; when a client is read, if its features differ
        from those of the client that was read first.

    Example:

      >>> one = fax.data.InMemory({"a": {"x": jnp.arange(3)}, "b": {"x": jnp.arange(2)}})
      >>> two = fax.data.InMemory({"c": {"x": jnp.arange(4)}})
      >>> both = fax.data.concatenate(one, two)
      >>> both.client_ids(), both.num_examples("c")
      (('a', 'b', 'c'), 4)
    """
    return Concatenation(datas)


class _View(Listed):
    """What views have in common."""

    def __repr__(self) -> str:
        own: Any = self
        return f"{kind_of(own)}(clients={len(own)})"


class Subset(_View):
    def __init__(self, where: str, data: FederatedData, ids: Iterable[ClientId]) -> None:
        super().__init__(ids)
        self._data = data
        if not self._ids:
            raise DataError(f"{where}: no client is left of {len(data)}.")
        if len(self._known) < len(self._ids):
            seen: set[ClientId] = set()
            twice = [i for i in self._ids if i in seen or seen.add(i)]  # type: ignore[func-returns-value]
            raise DataError(f"{where}: ids has {first_ids(twice)} more than once.")

    def num_examples(self, client_id: ClientId) -> int:
        return self._data.num_examples(self._own(client_id))

    def client(self, client_id: ClientId) -> Examples:
        return self._data.client(self._own(client_id))


class Concatenation(_View):
    def __init__(self, datas: tuple[FederatedData, ...]) -> None:
        where = "fax.data.concatenate"
        if not datas:
            raise DataError(f"{where}: there is nothing to concatenate. Pass federated data.")
        self._owner: dict[ClientId, FederatedData] = {}
        for number, data in enumerate(datas):
            if not isinstance(data, FederatedData):
                raise DataError(
                    f"{where}: argument {number} is {_arguments.of_type(data)}, expected federated "
                    "data. Pass them one by one, fax.data.concatenate(one, two)."
                )
            ids = data.client_ids()
            if twice := [i for i in ids if i in self._owner]:
                raise DataError(
                    f"{where}: argument {number} has {len(twice)} clients of earlier arguments, "
                    f"{first_ids(twice)}. Every client needs an id of its own."
                )
            self._owner |= dict.fromkeys(ids, data)
        super().__init__(self._owner)
        self._schema = Schema()

    def num_examples(self, client_id: ClientId) -> int:
        return self._part(client_id).num_examples(client_id)

    def client(self, client_id: ClientId) -> Examples:
        examples = self._part(client_id).client(client_id)
        self._schema.check(client_id, examples)
        return examples

    def _part(self, client_id: ClientId) -> FederatedData:
        return self._owner[self._own(client_id)]
