"""DP-FTRL: noise that is correlated over rounds, so that its sums stay small without sampling.

What a model is after t rounds is a sum of t private means, and with independent noise the noise
in it grows like sqrt(t). DP-FTRL subtracts in a round part of the noise of the rounds before. That
costs privacy, as a client's update is then seen in several rounds, but less than it gains.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fax._reductions as reductions
from fax import _arguments, _keys
from fax.aggregators._aggregator import Aggregator, Metrics, PerClient, all_bits
from fax.aggregators._noise import drawn, grid_of, normal, release_key, secret, snapped
from fax.aggregators._norms import l2_norm, wide
from fax.aggregators._privacy import Number, clipped_sum, divided

PyTree = Any


class DPFTRLState(NamedTuple):
    """The state of `dp_ftrl`.

    Attributes:
      noise: that of the last bands - 1 rounds, the newest first, leaves [bands - 1, ...].
      round: the number of rounds so far, an int32 scalar.
      members: of each client of the population, int32 [population], the ``"last"`` round that it
        took part in, and how many ``"times"`` it did.
      key: uint32 [2], which all noise follows from, with the number of the round. It is secret.
    """

    noise: PyTree
    round: jax.Array
    members: PerClient
    key: jax.Array


def dp_ftrl(
    clip: Number,
    noise_multiplier: Number,
    *,
    population: int,
    separation: int,
    participations: int,
    bands: int | None = None,
    expected_clients: float | None = None,
    key: jax.Array | None = None,
) -> Aggregator:
    """A private mean whose noise is correlated over rounds, by banded matrix factorisation.

    With the sums of clipped updates of all rounds as rows of G, the rounds give (G + inv(C) Z) / m,
    where the rows of Z are N(0, (z s clip)^2), and C is the lower triangular Toeplitz matrix with

        1, 1/2, 3/8, 5/16, ..., c_j = c_(j-1) (2 j - 1) / (2 j),

    of which the first ``bands`` are kept: the square root of the matrix A of prefix sums, which
    nearly minimises the noise of A G. The noise of round t is x_t = Z_t - sum_(j>0) c_j x_(t-j).

    All rounds follow from C G + Z. If from one round that a client takes part in to its next there
    are ``separation`` >= ``bands`` or more, and these are at most k = ``participations``, the bands
    of its rounds do not meet, and it changes C G by at most s clip with s = sqrt(k sum_j c_j^2).
    So the whole training is one event of the Gaussian mechanism with multiplier z:
    ``epsilon(z, rounds=1, delta=...)``. Nothing random is assumed in who takes part. Neighbours
    differ in one client, who in one of them sends zeros. Cohorts of `fax.data.cohorts` with
    ``sampler="minimum_reuse"`` have ``separation = population // clients`` and
    ``participations = ceil(rounds * clients / population)``.

    The aggregator sees to it: a client that comes too soon or too often is left out of the
    round, and counted. Otherwise weights and updates that are not finite are treated as by
    `gaussian`, and so is the noise, on a grid that all rounds share.

    Args:
      clip: the L2 norm of all leaves together. It stays the same, unlike that of `gaussian`.
      noise_multiplier: z.
      population: the number of clients of the data.
      separation: the least number of rounds from one that a client takes part in to its next; 1
        if it may take part in all.
      participations: k, in how many rounds of all a client takes part at most.
      bands: up to ``separation``. The state has bands - 1 models. One band is independent noise.
        Default: ``separation``, or 16 if that is less.
      expected_clients: m. Default: the number of clients of a round.
      key: see `gaussian`.

    Returns:
      The aggregator, whose state is a `DPFTRLState`. Its metrics are ``"clip_norm"`` and
      ``"refused"``, the number of clients that were left out because they came too soon or too
      often.

    Raises:
      ValueError: as `gaussian`.

    References:
      Kairouz et al., Practical and private (deep) learning without sampling or shuffling,
      arXiv:2103.00039. Choquette-Choo et al., (Amplified) banded matrix factorization,
      arXiv:2306.08153. Kalinin and Lampert, Banded square root matrix factorization,
      arXiv:2405.13763, which has these c_j.

    Example:

      >>> private = fax.aggregators.dp_ftrl(
      ...     clip=1.0, noise_multiplier=4.0, population=100, separation=10, participations=3
      ... )
      >>> state = private.init({"w": jnp.zeros(5)})
      >>> state.noise["w"].shape
      (9, 5)
    """
    caller = "fax.aggregators.dp_ftrl"
    _arguments.number(caller, "clip", clip, above=0)
    _arguments.number(caller, "noise_multiplier", noise_multiplier, least=0)
    population = _arguments.count(caller, "population", population, least=1)
    separation = _arguments.count(caller, "separation", separation, least=1)
    participations = _arguments.count(caller, "participations", participations, least=1)
    bands = min(separation, 16) if bands is None else bands
    bands = _arguments.count(caller, "bands", bands, least=1)
    if bands > separation:
        raise ValueError(
            f"{caller}: bands={bands} is above separation={separation}, expected at most that: a "
            "client's updates would be seen through the same noise twice."
        )
    if expected_clients is not None:
        _arguments.number(caller, "expected_clients", expected_clients, above=0)
    c = coefficients(bands)
    sensitivity = math.sqrt(participations * np.sum(c**2))

    def init(params: PyTree) -> DPFTRLState:
        noise = jax.tree.map(lambda x: jnp.zeros((bands - 1, *jnp.shape(x)), wide(x)), params)
        last = jnp.full(population, -separation, jnp.int32)
        members = PerClient({"last": last, "times": jnp.zeros(population, jnp.int32)})
        own_key = secret(caller, key, params, clip, noise_multiplier)
        return DPFTRLState(noise, jnp.zeros((), jnp.int32), members, own_key)

    def aggregate(
        updates: PyTree, weights: jax.Array, state: DPFTRLState, key: jax.Array
    ) -> tuple[PyTree, DPFTRLState, Metrics]:
        last, times = state.members.rows["last"], state.members.rows["times"]
        present = weights != 0
        in_time = (state.round - last >= separation) & (times < participations)
        counts = present & in_time
        total, _ = clipped_sum(updates, counts, l2_norm, clip)

        # Where a client changes G, and for the bands after that, its rounding and that of what is
        # subtracted change Z by up to four units in each number.
        roundings = 16 * participations * bands
        grid = grid_of(total, normal, noise_multiplier, sensitivity * clip, roundings)
        own_key = release_key(state.key, state.round, key)
        leaves: list[Any]
        treedef: Any
        leaves, treedef = jax.tree.flatten(total)
        fresh = treedef.unflatten(
            drawn(normal, _keys.derive(own_key, _keys.Use.UPDATE, j), y.shape, y.dtype, grid)
            for j, y in enumerate(leaves)
        )
        x = jax.tree.map(
            lambda z, old: z - snapped(jnp.tensordot(jnp.asarray(c[1:], old.dtype), old, 1), grid),
            fresh,
            state.noise,
        )
        total = jax.tree.map(lambda y: snapped(y, grid), total)
        noise = jax.tree.map(
            lambda new, old: jnp.concatenate([new[None], old])[: bands - 1], x, state.noise
        )
        rows = {
            "last": jnp.where(counts, state.round, last),
            "times": times + counts.astype(jnp.int32),
        }
        metrics = {
            "clients/bits": all_bits(updates),
            "clip_norm": jnp.asarray(clip),
            "refused": reductions.sum(present & ~in_time),
        }
        update = divided(jax.tree.map(jnp.add, total, x), expected_clients or len(weights), updates)
        return update, DPFTRLState(noise, state.round + 1, PerClient(rows), state.key), metrics

    return Aggregator(init, aggregate, private=True)


def coefficients(bands: int) -> np.ndarray:
    """The Taylor coefficients of (1 - x)^(-1/2), the first column of the square root of A."""
    j = np.arange(1, bands)
    return np.cumprod([1.0, *((2 * j - 1) / (2 * j))])
