"""The compiler's own estimate of a TPU program's time.

XLA notes the cycles that it expects of each fusion. Their sum over loops is less than all of the
time: instructions without a note, collectives and waiting for memory count nothing. It is good for
comparing schedules of the same work.
"""

from __future__ import annotations

import re

from fax.inspect._frames import Frame
from fax.inspect._hlo import Instruction, Module
from fax.inspect._loops import Total, total, total_of

_NOTED = re.compile(r'"estimated_cycles":"(\d+)"')
_TRANSFER = re.compile('_xla_host_transfer_rendezvous="[^"]*"')

# The clock in GHz by `jax.Device.device_kind`: what the published peak and the size of the matrix
# units come to. For v5e, 197 TFLOP/s of 4 units of 128 x 128 multiply-adds are 1.5 GHz.
CLOCKS_GHZ = {
    "TPU v2": 0.7,
    "TPU v3": 0.94,
    "TPU v4": 1.05,
    "TPU v5 lite": 1.5,
    "TPU v5": 1.75,
    "TPU v6 lite": 1.75,
}


def cycles(module: Module) -> Total | None:
    """The estimated cycles of a program on one core, or None if the compiler notes none."""
    found = total(module, _noted, fusions=False)
    return found if found.value else None


def cycles_in_flight(module: Module, frame: Frame, send: Instruction) -> int | None:
    """The cycles from sending something between slices to receiving what comes back.

    None if it is not received in the same computation. The instructions of a compiled program are
    in the order in which they run.
    """
    transfer = _TRANSFER.search(send.attributes)
    order = list(frame.own.values())
    awaited = {
        each.name
        for each in order
        if each.opcode == "recv" and transfer and transfer[0] in each.attributes
    }
    for end, each in enumerate(order):
        if each.opcode == "recv-done" and not awaited.isdisjoint(each.inputs):
            between = order[order.index(send) + 1 : end]
            return total_of(module, frame, between, _noted, fusions=False).value
    return None


def _noted(frame: Frame, instruction: Instruction) -> int:
    noted = _NOTED.search(instruction.attributes)
    return int(noted[1]) if noted else 0
