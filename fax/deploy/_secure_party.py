"""One client in one secure sum: its keys, its mask, its shares, and what it refuses.

It needs JAX and cryptography alone. See `_secure_server.py` for the protocol.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from fax.deploy import _client as runtime
    from fax.deploy import _masks as masks
    from fax.deploy import _shamir as shamir
else:  # where clients are, `_secure_client.py` has loaded these files
    names = ["_client", "_masks", "_shamir"]
    runtime, masks, shamir = map(importlib.import_module, names)

SESSION = 16  # bytes


# What the server and the clients compute alike


def needed(threshold: float, size: int) -> int:
    """How many of ``size`` clients a threshold stands for."""
    return threshold if isinstance(threshold, int) else math.floor(threshold * size) + 1


def context_of(session: bytes, threshold: int, roster: Sequence[Any]) -> bytes:
    """Identifies who takes part in a sum, with which keys."""
    return _digest(["fax secure sum 1", session, threshold, roster])


def context_of_masks(context: bytes, task: bytes) -> bytes:
    """Identifies who takes part in a sum, with which keys, and what they compute."""
    return _digest([context, task])


def task_of(stage: str, shared: Sequence[Any]) -> bytes:
    """Identifies what clients compute, and what the server has sent to all of them."""
    return _digest([stage, shared])


def mask_key(private: bytes, public: bytes, context: bytes, one: int, other: int) -> bytes:
    """The key of the mask that two clients share, from the private key of one of them.

    It depends on who they are. Otherwise a client that passes off another's public key as its own,
    written in another way, would have the same masks as this one, and they would cancel.
    """
    return masks.agree(private, public, b"mask", context + _ends(*sorted((one, other))))


def about_keys(session: bytes, client: Any, keys: Sequence[bytes]) -> bytes:
    """What a client signs to say which keys are its own."""
    return _digest(["fax secure sum 1, keys", session, client, keys])


def about_present(context: bytes, present: Sequence[int]) -> bytes:
    """What a client signs to say who it believes has answered."""
    return _digest(["fax secure sum 1, present", context, present])


def _digest(x: Any) -> bytes:
    return hashlib.sha256(runtime.encode(x)).digest()


# Clients


class Roster:
    """Who takes part in a sum, checked as far as a client can.

    Args:
      session: of the sum.
      threshold: how many clients have to answer until the end.
      entries: for each client its number, its name, its public keys for encrypted shares and for
        masks, the commitment to its seed, and the signature of these, or None.
      own_threshold: what the client demands.
      peers: the public keys of all clients' signatures, None if there are no signatures.
    """

    def __init__(
        self,
        session: bytes,
        threshold: int,
        entries: Sequence[Any],
        own_threshold: float,
        peers: dict[Any, bytes] | None,
    ):
        size = len(entries)
        least = needed(own_threshold, size)
        if size < 2:
            raise runtime.RefusedError("a sum over one client is what the client has")
        if not isinstance(threshold, int) or not max(least, size // 2 + 1) <= threshold <= size:
            raise runtime.RefusedError(
                f"the threshold is {threshold} of {size} clients, expected at least "
                f"{max(least, size // 2 + 1)}, and at most {size}"
            )
        self.threshold, self.peers, self.by_number = threshold, peers, {}
        for number, client, *keys, signature in entries:
            if not isinstance(number, int) or not 0 < number < 2**31 - 1:
                raise runtime.RefusedError("a client's number is not one")
            check_bytes(keys, [masks.KEY] * 3)
            if peers is not None:
                if client not in peers:
                    raise runtime.RefusedError(f"nobody knows the identity of {client!r}")
                check_bytes([signature], [masks.SIGNATURE])
                masks.verify(peers[client], signature, about_keys(session, client, keys))
            self.by_number[number] = (client, *keys)
        self.number_of = {client: number for number, (client, *_) in self.by_number.items()}
        public = {key for _, *keys in self.by_number.values() for key in keys}
        if not len(self.by_number) == len(self.number_of) == len(public) / 3 == size:
            raise runtime.RefusedError("two clients have the same number, name or key")
        self.context = context_of(session, threshold, entries)


class Party:
    """One client in one sum. Each step is taken once, and in this order.

    If it refuses one, it takes no other. So it masks one vector, and reveals one kind of shares of
    each other client.
    """

    def __init__(self, client: Any, session: bytes, signing: bytes | None):
        self._client, self._signing = client, signing
        self._channel, self._mask, self._seed = (masks.new_key() for _ in range(3))
        keys = [*map(masks.public_key, [self._channel, self._mask]), masks.commitment(self._seed)]
        self._keys = keys
        about = about_keys(session, client, keys)
        self.entry = [*keys, None if signing is None else masks.sign(signing, about)]
        self._next = "shares"

    @contextlib.contextmanager
    def _step(self, name: str, following: str) -> Iterator[None]:
        if self._next != name:
            raise runtime.RefusedError(f"{name} is not what comes next, but {self._next}")
        self._next = "nothing"
        yield
        self._next = following

    def shares(self, roster: Roster) -> list[list[Any]]:
        """A share of its mask key and of its seed for each other client, encrypted."""
        with self._step("shares", "mask"):
            self._number = roster.number_of.get(self._client, 0)
            if roster.by_number.get(self._number) != (self._client, *self._keys):
                raise runtime.RefusedError("the client is not in the roster with its own keys")
            self._roster, points = roster, list(roster.by_number)
            made = shamir.share([self._mask, self._seed], roster.threshold, points)
            found = {number: b"".join(own) for number, own in zip(points, made, strict=True)}
            self._shares = {self._number: found.pop(self._number)}
            return [
                [number, masks.encrypt(self._channel_to(number), own, _ends(self._number, number))]
                for number, own in found.items()
            ]

    def mask(self, received: Sequence[Any], rows: Sequence[Any], task: bytes) -> list[Any]:
        """What it sends: integers plus a mask for each other client, and one of its own.

        The masks depend on the task. So they only cancel if the server gives all the same.
        """
        with self._step("mask", "unmask" if self._signing is None else "sign"):
            for number, data in received:
                if number not in self._roster.by_number or number in self._shares:
                    raise runtime.RefusedError("shares are from nobody who takes part, or twice")
                about = _ends(number, self._number)
                self._shares[number] = masks.decrypt(self._channel_to(number), data, about)
            if len(self._shares) < self._roster.threshold:
                raise runtime.RefusedError("fewer clients than the threshold have sent shares")
            words = [masks.words_of(np.asarray(x)) for x in rows]
            context = context_of_masks(self._roster.context, task)
            masks.add_mask(words, masks.derive(self._seed, b"seed", context), 1)
            for number in self._shares.keys() - {self._number}:
                public = self._roster.by_number[number][2]
                key = mask_key(self._mask, public, context, self._number, number)
                masks.add_mask(words, key, 1 if self._number < number else -1)
            return words

    def sign(self, present: Sequence[int]) -> bytes:
        """Says whom it believes to be present."""
        with self._step("sign", "unmask"):
            assert self._signing is not None
            self._check_present(present)
            self._present = list(present)
            return masks.sign(self._signing, about_present(self._roster.context, present))

    def unmask(self, present: Sequence[int], signatures: Sequence[Any]) -> list[list[Any]]:
        """Shares of the seeds of those who are present, and of the mask keys of the others."""
        with self._step("unmask", "nothing"):
            self._check_present(present)
            if self._signing is not None:
                self._check_signatures(present, signatures)
            found = [
                [number, own[shamir.SHARE :] if number in present else own[: shamir.SHARE]]
                for number, own in sorted(self._shares.items())
            ]
            del self._channel, self._mask, self._seed, self._shares
            return found

    def _channel_to(self, number: int) -> bytes:
        public = self._roster.by_number[number][1]
        return masks.agree(self._channel, public, b"channel", self._roster.context)

    def _check_present(self, present: Sequence[int]) -> None:
        known = set(present)
        if len(known) != len(present) or not known <= self._shares.keys():
            raise runtime.RefusedError("some who are said to be present take no part")
        if self._number not in known or len(known) < self._roster.threshold:
            raise runtime.RefusedError("too few clients are said to be present, or not this one")

    def _check_signatures(self, present: Sequence[int], signatures: Sequence[Any]) -> None:
        if list(present) != self._present:
            raise runtime.RefusedError("others are said to be present than before")
        assert self._roster.peers is not None
        about = about_present(self._roster.context, present)
        signed = set()
        for number, signature in signatures:
            if number not in present:
                raise runtime.RefusedError("somebody has signed who is not present")
            masks.verify(self._roster.peers[self._roster.by_number[number][0]], signature, about)
            signed.add(number)
        if len(signed) < self._roster.threshold:
            raise runtime.RefusedError("too few clients agree on who is present")


def _ends(sender: int, receiver: int) -> bytes:
    return struct.pack("<II", sender, receiver)


def check_bytes(found: Sequence[Any], sizes: Sequence[int]) -> None:
    if [len(x) if isinstance(x, bytes) else None for x in found] != list(sizes):
        raise runtime.RefusedError("keys or signatures do not have the right sizes")
