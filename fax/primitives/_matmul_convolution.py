"""A convolution as slices and matrix products.

With stride s and dilation d, over positions p, taps k and channels c, and with X the input
after its own dilation and padding,

    y[n, p, o] = sum_{k, c} X[n, p s + k d, c] w[k, c, o]

There are three ways to write it, each best for some shapes:

  gather     X[n, p s + k d, c] for all k, side by side, are a matrix of patches
  positions  the same for all p instead of all k: for a large window in few positions, as in
             the derivative by the kernel. The patches are then those of the convolution that
             is differentiated, slice by slice, so that the compiler finds them there.
  scatter    products first: what input q contributes to output q - k d is padded and added
             up. For a dilated input, as in the derivative by the input, most of X is zeros.

A way stores all patches, or all products, at once, or it adds up one product after the other.
Groups are a batch of convolutions, which is what `jax.vmap` makes of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray

from fax.sharding._schedule import accumulator_dtype

Ints = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Convolution:
    """The sizes and parameters of a convolution.

    Attributes:
      batch, channels, outputs: sizes, each of one group.
      space, window, positions: sizes of the spatial dimensions of input, kernel and result.
      strides, padding, lhs_dilation, rhs_dilation, precision: as in
        `jax.lax.conv_general_dilated`.
      groups: how many groups of channels and outputs there are.
      batch_groups: how many groups of the batch and outputs there are; one of the two is 1.
      dtype: of the operands.
      accumulator: the dtype to add up products in.
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
        """The convolution of an equation, from its types and parameters."""
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
    """How to write a convolution: in which form, and whether with all slices in one matrix."""

    form: str
    at_once: bool


# Measured with benchmarks/convolutions.py on 2 cores of an AMD EPYC processor, jax 0.12.0 and
# 0.10.2, where a matrix larger than this took longer to write and read than was gained.
_LARGEST_MATRIX = 16 * 2**20  # bytes


def best_way(conv: Convolution) -> Way:
    """The way that measurement prefers, among those that give this convolution.

    All slices make one matrix if that has at most 16 MiB. So the memory for a convolution is
    bounded by this, or by twice that of its operands and result, where they have more.
    """
    dilated = any(d > 1 for d in conv.lhs_dilation)
    if math.prod(conv.positions) < math.prod(conv.window):
        form = "positions"
    elif set(conv.strides) <= {1} and (dilated or 1 < conv.channels >= conv.outputs):
        form = "scatter"
    else:
        form = "gather"
    each = (conv.outputs, *conv.space) if form == "scatter" else (conv.channels, *conv.positions)
    size = math.prod((conv.batch, conv.groups, conv.batch_groups, *each, *conv.window))
    # A product with one channel is none of matrices, and compiles to a single loop.
    thin = conv.batch == conv.outputs == 1 if form == "positions" else conv.channels == 1
    bytes_at_once = size * np.dtype(conv.accumulator).itemsize
    return Way(form, not thin and bytes_at_once <= _LARGEST_MATRIX)


def part_count(conv: Convolution) -> int:
    """How many slices the best way takes."""
    return min(math.prod(conv.positions), math.prod(conv.window))


def convolve(
    way: Way, params: dict[str, Any], out: ShapedArray, lhs: jax.Array, rhs: jax.Array
) -> jax.Array:
    """What an equation of these parameters computes, written in one of the ways.

    Args:
      way: any; ``scatter`` where there are no strides.
      params: of the equation, a ``conv_general_dilated``.
      out: the type of its result.
      lhs, rhs: its operands.
    """
    conv = Convolution.of(jax.typeof(lhs), jax.typeof(rhs), out, params)
    if 0 in (lhs.size, rhs.size, out.size):
        return lax.full(out.shape, 0, out.dtype)
    form = _FORMS[way.form]
    numbers = params["dimension_numbers"]
    x = lax.transpose(lhs, _order(form.lhs, "nc", numbers.lhs_spec))
    w = lax.transpose(rhs, _order(form.rhs, "oc", numbers.rhs_spec))
    write = functools.partial(form.write, conv, way.at_once)
    groups = conv.groups * conv.batch_groups
    if groups == 1:
        y = write(x, w)
    else:
        x, x_axis = _split(x, form.lhs, "c" if conv.groups > 1 else "n", groups)
        w, w_axis = _split(w, form.rhs, "o", groups)
        y = jax.vmap(write, (x_axis, w_axis), -2)(x, w)
        y = lax.collapse(y, y.ndim - 2)
    back = np.argsort(_order(form.out, "no", numbers.out_spec))
    return lax.transpose(y.astype(out.dtype), back)


# Layouts. The letters are n for the batch, c for channels, o for outputs, s for all of space.


class _Form(NamedTuple):
    write: Callable[[Convolution, bool, jax.Array, jax.Array], jax.Array]
    lhs: str
    rhs: str
    out: str


def _order(layout: str, names: str, spec: Sequence[int]) -> list[int]:
    """Where the dimensions of a layout are, given where JAX's first two, then space, are."""
    where = {names[0]: spec[:1], names[1]: spec[1:2], "s": spec[2:]}
    return [dim for letter in layout for dim in where[letter]]


def _split(x: jax.Array, layout: str, letter: str, count: int) -> tuple[jax.Array, int]:
    """Splits a dimension into groups. Returns the axis that counts them as well."""
    place = layout.index(letter)
    axis = place if place < layout.index("s") else x.ndim - len(layout) + place
    shape = (*x.shape[:axis], count, x.shape[axis] // count, *x.shape[axis + 1 :])
    return x.reshape(shape), axis


# The forms. Each takes operands of one group in its layout.


def _gather(conv: Convolution, at_once: bool, x: jax.Array, w: jax.Array) -> jax.Array:
    slices = _slices(conv, x, conv.window, conv.rhs_dilation, conv.positions, conv.strides)
    if at_once:
        patches = lax.concatenate(slices, x.ndim - 1)
        return _dot(conv, patches, w.reshape(-1, conv.outputs), [-1], [0])
    matrices = w.reshape(-1, conv.channels, conv.outputs)
    if conv.channels == 1:
        pairs = zip(_wide(conv, *slices), _wide(conv, *matrices), strict=True)
        products = [part * matrix[0] for part, matrix in pairs]
    else:
        pairs = zip(slices, matrices, strict=True)
        products = [_dot(conv, part, matrix, [-1], [0]) for part, matrix in pairs]
    return functools.reduce(lax.add, products)


def _positions(conv: Convolution, at_once: bool, x: jax.Array, w: jax.Array) -> jax.Array:
    slices = _slices(conv, x, conv.positions, conv.strides, conv.window, conv.rhs_dilation)
    dims = range(x.ndim - 1)
    if at_once:
        y = _dot(conv, lax.concatenate(slices, x.ndim - 1), w, dims, dims)
    elif conv.batch == conv.outputs == 1:
        # A last dimension of size 1 would make the sums three times slower.
        w, *parts = _wide(conv, *(lax.squeeze(a, [a.ndim - 1]) for a in (w, *slices)))
        y = jnp.stack([jnp.sum(part * w) for part in parts])
    else:
        y = jnp.stack([_dot(conv, part, w, dims, dims) for part in slices])
    return y.reshape(*conv.positions, conv.batch, conv.outputs)


def _scatter(conv: Convolution, at_once: bool, x: jax.Array, w: jax.Array) -> jax.Array:
    matrices = w.reshape(-1, conv.outputs, conv.channels)
    if conv.channels == 1:
        x, *rows = _wide(conv, x, *matrices)
        products = [x * row[:, 0] for row in rows]
    elif at_once:
        every = _dot(conv, x, matrices.reshape(-1, conv.channels), [-1], [-1])
        own = [conv.outputs] * len(matrices)
        products = list(lax.split(every, own, axis=every.ndim - 1))
    else:
        products = [_dot(conv, x, matrix, [-1], [-1]) for matrix in matrices]
    padded = []
    for k, product in zip(np.ndindex(*conv.window), products, strict=True):
        config = []
        for i, (low, _) in enumerate(conv.padding):
            low -= int(k[i]) * conv.rhs_dilation[i]
            size = (conv.space[i] - 1) * conv.lhs_dilation[i] + 1
            config.append((low, conv.positions[i] - low - size, conv.lhs_dilation[i] - 1))
        padded.append(_pad(product, config))
    return functools.reduce(lax.add, padded)


_FORMS = {
    "gather": _Form(_gather, "nsc", "sco", "nso"),
    "positions": _Form(_positions, "csn", "cso", "sno"),
    "scatter": _Form(_scatter, "nsc", "soc", "nso"),
}


def _slices(
    conv: Convolution, x: jax.Array, counts: Ints, steps: Ints, sizes: Ints, strides: Ints
) -> list[jax.Array]:
    """Slices of the padded input of these sizes and strides, one for each of ``counts``."""
    config = []
    for i, (low, _) in enumerate(conv.padding):
        # What the window does not reach is cut off, so that a derivative pads in the same way.
        reach = (counts[i] - 1) * steps[i] + (sizes[i] - 1) * strides[i] + 1
        size = (conv.space[i] - 1) * conv.lhs_dilation[i] + 1
        config.append((low, reach - low - size, conv.lhs_dilation[i] - 1))
    x = _pad(x, config)
    slices = []
    for number in np.ndindex(*counts):
        start = [int(i) * step for i, step in zip(number, steps, strict=True)]
        limit = [
            first + (size - 1) * stride + 1
            for first, size, stride in zip(start, sizes, strides, strict=True)
        ]
        ends = x.shape[0], x.shape[-1]
        slices.append(lax.slice(x, (0, *start, 0), (ends[0], *limit, ends[1]), (1, *strides, 1)))
    return slices


def _pad(x: jax.Array, config: Sequence[tuple[int, int, int]]) -> jax.Array:
    """Pads the spatial dimensions."""
    if not any(map(any, config)):
        return x
    return lax.pad(x, x.dtype.type(0), [(0, 0, 0), *config, (0, 0, 0)])


def _dot(
    conv: Convolution, x: jax.Array, w: jax.Array, x_dims: Iterable[int], w_dims: Iterable[int]
) -> jax.Array:
    contracted = [dim % x.ndim for dim in x_dims], [dim % w.ndim for dim in w_dims]
    # Said in full: what is not said is taken from what JAX's configuration is by now.
    precision = lax.Precision.DEFAULT if conv.precision is None else conv.precision
    return lax.dot_general(
        x, w, (contracted, ([], [])), precision, preferred_element_type=conv.accumulator
    )


def _wide(conv: Convolution, *arrays: jax.Array) -> list[jax.Array]:
    return [x.astype(conv.accumulator) for x in arrays]
