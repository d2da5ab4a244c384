"""Updates in eight bits: integers with stochastic rounding, and an 8-bit float."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

import fax._operators as operators
from fax.aggregators._aggregator import (
    Format,
    Metrics,
    PyTree,
    Transformation,
    of_floats,
    stateless_transformation,
)
from fax.aggregators._encoding import (
    Encoding,
    bits_of,
    cast_saturating,
    in_units_of_the_largest,
    shortened,
    straight_through,
)
from fax.aggregators._norms import Unit, largest_of, unit_of, wide
from fax.aggregators._per_client import each_present

_BITS = 8
_MOST = 127  # the largest int8
_FLOAT8 = jnp.float8_e4m3fn
_TOP = 2.0**7  # The largest number of a leaf is from 128 to 256, where an E4M3 has eight numbers.
_LOST_BITS = 8  # of float32's 24, so that products with 127 are exact


def int8() -> Transformation:
    """Rounds updates to eight bits at random: integers from -127 to 127, times a scale.

    A leaf x of a client's update has the step s = max abs(x) / 127, with 16 significant bits,
    rounded down. A number x_j becomes s floor(x_j / s) or s ceil(x_j / s), the latter with
    probability x_j / s - floor(x_j / s), so that the result is unbiased. Only the largest numbers,
    those within 2^-15 of the largest magnitude, become exactly 127 s. The variance of a number is
    at most s^2 / 4. Each client has its own random numbers. Derivatives are those of the
    expectation, x, as if nothing were rounded.

    The rounded updates are float32, or float64 if the updates were. Replicas in a data center send
    each other eight bits for each number; see `fax.algorithms.diloco`.

    Returns:
      The transformation. Its metric ``"clients/bits"`` is how many bits each client sends:
      8 for each number, and 32 for each leaf, or 64 if it is float64.

    Raises:
      ValueError: when used, if a leaf does not hold real floats.

    References:
      Alistarh et al., QSGD: Communication-efficient SGD via gradient quantization and encoding,
      arXiv:1610.02132.

    Example:

      >>> aggregator = fax.aggregators.chain(fax.aggregators.int8())
      >>> @fax.program(clients=2)
      ... def average(updates):
      ...     update, _, metrics = aggregator.aggregate(
      ...         updates, jnp.ones(2), aggregator.init(updates[0]), jax.random.key(0)
      ...     )
      ...     return update, metrics["clients/bits"]
      >>> average(jnp.array([[127.0, 3.0, -2.0], [127.0, 5.0, 0.0]]))
      (Array([127.,   4.,  -1.], dtype=float32), Array([56., 56.], dtype=float32))
    """

    def encode(x: jax.Array, random: jax.Array) -> tuple[jax.Array, float]:
        size = jnp.abs(x)
        largest = jnp.max(size)
        step = shortened((largest / _MOST).astype(jnp.float32), _LOST_BITS).astype(x.dtype)
        position = x / jnp.where(step > 0, step, 1)
        below = jnp.floor(position)
        level = below + (random < position - below)
        # The largest has to be 127 steps exactly: the step is found from it; see `_encode_int8`.
        level = jnp.where(size < largest, jnp.clip(level, -_MOST, _MOST), jnp.sign(x) * _MOST)
        return straight_through(x, level * step), 0

    return _in_eight_bits("int8", encode, Format(_BITS, _encode_int8, _decode_int8), random=True)


def e4m3() -> Transformation:
    """Rounds updates to 8-bit floats, E4M3: a sign, four bits of exponent, and three of mantissa.

    A leaf x of a client's update has a power of two as its scale, 2^floor(log2 max abs(x)) / 128.
    In units of this scale, a number x_j becomes the nearest number of this format. Ties go to the
    one whose last bit is zero. So relative errors are at most 1/16 for numbers of at least 2^-13
    times the largest, and numbers below 2^-18 of it vanish. Derivatives are those of x, as if
    nothing were rounded.

    The rounded updates are float32, or float64 if the updates were. Replicas in a data center send
    each other eight bits for each number; see `fax.algorithms.diloco`.

    Returns:
      The transformation. Its metric ``"clients/bits"`` is how many bits each client sends:
      8 for each number, and 32 for each leaf, or 64 if it is float64.

    Raises:
      ValueError: when used, if a leaf does not hold real floats.

    References:
      Micikevicius et al., FP8 formats for deep learning, arXiv:2209.05433.

    Example:

      >>> aggregator = fax.aggregators.chain(fax.aggregators.e4m3())
      >>> @fax.program(clients=2)
      ... def average(updates):
      ...     update, _, metrics = aggregator.aggregate(
      ...         updates, jnp.ones(2), aggregator.init(updates[0]), jax.random.key(0)
      ...     )
      ...     return update, metrics["clients/bits"]
      >>> average(jnp.array([[17.0, 1.1, -0.01], [17.0, 1.1, 0.01]]))
      (Array([16.   ,  1.125,  0.   ], dtype=float32), Array([56., 56.], dtype=float32))
    """

    def encode(x: jax.Array, random: jax.Array) -> tuple[jax.Array, float]:
        del random
        unit = unit_of(largest_of([x], x.dtype))
        rounded = (x * (_TOP * unit.inverse)).astype(jnp.float32).astype(_FLOAT8)
        return straight_through(x, rounded.astype(x.dtype) * (unit.value / _TOP)), 0

    return _in_eight_bits("e4m3", encode, Format(_BITS, _encode_e4m3, _decode_e4m3), random=False)


def _in_eight_bits(name: str, encode: Encoding, format: Format, *, random: bool) -> Transformation:
    """A transformation that rounds each number of a leaf by itself.

    Unlike `leafwise`, it keeps the shapes of leaves, which may be sharded, and returns wide dtypes.

    Args:
      name: of the function that makes the transformation.
      encode: as for `leafwise`, of leaves in their shapes. What it says about bits is ignored.
      format: of what it returns.
      random: whether it takes random numbers.
    """
    encode = in_units_of_the_largest(encode)

    def one(x: jax.Array, key: jax.Array) -> jax.Array:
        x = x.astype(wide(x))
        if not x.size:
            return x
        draws = jax.random.uniform(key, x.shape, jnp.float32) if random else jnp.zeros(())
        rounded, _ = encode(x, draws)
        rounded = cast_saturating(rounded, x.dtype)
        return jnp.where(jnp.isfinite(x).all(), rounded, jnp.nan)

    def client(update: PyTree, key: jax.Array) -> PyTree:
        leaves, treedef = jax.tree.flatten(update)
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(treedef, map(one, leaves, keys))

    def update(
        updates: PyTree, weights: jax.Array, key: jax.Array
    ) -> tuple[PyTree, jax.Array, Metrics]:
        leaves = jax.tree.leaves(updates)
        bits = sum(_BITS * math.prod(x.shape[1:]) + bits_of(wide(x)) for x in leaves)
        sent = each_present(client, updates, weights, operators.keys(key))
        return sent, weights, {"clients/bits": jnp.full(weights.shape, bits, jnp.float32)}

    return of_floats(name, stateless_transformation(name, update, format))


def _step_of(largest: jax.Array) -> tuple[Unit, jax.Array]:
    """A unit, and the step of numbers of which the largest is 127 steps, in this unit."""
    unit = unit_of(largest)
    # Half of the last bit makes it the nearest, should a division not be exact.
    step = (largest * unit.inverse / _MOST).astype(jnp.float32)
    return unit, shortened(step, _LOST_BITS, 2 ** (_LOST_BITS - 1)).astype(largest.dtype)


def _encode_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    largest = jnp.max(jnp.abs(x), initial=0)
    unit, step = _step_of(largest)
    level = jnp.round(x * unit.inverse / jnp.where(step > 0, step, 1)).astype(jnp.int8)
    sent = jnp.where(jnp.isfinite(largest), largest, jnp.nan)
    return lax.bitcast_convert_type(level, jnp.uint8), sent


def _decode_int8(codes: jax.Array, largest: jax.Array) -> jax.Array:
    unit, step = _step_of(largest)
    step = jnp.where(jnp.isfinite(largest), step, jnp.nan)
    return lax.bitcast_convert_type(codes, jnp.int8).astype(largest.dtype) * step * unit.value


def _scale_of(largest: jax.Array) -> tuple[Unit, jax.Array]:
    """A unit, and the scale of floats of which this is the largest, in this unit."""
    unit = unit_of(largest)
    largest = largest * unit.inverse
    power = unit_of(largest).value  # It is not 1 at the ends of the range; see `unit_of`.
    # A power of two may have been rounded up to it. Then this is the scale that was used, and if
    # not, half the scale has the same numbers.
    return unit, power / jnp.where(largest == power, 2 * _TOP, _TOP)


def _encode_e4m3(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    largest = jnp.max(jnp.abs(x), initial=0)
    unit, scale = _scale_of(largest)
    codes = (x * unit.inverse / scale).astype(jnp.float32).astype(_FLOAT8)
    sent = jnp.where(jnp.isfinite(largest), largest, jnp.nan)
    return lax.bitcast_convert_type(codes, jnp.uint8), sent


def _decode_e4m3(codes: jax.Array, largest: jax.Array) -> jax.Array:
    unit, scale = _scale_of(largest)
    scale = jnp.where(jnp.isfinite(largest), scale, jnp.nan)
    values = lax.bitcast_convert_type(codes, _FLOAT8).astype(scale.dtype) * scale * unit.value
    return cast_saturating(values, scale.dtype)
