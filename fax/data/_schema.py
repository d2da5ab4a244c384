"""What a client's examples look like, and whether all clients' do."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fax.data._protocol import DataError


class Feature(NamedTuple):
    """An example's dtype and shape, and the dtype that JAX has for it."""

    dtype: np.dtype
    shape: tuple[int, ...]
    on_device: np.dtype


class Schema:
    """Features with their dtypes and shapes, taken from one client and compared with others."""

    def __init__(self, client_id: Hashable, examples: Mapping[str, Any]):
        self.client_id = client_id
        self.features: dict[str, Feature] = {}
        for name, array in _arrays(client_id, examples).items():
            if not _is_number(array.dtype):
                raise DataError(
                    f"Client {client_id!r}: feature {name!r} has dtype {array.dtype}, expected "
                    "numbers. Turn text into numbers with fax.data.map, or leave the feature out."
                )
            on_device = np.dtype(jax.dtypes.canonicalize_dtype(array.dtype))
            self.features[name] = Feature(array.dtype, array.shape[1:], on_device)

    def check(self, client_id: Hashable, num_examples: int, examples: Mapping[str, Any]) -> dict:
        """The arrays of a client, if they are like those of the first one.

        Args:
          client_id: whose they are.
          num_examples: how many examples there should be.
          examples: feature -> array [num_examples, ...].
        """
        arrays = _arrays(client_id, examples)
        if arrays.keys() != self.features.keys():
            raise DataError(
                f"Client {client_id!r} has the features {sorted(arrays)}, but client "
                f"{self.client_id!r} has {sorted(self.features)}. All clients need the same ones."
            )
        for name, array in arrays.items():
            if len(array) != num_examples:
                raise DataError(
                    f"Client {client_id!r}: feature {name!r} has {len(array)} examples, expected "
                    f"{num_examples}, which is what num_examples says."
                )
            dtype, shape, on_device = self.features[name]
            if array.dtype != dtype or array.shape[1:] != shape:
                raise DataError(
                    f"Client {client_id!r}: examples of feature {name!r} are "
                    f"{array.dtype}{[*array.shape[1:]]}, but those of client {self.client_id!r} are "
                    f"{dtype}{[*shape]}. Bring them to one dtype and shape with fax.data.map."
                )
            if dtype != on_device and dtype.kind in "iu" and array.size:
                limits = np.iinfo(on_device)
                if array.min() < limits.min or array.max() > limits.max:
                    raise DataError(
                        f"Client {client_id!r}: feature {name!r} has numbers from {array.min()} to "
                        f"{array.max()}, which {on_device} does not hold. Map them to smaller "
                        "ones, or set jax_enable_x64."
                    )
        return arrays

    @property
    def bytes_per_example(self) -> int:
        """What an example takes on a device."""
        return sum(
            feature.on_device.itemsize * int(np.prod(feature.shape, dtype=int))
            for feature in self.features.values()
        )


def _is_number(dtype: np.dtype) -> bool:
    """Also of the short floats that NumPy itself does not know."""
    return dtype.kind in "biufc" or jax.dtypes.issubdtype(dtype, np.inexact)


def _arrays(client_id: Hashable, examples: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not isinstance(examples, Mapping) or not examples:
        raise DataError(
            f"Client {client_id!r} has {type(examples).__name__} for examples, expected a mapping "
            "from features to arrays, as in {'x': ..., 'y': ...}."
        )
    arrays = {name: np.asarray(array) for name, array in examples.items()}
    for name, array in arrays.items():
        if array.ndim == 0:
            raise DataError(
                f"Client {client_id!r}: feature {name!r} is a scalar, expected an array with a "
                "leading axis of examples."
            )
    return arrays
