"""Differentially private means: clipped updates, and noise on their sum.

The clip norm bounds what one client can change in the sum. Noise of about that size makes it hard
to tell whether a client took part. `fax.aggregators.epsilon` says how hard.

The bound is the same for each client, so the mean is not weighted, and the sum is divided by a
number that does not depend on the cohort. JAX draws the noise from a secret key in the state of
the aggregator, on a grid that does not depend on the sum; see `_noise.py`. The random generators of
JAX are not cryptographic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fax._operators as operators
import fax._reductions as reductions
from fax import _arguments, _keys
from fax.aggregators._aggregator import Aggregator, Metrics, PyTree, all_bits, of_floats
from fax.aggregators._clipping import first_clip_norm, next_clip_norm
from fax.aggregators._noise import (
    Law,
    NoiseState,
    first_noise_state,
    laplace_integers,
    next_release,
    normal_integers,
    with_noise,
)
from fax.aggregators._norms import Norm, l1_norm, l2_norm, scaled_down
from fax.aggregators._per_client import each

Number = float | jax.Array


class GaussianState(NamedTuple):
    """The state of `gaussian`.

    Attributes:
      noise: the source of the noise, and the number of releases.
      clip_norm: C, a float scalar, if it adapts. None otherwise.

    Example:

      >>> private = fax.aggregators.gaussian(clip_norm=0.5, noise_multiplier=1.0, quantile=0.5)
      >>> print(private.init(jnp.zeros(3)).clip_norm)
      0.5
    """

    noise: NoiseState
    clip_norm: jax.Array | None


def gaussian(
    clip_norm: Number,
    noise_multiplier: Number,
    *,
    quantile: Number | None = None,
    learning_rate: Number = 0.2,
    count_noise: Number | None = None,
    expected_clients: Number | None = None,
    key: jax.Array | None = None,
) -> Aggregator:
    """The private mean of DP-FedAvg: updates clipped by their L2 norm, and Gaussian noise.

        (sum_i u_i min(1, C / ‖u_i‖) + N(0, (z C)^2)) / m

    One such round is an event of the Gaussian mechanism with noise multiplier z, for neighbors that
    differ in one client; see `epsilon`.

    With ``quantile`` γ, the clip norm C adapts. A noisy share of the clients below it,
    b = (sum_i (1[‖u_i‖ <= C] - 1/2) + N(0, σ_b^2)) / m + 1/2, moves it to C exp(-η (b - γ)), and
    the noise of the updates has the standard deviation z_u C with

        z_u = (z^-2 - (2 σ_b)^-2)^(-1/2),

    a little more than z, so that both releases together still have the noise multiplier z.

    Weights only say which clients take part: those of weight zero are left out, others count the
    same. A client whose update is not finite is left out, too, since it cannot be clipped.

    Noise and sums are multiples of a power of two g, at most 2^-20 z C, so that the bits of a
    result reveal nothing else about the sum. To account for the rounding of d parameters, there is
    a little more noise, by a factor of at most 1 + z 2^-20 sqrt(d). Two training runs never have
    the same noise, unless they are given the same ``key``.

    Args:
      clip_norm: C, positive, the L2 norm of all leaves together. With ``quantile``, C of the first
        round.
      noise_multiplier: z, at least 0. This and all other numbers may be traced.
      quantile: γ, between 0 and 1. None means that C does not adapt.
      learning_rate: η, positive.
      count_noise: σ_b, above z / 2. The default, m / 20, is for hundreds of clients.
      expected_clients: m. The default is the number of clients of a round. Set it if that differs
        between rounds, or, with Poisson sampling and rows of weight zero, to the expected number.
      key: a secret random key that all noise is derived from, for one training run only. By
        default, ``init`` takes a new one from the operating system.

    Returns:
      The aggregator. Its state is a `GaussianState`. Its metric ``"clip_norm"`` is C.

    Raises:
      ValueError: if an argument is out of range; in ``init``, without ``key``, in a function that
        JAX traces or with several processes.

    References:
      McMahan et al., Learning differentially private recurrent language models,
      arXiv:1710.06963. Andrew et al., Differentially private learning with adaptive clipping,
      arXiv:1905.03871. The defaults of the adaptive norm are from there.

    Example:

      >>> private = fax.aggregators.gaussian(clip_norm=1.0, noise_multiplier=0.5)
      >>> @fax.program(clients=4)
      ... def average(updates, state, key):
      ...     return private.aggregate(updates, jnp.ones(4), state, key)
      >>> state = private.init(jnp.zeros(2))
      >>> update, state, _ = average(jnp.full((4, 2), 100.0), state, jax.random.key(0))
      >>> update.shape, fax.aggregators.releases(state)
      ((2,), 1)
    """
    caller = "fax.aggregators.gaussian"
    check_mechanism(caller, clip_norm, noise_multiplier, expected_clients)
    _arguments.number(caller, "learning_rate", learning_rate, above=0)
    if quantile is not None:
        _arguments.number(caller, "quantile", quantile, above=0, below=1)
    elif count_noise is not None:
        raise ValueError(
            f"{caller}: count_noise is {count_noise!r:.80}, but the clip norm does not adapt. Pass "
            "quantile, too."
        )
    if count_noise is not None:
        _arguments.number(caller, "count_noise", count_noise, above=0)

    def init(params: PyTree) -> GaussianState:
        noise = first_noise_state(caller, key, params, clip_norm, noise_multiplier)
        return GaussianState(
            noise, None if quantile is None else first_clip_norm(params, clip_norm)
        )

    def aggregate(
        updates: PyTree, weights: jax.Array, state: GaussianState, key: jax.Array
    ) -> tuple[PyTree, GaussianState, Metrics]:
        m, bits = number_of(expected_clients, weights), all_bits(updates)
        own_key, noise = next_release(state.noise, key)
        if quantile is None:
            update, _ = _GAUSSIAN.mean(updates, weights, own_key, noise_multiplier, clip_norm, m)
            metrics = {"clients/bits": bits, "clip_norm": jnp.asarray(clip_norm)}
            return update, GaussianState(noise, None), metrics
        assert state.clip_norm is not None
        sigma = m / 20 if count_noise is None else count_noise
        if _arguments.concrete((noise_multiplier, sigma)) and sigma <= noise_multiplier / 2:
            raise ValueError(
                f"{caller}: count_noise is {sigma:g}, by default a twentieth of the clients, "
                f"expected more than noise_multiplier / 2 = {noise_multiplier / 2:g}: otherwise "
                "the count alone uses up the whole noise multiplier. Pass a larger count_noise, or "
                "use more clients."
            )
        z = noise_multiplier / jnp.sqrt(1 - (noise_multiplier / (2 * sigma)) ** 2)
        update, excess = _GAUSSIAN.mean(updates, weights, own_key, z, state.clip_norm, m)
        excess = with_noise(excess, _GAUSSIAN.law, own_key, 2 * sigma, 0.5, _keys.Use.COUNT)
        metrics = {"clients/bits": bits + 1, "clip_norm": state.clip_norm}
        following = next_clip_norm(state.clip_norm, excess / m + 0.5, quantile, learning_rate)
        return update, GaussianState(noise, following), metrics

    return of_floats("gaussian", Aggregator(init, aggregate, private=True))


def laplace(
    clip_norm: Number,
    noise_multiplier: Number,
    *,
    expected_clients: Number | None = None,
    key: jax.Array | None = None,
) -> Aggregator:
    """A private mean: updates clipped by their L1 norm, and Laplace noise.

        (sum_i u_i min(1, C / ‖u_i‖_1) + Laplace(z C)) / m

    In each coordinate, the noise has the standard deviation sqrt(2) z C. One such round is an event
    of the Laplace mechanism, with a privacy loss of at most 1 / z, for neighbors that differ in one
    client; see `epsilon`. With many parameters, `gaussian` needs much less noise for the same
    epsilon.

    Weights, updates that are not finite, and the grid of the noise are as in `gaussian`. Here g is
    at most 2^-18 z C, and to account for the rounding of d parameters, there is more noise by a
    factor of at most 1 + z 2^-18 d.

    Args:
      clip_norm: C, positive, the L1 norm of all leaves together. It may be traced.
      noise_multiplier: z, at least 0. It may be traced.
      expected_clients: m; see `gaussian`.
      key: see `gaussian`.

    Returns:
      The aggregator. Its state is a `NoiseState`. Its metric ``"clip_norm"`` is C.

    Raises:
      ValueError: as `gaussian`.

    References:
      Dwork et al., Calibrating noise to sensitivity in private data analysis, TCC 2006.

    Example:

      >>> private = fax.aggregators.laplace(clip_norm=1.0, noise_multiplier=0.0)
      >>> @fax.program(clients=4)
      ... def average(updates, state, key):
      ...     return private.aggregate(updates, jnp.ones(4), state, key)[0]
      >>> state = private.init(jnp.zeros(2))
      >>> print(average(jnp.full((4, 2), 100.0), state, jax.random.key(0)).round(3))
      [0.5 0.5]
    """
    caller = "fax.aggregators.laplace"
    check_mechanism(caller, clip_norm, noise_multiplier, expected_clients)

    def aggregate(
        updates: PyTree, weights: jax.Array, state: NoiseState, key: jax.Array
    ) -> tuple[PyTree, NoiseState, Metrics]:
        m = number_of(expected_clients, weights)
        own_key, state = next_release(state, key)
        update, _ = _LAPLACE.mean(updates, weights, own_key, noise_multiplier, clip_norm, m)
        metrics = {"clients/bits": all_bits(updates), "clip_norm": jnp.asarray(clip_norm)}
        return update, state, metrics

    def init(params: PyTree) -> NoiseState:
        return first_noise_state(caller, key, params, clip_norm, noise_multiplier)

    return of_floats("laplace", Aggregator(init, aggregate, private=True))


def check_mechanism(
    caller: str, clip_norm: Any, noise_multiplier: Any, expected_clients: Any
) -> None:
    """Checks the arguments of all private aggregators."""
    _arguments.number(caller, "clip_norm", clip_norm, above=0)
    _arguments.number(caller, "noise_multiplier", noise_multiplier, least=0)
    if expected_clients is not None:
        _arguments.number(caller, "expected_clients", expected_clients, above=0)


def number_of(expected_clients: Any, weights: jax.Array) -> Any:
    """The number that sums are divided by. It may be traced."""
    return len(weights) if expected_clients is None else expected_clients


class _Mechanism(NamedTuple):
    """A norm by which updates are clipped, and the distribution of the noise for it."""

    norm: Callable[[PyTree], Norm]
    law: Law

    def mean(
        self,
        updates: PyTree,
        weights: jax.Array,
        key: jax.Array,
        multiplier: Any,
        clip_norm: Any,
        clients: Number,
    ) -> tuple[PyTree, jax.Array]:
        """The private mean, and the sum of `clipped_sum`, which is not private."""
        total, excess = clipped_sum(updates, weights, self.norm, clip_norm)
        total = with_noise(total, self.law, key, multiplier, clip_norm, _keys.Use.UPDATE)
        return divided(total, clients, updates), excess


_GAUSSIAN = _Mechanism(l2_norm, normal_integers)
_LAPLACE = _Mechanism(l1_norm, laplace_integers)


def clipped_sum(
    updates: PyTree, weights: jax.Array, norm: Callable[[PyTree], Norm], limit: Any
) -> tuple[PyTree, jax.Array]:
    """The sum of the clipped updates, in `wide` dtypes, and one of 1/2 or -1/2 for each client.

    A client adds 1/2 if its norm is at most the limit, and -1/2 if it is above. Clients of weight
    zero and clients whose update is not finite count in neither sum.
    """

    def own(
        update: PyTree, weight: jax.Array, limit: jax.Array
    ) -> tuple[PyTree, jax.Array, jax.Array]:
        found = norm(update)
        counts = (weight != 0) & jnp.isfinite(found.size)
        below = found.size <= limit * found.unit.inverse
        excess = jnp.where(counts, jnp.where(below, 0.5, -0.5), 0)
        return scaled_down(update, found, limit), excess, counts

    small, excess, counts = each(own, updates, weights, operators.broadcast(limit))
    return reductions.sum(small, where=counts), reductions.sum(excess)


def divided(total: PyTree, clients: Number, updates: PyTree) -> PyTree:
    """The mean, in the dtypes of the updates, from a sum in `wide` dtypes."""
    return optax.tree.cast_like(jax.tree.map(lambda x: x / clients, total), updates)
