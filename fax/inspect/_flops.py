"""Floating-point operations of matrix products and convolutions, counted in a compiled program.

XLA's own count, `jax.stages.Compiled.cost_analysis`, counts the body of a loop once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from fax.inspect._frames import Frame
from fax.inspect._hlo import Array, Instruction, Module, arrays, operand_arrays
from fax.inspect._loops import Total, total

_GEMM = re.compile(r'custom_call_target="__cublas\$(?:gemm|lt\$matmul)')
_CUDNN = re.compile(r'custom_call_target="__cudnn\$conv(Forward|BackwardInput|BackwardFilter|Bias)')
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")


def flops(module: Module) -> Total:
    """Two for each multiplication and addition of matrix products and convolutions."""

    def cost(frame: Frame, instruction: Instruction) -> int:
        match instruction.opcode:
            case "dot":
                contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
            case "custom-call" if _GEMM.search(instruction.attributes):
                contracted = re.search(
                    r'lhs_contracting_dimensions\\?":\[([\d,"\\]*)\]', instruction.attributes
                )
            case "convolution" | "custom-call":
                return 2 * _convolution(frame, instruction)
            case _:
                return 0
        left = operand_arrays(frame.own, instruction)[0].shape
        dims = re.findall(r"\d+", contracted[1]) if contracted else []
        result = arrays(instruction.type)[0].shape
        return 2 * math.prod(result) * math.prod(left[int(dim)] for dim in dims)

    return total(module, cost, fusions=True)


def _convolution(frame: Frame, instruction: Instruction) -> int:
    """Multiplications of a convolution, without those with padding."""
    text = instruction.attributes
    cudnn = _CUDNN.search(text)
    labels = _LABELS.search(text)
    if labels is None or (instruction.opcode == "custom-call" and cudnn is None):
        return 0
    one, two = operand_arrays(frame.own, instruction)[:2]
    result = arrays(instruction.type)[0]
    # A derivative has the window of the convolution that it is a derivative of.
    match cudnn[1] if cudnn else "Forward":
        case "BackwardInput":
            one, two, result = result, two, one
        case "BackwardFilter":
            one, two, result = one, result, two
    return _multiplications(one, two, result, text, labels.groups())


def _multiplications(
    image: Array, kernel: Array, out: Array, text: str, labels: Sequence[str]
) -> int:
    of_image, of_kernel, of_out = labels
    found = re.search(r"window=\{([^}]*)\}", text)
    window = dict(part.split("=") for part in found[1].split()) if found else {}
    spatial = sorted(label for label in of_kernel if label.isdigit())

    def values(name: str, default: str) -> list[str]:
        return window[name].split("x") if name in window else [default] * len(spatial)

    strides, dilations = values("stride", "1"), values("rhs_dilate", "1")
    pads, gaps = values("pad", "0_0"), values("lhs_dilate", "1")
    count = kernel.shape[of_kernel.index("i")]
    count *= out.shape[of_out.index("f")] * out.shape[of_out.index("b")]
    for d, label in enumerate(spatial):
        places = np.arange(out.shape[of_out.index(label)])[:, None] * int(strides[d])
        places = places + np.arange(kernel.shape[of_kernel.index(label)]) * int(dilations[d])
        places -= int(pads[d].split("_")[0])
        gap = int(gaps[d])
        inside = (places >= 0) & (places <= (image.shape[of_image.index(label)] - 1) * gap)
        count *= int((inside & (places % gap == 0)).sum())
    return count
