"""Federated data of examples that are read one by one: datasets of torch, and sources of grain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fax import _arguments
from fax.data._columns import column_array, kept, names_of, owners
from fax.data._lazy import Lazy
from fax.data._memory import InMemory
from fax.data._protocol import ClientId, DataError, FederatedData


def from_torch(
    dataset: Any,
    client: Any = None,
    *,
    features: Sequence[str] = ("x", "y"),
) -> FederatedData:
    """Makes federated data of torch datasets: one with examples of all clients, or one per client.

    Everything with a length and items counts as a dataset, such as a list; torch is not needed.
    Examples are read whenever their client is asked for, and become NumPy arrays, with transforms
    applied. A dataset that only iterates, an ``IterableDataset``, is read once, and kept in memory.
    From a ``DataLoader``, pass its ``dataset``: `fax.data.cohorts` makes the batches.

    Args:
      dataset: a dataset whose items are tuples, mappings or single arrays; or a mapping from ids of
        clients to such datasets.
      client: whose the examples are, if there is one dataset: a sequence of ids, one for each
        example, such as ``dataset.targets``; or the name of the field of items that holds them,
        for which all items are read once.
      features: the names of the elements of items that are tuples. Items that are mappings have
        names themselves.

    Returns:
      The clients, in the order of the mapping, or of their ids. The id of a client in ``client`` is
      its value as a string.

    Raises:
      DataError: if the dataset cannot be used; when a client is read, if an item has other elements
        than ``features``, or arrays have different shapes.

    Example:

      >>> import numpy as np
      >>> dataset = [(np.ones(3), 0), (np.zeros(3), 1), (np.ones(3), 1)]
      >>> data = fax.data.from_torch(dataset, client=["ada", "bob", "bob"])
      >>> data.client_ids(), data.client("bob")["y"]
      (('ada', 'bob'), array([1, 1]))
      >>> fax.data.from_torch({"ada": dataset[:1], "bob": dataset[1:]}).num_examples("bob")
      2
    """
    return _from_items("fax.data.from_torch", dataset, client, features)


def from_grain(
    source: Any, client: Any = None, *, features: Sequence[str] = ("x", "y")
) -> FederatedData:
    """Makes federated data of grain's sources: one with examples of all clients, or one per client.

    It takes random-access sources and ``MapDataset``; grain is not needed. See `from_torch`, which
    does the same for datasets of torch.

    Args:
      source: a source whose elements are tuples, mappings or single arrays; or a mapping from ids
        of clients to such sources.
      client: whose the examples are, if there is one source: a sequence of ids, one for each
        element; or the name of the field of elements that holds them.
      features: the names of the parts of elements that are tuples.

    Returns:
      The clients, in the order of the mapping, or of their ids.

    Raises:
      DataError: as `from_torch`.

    Example:

      >>> source = [{"user": 7, "x": 0.5}, {"user": 3, "x": 1.5}]  # or grain.MapDataset.source(...)
      >>> data = fax.data.from_grain(source, client="user")
      >>> data.client_ids(), data.client("7")
      (('3', '7'), {'x': array([0.5])})
    """
    return _from_items("fax.data.from_grain", source, client, features)


def _from_items(where: str, items: Any, client: Any, features: Any) -> FederatedData:
    features = tuple(names_of(where, features))
    if isinstance(items, Mapping):
        if client is not None:
            raise DataError(
                f"{where}: client is {_arguments.shown(client)}, but the mapping already says "
                "whose the examples are. Leave client out."
            )
        parts = {key: _checked_dataset(where, f"client {key!r}", own) for key, own in items.items()}
        if all(map(_has_items, parts.values())):
            datasets = {key: (own, range(len(own))) for key, own in parts.items()}
            return Items(where, features, None, datasets)
        items_of = {key: _items(own) if _has_items(own) else own for key, own in parts.items()}
        return InMemory({key: _stacked(where, own, features) for key, own in items_of.items()})
    dataset = _checked_dataset(where, "dataset", items)
    if client is None:
        raise DataError(
            f"{where}: whose the examples are is not known. Pass client=, a sequence of ids, one "
            "for each example, or the name of a field; or pass a mapping from clients to datasets."
        )
    if not _has_items(dataset):
        dataset = list(dataset)
    if isinstance(client, str):
        values: Any = [_field(where, client, item, i) for i, item in enumerate(_items(dataset))]
        drop: str | None = client
    else:
        # As an array, the ids 1 and "1" of a list would be the same.
        whole = isinstance(client, list | tuple | np.ma.MaskedArray)
        values, drop = client if whole else np.asarray(client), None
        shape = values.shape if isinstance(values, np.ndarray) else (len(values),)
        if shape != (len(dataset),):
            raise DataError(
                f"{where}: client has the shape {shape}, expected ({len(dataset)},), an id "
                "for each example."
            )
    ids, rows_of = owners(where, "client", values)
    rows = zip(ids, rows_of, strict=True)
    return Items(where, features, drop, {key: (dataset, own) for key, own in rows})


class Items(Lazy):
    """What `from_torch` and `from_grain` return: some items of a dataset for each client."""

    def __init__(
        self,
        where: str,
        features: tuple[str, ...],
        drop: str | None,
        clients: Mapping[Any, tuple[Any, Sequence[int] | np.ndarray]],
    ) -> None:
        super().__init__(clients)
        self._where, self._features, self._drop, self._clients = where, features, drop, clients

    def _length(self, client_id: ClientId) -> int:
        return len(self._clients[client_id][1])

    def _read(self, client_id: ClientId) -> dict[str, np.ndarray]:
        dataset, rows = self._clients[client_id]
        items = (dataset[int(row)] for row in rows)
        return _stacked(self._where, items, self._features, self._drop)


def _stacked(
    where: str, items: Iterable[Any], features: tuple[str, ...], drop: str | None = None
) -> dict[str, np.ndarray]:
    """The elements of items as arrays with a row for each item."""
    columns: dict[str, list[Any]] = {}
    for number, item in enumerate(items):
        fields = _fields(where, item, features)
        fields.pop(drop, None)
        if number == 0:
            columns = {name: [] for name in fields}
        if fields.keys() != columns.keys():
            raise DataError(
                f"{where}: item {number} has {sorted(fields)}, but the first has "
                f"{sorted(columns)}. All items need the same names."
            )
        for name, value in fields.items():
            columns[name].append(value)
    how = "for example in a transform"
    return {name: column_array(where, name, values, how) for name, values in columns.items()}


def _fields(where: str, item: Any, features: tuple[str, ...]) -> dict[Any, Any]:
    """The elements of an item by their names. Tensors become arrays."""
    if isinstance(item, Mapping):
        fields = dict(item)
    else:
        elements = tuple(item) if isinstance(item, tuple | list) else (item,)
        if len(elements) != len(features):
            raise DataError(
                f"{where}: an item has {len(elements)} elements, but features names "
                f"{len(features)}, {', '.join(features)}. Pass features= with a name for each."
            )
        fields = dict(zip(features, elements, strict=True))
    return {name: _value(where, name, value) for name, value in fields.items()}


def _value(where: str, name: Any, value: Any) -> Any:
    if isinstance(value, str | bytes | np.ndarray) or np.isscalar(value):
        return kept(value)
    try:
        return np.array(value)
    except Exception as error:  # a tensor on another device, or one that needs gradients
        raise DataError(
            f"{where}: {name!r} of an item, {_arguments.of_type(value)}, cannot be made an array: "
            f"{error}. Convert it in a transform of the dataset."
        ) from error


def _field(where: str, name: str, item: Any, number: int) -> Any:
    if not isinstance(item, Mapping) or name not in item:
        found = sorted(map(str, item)) if isinstance(item, Mapping) else _arguments.shown(item)
        raise DataError(
            f"{where}: client is {name!r}, but item {number} has no such field: it is {found}. "
            "Pass a sequence of ids, one for each example."
        )
    value = _value(where, name, item[name])
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


def _items(dataset: Any) -> Iterator[Any]:
    """All items, in order. Datasets need not iterate, and some do not stop at their length."""
    return (dataset[i] for i in range(len(dataset)))


def _has_items(dataset: Any) -> bool:
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


def _checked_dataset(where: str, name: str, dataset: Any) -> Any:
    if hasattr(dataset, "dataset") and hasattr(dataset, "batch_sampler"):
        raise DataError(
            f"{where}: {name} is a DataLoader. Pass its dataset, loader.dataset: the batches of a "
            "round are made by fax.data.cohorts."
        )
    # Iterable datasets of torch inherit __getitem__, which always raises.
    iterable = any(base.__name__ == "IterableDataset" for base in type(dataset).__mro__)
    if iterable:
        return iter(dataset)
    if _has_items(dataset) and not isinstance(dataset, str | bytes):
        return dataset
    if isinstance(dataset, Iterable) and not isinstance(dataset, str | bytes):
        return iter(dataset)
    raise DataError(
        f"{where}: {name} is {_arguments.shown(dataset)}, expected a dataset with a length and "
        "items, or one that iterates."
    )
