"""The cryptography of secure sums, all of it by the package `cryptography`: keys, masks, boxes.

Nothing here is a construction of its own: X25519 agrees on keys, HKDF with SHA-256 derives others,
AES-256 in counter mode expands a key into a mask, AES-256-GCM encrypts shares, and Ed25519 signs.
This file imports nothing of fax, because clients use it, too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY = 32  # bytes of every key, secret and commitment
SIGNATURE = 64  # bytes
_NONCE, _TAG = 12, 16  # bytes, of AES-GCM
_AT_ONCE = 2**18  # numbers of a mask


class CryptoError(ValueError):
    """A key, a signature or an encrypted message is not what it should be."""


# Keys


def new_key() -> bytes:
    """A private key of X25519, or a seed."""
    return os.urandom(KEY)


def public_key(private: bytes) -> bytes:
    """The public key of X25519."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, use: bytes, context: bytes) -> bytes:
    """The key that two share for a use. Each has its private key and the other's public key.

    Raises:
      CryptoError: if the public key is one that everybody knows the result for.
    """
    try:
        own = X25519PrivateKey.from_private_bytes(private)
        secret = own.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise CryptoError("a public key is not valid") from error
    return derive(secret, use, context)


def derive(secret: bytes, use: bytes, context: bytes) -> bytes:
    """A key for one use in one context, of fixed lengths, so that no two are confused."""
    info = b"fax secure sum 1" + hashlib.sha256(use).digest() + hashlib.sha256(context).digest()
    return HKDF(hashes.SHA256(), KEY, None, info).derive(secret)


def commitment(seed: bytes) -> bytes:
    """Identifies a seed, and does not say what it is."""
    return derive(seed, b"commitment", b"")


# Masks


def words_of(x: np.ndarray) -> np.ndarray:
    """Integers as numbers mod 2^32, or mod 2^64 if they have more than 32 bits; a copy.

    Raises:
      CryptoError: if they are no integers.
    """
    if x.dtype.kind not in "biu":
        raise CryptoError(f"a secure sum is over integers, and {x.dtype.name} is not one of them")
    return x.astype("<u8" if x.dtype.itemsize == 8 else "<u4", order="C")


def add_mask(words: Sequence[np.ndarray], key: bytes, sign: int) -> None:
    """Adds the mask of a key to contiguous arrays in place, or subtracts it if ``sign`` is -1.

    No key is used for anything else, so the counter starts at zero.
    """
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    change = np.add if sign == 1 else np.subtract
    for x in words:
        flat = x.reshape(-1)
        for start in range(0, flat.size, _AT_ONCE):
            part = flat[start : start + _AT_ONCE]
            mask = np.frombuffer(stream.update(bytes(part.nbytes)), part.dtype)
            change(part, mask, out=part)


# Encrypted messages


def encrypt(key: bytes, message: bytes, about: bytes) -> bytes:
    """A message that only who has the key can read. ``about`` is not encrypted, but protected."""
    nonce = os.urandom(_NONCE)
    return nonce + AESGCM(key).encrypt(nonce, message, about)


def decrypt(key: bytes, data: bytes, about: bytes) -> bytes:
    """The message.

    Raises:
      CryptoError: if it, or what it is about, was changed, or if it is for another key.
    """
    try:
        return AESGCM(key).decrypt(data[:_NONCE], data[_NONCE:], about)
    except (InvalidTag, ValueError) as error:
        raise CryptoError("shares were changed, or are not of this sum") from error


def size_encrypted(size: int) -> int:
    """The bytes of an encrypted message of ``size`` bytes."""
    return _NONCE + size + _TAG


# Signatures


def sign(private: bytes, message: bytes) -> bytes:
    """A signature by a private key of Ed25519."""
    return Ed25519PrivateKey.from_private_bytes(private).sign(message)


def verify(public: bytes, signature: bytes, message: bytes) -> None:
    """Checks a signature.

    Raises:
      CryptoError: if it is wrong.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise CryptoError("a signature is wrong") from error
