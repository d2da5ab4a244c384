"""The arithmetic of secure aggregation: the server learns the sum of masked integers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

import fax._operators as operators
import fax._reductions as reductions
from fax import _arguments
from fax._keys import Use, derive
from fax._placement import resolve
from fax.aggregators._aggregator import (
    Aggregator,
    Metrics,
    PyTree,
    of_floats,
    stateless_aggregator,
)
from fax.aggregators._encoding import parts_of, random_numbers
from fax.aggregators._norms import wide
from fax.aggregators._per_client import each, each_present

_CALLER = "fax.aggregators.secure_sum"
_MODULUS = 2**32


def secure_sum(
    max_value: float,
    max_weight: float,
    *,
    bits: int = 16,
    rounding: str = "stochastic",
    neighbors: int | None = None,
    masked: bool = True,
) -> Aggregator:
    """A weighted mean by sums of masked integers, as in secure aggregation.

    Client i rounds its weight w to an integer v. It clips each number u of its update to [-c, c],
    and rounds its product with the weight to an integer x:

        v = round(L min(w / max_weight, 1)),    x = round(v u / c),    L = 2^(bits - 1) - 1

    It sends y = x + mask mod 2^32, and v in the same way. The masks of all clients add up to zero,
    so that

        sum_i y_i = sum_i x_i mod 2^32,    update = c sum_i x_i / sum_i v_i

    exactly. A single y is uniformly distributed, whatever x is. With n clients, n 2^bits has to be
    at most 2^32, as the sum could wrap around otherwise.

    For each o of 1 ... n // 2, the clients i and i + o (mod n) share a random stream, which i adds
    and i + o subtracts. So every two clients share a mask, as in the paper, and clients that are
    n / 2 apart share two. Each client generates n streams as long as the update, one after another.
    With ``neighbors=k``, o only goes up to k / 2, as on the graphs of Bell et al.: each client
    generates k streams, and its numbers stay secret unless its k neighbors collude. Only one stream
    is in memory at a time.

    These masks are the arithmetic of the protocol, and not the protocol. In the protocol, pairs of
    clients agree on the seeds of their streams by exchanging keys; here they come from the server's
    key, and no client drops out. With ``masked=False``, clients add no masks, and send x and v as
    they are. This is for plans on a backend with `fax.deploy.SecureSums`, whose clients mask what
    they send by the whole protocol.

    Negative weights count as zero, and clients of weight zero send zeros, whatever they hold. If
    the update or the weight of any other client is NaN, so is the result, since integers cannot
    represent NaN. If the total weight is zero, so is the result. As integers have no derivatives,
    all derivatives are zero.

    Args:
      max_value: c, a positive number. The metric ``"clipped_values"`` says what share of the
        numbers was clipped.
      max_weight: a positive number. Weights above it count as this. The weights of
        `fax.algorithms.fedavg` are numbers of examples: choose a number that few clients exceed.
      bits: of each integer, including the sign, from 2 to 31. The resolution is c / L.
      rounding: of x. ``"stochastic"`` rounds at random without bias, ``"nearest"`` to the nearest.
      neighbors: how many clients each client shares masks with, an even int. None: all.
      masked: whether clients add these masks. False for plans whose clients mask what they send.

    Returns:
      The aggregator, without state. A client sends 32 bits for each number of its update, for its
      weight, and for whether it has NaN.

    Raises:
      ValueError: if an argument is out of range; when used, if there are too many clients for
        ``bits``, or a leaf does not hold real floats.

    References:
      Bonawitz et al., Practical secure aggregation for privacy-preserving machine learning, CCS
      2017. Bell et al., Secure single-server aggregation with (poly)logarithmic overhead, CCS 2020.

    Example:

      >>> aggregator = fax.aggregators.secure_sum(4.0, max_weight=3, rounding="nearest")
      >>> @fax.program(clients=2)
      ... def average(updates, weights, key):
      ...     return aggregator.aggregate(updates, weights, (), key)[0].round(3)
      >>> average(jnp.array([[1.0, 2.0], [-4.0, 2.0]]), jnp.array([3, 1]), jax.random.key(0))
      Array([-0.25,  2.  ], dtype=float32)
    """
    _arguments.number(_CALLER, "max_value", max_value, above=0)
    _arguments.number(_CALLER, "max_weight", max_weight, above=0)
    bits = _arguments.count(_CALLER, "bits", bits, least=2, most=31)
    _arguments.choice(_CALLER, "rounding", rounding, ("stochastic", "nearest"))
    _arguments.flag(_CALLER, "masked", masked)
    if neighbors is not None:
        neighbors = _arguments.count(_CALLER, "neighbors", neighbors, least=2)
        if neighbors % 2:
            raise ValueError(
                f"{_CALLER}: neighbors is {neighbors}, expected an even int, as half of them are "
                "on either side."
            )
    limit = 2 ** (bits - 1) - 1

    def encode(update: PyTree, weight: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A client's integers, and the share of its update that is clipped."""
        leaves = jax.tree.leaves(update)
        sizes = [x.size for x in leaves]
        share = jnp.clip(weight.astype(wide(weight.dtype)) / max_weight, 0, 1)
        whole = _integer(jnp.round(share * limit), limit)
        integers, outside = [], jnp.zeros((), jnp.float32)
        for x, random in zip(leaves, random_numbers(key, sizes)):
            x = x.reshape(-1).astype(wide(x.dtype))
            exact = jnp.clip(x / max_value, -1, 1).astype(x.dtype) * whole
            if rounding == "stochastic":
                rounded = jnp.floor(exact) + (random < exact - jnp.floor(exact))
            else:
                rounded = jnp.round(exact)
            integers.append(_integer(rounded, limit))
            outside += jnp.sum(jnp.abs(x) > max_value)
        has_nan = jnp.stack([jnp.any(jnp.isnan(x)) for x in [*leaves, share]]).any() & ~(share == 0)
        words = [x.reshape(-1).astype(jnp.uint32) for x in (*integers, whole, has_nan)]
        return jnp.concatenate(words), outside / max(1, sum(sizes))

    def aggregate(updates: PyTree, weights: jax.Array, key: jax.Array) -> tuple[PyTree, Metrics]:
        size = resolve(None, _CALLER).size
        if size * 2**bits > _MODULUS:
            raise ValueError(
                f"{_CALLER}: bits is {bits} in a round of {size} clients, whose sum could exceed "
                f"2^32, expected at most {(_MODULUS // size).bit_length() - 1}."
            )
        mask_key, rounding_key = (derive(key, use) for use in (Use.MASKS, Use.ROUNDING))
        keys = operators.keys(rounding_key)
        words, outside = each_present(encode, updates, weights, weights, keys)
        # Half of the residues stand for negative numbers.
        if masked:
            sent = with_masks(words, mask_key, neighbors)
            total = reductions.wrapping_sum(sent).astype(jnp.int32)
        else:
            total = reductions.wrapping_sum(words.astype(jnp.int32))
        leaves, treedef = jax.tree.flatten(updates)
        sizes = [math.prod(x.shape[1:]) for x in leaves]
        *sums, weight, has_nan = parts_of(total, [*sizes, 1, 1])

        def decode(x: jax.Array, like: jax.Array) -> jax.Array:
            dtype = wide(like.dtype)
            mean = max_value * x.astype(dtype) / jnp.maximum(weight, 1).astype(dtype)
            mean = jnp.where(has_nan > 0, jnp.nan, mean).astype(like.dtype)
            return mean.reshape(like.shape[1:])

        metrics = {
            "clients/bits": jnp.full(weights.shape, 32 * total.size, jnp.float32),
            "clipped_values": reductions.mean(outside, where=weights != 0),
        }
        return jax.tree.unflatten(treedef, map(decode, sums, leaves)), metrics

    return of_floats("secure_sum", stateless_aggregator("secure_sum", aggregate, encodes=True))


def with_masks(words: jax.Array, key: jax.Array, neighbors: int | None) -> jax.Array:
    """What clients send: placed uint32, plus masks that add up to zero over all clients."""
    size = resolve(None, _CALLER).size
    offsets = size // 2 if neighbors is None else min(neighbors, size) // 2

    def client(words: jax.Array, number: jax.Array) -> jax.Array:
        def stream(number: jax.Array, offset: jax.Array) -> jax.Array:
            """Uniform integers that a client shares with the client at this offset."""
            pair = jax.random.fold_in(jax.random.fold_in(key, number), offset)
            return jax.random.bits(pair, words.shape, jnp.uint32)

        def add(words: jax.Array, offset: jax.Array) -> tuple[jax.Array, None]:
            first = jnp.stack([number, (number - offset) % size])
            ours, theirs = jax.vmap(stream, (0, None))(first, offset)
            return words + ours - theirs, None

        return lax.scan(add, words, jnp.arange(1, offsets + 1, dtype=jnp.int32))[0]

    return each(client, words, operators.index())


def _integer(x: jax.Array, limit: int) -> jax.Array:
    """Whole numbers as integers. Floats near a large limit may have been rounded beyond it.

    What becomes of NaN does not matter, since the result will be NaN.
    """
    return jnp.clip(x.astype(jnp.int32), -limit, limit)
