"""Noise for differential privacy: on a grid, from its own key, and counted.

Proofs of privacy assume real numbers, and floating-point noise can break them (Mironov, CCS 2012).
A float32 normal of JAX is one of 2^23 numbers, and the low bits of a sum with noise depend on both.
So an output is often possible for only one of two neighboring sums. Here sums and noise are
multiples of the same power of two g. It is much smaller than the noise, and depends on the scale s
of the noise alone. Sums are rounded to multiples of g, and the noise is g times an integer, the sum
of several draws:

    normal:    n_1 + n_2 + n_3 + n_4,    n_i = round(s / (2 g) z_i)
    Laplace:   n_1 + n_2 - n_3 - n_4,    n_i = round(s / (2 g) z_i^2)

with independent normals z_i (Holohan and Braghin, arXiv:2107.10138); z^2 / 2 + z'^2 / 2 is
exponentially distributed. These integers are exact in float32. Their sum with the rounded values is
exact too, or rounded as IEEE 754 says, which is a function of the exact sum and reveals nothing
more.

Rounding moves a sum by up to g / 2 in each number. The scale of the noise accounts for that.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from fax import _arguments, _keys
from fax.aggregators._aggregator import PyTree
from fax.aggregators._encoding import straight_through

Law = Callable[[jax.Array, tuple[int, ...], jax.Array], jax.Array]


class NoiseState(NamedTuple):
    """The source of a private aggregator's noise.

    The noise of a release is drawn from this key, the number of the release, and the key that is
    passed to the aggregator. Anyone who knows the key can subtract the noise: keep it secret.

    Attributes:
      key: uint32 [2].
      releases: the number of releases so far, an int32 scalar.

    Example:

      >>> state = fax.aggregators.laplace(clip_norm=1.0, noise_multiplier=1.0).init(jnp.zeros(3))
      >>> state.key.shape, int(state.releases)
      ((2,), 0)
    """

    key: jax.Array
    releases: jax.Array


def first_noise_state(caller: str, key: jax.Array | None, *settings: Any) -> NoiseState:
    """A state without releases; see `secret_words`."""
    return NoiseState(secret_words(caller, key, *settings), jnp.int32(0))


def secret_words(caller: str, key: jax.Array | None, *settings: Any) -> jax.Array:
    """The two words of a secret key, from a user's key or from the operating system.

    Args:
      caller: for messages.
      key: a random key, or None.
      *settings: values that are concrete unless a function is being traced.
    """
    if key is not None:
        _arguments.key(caller, "key", key)
        return jax.random.bits(_keys.derive(key, _keys.Use.SECRET), (2,), jnp.uint32)
    if not _arguments.concrete((settings, jnp.zeros(()))):
        raise ValueError(
            f"{caller}: init draws a fresh secret key, but is called in a function that JAX "
            "traces, so that every run of the compiled function would use the same key. Call init "
            "outside of jit and vmap, or pass key=."
        )
    if jax.process_count() > 1:
        raise ValueError(
            f"{caller}: init draws a fresh secret key, which would differ between the "
            f"{jax.process_count()} processes. Pass key=, the same in all of them."
        )
    return jnp.asarray(np.frombuffer(os.urandom(8), np.uint32))


def release_key(words: jax.Array, number: jax.Array, key: jax.Array) -> jax.Array:
    """The key for the noise of one release. It differs if any of the arguments does."""
    own = jax.random.wrap_key_data(words, impl="threefry2x32")
    own = _keys.derive(own, _keys.Use.RELEASE, number)
    data = jax.random.key_data(key)
    for position in range(data.size):
        own = jax.random.fold_in(own, data[position])
    return own


def next_release(state: NoiseState, key: jax.Array) -> tuple[jax.Array, NoiseState]:
    """The key of the next release, and the state after it."""
    own = release_key(state.key, state.releases, key)
    return own, NoiseState(state.key, state.releases + 1)


class Grid(NamedTuple):
    """The multiples of a power of two, for noise of a scale.

    Attributes:
      unit: g.
      scale: of the noise. If it is zero there is no noise, and nothing is rounded.
    """

    unit: jax.Array
    scale: jax.Array


def grid_of(values: PyTree, law: Law, multiplier: Any, norm: Any, roundings: float = 1) -> Grid:
    """The grid for sums, and the scale of their noise: z times what one client can change.

    Args:
      values: the sums, in `wide` dtypes.
      law: `normal_integers` or `laplace_integers`.
      multiplier: z.
      norm: what one client can change in the sums before they are rounded, as an L2 norm, or an L1
        norm for `laplace_integers`.
      roundings: how often each number is rounded, in all releases that share one multiplier.
    """
    leaves = jax.tree.leaves(values)
    double = all(x.dtype == jnp.float64 for x in leaves)
    dtype = jnp.dtype(jnp.float64 if double and leaves else jnp.float32)
    size = max(1, sum(x.size for x in leaves)) * roundings
    most = size if law is laplace_integers else size**0.5
    multiplier, norm = (jnp.asarray(x).astype(dtype) for x in (multiplier, norm))
    bits = _bits_of_scale(law, dtype)
    scale = multiplier * norm
    for _ in range(2):  # the additional noise for rounding may need a coarser grid
        unit = _power_below(scale, bits)
        scale = multiplier * (norm + most * unit)
    return Grid(unit, scale)


def _bits_of_scale(law: Law, dtype: Any) -> int:
    """log2 of the scale in units of the grid, such that all noise fits into a significand."""
    return (18 if law is laplace_integers else 20) + (28 if dtype == jnp.float64 else 0)


def _power_below(scale: jax.Array, bits: int) -> jax.Array:
    """2^-bits times the largest power of two that is not above the scale. Never subnormal."""
    _, exponent = jnp.frexp(lax.stop_gradient(scale))
    least = jnp.finfo(scale.dtype).minexp
    exponent = jnp.where(scale > 0, jnp.maximum(exponent - 1 - bits, least), least)
    return jnp.ldexp(jnp.ones((), scale.dtype), exponent)


def round_to_grid(x: jax.Array, grid: Grid) -> jax.Array:
    """Values rounded to the grid. The derivative is that of the identity."""
    unit = jnp.where(grid.scale > 0, grid.unit, 1).astype(x.dtype)
    # Larger numbers are on the grid already, as all of their bits are.
    small = jnp.abs(x) < unit * 2.0 ** jnp.finfo(x.dtype).nmant
    rounded = jnp.where(small, jnp.round(x / unit) * unit, x)
    return straight_through(x, jnp.where(grid.scale > 0, rounded, x))


def noise_on_grid(values: PyTree, law: Law, key: jax.Array, use: _keys.Use, grid: Grid) -> PyTree:
    """Independent noise on the grid, in the shapes and dtypes of these values."""
    unit, scale = lax.stop_gradient(tuple(grid))
    # If a tiny scale would need subnormal units, the noise is larger than it has to be.
    ratio = jnp.maximum(scale / unit, 2.0 ** _bits_of_scale(law, unit.dtype))

    def draw(x: jax.Array, key: jax.Array) -> jax.Array:
        integers = law(key, x.shape, ratio)
        noise = (integers * unit).astype(x.dtype)
        exact = (integers / ratio * grid.scale).astype(x.dtype)
        return jnp.where(grid.scale > 0, straight_through(exact, noise), 0)

    leaves, treedef = jax.tree.flatten(values)
    keys = (_keys.derive(key, use, number) for number in range(len(leaves)))
    return jax.tree.unflatten(treedef, map(draw, leaves, keys))


def normal_integers(key: jax.Array, shape: tuple[int, ...], ratio: jax.Array) -> jax.Array:
    """Integers, as floats, from a normal distribution with this standard deviation."""
    return _sum_of_draws(key, shape, ratio.dtype, lambda z: jnp.round(z * (ratio / 2)), 1)


def laplace_integers(key: jax.Array, shape: tuple[int, ...], ratio: jax.Array) -> jax.Array:
    """Integers, as floats, from a Laplace distribution with this scale."""
    return _sum_of_draws(key, shape, ratio.dtype, lambda z: jnp.round(z * z * (ratio / 2)), -1)


def _sum_of_draws(
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: Any,
    integers: Callable[[jax.Array], jax.Array],
    sign: int,
) -> jax.Array:
    """The sum of the integers of two normals, plus ``sign`` times those of two more."""

    def add(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        one, other = two_normals(jax.random.fold_in(key, number), shape, dtype)
        return total + (integers(one) + sign * integers(other)), None

    # A scan takes the memory of one draw.
    return lax.scan(add, jnp.zeros(shape, dtype), jnp.arange(2, dtype=jnp.uint32))[0]


def two_normals(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Two arrays of normals from a threefry key.

    In float32, they come from the two words of each block, in half the time that JAX takes, which
    combines the two words into one.
    """
    if dtype == jnp.float64:
        one, other = (jax.random.normal(jax.random.fold_in(key, i), shape, dtype) for i in (0, 1))
        return one, other
    words = jax.random.key_data(jax.random.split(key, math.prod(shape)))
    return normals_of(words[:, 0]).reshape(shape), normals_of(words[:, 1]).reshape(shape)


def normals_of(words: jax.Array) -> jax.Array:
    """Normals by inversion, at the odd multiples of 2^-23 between -1 and 1, from 23 bits each."""
    from_1_to_2 = lax.bitcast_convert_type((words >> 9) | np.uint32(0x3F800000), jnp.float32)
    # All of this is exact; 3 - 2^-23 is not a float32.
    uniform = 2 * (from_1_to_2 - 1) - np.float32(1 - 2**-23)
    return np.float32(2**0.5) * lax.erf_inv(uniform)


def with_noise(
    values: PyTree, law: Law, key: jax.Array, multiplier: Any, norm: Any, use: _keys.Use
) -> PyTree:
    """Sums at the server, in `wide` dtypes, rounded to the grid, plus noise; see `grid_of`."""
    grid = grid_of(values, law, multiplier, norm)
    rounded = jax.tree.map(lambda x: round_to_grid(x, grid), values)
    return optax.tree.add(rounded, noise_on_grid(values, law, key, use, grid))


def releases(state: PyTree) -> int:
    """The number of releases that the private aggregators in a state have made.

    A round of `fax.algorithms.fedavg` or `hyp_cluster` is one release, whatever its cohort.
    `diloco` makes a release in each outer step, and `streaming_diloco` one for each fragment. Pass
    this number to `fax.aggregators.epsilon` as ``rounds``.

    Args:
      state: of an algorithm or an aggregator.

    Returns:
      The number of releases of `gaussian` and `laplace`. A whole training run with `dp_ftrl` is a
      single event, and is not counted.

    Raises:
      ValueError: if the state is that of several training runs, with leading axes.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2
      >>> private = fax.aggregators.gaussian(clip_norm=1.0, noise_multiplier=2.0)
      >>> algorithm = fax.algorithms.fedavg(loss, optax.sgd(0.1), aggregator=private)
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(3)}, "bob": {"x": jnp.zeros(2)}})
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=2)
      >>> state, _ = fax.algorithms.many_rounds(algorithm, algorithm.init(0.0), rounds, 10)
      >>> fax.aggregators.releases(state)
      10
    """
    return sum(int(own.releases) for own in noise_states("fax.aggregators.releases", state))


def noise_states(caller: str, state: PyTree) -> list[NoiseState]:
    """All of them in the state of one training run."""
    leaves = jax.tree.leaves(state, is_leaf=_is_noise_state)
    found = [leaf for leaf in leaves if _is_noise_state(leaf)]
    for own in found:
        if jnp.ndim(own.releases):
            raise ValueError(
                f"{caller}: state is that of several training runs, of shape "
                f"{jnp.shape(own.releases)}, expected that of one. Pass them one at a time."
            )
    return found


def _is_noise_state(x: Any) -> bool:
    return isinstance(x, NoiseState)
