"""What secure sums are made of: shares, masks, keys and signatures, against plain references."""

import hashlib
import hmac
import itertools

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fax.deploy import _masks as masks
from fax.deploy import _shamir as shamir

P = shamir.PRIME
SECRETS = [bytes(range(32)), b"\xff" * 32, bytes(32)]


# Shares


def numbers(share):
    """The numbers of a share, one for every two bytes of the secret."""
    return [int.from_bytes(share[i : i + 4], "little") for i in range(0, len(share), 4)]


def interpolated(points, values, at):
    """The value at ``at`` of the polynomial through points, by Lagrange's formula."""
    total = 0
    for i, x in enumerate(points):
        term = values[i]
        for other in points[:i] + points[i + 1 :]:
            term = term * (at - other) * pow(x - other, -1, P) % P
        total = (total + term) % P
    return total


@pytest.mark.parametrize(("size", "threshold"), [(2, 2), (5, 3), (5, 5), (4, 1), (60, 41)])
def test_any_shares_up_to_the_threshold_give_the_secret(size, threshold):
    points = [3 * i + 1 for i in range(size)]
    shares = shamir.share(SECRETS, threshold, points)
    rng = np.random.default_rng(0)
    subsets = itertools.islice(itertools.combinations(range(size), threshold), 10)
    for chosen in [*subsets, rng.permutation(size)[:threshold].tolist(), range(size)]:
        assert shamir.join([points[i] for i in chosen], [shares[i] for i in chosen]) == SECRETS
    # The same by the reference: the polynomials have the secret at zero, and the right degree.
    first = [numbers(row[0]) for row in shares]
    limbs = [int.from_bytes(SECRETS[0][i : i + 2], "little") for i in range(0, 32, 2)]
    few = points[:threshold]
    for k, limb in enumerate(limbs):
        values = [row[k] for row in first]
        assert interpolated(few, values[:threshold], 0) == limb
        assert interpolated(few, values[:threshold], points[-1]) == values[-1]


def test_fewer_shares_fit_any_secret():
    """With each secret there is one polynomial through them, so they say nothing about it."""
    points, threshold = [1, 2, 3, 4, 5], 4
    shares = shamir.share([SECRETS[0]], threshold, points)
    known = [row[0] for row in shares[: threshold - 1]]
    for other in SECRETS:
        limbs = [int.from_bytes(other[i : i + 2], "little") for i in range(0, 32, 2)]
        last = b"".join(
            interpolated([0, 1, 2, 3], [limb, *(numbers(x)[k] for x in known)], 4).to_bytes(
                4, "little"
            )
            for k, limb in enumerate(limbs)
        )
        assert shamir.join([1, 2, 3, 4], [[x] for x in (*known, last)]) == [other]


def test_each_share_is_uniform():
    """Whatever the secret: a chi-squared test of the upper bits, of 2 degrees of freedom each."""
    for secret in SECRETS:
        shares = [shamir.share([secret], 3, [1, 2, 3])[1][0] for _ in range(400)]
        found = np.array([numbers(share) for share in shares]).ravel() * 16 // P
        counts = np.bincount(found, minlength=16)
        expected = len(found) / 16
        # 15 degrees of freedom: less than 1e-9 of all runs are above.
        assert np.sum((counts - expected) ** 2 / expected) < 80


@pytest.mark.parametrize(
    ("points", "change", "message"),
    [
        ([1, 1, 2], lambda x: x, "different numbers"),
        ([0, 1, 2], lambda x: x, "different numbers"),
        ([1, 2, 3], lambda x: x[:-1], "does not have 64 bytes"),
        ([1, 2, 3], lambda x: b"\xff" * 64, "too large"),
        ([1, 2, 3], lambda x: bytes(64), "do not belong to one secret"),
    ],
)
def test_what_are_no_shares(points, change, message):
    shares = shamir.share([SECRETS[0]], 3, [1, 2, 3])
    shares[1][0] = change(shares[1][0])
    with pytest.raises(ValueError, match=message):
        shamir.join(points, shares)


def test_what_cannot_be_shared():
    with pytest.raises(ValueError, match="threshold is 4, expected 1 to 3"):
        shamir.share([SECRETS[0]], 4, [1, 2, 3])
    with pytest.raises(ValueError, match="32 bytes"):
        shamir.share([b"short"], 2, [1, 2, 3])
    with pytest.raises(ValueError, match="different numbers"):
        shamir.share([SECRETS[0]], 2, [1, P, 3])


# Masks


def counter_mode(key, size):
    """AES in counter mode, from AES of single blocks."""
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    blocks = (block.update(i.to_bytes(16, "big")) for i in range(-(-size // 16)))
    return b"".join(blocks)[:size]


def test_masks_are_added_mod_2_to_the_k(monkeypatch):
    monkeypatch.setattr(masks, "_AT_ONCE", 8)  # several pieces
    rng = np.random.default_rng(0)
    x = [
        rng.integers(-(2**31), 2**31, (3, 7)).astype(np.int32),
        np.array(-5, np.int8),
        rng.integers(-(2**63), 2**63, 5),
        np.zeros((0, 2), np.uint16),
        np.array([True, False]),
    ]
    words, key = [masks.words_of(each) for each in x], bytes(range(32))
    masks.add_mask(words, key, 1)
    stream = counter_mode(key, sum(each.nbytes for each in words))
    for own, before in zip(words, x, strict=True):
        bits = 8 * own.dtype.itemsize
        part, stream = stream[: own.nbytes], stream[own.nbytes :]
        mask = [
            int.from_bytes(part[i : i + bits // 8], "little")
            for i in range(0, len(part), bits // 8)
        ]
        expected = [(int(a) + b) % 2**bits for a, b in zip(before.ravel(), mask, strict=True)]
        assert own.ravel().tolist() == expected
    masks.add_mask(words, key, -1)
    for own, before in zip(words, x, strict=True):
        assert own.dtype == (np.uint64 if before.dtype == np.int64 else np.uint32)
        np.testing.assert_array_equal(own.astype(before.dtype), before)


@pytest.mark.parametrize("dtype", ["float32", "complex64", "S2"])
def test_only_integers_are_masked(dtype):
    with pytest.raises(masks.CryptoError, match="over integers"):
        masks.words_of(np.zeros(3, dtype))


# Keys


def test_two_agree_on_a_key_for_each_use_and_context():
    one, two = masks.new_key(), masks.new_key()
    key = masks.agree(one, masks.public_key(two), b"mask", b"here")
    assert key == masks.agree(two, masks.public_key(one), b"mask", b"here")
    others = [
        masks.agree(one, masks.public_key(two), b"channel", b"here"),
        masks.agree(one, masks.public_key(two), b"mask", b"there"),
        masks.agree(one, masks.public_key(two), b"maskh", b"ere"),
        masks.derive(one, b"mask", b"here"),
        masks.commitment(one),
    ]
    assert len({key, *others}) == 6


def test_a_public_key_that_makes_every_secret_the_same():
    with pytest.raises(masks.CryptoError, match="public key is not valid"):
        masks.agree(masks.new_key(), bytes(32), b"mask", b"")


def test_keys_are_those_of_x25519_and_hkdf():
    """The example of RFC 7748, section 6.1, and RFC 5869 with Python's own HMAC."""
    alice = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"  # public
    bob = "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"
    public = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert masks.public_key(bytes.fromhex(bob)).hex() == public
    info = b"fax secure sum 1" + b"".join(hashlib.sha256(x).digest() for x in (b"mask", b"here"))
    extracted = hmac.digest(bytes(32), bytes.fromhex(shared), "sha256")
    expected = hmac.digest(extracted, info + b"\x01", "sha256")
    found = masks.agree(bytes.fromhex(bob), bytes.fromhex(alice), b"mask", b"here")
    assert found == expected


def test_what_was_changed_is_not_decrypted():
    key, message = masks.new_key(), b"shares" * 5
    data = masks.encrypt(key, message, b"1 to 2")
    assert len(data) == masks.size_encrypted(len(message))
    assert masks.decrypt(key, data, b"1 to 2") == message
    assert masks.encrypt(key, message, b"1 to 2") != data  # another nonce
    wrong = [
        (masks.new_key(), data, b"1 to 2"),
        (key, data, b"2 to 1"),
        (key, data[:-1], b"1 to 2"),
        (key, b"", b"1 to 2"),
        *(
            (key, data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :], b"1 to 2")
            for i in range(0, len(data), 7)
        ),
    ]
    for own, changed, about in wrong:
        with pytest.raises(masks.CryptoError, match="changed"):
            masks.decrypt(own, changed, about)


def test_signatures():
    private = masks.new_key()
    public = Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    signature = masks.sign(private, b"present")
    masks.verify(public, signature, b"present")
    for own, signed, message in [
        (public, signature, b"absent"),
        (public, bytes(64), b"present"),
        (masks.public_key(private), signature, b"present"),
        (b"short", signature, b"present"),
    ]:
        with pytest.raises(masks.CryptoError, match="signature is wrong"):
            masks.verify(own, signed, message)
