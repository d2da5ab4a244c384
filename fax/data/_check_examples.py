"""Checks of clients' examples, and the messages for examples that cannot be used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fax import _arguments
from fax.data._protocol import ClientId, DataError, Examples, FederatedData


def check_federated(where: str, name: str, value: Any) -> None:
    """Checks that an argument has the methods of federated data."""
    methods = ("client_ids", "num_examples", "client", "__len__")
    lacks = [method for method in methods if not callable(getattr(value, method, None))]
    if not lacks and not isinstance(value, type):
        return
    fix = ""
    if isinstance(value, Mapping):
        fix = " Wrap a mapping from clients to their examples: fax.data.InMemory(clients)."
    elif isinstance(value, list | tuple) and all(hasattr(x, "client_ids") for x in value):
        fix = " Pass one of them, or fax.data.concatenate(*datas)."
    elif hasattr(value, "train") and hasattr(value, "test"):
        fix = " Pass its .train or .test."
    elif len(lacks) < len(methods) and "client_ids" not in lacks:
        fix = f" It has no method {' and no '.join(lacks)}."
    raise DataError(
        f"{where}: {name} is {_arguments.shown(value)}, expected federated data, such as "
        f"fax.data.InMemory.{fix or frame_hint(value, clients=True)}"
    )


def frame_hint(value: Any, *, clients: bool = False) -> str:
    """How to fix it if a table of pandas or polars was passed for examples or ``clients``."""
    if not type(value).__name__.endswith("DataFrame"):
        return ""
    if clients:
        return " Divide a table into clients: fax.data.from_pandas(frame, client=...)."
    columns = "{name: frame[name].to_numpy() for name in frame.columns}"
    return f" Pass the columns of a table: {columns}."


def checked_examples(client_id: ClientId, examples: Any) -> dict[str, np.ndarray]:
    """A client's features as read-only arrays with a common leading axis, after all checks."""
    if not isinstance(examples, Mapping):
        raise DataError(
            f"client {client_id!r} is {_arguments.of_type(examples)}, expected a mapping from the "
            "names of features to arrays with a common leading axis, one row for each example."
            f"{frame_hint(examples)}"
        )
    arrays: dict[str, np.ndarray] = {}
    for name, value in examples.items():
        if not isinstance(name, str):
            raise DataError(
                f"client {client_id!r} has a feature named {name!r}, {_arguments.of_type(name)}. "
                "Names of features have to be strings."
            )
        arrays[name] = _array(f"client {client_id!r}, feature {name!r}", value)
    if not arrays:
        raise DataError(f"client {client_id!r} has no features. Leave the client out.")
    (first, length), *others = ((name, len(array)) for name, array in arrays.items())
    for name, other in others:
        if other != length:
            raise DataError(
                f"client {client_id!r} has {length} examples by feature {first!r}, but {other} by "
                f"{name!r}, of shape {arrays[name].shape}. All features need one row for each "
                "example."
            )
    if length == 0:
        raise DataError(
            f"client {client_id!r} has no examples. Leave the client out, for example with "
            "on_bad='skip' where that is an option."
        )
    return arrays


def read_client(data: FederatedData, client_id: ClientId) -> dict[str, np.ndarray]:
    """A client's features, after all checks."""
    return checked_examples(client_id, fetch_client(data, client_id))


def fetch_client(data: FederatedData, client_id: ClientId) -> Examples:
    """A client's features as the data return them. The data may be a user's own class."""
    try:
        return data.client(client_id)
    except StopIteration as error:  # it would end the loop that this is called from
        raise DataError(
            f"client {client_id!r}: {type(data).__name__.lstrip('_')}.client raised StopIteration. "
            "If it calls next, pass a default or catch the exception."
        ) from error


def contains(ids: Container[ClientId], client_id: Any) -> bool:
    """Whether an id is among others. One that is not hashable is not."""
    try:
        return client_id in ids
    except TypeError:
        return False


def num_rows(examples: Examples) -> int:
    """The number of examples, which is the same in all features."""
    return len(next(iter(examples.values())))


def utf8_of(text: str) -> bytes:
    """A client's id in UTF-8. Surrogate escapes become the bytes that they stand for."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"its id has {text[error.start]!r} at position {error.start}, a lone surrogate, which "
            "is not a character. Rename the client"
        ) from error


def exact_array(value: Any) -> np.ndarray:
    """An array of these values. NumPy would round ints to floats if int64 is too short for one."""
    array = np.asarray(value)
    given = hasattr(value, "dtype") or array.dtype != np.float64
    if given or not (np.abs(array) >= 2.0**53).any():
        return array
    values = np.asarray(value, object)
    if not all(isinstance(v, int | np.integer) for v in values.flat):
        return array
    dtype = common_ints(values.min(), values.max())
    return values if dtype is None else values.astype(dtype)


def common_ints(lowest: int, highest: int) -> np.dtype | None:
    """A dtype of 64 bits for ints from the lowest to the highest, or None if there is none."""
    for dtype in (np.dtype(np.uint64), np.dtype(np.int64)):
        if np.iinfo(dtype).min <= lowest and highest <= np.iinfo(dtype).max:
            return dtype
    return None


def unchanged_array(where: str, value: Any) -> np.ndarray:
    """An array of numbers or strings. What NumPy would change or drop silently is an error."""
    if isinstance(value, np.ma.MaskedArray):
        raise DataError(f"{where} is a masked array. Make the mask a feature of its own.")
    if isinstance(value, list | tuple) and any(
        isinstance(v, np.ma.MaskedArray) and np.ma.is_masked(v) for v in value
    ):
        raise DataError(f"{where} has masked values. Make the mask a feature of its own.")
    try:
        array = exact_array(value)
    except Exception as error:  # __array__ may raise anything
        raise DataError(f"{where} cannot be made an array: {error}") from error
    if array.dtype.hasobject and not all(isinstance(v, (str, bytes)) for v in array.flat):
        raise DataError(
            f"{where} has dtype object, expected numbers, bools or strings. If its rows have "
            "different lengths, pad them."
        )
    # NumPy turns bytes into text where both are mixed, so look for bytes before that.
    text = array if array.dtype.hasobject else np.array(0)
    if array.dtype.kind in "SU" and not isinstance(value, np.ndarray):
        text = np.asarray(value, object)
        kinds = sorted({type(v).__name__ for v in text.flat if not isinstance(v, (str, bytes))})
        if kinds:
            raise DataError(
                f"{where} mixes strings and {' and '.join(kinds)}. Convert it to one type."
            )
        if any(v[-1:] in ("\0", b"\0") for v in text.flat):
            raise DataError(
                f"{where} has a string that ends with a zero, which NumPy would drop. Pass an "
                "array of dtype object: np.array(values, object)."
            )
    if len({isinstance(v, bytes) for v in text.flat}) > 1:
        raise DataError(f"{where} mixes str and bytes. Decode or encode one of them.")
    return array


def _array(where: str, value: Any) -> np.ndarray:
    """A feature as a read-only array."""
    if isinstance(value, Mapping):
        raise DataError(
            f"{where} is {_arguments.of_type(value)}, expected an array. Features are a flat "
            "mapping: make each of its entries a feature of its own."
        )
    array = unchanged_array(where, value)
    if array.ndim == 0:
        raise DataError(
            f"{where} is a scalar, {array.dtype}, expected an array with a row for each example."
        )
    if array.dtype == bool and (highest := np.max(array.view(np.uint8), initial=0)) > 1:
        raise DataError(
            f"{where} has bools with the byte {highest}, expected 0 or 1. The file that they were "
            "read from is damaged."
        )
    if not (is_numeric(array.dtype) or array.dtype.kind in "OSUMm"):
        raise DataError(
            f"{where} has dtype {array.dtype}, expected numbers, bools or strings. Make each "
            "field a feature of its own."
        )
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    array = array.view()
    array.flags.writeable = False
    return array


def is_numeric(dtype: np.dtype) -> bool:
    """Whether a dtype is of numbers or bools, including bfloat16 and similar extended dtypes."""
    extended = dtype.kind == "V" and dtype.type is not np.void
    return dtype.kind in "biufc" or extended


def check_numeric(client_id: ClientId, examples: Examples) -> None:
    """Checks that examples can be batched: strings have to be mapped to numbers first."""
    for name, array in examples.items():
        if not is_numeric(array.dtype):
            raise DataError(
                f"client {client_id!r}, feature {name!r} has dtype {array.dtype}, but only numbers "
                "and bools can be batched. Convert it to numbers or drop it with fax.data.map."
            )


def check_finite(client_id: ClientId, examples: Examples) -> None:
    """Checks that no feature has NaNs or infinities."""
    for name, array in examples.items():
        if not is_numeric(array.dtype) or array.dtype.kind in "biu":
            continue
        values = array if array.dtype.kind in "fc" else array.astype(np.float32)
        finite = np.isfinite(values)
        if not finite.all():
            row = np.argwhere(~finite)[0]
            bad = finite.size - finite.sum()
            raise DataError(
                f"client {client_id!r}, feature {name!r} has {bad} "
                f"{'value that is' if bad == 1 else 'values that are'} not finite. The first is "
                f"{values[tuple(row)]} in example {row[0]}. Fill or drop missing values, for "
                "example by fax.data.map, or leave out such clients by fax.data.validate(data, "
                "on_bad='skip')."
            )


class Schema:
    """The features that all clients must have: those of the client that was checked first."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[ClientId, dict[str, tuple[str, tuple[int, ...]]]]] = {}

    def check(self, client_id: ClientId, examples: Examples) -> None:
        """Checks that a client's features have the names, dtypes and shapes of the others'."""
        own = {name: (_dtype(x.dtype), x.shape[1:]) for name, x in examples.items()}
        # Several threads may be here at once; setdefault lets only one of them be the first.
        other, expected = self._first.setdefault("client", (client_id, own))
        if own == expected:
            return
        if own.keys() != expected.keys():
            raise DataError(
                f"client {client_id!r} has the features {sorted(own)}, but client {other!r} has "
                f"{sorted(expected)}. All clients need the same features."
            )
        for name, (dtype, shape) in own.items():
            if (dtype, shape) != expected[name]:
                raise DataError(
                    f"client {client_id!r}, feature {name!r} is {_shown(dtype, shape)} for each "
                    f"example, but {_shown(*expected[name])} at client {other!r}. All clients need "
                    "the same dtypes and shapes."
                )


def _dtype(dtype: np.dtype) -> str:
    # The width of strings may differ between clients.
    return dtype.kind if dtype.kind in "SU" else dtype.name


def _shown(dtype: str, shape: tuple[int, ...]) -> str:
    dtype = {"S": "bytes", "U": "str"}.get(dtype, dtype)
    return f"{dtype}[{','.join(map(str, shape))}]"


def unknown_client(client_id: Any, data: FederatedData) -> DataError:
    """The error for an id that no client has."""
    return DataError(
        f"no client {client_id!r} in {kind_of(data)} of {len(data)} clients, "
        f"{first_ids(data.client_ids())}."
    )


def kind_of(data: FederatedData) -> str:
    """The kind of federated data, such as ``Subset``."""
    return type(data).__name__.lstrip("_")


def describe_features(examples: Examples) -> str:
    """The features of a client's examples, such as ``x float32[28,28], y int32[]``."""
    return ", ".join(f"{name} {_shown(x.dtype.name, x.shape[1:])}" for name, x in examples.items())


def first_ids(ids: Sequence[Any], limit: int = 3) -> str:
    """The first few of some ids."""
    shown = ", ".join(repr(i) for i in ids[:limit])
    return shown + (", ..." if len(ids) > limit else "")


def usable_clients(
    where: str, ids: Iterable[ClientId], check: Callable[[ClientId], None], on_bad: str
) -> list[ClientId]:
    """The clients that pass a check. The others raise an error, or are counted in one warning."""
    _arguments.choice(where, "on_bad", on_bad, ("raise", "skip"), error=DataError)
    good: list[ClientId] = []
    bad: list[DataError] = []
    for client_id in ids:
        try:
            check(client_id)
            good.append(client_id)
        except DataError as error:
            if on_bad == "raise":
                raise
            bad.append(error)
    if bad:
        total = len(good) + len(bad)
        reasons = " ".join(str(error) for error in bad[:3]) + (" ..." if len(bad) > 3 else "")
        if not good:
            raise DataError(f"{where}: none of {total} clients can be used. {reasons}") from bad[0]
        warnings.warn(
            f"{where} skips {len(bad)} of {total} clients: {reasons}", UserWarning, stacklevel=3
        )
    return good
