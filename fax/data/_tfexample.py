"""The examples of TensorFlow Federated's files: `tf.train.Example` messages, read by their bytes.

The message is, in the notation of protocol buffers::

    Example   { Features features = 1 }           BytesList { repeated bytes value = 1 }
    Features  { map<string, Feature> feature = 1 }  FloatList { repeated float value = 1 [packed] }
    Feature   { oneof { BytesList = 1, FloatList = 2, Int64List = 3 } }
    Int64List { repeated int64 value = 1 [packed] }

A map is a repeated entry of a key, 1, and a value, 2. Every field begins with a varint of its
number and its wire type. Anything else is an error, for it means that the bytes are damaged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fax.data._check import is_numeric
from fax.data._protocol import DataError

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5

Values = Any  # list[bytes] or np.ndarray
Features = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


def parse(message: bytes) -> dict[str, Values]:
    """The features of an example: byte strings, or an array of float32 or int64, each flat.

    Raises `ValueError` for anything that is not such a message.
    """
    features: dict[str, Values] = {}
    for body in _only(message, 1):
        for entry in _only(body, 1):
            fields = list(_fields(entry))
            if [field[:2] for field in fields] != [(1, LENGTH), (2, LENGTH)]:
                raise ValueError("an entry of the map of features is no pair of a name and values")
            name = fields[0][2].decode()
            if name in features:
                raise ValueError(f"feature {name!r} comes twice")
            features[name] = _values(name, fields[1][2])
    return features


def _values(name: str, feature: bytes) -> Values:
    """The one list of a feature. One that has none is like an empty list."""
    fields = list(_fields(feature))
    if not fields:
        return []
    (kind, wire, body), *more = fields
    if more or wire != LENGTH or kind not in (1, 2, 3):
        raise ValueError(f"feature {name!r} is no list of bytes, floats or ints")
    if kind == 1:
        return list(_only(body, 1))
    parts = []
    for number, wire, value in _fields(body):
        if number != 1 or wire not in (LENGTH, FIXED32 if kind == 2 else VARINT):
            raise ValueError(f"feature {name!r} is damaged")
        parts.append(np.frombuffer(value, "<f4") if kind == 2 else _varints(value))
    return np.concatenate(parts) if parts else np.empty(0, np.float32 if kind == 2 else np.int64)


def _only(message: bytes, number: int) -> Iterator[bytes]:
    """The values of a message that has one kind of field, of that number and with a length."""
    for found, wire, value in _fields(message):
        if (found, wire) != (number, LENGTH):
            raise ValueError(f"field {found} of wire type {wire} in place of field {number}")
        yield value


def _fields(message: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The number, the wire type and the bytes of each field."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        wire, start = tag & 7, at
        if wire == VARINT:
            _, at = _varint(message, at)
        elif wire == LENGTH:
            length, start = _varint(message, at)
            at = start + length
        elif wire in (FIXED32, FIXED64):
            at += 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        if at > len(message):
            raise ValueError(f"{at - len(message)} bytes are missing at the end")
        yield tag >> 3, wire, message[start:at]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number in groups of 7 bits, the lowest first, and where it ends."""
    value = 0
    for i, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    raise ValueError("a number does not end")


def _varints(packed: bytes) -> np.ndarray:
    """Many numbers at once, as int64."""
    groups = np.frombuffer(packed, np.uint8)
    last = groups < 0x80
    if last.all():  # all of them below 128
        return groups.astype(np.int64)
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends + 1])[: len(ends)]
    if not last[-1] or (ends - starts).max() > 9:
        raise ValueError("a number does not end")
    place = np.arange(len(groups)) - np.repeat(starts, ends - starts + 1)
    bits = (groups & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.bitwise_or.reduceat(bits, starts).view(np.int64)


def feature_types(features: Any) -> Features:
    """Checks which features to read: names to pairs of a dtype and the shape in one example."""
    where = "fax.data.SQLite: features"
    if not isinstance(features, Mapping) or not features:
        raise DataError(f"{where} is {features!r}, expected such as {{'x': (float, (28, 28))}}.")
    types = {}
    for name, value in features.items():
        try:
            dtype, shape = value
            dtype = np.dtype(object if dtype in (bytes, "bytes") else dtype)
            shape = tuple(int(n) for n in shape)
        except (TypeError, ValueError):
            raise DataError(
                f"{where}[{name!r}] is {value!r}, expected a pair of a dtype, bytes for byte "
                "strings, and the shape in one example, as (np.int32, ())."
            ) from None
        if not (dtype.hasobject or is_numeric(dtype)) or any(n < 0 for n in shape):
            raise DataError(f"{where}[{name!r}] is {dtype}{shape}, expected numbers or bytes.")
        types[name] = dtype, shape
    return types


def describe(message: bytes) -> str:
    """What could be passed as features for a file that has such examples."""
    shown = []
    for name, values in sorted(parse(message).items()):
        dtype = f"np.{values.dtype}" if isinstance(values, np.ndarray) else "bytes"
        shape = "()" if len(values) == 1 else f"({len(values)},)"
        shown.append(f"{name!r}: ({dtype}, {shape})")
    return "{" + ", ".join(shown) + "}"


def stack(client_id: str, messages: list[bytes], features: Features) -> dict[str, np.ndarray]:
    """A client's examples as arrays with a row for each message."""
    examples = []
    for i, message in enumerate(messages):
        try:
            if not isinstance(message, bytes):
                raise ValueError(f"it is a {type(message).__name__}")
            examples.append(parse(message))
        except ValueError as error:
            raise DataError(
                f"client {client_id!r}, example {i} is no tf.train.Example: {error}. "
                "The file is damaged."
            ) from error
    arrays = {}
    for name, (dtype, shape) in features.items():
        where = f"client {client_id!r}, feature {name!r}"
        rows = []
        for i, example in enumerate(examples):
            if name not in example:
                raise DataError(f"{where}: example {i} lacks it, and has {sorted(example)}.")
            rows.append(_row(f"{where}, example {i}", example[name], dtype, math.prod(shape)))
        array = np.empty((len(rows), math.prod(shape)), dtype if dtype.hasobject else rows[0].dtype)
        for i, row in enumerate(rows):
            array[i] = row
        arrays[name] = _cast(where, array, dtype).reshape(len(rows), *shape)
    return arrays


def _row(where: str, values: Values, dtype: np.dtype, size: int) -> Values:
    """The values of one example, of the kind of the dtype, and as many as there should be."""
    if isinstance(values, list) and values and not dtype.hasobject:  # the bytes of an array
        if len(values) != 1 or len(values[0]) != size * dtype.itemsize:
            raise DataError(
                f"{where} has {sum(map(len, values))} bytes, expected {size} values of {dtype}. "
                "For byte strings say bytes."
            )
        return np.frombuffer(values[0], dtype.newbyteorder("<"))
    if len(values) != size:
        raise DataError(f"{where} has {len(values)} values, expected {size}.")
    if isinstance(values, np.ndarray):
        integers = dtype.kind in "biu"
        if dtype.hasobject or integers != (values.dtype == np.int64) or dtype.kind == "c":
            wanted = "byte strings" if dtype.hasobject else str(dtype)
            raise DataError(f"{where} is {values.dtype}, expected {wanted}. Change it in features.")
        return values
    return values if dtype.hasobject else np.empty(0, dtype)


def _cast(where: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Casts, unless ints do not fit."""
    if array.dtype == np.int64 and dtype != np.int64 and array.size:
        low, high = array.min(), array.max()
        limits = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        if low < limits[0] or high > limits[1]:
            raise DataError(f"{where} has values from {low} to {high}, which {dtype} cannot hold.")
    return array.astype(dtype, copy=False)
