"""DP-FTRL: noise that is correlated over rounds, so that its sums stay small without sampling.

After t rounds, the model is a sum of t private means. If their noise is independent, the noise of
the sum grows like sqrt(t). In each round, DP-FTRL subtracts part of the noise of earlier rounds.
This costs privacy, as an update then affects several rounds, but it gains more than it costs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fax._reductions as reductions
from fax import _arguments, _keys
from fax.aggregators._aggregator import (
    Aggregator,
    Metrics,
    PerClient,
    PyTree,
    all_bits,
    of_floats,
)
from fax.aggregators._noise import (
    grid_of,
    noise_on_grid,
    normal_integers,
    release_key,
    round_to_grid,
    secret_words,
)
from fax.aggregators._norms import l2_norm, wide
from fax.aggregators._private_means import Number, check_mechanism, clipped_sum, divided, number_of


class DPFTRLState(NamedTuple):
    """The state of `dp_ftrl`.

    Attributes:
      noise: the noise of the last bands - 1 rounds, the newest first, leaves [bands - 1, ...].
      round: the number of rounds so far, an int32 scalar.
      members: for each client of the data, int32 [num_clients], the ``"last"`` round that it took
        part in, and how many ``"times"`` it took part.
      key: uint32 [2]. All noise is derived from it and the number of the round. Keep it secret.

    Example:

      >>> private = fax.aggregators.dp_ftrl(
      ...     clip_norm=1.0, noise_multiplier=4.0, num_clients=100, separation=2, participations=9
      ... )
      >>> state = private.init(jnp.zeros(5))
      >>> state.noise.shape, state.members.rows["last"].shape
      ((1, 5), (100,))
    """

    noise: PyTree
    round: jax.Array
    members: PerClient
    key: jax.Array


def dp_ftrl(
    clip_norm: Number,
    noise_multiplier: Number,
    *,
    num_clients: int,
    separation: int,
    participations: int,
    bands: int | None = None,
    expected_clients: Number | None = None,
    key: jax.Array | None = None,
) -> Aggregator:
    """A private mean whose noise is correlated over rounds, by banded matrix factorization.

    Let the rows of G be the sums of clipped updates in all rounds. The rounds return
    (G + inv(C) Z) / m, where the rows of Z are N(0, (z s clip_norm)^2), and C is the lower
    triangular Toeplitz matrix with

        1, 1/2, 3/8, 5/16, ..., c_j = c_(j-1) (2 j - 1) / (2 j),

    of which the first ``bands`` are kept. C is the square root of the matrix A of prefix sums, and
    nearly minimizes the noise of A G. The noise of round t is x_t = Z_t - sum_(j>0) c_j x_(t-j).

    All rounds are functions of C G + Z. Let a client take part in at most k = ``participations``
    rounds, any two of them at least ``separation`` >= ``bands`` rounds apart. Then the bands of its
    rounds do not overlap, and it changes C G by at most s clip_norm with s = sqrt(k sum_j c_j^2).
    So the whole training run is a single event of the Gaussian mechanism with noise multiplier z:
    ``epsilon(z, rounds=1, delta=...)``. Cohorts do not have to be random. Neighbors differ in one
    client, which sends zeros in one of them. Cohorts of `fax.data.cohorts` with
    ``sampler="minimum_reuse"`` have ``separation = num_clients // clients`` and
    ``participations = ceil(rounds * clients / num_clients)``.

    The aggregator enforces this: a client that takes part too soon or too often is left out of the
    round, and counted in a metric. Weights and updates that are not finite are treated as in
    `gaussian`. So is the noise, on a grid that all rounds share.

    Args:
      clip_norm: the L2 norm of all leaves together. Unlike in `gaussian`, it cannot adapt.
      noise_multiplier: z.
      num_clients: the number of clients in the data, ``len(data)``.
      separation: the smallest number of rounds from one that a client takes part in to its next, 1
        if it may take part in every round.
      participations: k, the largest number of rounds that a client takes part in.
      bands: at most ``separation``. The state holds bands - 1 models. One band means independent
        noise. The default is ``separation``, but at most 16.
      expected_clients: m. The default is the number of clients of a round.
      key: see `gaussian`.

    Returns:
      The aggregator. Its state is a `DPFTRLState`. Its metrics are ``"clip_norm"`` and
      ``"refused"``, the number of clients that were left out because they took part too soon or too
      often.

    Raises:
      ValueError: as `gaussian`.

    References:
      Kairouz et al., Practical and private (deep) learning without sampling or shuffling,
      arXiv:2103.00039. Choquette-Choo et al., (Amplified) banded matrix factorization,
      arXiv:2306.08153. Kalinin and Lampert, Banded square root matrix factorization,
      arXiv:2405.13763, for these c_j.

    Example:

      >>> private = fax.aggregators.dp_ftrl(
      ...     clip_norm=1.0, noise_multiplier=4.0, num_clients=100, separation=10, participations=3
      ... )
      >>> state = private.init({"w": jnp.zeros(5)})
      >>> state.noise["w"].shape
      (9, 5)
    """
    caller = "fax.aggregators.dp_ftrl"
    check_mechanism(caller, clip_norm, noise_multiplier, expected_clients)
    num_clients = _arguments.count(caller, "num_clients", num_clients, least=1)
    separation = _arguments.count(caller, "separation", separation, least=1)
    participations = _arguments.count(caller, "participations", participations, least=1)
    bands = min(separation, 16) if bands is None else bands
    bands = _arguments.count(
        caller, "bands", bands, most=separation, expected=f"from 1 to separation={separation}"
    )
    c = coefficients(bands)
    sensitivity = math.sqrt(participations * np.sum(c**2))

    def init(params: PyTree) -> DPFTRLState:
        noise = jax.tree.map(lambda x: jnp.zeros((bands - 1, *jnp.shape(x)), wide(x)), params)
        last = jnp.full(num_clients, -separation, jnp.int32)
        members = PerClient({"last": last, "times": jnp.zeros(num_clients, jnp.int32)})
        own_key = secret_words(caller, key, params, clip_norm, noise_multiplier)
        return DPFTRLState(noise, jnp.zeros((), jnp.int32), members, own_key)

    def aggregate(
        updates: PyTree, weights: jax.Array, state: DPFTRLState, key: jax.Array
    ) -> tuple[PyTree, DPFTRLState, Metrics]:
        last, times = state.members.rows["last"], state.members.rows["times"]
        present = weights != 0
        in_time = (state.round - last >= separation) & (times < participations)
        counts = present & in_time
        total, _ = clipped_sum(updates, counts, l2_norm, clip_norm)

        # In each round that a client changes, and in the bands after it, the rounding of the sum
        # and of what is subtracted changes Z by up to four units in each number.
        roundings = 16 * participations * bands
        grid = grid_of(total, normal_integers, noise_multiplier, sensitivity * clip_norm, roundings)
        own_key = release_key(state.key, state.round, key)
        fresh = noise_on_grid(total, normal_integers, own_key, _keys.Use.UPDATE, grid)

        def earlier(old: jax.Array) -> jax.Array:
            return round_to_grid(jnp.tensordot(jnp.asarray(c[1:], old.dtype), old, 1), grid)

        x = optax.tree.sub(fresh, jax.tree.map(earlier, state.noise))
        total = jax.tree.map(lambda y: round_to_grid(y, grid), total)
        noise = jax.tree.map(
            lambda new, old: jnp.concatenate([new[None], old])[: bands - 1], x, state.noise
        )
        rows = {
            "last": jnp.where(counts, state.round, last),
            "times": times + counts.astype(jnp.int32),
        }
        metrics = {
            "clients/bits": all_bits(updates),
            "clip_norm": jnp.asarray(clip_norm),
            "refused": reductions.sum(present & ~in_time),
        }
        m = number_of(expected_clients, weights)
        update = divided(optax.tree.add(total, x), m, updates)
        return update, DPFTRLState(noise, state.round + 1, PerClient(rows), state.key), metrics

    return of_floats("dp_ftrl", Aggregator(init, aggregate, private=True))


def coefficients(bands: int) -> np.ndarray:
    """The Taylor coefficients of (1 - x)^(-1/2): the first column of the square root of A."""
    j = np.arange(1, bands)
    return np.cumprod([1.0, *((2 * j - 1) / (2 * j))])
