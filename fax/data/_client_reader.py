"""Reads clients' examples as they go to the devices: checked, and in the dtypes that JAX uses."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from fax.data._check_examples import Schema, check_finite, check_numeric, read_client
from fax.data._prefetch import reading
from fax.data._protocol import ClientId, DataError, FederatedData


class Feature(NamedTuple):
    """The shape of a feature in one example, and its dtype on a device."""

    shape: tuple[int, ...]
    dtype: np.dtype


def settings_here() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context with JAX's settings of the thread that calls this, to be used in another thread."""
    x64, device = jax.config.jax_enable_x64, jax.config.jax_default_device

    @contextlib.contextmanager
    def settings() -> Iterator[None]:
        with jax.enable_x64(x64), jax.default_device(device):
            yield

    return settings


class ClientReader:
    """Reads clients, which must all have the features of the first one.

    Attributes:
      features: by name.
    """

    features: dict[str, Feature]

    def __init__(self, data: FederatedData, first: ClientId) -> None:
        self._data = data
        self._schema = Schema()
        examples = self.client(first)
        self.features = {
            name: Feature(array.shape[1:], array.dtype) for name, array in examples.items()
        }

    def client(self, client_id: ClientId, num_examples: int | None = None) -> dict[str, np.ndarray]:
        """A client's examples, in the dtypes that they have on a device.

        Args:
          client_id: the client.
          num_examples: how many examples there should be, or None if that is not known.
        """
        with reading(client_id):
            examples = read_client(self._data, client_id)
        check_numeric(client_id, examples)
        self._schema.check(client_id, examples)
        for name, array in examples.items():
            if num_examples is not None and len(array) != num_examples:
                raise DataError(
                    f"client {client_id!r}, feature {name!r} has {len(array)} examples, but "
                    f"num_examples returns {num_examples}. It has to return the number of examples "
                    "that client returns."
                )
        check_finite(client_id, examples)
        return {name: _narrowed(client_id, name, array) for name, array in examples.items()}

    @property
    def bytes_per_example(self) -> int:
        """The memory that an example takes on a device."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.features.values())


def _narrowed(client_id: ClientId, name: str, array: np.ndarray) -> np.ndarray:
    """An array in JAX's dtype. Without x64, JAX would truncate large numbers silently."""
    known = {"g": np.float64, "G": np.complex128}  # JAX has none of more bits
    dtype = np.dtype(jax.dtypes.canonicalize_dtype(known.get(array.dtype.char, array.dtype)))
    if array.dtype == dtype or not array.size:
        return array.astype(dtype, copy=False)
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    fits = narrow == array if array.dtype.kind in "iu" else np.isfinite(narrow)
    if not fits.all():
        raise DataError(
            f"client {client_id!r}, feature {name!r} has numbers such as {array[~fits][0]}, which "
            f"do not fit {dtype}. Map them to smaller numbers, or set jax_enable_x64."
        )
    return narrow
