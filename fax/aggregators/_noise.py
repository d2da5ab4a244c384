"""Noise for differential privacy: on a grid, from a key of its own, and counted.

Noise of floats has a weak spot that the proofs do not see (Mironov, CCS 2012). A float32 normal of
JAX is one of 2^23 numbers, and what a sum and noise add up to depends on the bits of both, so that
an output often can have come from one of two neighbouring sums only. Here sums and noise are
multiples of the same power of two g, far below the noise, which follows from the noise's scale
alone. Sums are rounded to it, and the noise is an integer times g, made of several draws:

    normal:    n_1 + n_2 + n_3 + n_4,    n_i = round(s / (2 g) z_i)
    Laplace:   n_1 + n_2 - n_3 - n_4,    n_i = round(s / (2 g) z_i^2)

of independent normals z_i (Holohan and Braghin, arXiv:2107.10138), as z^2 / 2 + z'^2 / 2 is
exponential. These are exact in float32, and so is their sum with the rounded values, or it is
rounded in the way that IEEE says, which is a function of the exact sum and tells no more.

Rounding moves a sum, and a neighbour's, by up to g / 2 in each number. The noise is made for that.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fax import _arguments, _keys
from fax.aggregators._leaves import straight_through

PyTree = Any
Law = Callable[[jax.Array, tuple[int, ...], jax.Array], jax.Array]


class NoiseState(NamedTuple):
    """Where the noise of a private aggregator comes from.

    The noise of a release is drawn by this key, the number of the release, and the key that the
    aggregator is given. Whoever knows the key can subtract the noise: keep it secret.

    Attributes:
      key: uint32 [2].
      releases: how many there were, int32.
    """

    key: jax.Array
    releases: jax.Array


def start(caller: str, key: jax.Array | None, *settings: Any) -> NoiseState:
    """A state without releases; see `secret`."""
    return NoiseState(secret(caller, key, *settings), jnp.int32(0))


def secret(caller: str, key: jax.Array | None, *settings: Any) -> jax.Array:
    """The words of a secret key: made of a user's key, or fresh ones of the operating system's.

    Args:
      caller: for messages.
      key: a random key, or None.
      *settings: what is known where no function is being traced.
    """
    if key is not None:
        if not ((_is_key(key) and jnp.ndim(key) == 0) or (_is_raw(key) and jnp.ndim(key) == 1)):
            raise ValueError(
                f"{caller}: key is {key!r:.80}, expected one random key, as made by jax.random.key."
            )
        return jax.random.bits(_keys.derive(key, _keys.Use.SECRET), (2,), jnp.uint32)
    if not _arguments.concrete((settings, jnp.zeros(()))):
        raise ValueError(
            f"{caller}: init draws a fresh secret key, but is called where JAX traces, so that "
            "every run of the compiled function would have the same one. Call init outside of "
            "jit and vmap, or pass key=."
        )
    if jax.process_count() > 1:
        raise ValueError(
            f"{caller}: init draws a fresh secret key, which would be another one in each of the "
            f"{jax.process_count()} processes. Pass key=, the same in all of them."
        )
    return jnp.asarray(np.frombuffer(os.urandom(8), np.uint32))


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _is_raw(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray) and x.dtype == np.uint32


def release_key(words: jax.Array, number: jax.Array, key: jax.Array) -> jax.Array:
    """The key for the noise of one release, which is different if one of these is."""
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
      scale: of the noise; where it is zero there is no noise, and nothing is rounded.
    """

    unit: jax.Array
    scale: jax.Array


def grid_of(values: PyTree, law: Law, multiplier: Any, norm: Any, roundings: float = 1) -> Grid:
    """The grid for sums, and the scale of their noise, z times what one client changes.

    Args:
      values: the sums, of `wide` dtypes.
      law: `normal` or `laplace`.
      multiplier: z.
      norm: what one client changes in the sums, before they are rounded, L1 for `laplace` or L2.
      roundings: how often each number is rounded in this, for all releases with one multiplier.
    """
    leaves = jax.tree.leaves(values)
    double = all(x.dtype == jnp.float64 for x in leaves)
    dtype = jnp.dtype(jnp.float64 if double and leaves else jnp.float32)
    size = max(1, sum(x.size for x in leaves)) * roundings
    most = size if law is laplace else size**0.5
    multiplier, norm = (jnp.asarray(x).astype(dtype) for x in (multiplier, norm))
    bits = _bits(law, dtype)
    scale = multiplier * norm
    for _ in range(2):  # the noise for the rounding may ask for a coarser grid
        unit = _power_below(scale, bits)
        scale = multiplier * (norm + most * unit)
    return Grid(unit, scale)


def _bits(law: Law, dtype: Any) -> int:
    """log2 of how many units the scale has, such that no noise has more than a significand."""
    return (18 if law is laplace else 20) + (28 if dtype == jnp.float64 else 0)


def _power_below(scale: jax.Array, bits: int) -> jax.Array:
    """2^-bits times the largest power of two that is not above the scale, and no denormal."""
    _, exponent = jnp.frexp(lax.stop_gradient(scale))
    least = jnp.finfo(scale.dtype).minexp
    exponent = jnp.where(scale > 0, jnp.maximum(exponent - 1 - bits, least), least)
    return jnp.ldexp(jnp.ones((), scale.dtype), exponent)


def snapped(x: jax.Array, grid: Grid) -> jax.Array:
    """Values rounded to the grid. To derivatives it is the identity."""
    unit = jnp.where(grid.scale > 0, grid.unit, 1).astype(x.dtype)
    # Whatever is larger is on the grid, as all of its bits are.
    small = jnp.abs(x) < unit * 2.0 ** jnp.finfo(x.dtype).nmant
    rounded = jnp.where(small, jnp.round(x / unit) * unit, x)
    return straight_through(x, jnp.where(grid.scale > 0, rounded, x))


def drawn(law: Law, key: jax.Array, shape: tuple[int, ...], dtype: Any, grid: Grid) -> jax.Array:
    """Noise on the grid."""
    unit, scale = lax.stop_gradient(tuple(grid))
    # Where a tiny scale would ask for denormal units, the noise is larger than it has to be.
    ratio = jnp.maximum(scale / unit, 2.0 ** _bits(law, unit.dtype))
    integers = law(key, shape, ratio)
    noise = (integers * unit).astype(dtype)
    return jnp.where(
        grid.scale > 0, straight_through((integers / ratio * grid.scale).astype(dtype), noise), 0
    )


def normal(key: jax.Array, shape: tuple[int, ...], ratio: jax.Array) -> jax.Array:
    """Integers, as floats, of a normal distribution with this deviation."""
    return _of_draws(key, shape, ratio.dtype, lambda z: jnp.round(z * (ratio / 2)), 1)


def laplace(key: jax.Array, shape: tuple[int, ...], ratio: jax.Array) -> jax.Array:
    """Integers, as floats, of a Laplace distribution with this scale."""
    return _of_draws(key, shape, ratio.dtype, lambda z: jnp.round(z * z * (ratio / 2)), -1)


def _of_draws(
    key: jax.Array, shape: tuple[int, ...], dtype: Any, part: Callable, sign: int
) -> jax.Array:
    """The sum of two parts, and ``sign`` times two more."""

    def add(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        one, other = two_normals(jax.random.fold_in(key, number), shape, dtype)
        return total + (part(one) + sign * part(other)), None

    # One after the other, for memory.
    return lax.scan(add, jnp.zeros(shape, dtype), jnp.arange(2, dtype=jnp.uint32))[0]


def two_normals(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Normals from a threefry key. In float32 both come from the two words of a block.

    That takes half of the time, as JAX makes one word of the two.
    """
    if dtype == jnp.float64:
        one, other = (jax.random.normal(jax.random.fold_in(key, i), shape, dtype) for i in (0, 1))
        return one, other
    words = jax.random.key_data(jax.random.split(key, math.prod(shape)))
    return normals_of(words[:, 0]).reshape(shape), normals_of(words[:, 1]).reshape(shape)


def normals_of(words: jax.Array) -> jax.Array:
    """Normals by inversion at the odd multiples of 2^-23 between -1 and 1, from 23 bits each."""
    from_1_to_2 = lax.bitcast_convert_type((words >> 9) | np.uint32(0x3F800000), jnp.float32)
    # All of this is exact; 3 - 2^-23 is not a float32.
    uniform = 2 * (from_1_to_2 - 1) - np.float32(1 - 2**-23)
    return np.float32(2**0.5) * lax.erf_inv(uniform)


def noised(
    values: PyTree, law: Law, key: jax.Array, multiplier: Any, norm: Any, use: _keys.Use
) -> PyTree:
    """Sums at the server, of `wide` dtypes, on the grid, with independent noise; see `grid_of`."""
    grid = grid_of(values, law, multiplier, norm)
    leaves: list[Any]
    treedef: Any
    leaves, treedef = jax.tree.flatten(values)
    return treedef.unflatten(
        snapped(x, grid) + drawn(law, _keys.derive(key, use, number), x.shape, x.dtype, grid)
        for number, x in enumerate(leaves)
    )


def releases(state: PyTree) -> int:
    """How many releases the private aggregators in a state have made.

    A round of `fax.algorithms.fedavg` is one release, whatever its cohort, and so is one of
    `hyp_cluster`. `diloco` makes one in each outer step, `streaming_diloco` one for each fragment.
    `fax.aggregators.epsilon` takes this number for its ``rounds``.

    Args:
      state: of an algorithm or an aggregator.

    Returns:
      The number of releases of `gaussian` and `laplace`. All of a training by `dp_ftrl` are one
      event, and are not counted.

    Raises:
      ValueError: if the state is of several trainings, with leading axes.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2
      >>> private = fax.aggregators.gaussian(clip=1.0, noise_multiplier=2.0)
      >>> algorithm = fax.algorithms.fedavg(loss, optax.sgd(0.1), aggregator=private)
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(3)}, "bob": {"x": jnp.zeros(2)}})
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=2)
      >>> state, _ = fax.algorithms.many_rounds(algorithm, algorithm.init(0.0), rounds, 10)
      >>> fax.aggregators.releases(state)
      10
    """
    return sum(int(own.releases) for own in noise_states("fax.aggregators.releases", state))


def noise_states(caller: str, state: PyTree) -> list[NoiseState]:
    """All of them in a state of one training."""
    leaves = jax.tree.leaves(state, is_leaf=_is_noise_state)
    found = [leaf for leaf in leaves if _is_noise_state(leaf)]
    for own in found:
        if jnp.ndim(own.releases):
            raise ValueError(
                f"{caller}: the state is of {jnp.shape(own.releases)} trainings, expected that of "
                "one. Take one after the other."
            )
    return found


def _is_noise_state(x: Any) -> bool:
    return isinstance(x, NoiseState)
