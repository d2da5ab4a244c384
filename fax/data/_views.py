"""Federated data made of other federated data: fewer clients, mapped clients, more clients.

Views hold no examples. They read from what they are views of when a client is asked for, and can
be combined at will.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Hashable, Iterable, Mapping
from typing import Any

import numpy as np

from fax import _arguments
from fax.data._check import (
    Schema,
    check_finite,
    checked,
    federated,
    fetch,
    listed,
    name_of,
    read,
    seed_of,
    sift,
    unknown,
)
from fax.data._protocol import ClientId, DataError, Examples, FederatedData


def subset(data: FederatedData, ids: Iterable[ClientId]) -> FederatedData:
    """The clients with the given ids, in the order of these ids.

    Args:
      data: federated data.
      ids: ids of clients of ``data``, each at most once.

    Returns:
      A view.

    Raises:
      DataError: if there are no ids, one has no client, or one comes twice.

    Example:

      >>> data = fax.data.InMemory({name: {"x": jnp.arange(3)} for name in "abcd"})
      >>> fax.data.subset(data, ["d", "a"]).client_ids()
      ('d', 'a')
    """
    where = "fax.data.subset"
    federated(where, "data", data)
    if isinstance(ids, (str, bytes)):
        ids = [ids]
    if not isinstance(ids, Iterable) or (hasattr(ids, "ndim") and ids.ndim == 0):
        raise DataError(f"{where}: ids is {_arguments.shown(ids)}, expected a list of client ids.")
    ids, known = list(ids), set(data.client_ids())
    if strange := [i for i in ids if not isinstance(i, Hashable) or i not in known]:
        raise DataError(
            f"{where}: ids has {listed(strange)}, but data has no such clients. It has "
            f"{listed(data.client_ids())}."
        )
    return _Subset(where, data, ids)


def slice(data: FederatedData, start: int | None = None, stop: int | None = None) -> FederatedData:
    """The clients from one position to another, as a slice of a sequence.

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
    federated(where, "data", data)
    for name, value in (("start", start), ("stop", stop)):
        if value is not None:
            _arguments.count(
                where, name, value, least=-sys.maxsize, expected="an int", error=DataError
            )
    return _Subset(f"{where}({start}, {stop})", data, data.client_ids()[start:stop])


def split(
    data: FederatedData, held_out: float | int = 0.1, *, seed: int = 0
) -> tuple[FederatedData, FederatedData]:
    """Holds out clients for evaluation. They are drawn at random.

    Args:
      data: federated data of at least two clients.
      held_out: the share of the clients to hold out, a float between 0 and 1, of which at least
        one client is made; or their number, an int.
      seed: of the draw.

    Returns:
      Views of the clients to train with and of those held out, both in the order of ``data``.

    Raises:
      DataError: if not at least one client remains on each side.

    Example:

      >>> data = fax.data.InMemory({name: {"x": jnp.arange(3)} for name in "abcdefghij"})
      >>> train, held_out = fax.data.split(data, held_out=0.2)
      >>> len(train), len(held_out), set(train.client_ids()) & set(held_out.client_ids())
      (8, 2, set())
    """
    where = "fax.data.split"
    federated(where, "data", data)
    seed, ids = seed_of(where, seed), data.client_ids()
    if isinstance(held_out, (float, np.floating)):
        valid = 0 < held_out < 1
        count = max(1, round(float(held_out) * len(ids))) if valid else 0
    else:
        whole = isinstance(held_out, int | np.integer) and not isinstance(held_out, bool)
        count = int(held_out) if whole else 0
    if not 0 < count < len(ids):
        raise DataError(
            f"{where}: held_out is {held_out!r} of {len(ids)} clients, expected a share between 0 "
            "and 1 or a number, so that at least one client is held out and one is not."
        )
    out = np.zeros(len(ids), bool)
    out[np.random.default_rng(seed).choice(len(ids), count, replace=False)] = True
    sides = ([i for i, is_out in zip(ids, out) if is_out == side] for side in (False, True))
    train, evaluate = (_Subset(where, data, side) for side in sides)
    return train, evaluate


def map(
    data: FederatedData,
    fn: Callable[[Any, Examples], Mapping[str, Any]],
    *,
    keeps_length: bool = True,
) -> FederatedData:
    """Applies a function to each client's examples, whenever a client is read.

    Args:
      data: federated data.
      fn: called as ``fn(client_id, examples)``, it returns the new examples, a mapping from names
        to arrays. It has to give the same for the same client each time, so draw random numbers
        from a seed that is made of the id. The arrays that it gets are read-only. To be used
        with several processes it has to be picklable.
      keeps_length: whether clients have as many examples after ``fn`` as before. If not, say so:
        `num_examples` then has to read the client and apply ``fn``, and remembers the number.

    Returns:
      A view.

    Raises:
      DataError: when a client is read, if ``fn`` returns what cannot be used, or changes the number
        of examples with ``keeps_length=True``.

    Example:

      >>> data = fax.data.InMemory({"ada": {"text": ["to be", "or not", "to be"]}})
      >>> words = {"to be": 0, "or not": 1}
      >>> def tokenize(client_id, examples):
      ...     return {"token": [words[text] for text in examples["text"]]}
      >>> fax.data.map(data, tokenize).client("ada")
      {'token': array([0, 1, 0])}
    """
    where = "fax.data.map"
    federated(where, "data", data)
    if not callable(fn):
        raise DataError(f"{where}: fn is {fn!r}, expected a function of an id and examples.")
    _arguments.function(where, "fn", fn, {2: "fn(client_id, examples)"}, error=DataError)
    _arguments.flag(where, "keeps_length", keeps_length, error=DataError)
    return _Map(data, fn, keeps_length)


def concatenate(*datas: FederatedData) -> FederatedData:
    """All clients of several federated data, one after the other.

    Args:
      datas: federated data that have no client in common, and the same features.

    Returns:
      A view.

    Raises:
      DataError: if two clients have the same id; when a client is read, if its features differ
        from those that were read before.

    Example:

      >>> one = fax.data.InMemory({"a": {"x": jnp.arange(3)}, "b": {"x": jnp.arange(2)}})
      >>> two = fax.data.InMemory({"c": {"x": jnp.arange(4)}})
      >>> both = fax.data.concatenate(one, two)
      >>> both.client_ids(), both.num_examples("c")
      (('a', 'b', 'c'), 4)
    """
    return _Concatenation(datas)


def validate(data: FederatedData, on_bad: str = "raise") -> FederatedData:
    """Reads all clients and checks them, as lazy sources do only when a client is needed.

    In addition to what is checked whenever a client is read, features must be finite, and the
    number of examples the one that was announced.

    Args:
      data: federated data.
      on_bad: ``"raise"``, or ``"skip"`` to leave out clients that cannot be used, with one warning
        that counts them.

    Returns:
      ``data``, or a view of its good clients.

    Raises:
      DataError: for the first client that cannot be used, with ``"raise"``; if there is no good
        client, with ``"skip"``.

    Example:

      >>> data = fax.data.InMemory({"ada": {"x": [1.0]}, "bob": {"x": [float("nan")]}})
      >>> fax.data.validate(data)
      Traceback (most recent call last):
      fax.data._protocol.DataError: client 'bob', feature 'x' has 1 values that are not finite, ...
    """
    where, schema = "fax.data.validate", Schema()
    federated(where, "data", data)

    def check(client_id: ClientId) -> None:
        examples = read(data, client_id)
        check_finite(client_id, examples)
        found, announced = _length(examples), data.num_examples(client_id)
        if found != announced:
            raise DataError(
                f"client {client_id!r} has {found} examples, but num_examples says {announced}."
            )
        schema.check(client_id, examples)

    ids = data.client_ids()
    good = sift(where, ids, check, on_bad)
    return data if len(good) == len(ids) else _Subset(where, data, good)


def _length(examples: Examples) -> int:
    return len(next(iter(examples.values())))


def _has(ids: Container[ClientId], client_id: ClientId) -> bool:
    try:
        return client_id in ids
    except TypeError:  # it is not hashable
        return False


class _View:
    """What views have in common."""

    def __repr__(self) -> str:
        own: Any = self
        return f"{name_of(own)}(clients={len(own)})"


class _Subset(_View):
    def __init__(self, where: str, data: FederatedData, ids: Iterable[ClientId]) -> None:
        self._data = data
        self._ids = tuple(ids)
        self._known = frozenset(self._ids)
        if not self._ids:
            raise DataError(f"{where}: no client is left of {len(data)}.")
        if len(self._known) < len(self._ids):
            seen: set[ClientId] = set()
            twice = [i for i in self._ids if i in seen or seen.add(i)]  # type: ignore[func-returns-value]
            raise DataError(f"{where}: ids has {listed(twice)} more than once.")

    def client_ids(self) -> tuple[ClientId, ...]:
        return self._ids

    def num_examples(self, client_id: ClientId) -> int:
        return self._data.num_examples(self._own(client_id))

    def client(self, client_id: ClientId) -> Examples:
        return self._data.client(self._own(client_id))

    def _own(self, client_id: ClientId) -> ClientId:
        if not _has(self._known, client_id):
            raise unknown(client_id, self)
        return client_id

    def __len__(self) -> int:
        return len(self._ids)


class _Map:
    def __init__(self, data: FederatedData, fn: Callable[..., Any], keeps_length: bool) -> None:
        self._data, self._fn, self._keeps_length = data, fn, keeps_length
        self._lengths: dict[ClientId, int] = {}
        self._schema = Schema()

    def __repr__(self) -> str:  # without a count: to list a folder may take long
        return f"Map({self._data!r})"

    def client_ids(self) -> Any:
        return self._data.client_ids()

    def num_examples(self, client_id: ClientId) -> int:
        if self._keeps_length:
            return self._data.num_examples(client_id)
        if not _has(self._lengths, client_id):
            self.client(client_id)
        return self._lengths[client_id]

    def client(self, client_id: ClientId) -> Examples:
        before = fetch(self._data, client_id)
        length = _length(before)  # now, because fn may empty the mapping
        try:
            after = self._fn(client_id, before)
        except StopIteration as error:  # it would end whatever loop this is called from
            raise DataError(
                f"client {client_id!r}: fn of fax.data.map raised StopIteration. If it calls next, "
                "pass a default or catch the exception."
            ) from error
        except Exception as error:
            error.add_note(f"This came from fn of fax.data.map, for client {client_id!r}.")
            raise
        examples = checked(client_id, after)
        if self._keeps_length and _length(examples) != length:
            raise DataError(
                f"client {client_id!r} has {length} examples before fn of fax.data.map and "
                f"{_length(examples)} after it. Pass keeps_length=False."
            )
        self._schema.check(client_id, examples)
        self._lengths[client_id] = _length(examples)
        return examples

    def __len__(self) -> int:
        return len(self._data)


class _Concatenation(_View):
    def __init__(self, datas: tuple[FederatedData, ...]) -> None:
        where = "fax.data.concatenate"
        if not datas:
            raise DataError(f"{where}: nothing to concatenate. Pass federated data.")
        self._owner: dict[ClientId, FederatedData] = {}
        for number, data in enumerate(datas):
            if not isinstance(data, FederatedData):
                raise DataError(
                    f"{where}: argument {number} is a {type(data).__name__}, expected federated "
                    "data. Pass them one by one, fax.data.concatenate(one, two)."
                )
            ids = data.client_ids()
            if twice := [i for i in ids if i in self._owner]:
                raise DataError(
                    f"{where}: argument {number} has {len(twice)} clients that came before, "
                    f"{listed(twice)}. Every client needs an id of its own."
                )
            self._owner |= dict.fromkeys(ids, data)
        self._ids = tuple(self._owner)
        self._schema = Schema()

    def client_ids(self) -> tuple[ClientId, ...]:
        return self._ids

    def num_examples(self, client_id: ClientId) -> int:
        return self._part(client_id).num_examples(client_id)

    def client(self, client_id: ClientId) -> Examples:
        examples = self._part(client_id).client(client_id)
        self._schema.check(client_id, examples)
        return examples

    def _part(self, client_id: ClientId) -> FederatedData:
        if not _has(self._owner, client_id):
            raise unknown(client_id, self)
        return self._owner[client_id]

    def __len__(self) -> int:
        return len(self._ids)
