"""NumPy arrays that CPU devices can use in place, without copying them."""

import math
from typing import Any

import numpy as np

# XLA uses a NumPy array in place if it starts at a multiple of this many bytes. NumPy does not
# align its arrays that much.
_ALIGNMENT = 64


def aligned_zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that any number of CPU devices can share without a copy."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
