"""The examples in TensorFlow Federated's files, `tf.train.Example` messages, without TensorFlow.

The message is, in the notation of protocol buffers::

    Example   { Features features = 1 }           BytesList { repeated bytes value = 1 }
    Features  { map<string, Feature> feature = 1 }  FloatList { repeated float value = 1 [packed] }
    Feature   { oneof { BytesList = 1, FloatList = 2, Int64List = 3 } }
    Int64List { repeated int64 value = 1 [packed] }

A map is a repeated entry of a key, field 1, and a value, field 2. Every field starts with a varint
of its number and its wire type. Anything else is an error, because the bytes must be damaged.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fax.data._check_examples import is_numeric
from fax.data._protocol import DataError

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5

BYTES, FLOATS, INTS = 1, 2, 3

Features = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Values:
    """The values of a feature, which are decoded only if their number is as expected.

    Attributes:
      kind: `BYTES`, `FLOATS` or `INTS`, or None if there are no values.
      packed: the message of a list of byte strings, or all numbers, one after another.
    """

    kind: int | None
    packed: bytes

    def count(self) -> int:
        if self.kind == BYTES:
            return sum(1 for _ in _values_of(self.packed, 1))
        if self.kind == INTS:
            return int(np.count_nonzero(np.frombuffer(self.packed, np.uint8) < 0x80))
        return len(self.packed) // 4

    def array(self) -> np.ndarray:
        """All values, flat: float32, int64, or byte strings as objects."""
        if self.kind == INTS:
            return _varints(self.packed)
        if self.kind == FLOATS:
            return np.frombuffer(self.packed, "<f4").astype(np.float32, copy=False)
        values = list(_values_of(self.packed, 1))
        array = np.empty(len(values), object)
        array[:] = values
        return array


def parse(message: bytes, wanted: Container[str] | None = None) -> dict[str, Values]:
    """The features of an example, or those of them that are wanted.

    Raises `ValueError` for any other message.
    """
    features: dict[str, Values] = {}
    for name, feature in _entries(message):
        if wanted is not None and name not in wanted:
            continue
        if name in features:
            raise ValueError(f"feature {name!r:.80} occurs twice")
        features[name] = _list_of(name, feature)
    return features


def _entries(message: bytes) -> Iterator[tuple[str, bytes]]:
    for body in _values_of(message, 1):
        for entry in _values_of(body, 1):
            fields = list(itertools.islice(_fields(entry), 3))
            if [field[:2] for field in fields] != [(1, LENGTH), (2, LENGTH)]:
                raise ValueError("an entry of the features is not a pair of a name and values")
            yield fields[0][2].decode(), fields[1][2]


def _list_of(name: str, feature: bytes) -> Values:
    """The list of a feature. A feature without a list is like an empty list."""
    fields = list(itertools.islice(_fields(feature), 2))
    if not fields:
        return Values(None, b"")
    (kind, wire, body), *more = fields
    if more or wire != LENGTH or kind not in (BYTES, FLOATS, INTS):
        raise ValueError(f"feature {name!r:.80} is not a list of bytes, floats or ints")
    if kind == BYTES:
        for _ in _values_of(body, 1):
            pass
        return Values(kind, body)
    packed = bytearray()
    for number, wire, value in _fields(body):
        ends = len(value) % 4 == 0 if kind == FLOATS else not value or value[-1] < 0x80
        if number != 1 or wire not in (LENGTH, FIXED32 if kind == FLOATS else VARINT) or not ends:
            raise ValueError(f"feature {name!r:.80} is damaged")
        packed += value
    return Values(kind, bytes(packed))


def _values_of(message: bytes, number: int) -> Iterator[bytes]:
    """The values of a message whose fields all have this number, and wire type `LENGTH`."""
    for found, wire, value in _fields(message):
        if (found, wire) != (number, LENGTH):
            raise ValueError(f"field {found} of wire type {wire} instead of field {number}")
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
    """A number in groups of 7 bits, the lowest first, and its end."""
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
        raise DataError(
            f"{where} is {features!r:.80}, expected a mapping from names to pairs of a dtype and a "
            "shape, as in {'x': (np.float32, (28, 28))}."
        )
    types = {}
    for name, value in features.items():
        try:
            dtype, shape = value
            dtype = np.dtype(object if dtype in (bytes, "bytes") else dtype)
            shape = tuple(operator.index(n) for n in shape)
        # NumPy evaluates the text of a dtype as Python, which can raise any error.
        except Exception:
            raise DataError(
                f"{where}[{name!r:.80}] is {value!r:.80}, expected a pair of a dtype, bytes for "
                "byte strings, and the shape in one example, as (np.int32, ())."
            ) from None
        if not (dtype.kind == "O" or is_numeric(dtype)) or any(n < 0 for n in shape):
            raise DataError(f"{where}[{name!r:.80}] is {dtype}{shape}, expected numbers or bytes.")
        if math.prod(n or 1 for n in shape) * dtype.itemsize >= 1 << 31 or len(shape) > 32:
            raise DataError(f"{where}[{name!r:.80}] is {dtype}{shape}, more than 2 GiB an example.")
        types[name] = dtype, shape
    return types


def describe(message: Any) -> str:
    """What to pass as ``features`` for a file with such examples."""
    if not isinstance(message, bytes):
        raise ValueError(f"the first example is of type {type(message).__name__}, not bytes")
    shown = []
    for name, values in sorted(parse(message).items())[:20]:
        names: dict[int | None, str] = {INTS: "np.int64", FLOATS: "np.float32"}
        dtype, count = names.get(values.kind, "bytes"), values.count()
        shown.append(f"{name!r:.80}: ({dtype}, {'()' if count == 1 else f'({count},)'})")
    return "{" + ", ".join(shown) + "}"


def stack(client_id: str, messages: list[bytes], features: Features) -> dict[str, np.ndarray]:
    """A client's examples as arrays with a row for each message."""
    examples = []
    for i, message in enumerate(messages):
        try:
            examples.append(parse(message, features))
        except ValueError as error:
            raise DataError(
                f"client {client_id!r}, example {i} is not a tf.train.Example: {error}. "
                "The file is damaged."
            ) from error
    arrays = {}
    for name, (dtype, shape) in features.items():
        where, size = f"client {client_id!r}, feature {name!r}", math.prod(shape)
        rows = []
        for i, example in enumerate(examples):
            if name not in example:
                has = sorted(parse(messages[i]))[:20]
                raise DataError(f"{where}: example {i} does not have it, but {has}.")
            rows.append(_row(f"{where}, example {i}", example[name], dtype, size))
        if len({row.dtype for row in rows}) > 1:  # some examples have ints, some have their bytes
            rows = [_cast(where, row, dtype) for row in rows]
        array = np.empty((len(rows), size), rows[0].dtype)
        for i, row in enumerate(rows):
            array[i] = row
        arrays[name] = _cast(where, array, dtype).reshape(len(rows), *shape)
    return arrays


def _row(where: str, values: Values, dtype: np.dtype, size: int) -> np.ndarray:
    """The values of one example, checked for the kind of their dtype and their number."""
    count = values.count()
    if values.kind == BYTES and count and not dtype.hasobject:  # the bytes of an array
        lengths = [len(value) for value in itertools.islice(_values_of(values.packed, 1), 2)]
        if lengths != [size * dtype.itemsize]:
            raise DataError(
                f"{where} has {count} byte strings, the first of {lengths[0]} bytes, expected "
                f"{size} values of {dtype}. For byte strings pass the dtype bytes."
            )
        return np.frombuffer(values.array()[0], dtype.newbyteorder("<"))
    if count != size:
        raise DataError(f"{where} has {count} values, expected {size}.")
    if not count and values.kind not in (FLOATS, INTS):
        return np.empty(0, dtype)
    try:
        array = values.array()
    except ValueError as error:
        raise DataError(f"{where}: {error}. The file is damaged.") from error
    kinds: dict[int | None, str] = {BYTES: "O", FLOATS: "fV", INTS: "biu"}
    if dtype.kind not in kinds[values.kind]:
        wanted = "byte strings" if dtype.hasobject else str(dtype)
        raise DataError(
            f"{where} is {array.dtype}, expected {wanted}. Change its dtype in features."
        )
    return array


def _cast(where: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Casts to a dtype, if all numbers fit it."""
    if array.dtype == np.int64 and dtype != np.int64 and array.size:
        low, high = array.min(), array.max()
        limits = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        if low < limits[0] or high > limits[1]:
            raise DataError(f"{where} has values from {low} to {high}, which {dtype} cannot hold.")
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype, copy=False)
    if array.dtype == np.float32 and dtype != np.float32:
        lost = np.isfinite(array) & ~np.isfinite(cast)
        if lost.any():
            raise DataError(f"{where} has the value {array[lost][0]}, which {dtype} cannot hold.")
    return cast
