"""A convolution's sizes, and the fastest way to write it as slices and matrix products.

`_matmul` has the ways, and explains their forms.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from fax._arithmetic import accumulator_dtype, elements

Ints = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Convolution:
    """The sizes and parameters of a convolution.

    Attributes:
      batch, channels, outputs: sizes of one group.
      space, window, positions: sizes of the spatial dimensions of input, kernel and result.
      strides, padding, lhs_dilation, rhs_dilation, precision: as in
        `jax.lax.conv_general_dilated`.
      groups: the number of groups of channels and outputs.
      batch_groups: the number of groups of the batch and outputs. One of the two numbers is 1.
      dtype: of the operands.
      accumulator: the dtype in which products are summed.
    """

    batch: int
    channels: int
    outputs: int
    space: Ints
    window: Ints
    positions: Ints
    strides: Ints
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: Ints
    rhs_dilation: Ints
    precision: Any
    groups: int
    batch_groups: int
    dtype: Any
    accumulator: Any

    @staticmethod
    def of(lhs: Any, rhs: Any, out: Any, params: dict[str, Any]) -> Convolution:
        """The convolution of an equation, from its operands or their types, and its parameters."""
        groups, batch_groups = params["feature_group_count"], params["batch_group_count"]
        x, w, y = (
            tuple(aval.shape[i] for i in spec)
            for aval, spec in zip((lhs, rhs, out), params["dimension_numbers"], strict=True)
        )
        names = ("padding", "lhs_dilation", "rhs_dilation", "precision")
        return Convolution(
            batch=x[0] // batch_groups,
            channels=w[1],
            outputs=w[0] // (groups * batch_groups),
            space=x[2:],
            window=w[2:],
            positions=y[2:],
            strides=params["window_strides"],
            groups=groups,
            batch_groups=batch_groups,
            dtype=lhs.dtype,
            accumulator=accumulator_dtype(out.dtype),
            **{name: params[name] for name in names},
        )


class Way(NamedTuple):
    """How to write a convolution: the form, and whether at once or in a loop."""

    form: str
    at_once: bool


# Measured with benchmarks/convolutions.py on 2 cores of an AMD EPYC processor, jax 0.12.0 and
# 0.10.2: a larger matrix takes longer to write and read than a loop of smaller products.
_LARGEST_MATRIX = 16 * 2**20  # bytes
# At once, each slice is a separate operation, which takes time to compile.
_MOST_SLICES = 64


def best_way(conv: Convolution) -> Way:
    """The fastest way according to measurements.

    Patches of more than 16 MiB are not stored at once. So besides its operands and result, a
    convolution needs this much memory or, if that is more, a few times the memory of these.
    """
    dilated = any(d > 1 for d in conv.lhs_dilation)
    if math.prod(conv.positions) < math.prod(conv.window):
        form, slices = "positions", math.prod(conv.positions)
    else:
        scatter = set(conv.strides) <= {1} and (dilated or 1 < conv.channels >= conv.outputs)
        form, slices = "scatter" if scatter else "gather", math.prod(conv.window)
    each = (conv.outputs, *conv.space) if form == "scatter" else (conv.channels, *conv.positions)
    size = elements((conv.batch, conv.groups, conv.batch_groups, *each, *conv.window))
    small = size * np.dtype(conv.accumulator).itemsize <= _LARGEST_MATRIX
    return Way(form, slices <= _MOST_SLICES and (small or is_thin(conv, form)))


def is_thin(conv: Convolution, form: str) -> bool:
    """Whether the products are not matrix products. The compiler fuses these and stores none."""
    return conv.batch == conv.outputs == 1 if form == "positions" else conv.channels == 1
