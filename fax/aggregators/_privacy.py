"""Differentially private means: clipped updates, and noise on their sum.

What one client can change in the sum is bounded by the clip norm; noise of that size makes runs
with and without the client hard to tell apart. `fax.aggregators.epsilon` says how hard.

The bound holds for each client alike, so the mean has no weights, and is divided by a number that
does not depend on who took part. Noise is drawn by JAX from a secret key in the aggregator's state,
on a grid that does not depend on the sum; see `_noise.py`. JAX's generators are not cryptographic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fax._operators as operators
import fax._reductions as reductions
from fax import _arguments, _keys
from fax.aggregators._aggregator import Aggregator, Metrics, all_bits, each
from fax.aggregators._clipping import next_norm, start_norm
from fax.aggregators._noise import NoiseState, next_release, noised, normal, start
from fax.aggregators._noise import laplace as laplace_law
from fax.aggregators._norms import Norm, l1_norm, l2_norm, shrunk

PyTree = Any
Number = float | jax.Array


class GaussianState(NamedTuple):
    """The state of `gaussian`.

    Attributes:
      noise: where the noise comes from, and how many releases there were.
      norm: C where it adapts, a float scalar, else None.
    """

    noise: NoiseState
    norm: jax.Array | None


def gaussian(
    clip: Number,
    noise_multiplier: Number,
    *,
    quantile: Number | None = None,
    rate: Number = 0.2,
    count_noise: Number | None = None,
    expected_clients: float | None = None,
    key: jax.Array | None = None,
) -> Aggregator:
    """The private mean of DP-FedAvg: updates clipped by their L2 norm, and Gaussian noise.

        (sum_i u_i min(1, C / ‖u_i‖) + N(0, (z C)^2)) / m

    One such round is an event of the Gaussian mechanism with noise multiplier z, for neighbours
    that differ in one client; see `epsilon`.

    With ``quantile`` γ the norm C adapts. A noised share of clients below it,
    b = (sum_i (1[‖u_i‖ <= C] - 1/2) + N(0, σ_b^2)) / m + 1/2, moves it to C exp(-η (b - γ)), and
    the updates get the noise z_u C with

        z_u = (z^-2 - (2 σ_b)^-2)^(-1/2),

    a little more than z, so that both releases together still have the multiplier z.

    Weights only tell who takes part: clients of weight zero are left out, and all others count the
    same. So is a client left out whose update is not finite, for it cannot be clipped.

    Noise and sums are multiples of a power of two g, at most 2^-20 z C, so that the bits of a
    result tell nothing else about the sum. For the rounding of d parameters there is a little more
    noise, by a factor of 1 + z 2^-20 sqrt(d) at most. Two trainings never have the same noise,
    unless they are given the same ``key``.

    Args:
      clip: C, positive, the L2 norm of all leaves together; with ``quantile``, that of the first
        round.
      noise_multiplier: z, at least 0. It may be traced, as all numbers here.
      quantile: γ, between 0 and 1. None: C stays what it is.
      rate: η, positive.
      count_noise: σ_b, above z / 2. Default: m / 20, which is for hundreds of clients.
      expected_clients: m. Default: the number of clients of a round, if it is the same in all
        rounds; with Poisson sampling and rows of weight zero, how many are expected.
      key: a secret random key, which all noise follows from, for one training only. Default:
        ``init`` takes a fresh one from the operating system.

    Returns:
      The aggregator. Its state is a `GaussianState`. Its metric ``"clip_norm"`` is C.

    Raises:
      ValueError: if an argument is out of range, and in ``init``, without ``key``, in a function
        that JAX traces and with several processes.

    References:
      McMahan et al., Learning differentially private recurrent language models,
      arXiv:1710.06963. Andrew et al., Differentially private learning with adaptive clipping,
      arXiv:1905.03871, of which the defaults are.

    Example:

      >>> private = fax.aggregators.gaussian(clip=1.0, noise_multiplier=0.5)
      >>> @fax.program(clients=4)
      ... def average(updates, state, key):
      ...     return private.aggregate(updates, jnp.ones(4), state, key)
      >>> state = private.init(jnp.zeros(2))
      >>> update, state, _ = average(jnp.full((4, 2), 100.0), state, jax.random.key(0))
      >>> update.shape, fax.aggregators.releases(state)
      ((2,), 1)
    """
    caller = "fax.aggregators.gaussian"
    _arguments.number(caller, "clip", clip, above=0)
    _arguments.number(caller, "noise_multiplier", noise_multiplier, least=0)
    _arguments.number(caller, "rate", rate, above=0)
    if quantile is not None:
        _arguments.number(caller, "quantile", quantile, above=0, below=1)
    elif count_noise is not None:
        raise ValueError(
            f"{caller}: count_noise={count_noise!r} is for a norm that adapts; give quantile, too."
        )
    if count_noise is not None:
        _arguments.number(caller, "count_noise", count_noise, above=0)
    if expected_clients is not None:
        _arguments.number(caller, "expected_clients", expected_clients, above=0)

    def init(params: PyTree) -> GaussianState:
        noise = start(caller, key, params, clip, noise_multiplier)
        return GaussianState(noise, None if quantile is None else start_norm(params, clip))

    def aggregate(
        updates: PyTree, weights: jax.Array, state: GaussianState, key: jax.Array
    ) -> tuple[PyTree, GaussianState, Metrics]:
        m, bits = expected_clients or len(weights), all_bits(updates)
        own_key, noise = next_release(state.noise, key)
        if quantile is None:
            total, _ = clipped_sum(updates, weights, l2_norm, clip)
            total = noised(total, normal, own_key, noise_multiplier, clip, _keys.Use.UPDATE)
            metrics = {"clients/bits": bits, "clip_norm": jnp.asarray(clip)}
            return divided(total, m, updates), GaussianState(noise, None), metrics
        assert state.norm is not None
        sigma = m / 20 if count_noise is None else count_noise
        concrete = not any(isinstance(x, jax.core.Tracer) for x in (noise_multiplier, sigma))
        if concrete and sigma <= noise_multiplier / 2:
            raise ValueError(
                f"{caller}: count_noise is {sigma:g}, by default a twentieth of the clients, "
                f"expected more than noise_multiplier / 2 = {noise_multiplier / 2:g}, or the count "
                "alone would cost more than both may. Give count_noise, or take more clients."
            )
        z = noise_multiplier / jnp.sqrt(1 - (noise_multiplier / (2 * sigma)) ** 2)
        total, excess = clipped_sum(updates, weights, l2_norm, state.norm)
        total = noised(total, normal, own_key, z, state.norm, _keys.Use.UPDATE)
        share = noised(excess, normal, own_key, 2 * sigma, 0.5, _keys.Use.COUNT) / m + 0.5
        metrics = {"clients/bits": bits + 1, "clip_norm": state.norm}
        norm = next_norm(state.norm, share, quantile, rate)
        return divided(total, m, updates), GaussianState(noise, norm), metrics

    return Aggregator(init, aggregate, private=True)


def laplace(
    clip: Number,
    noise_multiplier: Number,
    *,
    expected_clients: float | None = None,
    key: jax.Array | None = None,
) -> Aggregator:
    """A private mean: updates clipped by their L1 norm, and Laplace noise.

        (sum_i u_i min(1, C / ‖u_i‖_1) + Laplace(z C)) / m

    The noise has the standard deviation sqrt(2) z C in each coordinate. One such round is an event
    of the Laplace mechanism, of privacy loss at most 1 / z, for neighbours that differ in one
    client; see `epsilon`. With many parameters `gaussian` has far less noise at the same epsilon.

    Weights, updates that are not finite, and the grid of the noise: see `gaussian`. Here g is at
    most 2^-18 z C, and for the rounding of d parameters there is more noise by a factor of
    1 + z 2^-18 d at most.

    Args:
      clip: C, positive, the L1 norm of all leaves together.
      noise_multiplier: z, at least 0. Both may be traced.
      expected_clients: m; see `gaussian`.
      key: see `gaussian`.

    Returns:
      The aggregator. Its state is a `NoiseState`. Its metric ``"clip_norm"`` is C.

    Raises:
      ValueError: as `gaussian`.

    References:
      Dwork et al., Calibrating noise to sensitivity in private data analysis, TCC 2006.

    Example:

      >>> private = fax.aggregators.laplace(clip=1.0, noise_multiplier=0.0)
      >>> @fax.program(clients=4)
      ... def average(updates, state, key):
      ...     return private.aggregate(updates, jnp.ones(4), state, key)[0]
      >>> state = private.init(jnp.zeros(2))
      >>> print(average(jnp.full((4, 2), 100.0), state, jax.random.key(0)).round(3))
      [0.5 0.5]
    """
    caller = "fax.aggregators.laplace"
    _arguments.number(caller, "clip", clip, above=0)
    _arguments.number(caller, "noise_multiplier", noise_multiplier, least=0)
    if expected_clients is not None:
        _arguments.number(caller, "expected_clients", expected_clients, above=0)

    def aggregate(
        updates: PyTree, weights: jax.Array, state: NoiseState, key: jax.Array
    ) -> tuple[PyTree, NoiseState, Metrics]:
        own_key, state = next_release(state, key)
        total, _ = clipped_sum(updates, weights, l1_norm, clip)
        total = noised(total, laplace_law, own_key, noise_multiplier, clip, _keys.Use.UPDATE)
        metrics = {"clients/bits": all_bits(updates), "clip_norm": jnp.asarray(clip)}
        return divided(total, expected_clients or len(weights), updates), state, metrics

    def init(params: PyTree) -> NoiseState:
        return start(caller, key, params, clip, noise_multiplier)

    return Aggregator(init, aggregate, private=True)


def clipped_sum(
    updates: PyTree, weights: jax.Array, norm: Callable[[PyTree], Norm], limit: Any
) -> tuple[PyTree, jax.Array]:
    """The sum of the clipped updates, in `wide` dtypes, and that of (1/2 or -1/2: below or above).

    Clients of weight zero count in neither, and so do those whose update is not finite.
    """

    def own(update, weight, limit):
        found = norm(update)
        counts = (weight != 0) & jnp.isfinite(found.size)
        below = found.size <= limit * found.unit.inverse
        excess = jnp.where(counts, jnp.where(below, 0.5, -0.5), 0)
        return shrunk(update, found, limit), excess, counts

    small, excess, counts = each(own, updates, weights, operators.broadcast(limit))
    return reductions.sum(small, where=counts), reductions.sum(excess)


def divided(total: PyTree, clients: float, updates: PyTree) -> PyTree:
    """The mean in the dtypes of the updates, of a sum in `wide` ones."""
    return jax.tree.map(lambda x, like: (x / clients).astype(like.dtype), total, updates)
