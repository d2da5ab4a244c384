"""Differentially private means: clipped updates, and noise on their sum.

What one client can change in the sum is bounded by the clip norm; noise of that size makes runs
with and without the client hard to tell apart. `fax.aggregators.epsilon` says how hard.

The bound holds for each client alike, so the mean has no weights, and is divided by a number that
does not depend on who took part. Noise is drawn by JAX from the server's key, in the dtype of the
updates and at least in float32. That is the mechanism of the textbooks up to rounding, and a
simulation of it up to the key: JAX's generators are not cryptographic, the key follows from the
seed of the cohorts, and the low bits of floating-point noise can tell about the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import fax._operators as operators
import fax._reductions as reductions
from fax import _arguments
from fax.aggregators._aggregator import Aggregator, Metrics, all_bits, each
from fax.aggregators._clipping import l2_norm, next_norm, shrunk, start_norm, wide

PyTree = Any
Number = float | jax.Array


def gaussian(
    clip: Number,
    noise_multiplier: Number,
    *,
    quantile: Number | None = None,
    rate: Number = 0.2,
    count_noise: Number | None = None,
    expected_clients: float | None = None,
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

    Args:
      clip: C, positive, the L2 norm of all leaves together; with ``quantile``, that of the first
        round.
      noise_multiplier: z, at least 0. It may be traced, as all numbers here.
      quantile: γ, between 0 and 1. None: C stays what it is.
      rate: η, positive.
      count_noise: σ_b, above z / 2. Default: m / 20, which is for hundreds of clients.
      expected_clients: m. Default: the number of clients of a round, if it is the same in all
        rounds; with Poisson sampling and rows of weight zero, how many are expected.

    Returns:
      The aggregator. Its state is C where that adapts, else (). Its metric ``"clip_norm"`` is C.

    Raises:
      ValueError: if an argument is out of range.

    References:
      McMahan et al., Learning differentially private recurrent language models,
      arXiv:1710.06963. Andrew et al., Differentially private learning with adaptive clipping,
      arXiv:1905.03871, of which the defaults are.

    Example:

      >>> @fax.program(clients=4)
      ... def average(updates, key):
      ...     private = fax.aggregators.gaussian(clip=1.0, noise_multiplier=0.5)
      ...     return private.aggregate(updates, jnp.ones(4), (), key)[0]
      >>> average(jnp.full((4, 2), 100.0), jax.random.key(0)).shape
      (2,)
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

    def init(params: PyTree) -> PyTree:
        return () if quantile is None else start_norm(params, clip)

    def aggregate(
        updates: PyTree, weights: jax.Array, state: PyTree, key: jax.Array
    ) -> tuple[PyTree, PyTree, Metrics]:
        m, bits = expected_clients or len(weights), all_bits(updates)
        if quantile is None:
            total, _ = clipped_sum(updates, weights, l2_norm, clip)
            total = noised(total, jax.random.normal, key, noise_multiplier * clip)
            metrics = {"clients/bits": bits, "clip_norm": jnp.asarray(clip)}
            return divided(total, m, updates), state, metrics
        sigma = m / 20 if count_noise is None else count_noise
        concrete = not any(isinstance(x, jax.core.Tracer) for x in (noise_multiplier, sigma))
        if concrete and sigma <= noise_multiplier / 2:
            raise ValueError(
                f"{caller}: count_noise is {sigma:g}, by default a twentieth of the clients, "
                f"expected more than noise_multiplier / 2 = {noise_multiplier / 2:g}, or the count "
                "alone would cost more than both may. Give count_noise, or take more clients."
            )
        z = noise_multiplier / jnp.sqrt(1 - (noise_multiplier / (2 * sigma)) ** 2)
        of_updates, of_count = jax.random.split(key)
        total, excess = clipped_sum(updates, weights, l2_norm, state)
        total = noised(total, jax.random.normal, of_updates, z * state)
        share = noised(excess, jax.random.normal, of_count, sigma) / m + 0.5
        metrics = {"clients/bits": bits + 1, "clip_norm": state}
        return divided(total, m, updates), next_norm(state, share, quantile, rate), metrics

    return Aggregator(init, aggregate)


def laplace(
    clip: Number, noise_multiplier: Number, *, expected_clients: float | None = None
) -> Aggregator:
    """A private mean: updates clipped by their L1 norm, and Laplace noise.

        (sum_i u_i min(1, C / ‖u_i‖_1) + Laplace(z C)) / m

    The noise has the standard deviation sqrt(2) z C in each coordinate. One such round is an event
    of the Laplace mechanism, of privacy loss at most 1 / z, for neighbours that differ in one
    client; see `epsilon`. With many parameters `gaussian` has far less noise at the same epsilon.

    Weights and updates that are not finite: see `gaussian`.

    Args:
      clip: C, positive, the L1 norm of all leaves together.
      noise_multiplier: z, at least 0. Both may be traced.
      expected_clients: m; see `gaussian`.

    Returns:
      The aggregator. It has no state. Its metric ``"clip_norm"`` is C.

    Raises:
      ValueError: if an argument is out of range.

    References:
      Dwork et al., Calibrating noise to sensitivity in private data analysis, TCC 2006.

    Example:

      >>> @fax.program(clients=4)
      ... def average(updates, key):
      ...     private = fax.aggregators.laplace(clip=1.0, noise_multiplier=0.0)
      ...     return private.aggregate(updates, jnp.ones(4), (), key)[0]
      >>> average(jnp.full((4, 2), 100.0), jax.random.key(0))
      Array([0.5, 0.5], dtype=float32)
    """
    caller = "fax.aggregators.laplace"
    _arguments.number(caller, "clip", clip, above=0)
    _arguments.number(caller, "noise_multiplier", noise_multiplier, least=0)
    if expected_clients is not None:
        _arguments.number(caller, "expected_clients", expected_clients, above=0)

    def aggregate(
        updates: PyTree, weights: jax.Array, state: PyTree, key: jax.Array
    ) -> tuple[PyTree, PyTree, Metrics]:
        total, _ = clipped_sum(updates, weights, _l1_norm, clip)
        total = noised(total, jax.random.laplace, key, noise_multiplier * clip)
        metrics = {"clients/bits": all_bits(updates), "clip_norm": jnp.asarray(clip)}
        return divided(total, expected_clients or len(weights), updates), state, metrics

    return Aggregator(lambda params: (), aggregate)


def _l1_norm(update: PyTree) -> jax.Array:
    return sum(
        (jnp.sum(jnp.abs(x), dtype=wide(x)) for x in jax.tree.leaves(update)), start=jnp.zeros(())
    )


def clipped_sum(
    updates: PyTree, weights: jax.Array, norm: Callable[[PyTree], jax.Array], limit: Any
) -> tuple[PyTree, jax.Array]:
    """The sum of the clipped updates, in `wide` dtypes, and that of (1/2 or -1/2: below or above).

    Clients of weight zero count in neither.
    """

    def own(update, weight, limit):
        size = norm(update)
        small = shrunk(update, size, limit)
        small = jax.tree.map(lambda x: x.astype(wide(x)), small)
        excess = jnp.where(weight != 0, jnp.where(size <= limit, 0.5, -0.5), 0)
        return small, excess, (weight != 0) & jnp.isfinite(size)

    small, excess, counts = each(own, updates, weights, operators.broadcast(limit))
    return reductions.sum(small, where=counts), reductions.sum(excess)


def noised(values: PyTree, draw: Callable, key: jax.Array, scale: Any) -> PyTree:
    """Values at the server, of `wide` dtypes, with independent noise."""
    leaves: list[Any]
    treedef: Any
    leaves, treedef = jax.tree.flatten(values)
    keys = jax.random.split(key, max(len(leaves), 1))
    return treedef.unflatten(
        x + (scale * draw(k, x.shape, x.dtype)).astype(x.dtype) for x, k in zip(leaves, keys)
    )


def divided(total: PyTree, clients: float, updates: PyTree) -> PyTree:
    """The mean in the dtypes of the updates, of a sum in `wide` ones."""
    return jax.tree.map(lambda x, like: (x / clients).astype(like.dtype), total, updates)
