"""The compiler's own estimate of a TPU program's time.

XLA notes the cycles that it expects of each fusion. Their sum over loops is less than all of the
time: instructions without a note, collectives and waiting for memory count nothing. It is good for
comparing schedules of the same work.
"""

from __future__ import annotations

import re

from fax.inspect._frames import Frame
from fax.inspect._hlo import Instruction, Module
from fax.inspect._loops import Total, total

_NOTED = re.compile(r'"estimated_cycles":"(\d+)"')

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

    def cost(frame: Frame, instruction: Instruction) -> int:
        noted = _NOTED.search(instruction.attributes)
        return int(noted[1]) if noted else 0

    found = total(module, cost, fusions=False)
    return found if found.value else None
