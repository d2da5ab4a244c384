"""What examples look like on a device, and clients that are checked before they go there."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import numpy as np

from fax.data._check import Schema, check_finite, check_numeric, read
from fax.data._prefetch import reading
from fax.data._protocol import ClientId, DataError, FederatedData


class Feature(NamedTuple):
    """The shape of an example, and the dtype that it has on a device."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Reader:
    """Reads clients, all of which must have the features of the first one.

    Attributes:
      features: by name.
    """

    def __init__(self, data: FederatedData, first: ClientId):
        self.data = data
        self._schema = Schema()
        examples = self.client(first)
        self.features = {
            name: Feature(array.shape[1:], array.dtype) for name, array in examples.items()
        }

    def client(self, client_id: ClientId, num_examples: int | None = None) -> dict[str, np.ndarray]:
        """A client's examples, in the dtypes of the device. ``num_examples``, if that is said."""
        with reading(client_id):
            examples = read(self.data, client_id)
        check_numeric(client_id, examples)
        self._schema.check(client_id, examples)
        for name, array in examples.items():
            if num_examples is not None and len(array) != num_examples:
                raise DataError(
                    f"client {client_id!r}, feature {name!r} has {len(array)} examples, but the "
                    f"data say that there are {num_examples}. num_examples has to count what "
                    "client gives."
                )
        check_finite(client_id, examples)
        return {name: _narrowed(client_id, name, array) for name, array in examples.items()}

    @property
    def bytes_per_example(self) -> int:
        """What an example takes on a device."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.features.values())


def _narrowed(client_id: ClientId, name: str, array: np.ndarray) -> np.ndarray:
    """An array as JAX has it: without 64-bit numbers it would cut large ones off without a word."""
    dtype = np.dtype(jax.dtypes.canonicalize_dtype(array.dtype))
    if array.dtype == dtype or not array.size:
        return array.astype(dtype, copy=False)
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    fits = narrow == array if array.dtype.kind in "iu" else np.isfinite(narrow)
    if not fits.all():
        raise DataError(
            f"client {client_id!r}, feature {name!r} has numbers such as {array[~fits][0]}, which "
            f"{dtype} does not hold. Map them to smaller ones, or set jax_enable_x64."
        )
    return narrow
