"""Examples of different lengths or sizes as arrays: what is padded, and what is cropped."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fax import _arguments
from fax.data._check_examples import common_ints, is_numeric, unchanged_array
from fax.data._protocol import DataError


def pad(
    rows: Iterable[Any], shape: int | Sequence[int], *, value: Any = 0, truncate: bool = False
) -> np.ndarray:
    """Pads the end of rows of different lengths, such as tokens of texts, to one shape.

    Args:
      rows: an iterable of arrays or sequences.
      shape: the length of a row in its first axes: an int for the first one, or an int for each of
        several. Other axes have the same lengths in all rows.
      value: what rows are padded with.
      truncate: whether longer rows lose their end. By default they are an error.

    Returns:
      An array ``[rows, *shape, ...]`` with the dtype of the rows, or one that holds all of theirs.

    Raises:
      DataError: if there are no rows, a row is longer and ``truncate`` is False, the other axes
        differ, or no dtype holds all rows and ``value``.

    Example:

      >>> fax.data.pad([[1, 2], [3]], 3)
      array([[1, 2, 0],
             [3, 0, 0]])

      Texts are tokenized by any function, when a client is read:

      >>> data = fax.data.InMemory({"ada": {"text": ["to be", "or not to be"]}})
      >>> def tokenize(client_id, examples):
      ...     tokens = [[len(word) for word in text.split()] for text in examples["text"]]
      ...     return {"token": fax.data.pad(tokens, 4)}
      >>> fax.data.map(data, tokenize).client("ada")["token"].tolist()
      [[2, 2, 0, 0], [2, 3, 2, 2]]
    """
    where = "fax.data.pad"
    wanted = _shape(where, shape)
    _arguments.flag(where, "truncate", truncate, error=DataError)
    arrays = _rows(where, rows, len(wanted))
    for i, array in enumerate(arrays):
        longer = [axis for axis, length in enumerate(wanted) if array.shape[axis] > length]
        if longer and not truncate:
            axis = longer[0]
            raise DataError(
                f"{where}: row {i} has the length {array.shape[axis]} in axis {axis}, more than "
                f"{wanted[axis]}. Pass a larger shape, or truncate=True to drop its end."
            )
    dtype = arrays[0].dtype
    if not _holds(dtype, value):
        raise DataError(
            f"{where}: value is {value!r:.80}, which the rows' dtype {dtype} cannot hold."
        )
    result = np.full((len(arrays), *wanted, *arrays[0].shape[len(wanted) :]), value, dtype)
    for i, array in enumerate(arrays):
        kept = array[tuple(slice(length) for length in wanted)]
        result[i][tuple(slice(n) for n in kept.shape[: len(wanted)])] = kept
    return result


def crop(rows: Iterable[Any], shape: int | Sequence[int]) -> np.ndarray:
    """Crops the centers of rows of different sizes, such as images, to one shape.

    Args:
      rows: an iterable of arrays.
      shape: the lengths of the first axes, such as ``(height, width)``. If an odd number of
        elements is dropped, one more is dropped at the end. Other axes have the same lengths in all
        rows.

    Returns:
      An array ``[rows, *shape, ...]`` with the dtype of the rows, or one that holds all of theirs.

    Raises:
      DataError: if there are no rows, a row is smaller, the other axes differ, or no dtype holds
        all rows.

    Example:

      >>> import numpy as np
      >>> images = [np.zeros((30, 40, 3), np.uint8), np.zeros((28, 33, 3), np.uint8)]
      >>> fax.data.crop(images, (28, 28)).shape
      (2, 28, 28, 3)
    """
    where = "fax.data.crop"
    wanted = _shape(where, shape)
    arrays = _rows(where, rows, len(wanted))
    centers = []
    for i, array in enumerate(arrays):
        left = [have - want for have, want in zip(array.shape, wanted, strict=False)]
        if min(left) < 0:
            raise DataError(
                f"{where}: row {i} has the shape {array.shape}, smaller than {wanted}. Pad it "
                "first, for example with fax.data.pad."
            )
        starts = (n // 2 for n in left)
        centers.append(array[tuple(slice(n, n + want) for n, want in zip(starts, wanted))])
    return np.stack(centers)


def _shape(where: str, shape: Any) -> tuple[int, ...]:
    try:
        lengths = (operator.index(shape),)
    except TypeError:
        lengths = tuple(shape) if isinstance(shape, Iterable) else (shape,)
    if not lengths:
        raise DataError(f"{where}: shape is empty, expected an int or a sequence of ints.")
    return tuple(_arguments.count(where, "shape", n, error=DataError) for n in lengths)


def _rows(where: str, rows: Any, ndim: int) -> list[np.ndarray]:
    """The rows as arrays of one dtype that differ in their first axes alone."""
    if not isinstance(rows, Iterable) or isinstance(rows, str | bytes):
        raise DataError(f"{where}: rows is {_arguments.shown(rows)}, expected a list of arrays.")
    arrays = [unchanged_array(f"{where}: row {i}", row) for i, row in enumerate(rows)]
    if not arrays:
        raise DataError(f"{where}: there are no rows.")
    for i, array in enumerate(arrays):
        if array.ndim < ndim:
            raise DataError(
                f"{where}: row {i} has the shape {array.shape}, expected at least {ndim} "
                f"{'axis' if ndim == 1 else 'axes'}."
            )
        if array.shape[ndim:] != arrays[0].shape[ndim:]:
            raise DataError(
                f"{where}: row {i} has the shape {array.shape}, but row 0 {arrays[0].shape}. Rows "
                f"may differ only in the first {ndim} of their axes."
            )
    # An empty list has the dtype float64, which says nothing.
    dtype = _common_dtype(where, [array for array in arrays if array.size] or arrays[:1])
    return [array.astype(dtype, copy=False) for array in arrays]


def _common_dtype(where: str, arrays: Sequence[np.ndarray]) -> np.dtype:
    """The dtype that holds the values of all arrays. NumPy would round some ints to floats."""
    dtypes = list(dict.fromkeys(array.dtype for array in arrays))
    common: np.dtype | None = None
    if len(set(map(_kind, arrays))) == 1:
        with contextlib.suppress(TypeError):  # such as fields of different names
            common = np.result_type(*dtypes)
    if common is not None and common.kind == "f" and all(x.kind in "biu" for x in dtypes):
        common = common_ints(min(int(x.min()) for x in arrays), max(int(x.max()) for x in arrays))
    if common is None or not (is_numeric(common) or common.kind in "OSUMm"):
        shown = " and ".join(map(str, dtypes))
        raise DataError(f"{where}: rows have dtype {shown}. Convert them to one that holds all.")
    return common


def _kind(array: np.ndarray) -> str:
    """Whether an array has bytes, text, times or numbers."""
    if array.dtype.hasobject:
        return "S" if isinstance(next(array.flat, None), bytes) else "U"
    return array.dtype.kind if array.dtype.kind in "SUMm" else "number"


def _holds(dtype: np.dtype, value: Any) -> bool:
    """Whether a dtype can hold a value. A float may be rounded, but may not become infinite."""
    try:
        if np.ndim(value) != 0 or (np.iscomplexobj(value) and dtype.kind != "c"):
            return False
        with np.errstate(all="ignore"):
            own = np.array(value).astype(dtype)
            if not is_numeric(dtype):
                return bool(own == value) or (
                    dtype.kind in "mM" and isinstance(value, dtype.type) and bool(np.isnat(value))
                )
            if np.array(0.5).astype(dtype) != 0.5:  # ints and bools
                return bool(own == value)
            found, given = own.astype(complex), complex(value)
            return all(f(found) == f(given) for f in (np.isnan, np.isinf))
    except (TypeError, ValueError, OverflowError):
        return False
