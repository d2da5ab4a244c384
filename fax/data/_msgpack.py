"""The examples of a client as FedJAX stores them: msgpack with arrays as extension types.

A client is a map from names to arrays. An array of numbers is extension type 1, an array of byte
strings type 4. Their data are msgpack again, ``[shape, dtype's name, bytes in row-major order]``
and ``[shape, [byte string, ...]]``. This module reads and writes only that part of msgpack.

The msgpack package is not used, because it cannot be bounded for untrusted files. It
allocates a list of the announced length at each of up to 1,024 levels of nesting before it reads an
element, so that 21 kB of input take 76 times the limit of ``max_array_len`` in memory, and it
accepts maps in which a name occurs twice. This reader bounds depth and memory, and reports both.
`fax.data` also needs nothing but NumPy this way.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fax.data._check_examples import is_numeric

ARRAY, BYTES_ARRAY = 1, 4

_DEEPEST = 4  # levels of nested lists and maps; an array has two
_MOST_AXES = 64  # as in NumPy
_BYTES_OF_A_VALUE = 64  # of memory, as a Python object and its place in a list

# What follows the first byte of a value: the number itself, or the length of the rest.
_NUMBERS = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i"}
_NUMBERS |= {0xD3: ">q", 0xCA: ">f", 0xCB: ">d"}
_BYTES = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
_EXTENSIONS = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}
_ARRAYS, _MAPS = {0xDC: ">H", 0xDD: ">I"}, {0xDE: ">H", 0xDF: ">I"}


class _Extension(NamedTuple):
    kind: int
    data: bytes


def unpack(data: bytes, most: int) -> dict[str, np.ndarray]:
    """The features of a client, which may take about ``most`` bytes of memory.

    Raises `ValueError` for any other input.
    """
    features = _unpacked(data, most)
    if not isinstance(features, dict):
        raise ValueError("expected a map from names to arrays")
    return {name.decode(): _array(name.decode(), value, most) for name, value in features.items()}


def _array(name: str, value: Any, most: int) -> np.ndarray:
    where = f"feature {name!r:.80}"
    if not isinstance(value, _Extension) or value.kind not in (ARRAY, BYTES_ARRAY):
        raise ValueError(f"{where} is not an array")
    parts = _unpacked(value.data, most)
    if not isinstance(parts, list) or len(parts) != (3 if value.kind == ARRAY else 2):
        raise ValueError(f"{where} is not an array")
    shape, *dtype, content = parts
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"{where} has the shape {shape!r:.80}")
    if value.kind == BYTES_ARRAY:
        if not isinstance(content, list) or not all(isinstance(v, bytes) for v in content):
            raise ValueError(f"{where} does not consist of byte strings")
        flat = np.empty(len(content), object)
        flat[:] = content
    else:
        if not isinstance(dtype[0], bytes) or not isinstance(content, bytes):
            raise ValueError(f"{where} is not an array")
        # Only names, for NumPy would evaluate other text, too.
        kind = np.dtype(np.sctypeDict.get(dtype[0].decode(), np.void))
        if not is_numeric(kind):
            raise ValueError(f"{where} has dtype {dtype[0]!r:.80}")
        flat = np.frombuffer(content, kind)
    if len(shape) > _MOST_AXES or flat.size != math.prod(shape):
        raise ValueError(f"{where} has {flat.size} values for the shape {shape!r:.80}")
    try:
        return flat.reshape(shape)
    except ValueError as error:
        raise ValueError(f"{where} has the shape {shape!r:.80}: {error}") from error


def _unpacked(data: bytes, most: int) -> Any:
    value, end = _value(data, 0, 0, most)
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes follow its end")
    return value


def _value(data: bytes, at: int, depth: int, most: int) -> tuple[Any, int]:
    """The value that starts at a byte, and its end. All strings are bytes."""
    if depth > _DEEPEST:
        raise ValueError("lists and maps are nested too deeply")
    code = _take(data, at, 1)[0]
    at += 1
    if code < 0x80:
        return code, at
    if code >= 0xE0:
        return code - 0x100, at
    if code < 0x90:
        return _map(data, at, code & 0x0F, depth, most)
    if code < 0xA0:
        return _list(data, at, code & 0x0F, depth, most)
    if code < 0xC0:
        return _take(data, at, code & 0x1F), at + (code & 0x1F)
    if code in _NUMBERS:
        return _number(data, at, _NUMBERS[code])
    if code in _BYTES:
        length, at = _number(data, at, _BYTES[code])
        return _take(data, at, length), at + length
    if code in _ARRAYS:
        length, at = _number(data, at, _ARRAYS[code])
        return _list(data, at, length, depth, most)
    if code in _MAPS:
        length, at = _number(data, at, _MAPS[code])
        return _map(data, at, length, depth, most)
    if code in _EXTENSIONS:
        length, at = _number(data, at, _EXTENSIONS[code])
    elif 0xD4 <= code <= 0xD8:
        length = 1 << (code - 0xD4)
    else:
        raise ValueError(f"byte {at - 1} is {code:#x}, which no expected value starts with")
    kind = _take(data, at, 1)[0]
    return _Extension(kind, _take(data, at + 1, length)), at + 1 + length


def _take(data: bytes, at: int, length: int) -> bytes:
    if at + length > len(data):
        raise ValueError(f"{at + length - len(data)} bytes are missing at the end")
    return data[at : at + length]


def _number(data: bytes, at: int, form: str) -> tuple[Any, int]:
    size = struct.calcsize(form)
    return struct.unpack(form, _take(data, at, size))[0], at + size


def _list(data: bytes, at: int, length: int, depth: int, most: int) -> tuple[list[Any], int]:
    _check_length(data, at, length, most)
    values = []
    for _ in range(length):
        value, at = _value(data, at, depth + 1, most)
        values.append(value)
    return values, at


def _map(data: bytes, at: int, length: int, depth: int, most: int) -> tuple[dict[bytes, Any], int]:
    _check_length(data, at, 2 * length, most)
    values: dict[bytes, Any] = {}
    for _ in range(length):
        key, at = _value(data, at, depth + 1, most)
        if not isinstance(key, bytes) or key in values:
            raise ValueError(f"the name {key!r:.80} is not a string, or occurs twice")
        values[key], at = _value(data, at, depth + 1, most)
    return values, at


def _check_length(data: bytes, at: int, length: int, most: int) -> None:
    """Checks that there can be so many values, of at least a byte each, and memory for them."""
    if length > len(data) - at:
        raise ValueError(f"{length} values are announced, but only {len(data) - at} bytes are left")
    if length > most // _BYTES_OF_A_VALUE:
        raise ValueError(
            f"a list of {length} values takes about {length * _BYTES_OF_A_VALUE} bytes of memory, "
            f"and the limit is {most}. If you trust the data, pass a larger max_bytes"
        )


def pack(features: Mapping[str, np.ndarray]) -> bytes:
    """The inverse of `unpack`. Raises `ValueError` for what the format cannot represent."""
    parts = [_head(0xDE, len(features), ">H")]
    for name, array in features.items():
        shape = _packed_list([_int(n) for n in array.shape])
        if is_numeric(array.dtype):
            kind, rest = ARRAY, [_string(array.dtype.name), _bytes(array.tobytes())]
        elif array.dtype.hasobject and all(isinstance(v, bytes) for v in array.flat):
            kind, rest = BYTES_ARRAY, [_packed_list([_bytes(v) for v in array.flat])]
        else:
            raise ValueError(
                f"feature {name!r:.80} has dtype {array.dtype}, but the file can hold only "
                "numbers, bools, and byte strings in arrays of dtype object. Convert it with "
                "fax.data.map"
            )
        data = _packed_list([shape, *rest])
        parts += [_string(name), _head(0xC9, len(data)), struct.pack(">b", kind), data]
    return b"".join(parts)


def _head(code: int, length: int, form: str = ">I") -> bytes:
    if length >= 1 << (8 * struct.calcsize(form)):
        raise ValueError(f"an array of {length} bytes or a map of that size is too large")
    return bytes([code]) + struct.pack(form, length)


def _packed_list(values: list[bytes]) -> bytes:
    return _head(0xDD, len(values)) + b"".join(values)


def _int(value: int) -> bytes:
    return bytes([0xCF]) + struct.pack(">Q", value)


def _string(value: str) -> bytes:
    return _head(0xDB, len(value.encode())) + value.encode()


def _bytes(value: bytes) -> bytes:
    return _head(0xC6, len(value)) + value
