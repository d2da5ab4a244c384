"""The arithmetic of secure aggregation: masked integers, of which the server learns the sum."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import fax._operators as operators
import fax._reductions as reductions
from fax import _arguments
from fax._keys import Use, derive
from fax._placement import resolve
from fax.aggregators._aggregator import Aggregator, Metrics, each, each_present
from fax.aggregators._leaves import (
    check_floats,
    split,
    uniform,
    wide,
)

PyTree = Any

_MODULUS = 2**32


def secure_sum(
    clip: float,
    max_weight: float,
    *,
    bits: int = 16,
    rounding: str = "stochastic",
    neighbors: int | None = None,
) -> Aggregator:
    """A weighted mean by sums of masked integers, as in secure aggregation.

    Client i rounds its weight w_i to an integer v_i, and each number u of its update, clipped to
    [-c, c], times the weight, to an integer x:

        v = round(L min(w / max_weight, 1)),    x = round(v u / c),    L = 2^(bits - 1) - 1

    and sends y = x + mask_i mod 2^32, and v likewise. Masks of all clients add up to zero, so

        sum_i y_i = sum_i x_i mod 2^32,    update = c sum_i x_i / sum_i v_i

    exactly. A single y is uniformly distributed, whatever x is. n clients of ``bits`` bits need
    n 2^bits <= 2^32, or the sum could wrap around.

    With the pair of clients i and i + o (mod n) goes a random stream of the pair's, for each o of
    1 ... n // 2, which i adds and i + o subtracts: every two clients share a mask, as in the
    paper, and clients that are half the circle apart share two. That takes n streams as long as the
    update for each client, one after another. With ``neighbors=k`` o goes to k / 2 only, as on the
    graphs of Bell et al.: k streams, and a client's number is hidden unless its k neighbours
    conspire. The memory is that of one update.

    This is the arithmetic, not the protocol: the streams' seeds, on which pairs would agree by
    exchanging keys, are drawn from the server's key, and nobody drops out. Weights below zero count
    as zero, and a client of such a weight sends zeros, whatever it holds. If another client's
    update or weight is NaN so is the result, for an integer cannot say so. With a total weight of
    zero it is zero. What is differentiated are integers: derivatives are
    zero.

    Args:
      clip: c, a positive number. The metric ``"clipped"`` tells what part of the numbers was
        outside.
      max_weight: a positive number; weights above it count as this. With `fax.algorithms.fedavg`,
        whose weights are numbers of examples, one that few clients exceed.
      bits: of each integer with its sign, from 2 to 31. The resolution is c / L.
      rounding: of x. ``"stochastic"``, up with the probability that makes it right on average, or
        ``"nearest"``.
      neighbors: with how many clients each one shares masks, an even int. None: with all.

    Returns:
      The aggregator, without state. A client sends 32 bits for each number of its update, for its
      weight, and for whether it is NaN.

    Raises:
      ValueError: if an argument is out of range; when used, if there are too many clients for
        ``bits``, or a leaf does not hold floats.

    References:
      Bonawitz et al., Practical secure aggregation for privacy-preserving machine learning, CCS
      2017. Bell et al., Secure single-server aggregation with (poly)logarithmic overhead, CCS 2020.

    Example:

      >>> aggregator = fax.aggregators.secure_sum(clip=4.0, max_weight=3, rounding="nearest")
      >>> @fax.program(clients=2)
      ... def average(updates, weights, key):
      ...     return aggregator.aggregate(updates, weights, (), key)[0].round(3)
      >>> average(jnp.array([[1.0, 2.0], [-4.0, 2.0]]), jnp.array([3, 1]), jax.random.key(0))
      Array([-0.25,  2.  ], dtype=float32)
    """
    _arguments.number("fax.aggregators.secure_sum", "clip", clip, above=0)
    _arguments.number("fax.aggregators.secure_sum", "max_weight", max_weight, above=0)
    _arguments.count("fax.aggregators.secure_sum", "bits", bits, least=2, most=31)
    words = ("stochastic", "nearest")
    _arguments.choice("fax.aggregators.secure_sum", "rounding", rounding, words)
    if neighbors is not None:
        _arguments.count("fax.aggregators.secure_sum", "neighbors", neighbors, least=2)
        if neighbors % 2:
            raise ValueError(
                f"fax.aggregators.secure_sum: neighbors is {neighbors}, expected an even int: they "
                "are on both sides."
            )
    limit = 2 ** (bits - 1) - 1

    def init(params: PyTree) -> tuple:
        check_floats("secure_sum", params)
        return ()

    def encode(update: PyTree, weight: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A client's integers, and which part of its update is clipped."""
        leaves = jax.tree.leaves(update)
        sizes = [x.size for x in leaves]
        share = jnp.clip(weight.astype(wide(weight.dtype)) / max_weight, 0, 1)
        whole = _integer(jnp.round(share * limit), limit)
        integers, outside = [], jnp.zeros((), jnp.float32)
        for x, random in zip(leaves, uniform(key, sizes)):
            x = x.reshape(-1).astype(wide(x.dtype))
            exact = jnp.clip(x / clip, -1, 1).astype(x.dtype) * whole
            if rounding == "stochastic":
                rounded = jnp.floor(exact) + (random < exact - jnp.floor(exact))
            else:
                rounded = jnp.round(exact)
            integers.append(_integer(rounded, limit))
            outside += jnp.sum(jnp.abs(x) > clip)
        lost = jnp.stack([jnp.any(jnp.isnan(x)) for x in [*leaves, share]]).any() & ~(share == 0)
        words = [x.reshape(-1).astype(jnp.uint32) for x in (*integers, whole, lost)]
        return jnp.concatenate(words), outside / max(1, sum(sizes))

    def aggregate(
        updates: PyTree, weights: jax.Array, state: PyTree, key: jax.Array
    ) -> tuple[PyTree, PyTree, Metrics]:
        check_floats("secure_sum", updates)
        size = resolve(None, "fax.aggregators.secure_sum").size
        if size * 2**bits > _MODULUS:
            raise ValueError(
                f"fax.aggregators.secure_sum: {size} clients of {bits} bits could add up to more "
                f"than 2^32. Expected bits of at most {(_MODULUS // size).bit_length() - 1}."
            )
        mask_key, rounding_key = (derive(key, use) for use in (Use.MASKS, Use.ROUNDING))
        keys = operators.keys(rounding_key)
        words, outside = each_present(encode, updates, weights, weights, keys)
        sent = masked(words, mask_key, neighbors)
        # Half of the residues stand for negative numbers.
        total = reductions.sum(sent).astype(jnp.uint32).astype(jnp.int32)
        leaves, treedef = jax.tree.flatten(updates)
        *sums, weight, lost = split(total, [*(math.prod(x.shape[1:]) for x in leaves), 1, 1])
        update = [
            _quotient(x, weight, clip, lost, u.dtype).reshape(u.shape[1:])
            for x, u in zip(sums, leaves)
        ]
        metrics = {
            "clients/bits": jnp.full(weights.shape, 32 * total.size, jnp.float32),
            "clipped": reductions.mean(outside, where=weights != 0),
        }
        return jax.tree.unflatten(treedef, update), state, metrics

    return Aggregator(init, aggregate, encodes=True)


def masked(words: jax.Array, key: jax.Array, neighbors: int | None) -> jax.Array:
    """What clients send: placed uint32 plus masks, which add up to zero over all clients."""
    size = resolve(None, "fax.aggregators.secure_sum").size
    offsets = size // 2 if neighbors is None else min(neighbors, size) // 2

    def client(words: jax.Array, number: jax.Array) -> jax.Array:
        def stream(number, offset):
            """Uniform integers that a client shares with the one ``offset`` places further."""
            pair = jax.random.fold_in(jax.random.fold_in(key, number), offset)
            return jax.random.bits(pair, words.shape, jnp.uint32)

        def add(words, offset):
            first = jnp.stack([number, (number - offset) % size])
            ours, theirs = jax.vmap(stream, (0, None))(first, offset)
            return words + ours - theirs, None

        return lax.scan(add, words, jnp.arange(1, offsets + 1, dtype=jnp.int32))[0]

    return each(client, words, operators.index())


def _integer(x: jax.Array, limit: int) -> jax.Array:
    """Whole numbers as integers. Floats near a large limit could be rounded beyond it."""
    return jnp.clip(jnp.nan_to_num(x).astype(jnp.int32), -limit, limit)


def _quotient(
    x: jax.Array, weight: jax.Array, clip: float, lost: jax.Array, dtype: Any
) -> jax.Array:
    mean = clip * x.astype(wide(dtype)) / jnp.maximum(weight, 1).astype(wide(dtype))
    return jnp.where(lost > 0, jnp.nan, mean).astype(dtype)
