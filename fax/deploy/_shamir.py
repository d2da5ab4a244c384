"""Shamir's secret sharing of bytes: any ``threshold`` shares give a secret, and fewer say nothing.

Two bytes of a secret are the constant term of a polynomial of degree threshold - 1 over the
integers mod p = 2^31 - 1, whose other coefficients are uniform. The share for a participant is the
value at the participant's number. This file imports nothing of fax, because clients use it, too.

Shamir, How to share a secret, Communications of the ACM 1979.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

PRIME = 2**31 - 1  # products of two numbers below it fit into 64 bits
SECRET = 32  # bytes
_LIMBS = SECRET // 2
SHARE = 4 * _LIMBS  # bytes


def share(secrets: Sequence[bytes], threshold: int, points: Sequence[int]) -> list[list[bytes]]:
    """The shares of secrets.

    Args:
      secrets: of `SECRET` bytes each.
      threshold: how many shares of a secret give it back.
      points: the numbers of those who get shares, all different, from 1 to ``PRIME - 1``.

    Returns:
      For each point a share of each secret, of `SHARE` bytes.
    """
    _check_points(points)
    if not 1 <= threshold <= len(points):
        raise ValueError(f"threshold is {threshold}, expected 1 to {len(points)}, the shares")
    if any(len(secret) != SECRET for secret in secrets):
        raise ValueError(f"a secret does not have {SECRET} bytes")
    limbs = np.frombuffer(b"".join(secrets), "<u2").astype(np.uint64)
    others = _uniform((threshold - 1) * len(limbs)).reshape(threshold - 1, len(limbs))
    x = np.asarray(points, np.uint64)[:, None]
    values = np.zeros((len(points), len(limbs)), np.uint64)
    for coefficients in (*others, limbs):  # Horner's scheme
        values = (values * x + coefficients) % PRIME
    return [
        [part.tobytes() for part in row.astype("<u4").reshape(len(secrets), _LIMBS)]
        for row in values
    ]


def join(points: Sequence[int], shares: Sequence[Sequence[bytes]]) -> list[bytes]:
    """The secrets, from as many shares as the threshold.

    Args:
      points: whose shares they are.
      shares: for each point a share of each secret.

    Raises:
      ValueError: if these are not shares, or together not those of secrets. Shares that were
        changed can also give other secrets.
    """
    _check_points(points)
    if any(len(part) != SHARE for row in shares for part in row):
        raise ValueError(f"a share does not have {SHARE} bytes")
    values = np.stack([np.frombuffer(b"".join(row), "<u4") for row in shares]).astype(np.uint64)
    if (values >= PRIME).any():
        raise ValueError("a share has numbers that are too large")
    limbs = np.zeros(values.shape[1], np.uint64)
    for factor, row in zip(_at_zero(points), values, strict=True):
        limbs = (limbs + np.uint64(factor) * row) % PRIME
    if (limbs >= 2**16).any():
        raise ValueError("the shares do not belong to one secret")
    data = limbs.astype("<u2").tobytes()
    return [data[start : start + SECRET] for start in range(0, len(data), SECRET)]


def _at_zero(points: Sequence[int]) -> list[int]:
    """By what Lagrange's formula multiplies the value at each point, for the value at zero."""
    factors = []
    for x in points:
        above, below = 1, 1
        for other in points:
            if other != x:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        factors.append(above * pow(below, -1, PRIME) % PRIME)
    return factors


def _uniform(size: int) -> np.ndarray:
    """Uniform integers mod p, from the operating system."""
    found = np.frombuffer(os.urandom(4 * size), "<u4") & np.uint32(PRIME)
    while (again := found == PRIME).any():
        found = np.where(
            again, np.frombuffer(os.urandom(4 * size), "<u4") & np.uint32(PRIME), found
        )
    return found.astype(np.uint64)


def _check_points(points: Sequence[int]) -> None:
    if len(set(points)) != len(points) or not all(0 < x < PRIME for x in points):
        raise ValueError("points are not different numbers from 1 to 2^31 - 2")
