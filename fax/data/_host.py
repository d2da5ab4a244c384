"""Host arrays that a CPU device can use in place, without a copy of its own."""

import math
from typing import Any

import numpy as np

# XLA takes over a host array that starts at a multiple of this many bytes. NumPy's own do not.
_ALIGNMENT = 64


def aligned_zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros whose memory devices of the CPU share, however many they are."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
