"""How many participants a device works on at once, if nobody says.

A participant's local training reads and writes its own copy of the model in every step. What
decides is where that copy is. A TPU has fast memory on the chip (VMEM), whose bandwidth is about 20
times that of the main memory (HBM).

  - One participant of a small model leaves the device idle most of the time: each operation takes
    thousands of cycles to start. So participants are vectorized, and share the starts.
  - If their copies do not fit into half of the fast memory (their gradients need the other half),
    each step reads and writes all of them in main memory, which takes longer than the starts. On
    v5p, where the compiler leaves what a loop carries in main memory anyway, this bound is twice as
    high. Where there are convolutions, their results have to fit, too. And there is a bound for the
    operands and results of the largest operation. Beyond it, the compiler divides the operation
    into pieces, which on v5e can take six times as long.
  - An exception is a client function whose steps have so many operations that starting them takes
    longer still, such as a recurrent network. Its participants are doubled as long as this saves
    more than reading and writing a copy takes. So memory grows only where it pays.
  - From four million numbers on, participants run one by one: memory has to be that of one.

On CPU participants run one by one, too: small matrix products are faster then, and in a loop
`lax.cond` stays a branch.

The measurements, by `benchmarks/tpu_schedule.py`, are in benchmarks/README.md. In short, cycles as
multiples of the best, for 64 participants:

                               1      4      16     64    default
    logistic, v5e            14.4    4.0    2.1    1.0    64
    dense, 0.2 M, v6e        15.2           2.1    1.0    64
    dense, 0.2 M, v5e         6.5    2.4    1.1    1.1    32: 1.0
    dense, 1 M, v5e           2.0    1.0    1.5    2.4    4
    recurrent, 0.8 M, v5e     7.3    2.4    1.2    1.0    32: 1.06
    recurrent, 4 M, v5e       1.1    1.0    1.2    1.8    1
    convolutions, 1.2 M, v5e  1.5    1.0    1.4    2.1    4
    dense, 17 M, v5e          1.0    3.3    3.3    3.2    1

GPUs have not been measured. Their rule is the same with the L2 cache as fast memory, except that at
most 16 participants are vectorized, and none with convolutions by kernels of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from fax.lowering._client_cost import ClientCost
from fax.primitives._round import AtMost, Round, Vectorize


class Device(NamedTuple):
    """What a program is lowered for: a platform, and the kind of device if that is known."""

    platform: str
    kind: str | None = None


class Chip(NamedTuple):
    """What matters about a kind of device.

    Attributes:
      state: the bytes that vectorized participants may carry from step to step.
      operation: the bytes that one operation may read and write.
      main: the bytes of its main memory.
      start: the bytes that it could read from main memory while an operation starts.
      grouped: whether it is fast at convolutions whose kernels differ between participants.
      most: the largest useful number of vectorized participants.
    """

    state: int
    operation: int
    main: int
    start: int
    grouped: bool = True
    most: int = 64


_MIB, _GIB = 2**20, 2**30
# By `jax.Device.device_kind`.
_TPUS = {
    "TPU v2": Chip(8 * _MIB, 16 * _MIB, 8 * _GIB, 2_000_000),
    "TPU v3": Chip(8 * _MIB, 16 * _MIB, 16 * _GIB, 2_000_000),
    "TPU v4": Chip(64 * _MIB, 256 * _MIB, 32 * _GIB, 2_000_000),
    "TPU v5 lite": Chip(64 * _MIB, 64 * _MIB, 16 * _GIB, 1_500_000),
    "TPU v5": Chip(128 * _MIB, 512 * _MIB, 95 * _GIB, 5_000_000),
    "TPU v6 lite": Chip(64 * _MIB, 192 * _MIB, 32 * _GIB, 3_000_000),
}
_TPUS |= {"TPU v5p": _TPUS["TPU v5"], "TPU v6e": _TPUS["TPU v6 lite"]}  # their other names
_UNKNOWN_TPU = _TPUS["TPU v5 lite"]
_GPU = Chip(20 * _MIB, 40 * _MIB, 16 * _GIB, 8_000_000, grouped=False, most=16)

# A model with more numbers trains one participant at a time.
_MOST_NUMBERS = 4_000_000
# How often a step goes through what it carries: forward, backward, and to change it.
_PASSES = 3
# The part of main memory that may hold intermediate results, which are estimated from above.
_TEMPORARY = 1 / 4


def vectorized(device: Device, this: Round) -> Callable[[int], int]:
    """How many participants a device works on at once, as a function of how many it has."""
    asked = this.vectorize

    @functools.cache
    def most() -> int:
        if isinstance(asked, int) or device.platform == "cpu":
            return asked if isinstance(asked, int) else 1
        bound = asked.number if isinstance(asked, AtMost) else None
        if bound == 1:
            return 1
        found = default(_chip(device), ClientCost.of(this))
        return found if bound is None else min(bound, found)

    def at_once(size: int) -> int:
        if asked is Vectorize.ALL:
            return size
        if isinstance(asked, int):
            return min(asked, size)
        return _even(size, most())

    return at_once


def _even(size: int, most: int) -> int:
    """A number up to the largest that makes batches equal, or at least no more batches than that.

    A rest is compiled once more. So it is a divisor of the size, if one is at least half of the
    largest number.
    """
    divisors = (v for v in range(min(most, size), (most - 1) // 2, -1) if size % v == 0)
    return next(divisors, -(-size // -(-size // most)))


def _chip(device: Device) -> Chip:
    return _TPUS.get(device.kind or "", _UNKNOWN_TPU) if device.platform == "tpu" else _GPU


def default(chip: Chip, cost: ClientCost) -> int:
    """How many participants of a client function are fast on a chip, if it has many."""
    if cost.numbers > _MOST_NUMBERS or (cost.images and not chip.grouped):
        return 1
    held = max(1, cost.state + cost.images)
    room = int(chip.main * _TEMPORARY) // max(1, cost.temporary)
    most = max(1, min(chip.most, room))
    found = max(1, min(chip.state // held, chip.operation // max(1, cost.largest)))
    while found < most and cost.products * chip.start / (2 * found) > _PASSES * held:
        found *= 2
    return min(found, most)
