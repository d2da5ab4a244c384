"""A convolution as slices and matrix products.

With stride s and dilation d, over positions p, taps k and channels c, and with X the input
after its own dilation and padding,

    y[n, p, o] = sum_{k, c} X[n, p s + k d, c] w[k, c, o]

There are three ways to write it, each best for some shapes:

  gather     X[n, p s + k d, c] for all k, side by side, are a matrix of patches
  positions  the same for all p instead of all k: for a large window in few positions, as in
             the derivative with respect to the kernel. The patches are then the same slices as
             in the convolution that is differentiated, so the compiler can reuse them.
  scatter    products first: what input q contributes to output q - k d is padded and summed.
             For a dilated input, as in the derivative with respect to the input, most of X is
             zeros.

Either all patches, or all products, are one matrix, or a loop goes through them one by one.
Groups are a batch of convolutions, under `jax.vmap`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray

from fax.lowering.convolutions._convolution import Convolution, Ints, Way, is_thin


def convolve(
    way: Way, params: dict[str, Any], out: ShapedArray, lhs: jax.Array, rhs: jax.Array
) -> jax.Array:
    """Computes what an equation with these parameters computes, in one of the ways.

    Args:
      way: the way. ``scatter`` only works without strides.
      params: of the equation, a ``conv_general_dilated``.
      out: the type of its result.
      lhs, rhs: its operands.
    """
    conv = Convolution.of(lhs, rhs, out, params)
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
        x, x_axis = _in_groups(x, form.lhs, "c" if conv.groups > 1 else "n", groups)
        w, w_axis = _in_groups(w, form.rhs, "o", groups)
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
    """The dimensions of a layout, given JAX's specification: first two, then space."""
    where = {names[0]: spec[:1], names[1]: spec[1:2], "s": spec[2:]}
    return [dim for letter in layout for dim in where[letter]]


def _in_groups(x: jax.Array, layout: str, letter: str, count: int) -> tuple[jax.Array, int]:
    """Splits a dimension into groups. Also returns the axis of the groups."""
    place = layout.index(letter)
    axis = place if place < layout.index("s") else x.ndim - len(layout) + place
    shape = (*x.shape[:axis], count, x.shape[axis] // count, *x.shape[axis + 1 :])
    return x.reshape(shape), axis


# The forms. Each takes the operands of one group in its layout.


def _gather(conv: Convolution, at_once: bool, x: jax.Array, w: jax.Array) -> jax.Array:
    cut = _Slices(conv, x, conv.window, conv.rhs_dilation, conv.positions, conv.strides)
    matrices = w.reshape(-1, conv.channels, conv.outputs)
    if not at_once:

        def add(total, tap):
            number, matrix = tap
            return total + _product(conv, cut(number), matrix), None

        first = _product(conv, cut(0), matrices[0])
        return lax.scan(add, first, (jnp.arange(1, len(matrices)), matrices[1:]))[0]
    if is_thin(conv, "gather"):
        pairs = zip(cut.all(), matrices, strict=True)
        return functools.reduce(lax.add, [_product(conv, *pair) for pair in pairs])
    patches = lax.concatenate(cut.all(), x.ndim - 1)
    return _dot(conv, patches, w.reshape(-1, conv.outputs), [-1], [0])


def _positions(conv: Convolution, at_once: bool, x: jax.Array, w: jax.Array) -> jax.Array:
    dims, thin = range(x.ndim - 1), is_thin(conv, "positions")
    if thin:  # a last dimension of size 1 would make the sums three times slower
        x, w = (lax.squeeze(a, [a.ndim - 1]) for a in (x, w))
    cut = _Slices(conv, x, conv.positions, conv.strides, conv.window, conv.rhs_dilation)

    def product(part):
        return (
            jnp.sum(_wide(conv, part) * _wide(conv, w)) if thin else _dot(conv, part, w, dims, dims)
        )

    if not at_once:
        y = lax.map(lambda number: product(cut(number)), jnp.arange(math.prod(conv.positions)))
    elif thin:
        y = jnp.stack(list(map(product, cut.all())))
    else:
        y = product(lax.concatenate(cut.all(), x.ndim - 1))
    return y.reshape(*conv.positions, conv.batch, conv.outputs)


def _scatter(conv: Convolution, at_once: bool, x: jax.Array, w: jax.Array) -> jax.Array:
    matrices = w.reshape(-1, conv.outputs, conv.channels)
    # The canvas has room for all contributions; those of tap 0 are at its end.
    ends = [(k - 1) * d for k, d in zip(conv.window, conv.rhs_dilation, strict=True)]

    def start(number):
        digits = _digits(number, conv.window)
        return [e - n * d for e, n, d in zip(ends, digits, conv.rhs_dilation, strict=True)]

    def on_canvas(number, y):
        at = start(number)
        return _pad(y, [(low, e - low, 0) for low, e in zip(at, ends, strict=True)])

    def dilated(y):
        return _pad(y, [(0, 0, d - 1) for d in conv.lhs_dilation])

    if not at_once:

        def add(canvas, tap):
            number, matrix = tap
            y = dilated(_product(conv, x, matrix.T))
            where = [number * 0, *start(number), number * 0]
            y = y + lax.dynamic_slice(canvas, where, y.shape)
            return lax.dynamic_update_slice(canvas, y, where), None

        first = on_canvas(0, dilated(_product(conv, x, matrices[0].T)))
        canvas, _ = lax.scan(add, first, (jnp.arange(1, len(matrices)), matrices[1:]))
    else:
        if is_thin(conv, "scatter"):
            products: Sequence[jax.Array] = [_product(conv, x, matrix.T) for matrix in matrices]
        else:
            every = _dot(conv, x, matrices.reshape(-1, conv.channels), [-1], [-1])
            products = lax.split(every, [conv.outputs] * len(matrices), axis=every.ndim - 1)
        canvas = functools.reduce(
            lax.add, map(on_canvas, itertools.count(), map(dilated, products))
        )
    config = []
    for i, (low, _) in enumerate(conv.padding):
        size = (conv.space[i] - 1) * conv.lhs_dilation[i] + 1
        config.append((low - ends[i], conv.positions[i] - low - size, 0))
    return _pad(canvas, config)


_FORMS = {
    "gather": _Form(_gather, "nsc", "sco", "nso"),
    "positions": _Form(_positions, "csn", "cso", "sno"),
    "scatter": _Form(_scatter, "nsc", "soc", "nso"),
}


class _Slices:
    """Slices of the padded input with these sizes and strides, one for each index of ``counts``."""

    def __init__(
        self,
        conv: Convolution,
        x: jax.Array,
        counts: Ints,
        steps: Ints,
        sizes: Ints,
        strides: Ints,
    ):
        self.counts, self.steps, self.strides = counts, steps, strides
        self.extents = [(n - 1) * s + 1 for n, s in zip(sizes, strides, strict=True)]
        config = []
        for i, (low, _) in enumerate(conv.padding):
            # Cut off what the window does not reach, so that a derivative pads in the same way.
            reach = (counts[i] - 1) * steps[i] + self.extents[i]
            size = (conv.space[i] - 1) * conv.lhs_dilation[i] + 1
            config.append((low, reach - low - size, conv.lhs_dilation[i] - 1))
        self.x = _pad(x, config)

    def all(self) -> list[jax.Array]:
        return list(map(self, range(math.prod(self.counts))))

    def __call__(self, number: Any) -> jax.Array:
        """One slice. Its number is an int, or an array if it is known only at run time."""
        start = [n * step for n, step in zip(_digits(number, self.counts), self.steps, strict=True)]
        last = self.x.shape[1 + len(start) :]
        zero, ones = [number * 0] * len(last), [1] * len(last)
        sizes, strides = [self.x.shape[0], *self.extents, *last], [1, *self.strides, *ones]
        if isinstance(number, int):
            begin = [0, *start, *zero]
            limit = [at + size for at, size in zip(begin, sizes, strict=True)]
            return lax.slice(self.x, begin, limit, strides)
        part = lax.dynamic_slice(self.x, [number * 0, *start, *zero], sizes)
        return lax.slice(part, [0] * part.ndim, part.shape, strides)


def _digits(number: Any, counts: Ints) -> list[Any]:
    """A flat index as an index of an array of shape ``counts``, in row-major order."""
    sizes = [math.prod(counts[i + 1 :]) for i in range(len(counts))]
    return [number // size % count for size, count in zip(sizes, counts, strict=True)]


def _pad(x: jax.Array, config: Sequence[tuple[int, int, int]]) -> jax.Array:
    """Pads the spatial dimensions, which come second."""
    if not any(map(any, config)):
        return x
    none = (0, 0, 0)
    return lax.pad(x, x.dtype.type(0), [none, *config, *[none] * (x.ndim - 1 - len(config))])


def _product(conv: Convolution, x: jax.Array, matrix: jax.Array) -> jax.Array:
    """The product with a matrix over the channels, which come last."""
    if conv.channels == 1:
        return _wide(conv, x) * _wide(conv, matrix[0])
    return _dot(conv, x, matrix, [-1], [0])


def _dot(
    conv: Convolution, x: jax.Array, w: jax.Array, x_dims: Iterable[int], w_dims: Iterable[int]
) -> jax.Array:
    contracted = [dim % x.ndim for dim in x_dims], [dim % w.ndim for dim in w_dims]
    # An explicit precision: None would use JAX's configuration at the time of this call.
    precision = lax.Precision.DEFAULT if conv.precision is None else conv.precision
    return lax.dot_general(
        x, w, (contracted, ([], [])), precision, preferred_element_type=conv.accumulator
    )


def _wide(conv: Convolution, x: jax.Array) -> jax.Array:
    return x.astype(conv.accumulator)
