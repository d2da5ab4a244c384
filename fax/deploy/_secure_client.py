"""The client's part of secure sums. It needs JAX and cryptography, and neither fax nor the model.

    python _secure_client.py ADDRESS --secure THRESHOLD [--identities MODULE:FUNCTION] ...

is `_client.py` for clients that send nothing but masked integers, and whatever helps to unmask the
sum over at least as many clients as the threshold says. What they refuse does not depend on what
the server says about itself. See `_secure_sums.py` for the protocol.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import math
import pathlib
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np


def _beside(name: str) -> Any:
    """The module in a file of this folder, which is not where modules are looked for."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, pathlib.Path(__file__).with_name(f"{name}.py")
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


if TYPE_CHECKING or __package__:
    from fax.deploy import _client as runtime
    from fax.deploy import _masks as masks
    from fax.deploy import _shamir as shamir
else:  # where clients are: it is a script, and these files are beside it
    runtime, masks, shamir = map(_beside, ["_client", "_masks", "_shamir"])

SESSION = 16  # bytes
Identities = tuple[dict[Any, bytes], dict[Any, bytes]]


# What the server and the clients compute alike


def needed(threshold: float, size: int) -> int:
    """How many of ``size`` clients a threshold stands for."""
    return threshold if isinstance(threshold, int) else math.floor(threshold * size) + 1


def context_of(session: bytes, threshold: int, roster: Sequence[Any]) -> bytes:
    """Identifies who takes part in a sum, with which keys."""
    return _digest(["fax secure sum 1", session, threshold, roster])


def context_of_stage(context: bytes, stage: str, shared: Sequence[Any]) -> bytes:
    """Identifies what they compute, and what the server has sent to all of them."""
    return _digest([context, stage, shared])


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
            _check_bytes(keys, [masks.KEY] * 3)
            if peers is not None:
                if client not in peers:
                    raise runtime.RefusedError(f"nobody knows the identity of {client!r}")
                _check_bytes([signature], [masks.SIGNATURE])
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

    def mask(self, received: Sequence[Any], rows: Sequence[Any], context: bytes) -> list[Any]:
        """What it sends: integers plus a mask for each other client, and one of its own."""
        with self._step("mask", "unmask" if self._signing is None else "sign"):
            for number, data in received:
                if number not in self._roster.by_number or number in self._shares:
                    raise runtime.RefusedError("shares are from nobody who takes part, or twice")
                about = _ends(number, self._number)
                self._shares[number] = masks.decrypt(self._channel_to(number), data, about)
            if len(self._shares) < self._roster.threshold:
                raise runtime.RefusedError("fewer clients than the threshold have sent shares")
            words = [masks.words_of(np.asarray(x)) for x in rows]
            masks.add_mask(words, masks.derive(self._seed, b"seed", context), 1)
            for number in self._shares.keys() - {self._number}:
                public = self._roster.by_number[number][2]
                key = masks.agree(self._mask, public, b"mask", context)
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


class SecureClients(runtime.Clients):
    """Clients that send nothing but masked integers.

    Args:
      data, plan, folder: see `_client.Clients`.
      threshold: how many clients have to take part until the end of a sum: a number, or as a
        float, a share of the clients that more than these have to reach.
      identities: the private keys of signatures of these clients, and the public ones of all.
    """

    def __init__(
        self,
        data: dict[Any, dict[str, Any]],
        plan: dict[str, Any] | None = None,
        folder: pathlib.Path | None = None,
        *,
        threshold: float,
        identities: Identities | None = None,
    ):
        super().__init__(data, plan, folder)
        self._threshold = threshold
        self._signing: dict[Any, bytes] = {} if identities is None else identities[0]
        self._peers: dict[Any, bytes] | None = None if identities is None else identities[1]
        self._session, self._seen = b"", set[bytes]()
        self._parties: dict[Any, Party] = {}

    def do_fetch(self, rows: list[Any]) -> list[Any]:
        raise runtime.RefusedError("this client sends no rows, only masked sums")

    def do_run(
        self, stage: str, shared: list[Any], jobs: list[Any], blob: bytes | None = None
    ) -> list[list[Any]]:
        if any(name is None for _, _, keep in jobs for name in keep):
            raise runtime.RefusedError("this client sends no results as they are, only masked sums")
        return super().do_run(stage, shared, jobs, blob)

    def do_secure_keys(self, session: bytes, clients: list[Any]) -> list[Any]:
        """Begins a sum: each client's new public keys. What is left of another sum is forgotten."""
        _check_bytes([session], [SESSION])
        if session in self._seen:
            raise runtime.RefusedError("there was a sum with this number already")
        if self._peers is not None and not self._signing.keys() >= set(clients):
            raise runtime.RefusedError("this process has no keys to sign for these clients")
        self._seen.add(session)
        self._session = session
        self._parties = {c: Party(c, session, self._signing.get(c)) for c in clients}
        return [party.entry for party in self._parties.values()]

    def do_secure_shares(self, session: bytes, threshold: int, roster: list[Any]) -> list[Any]:
        self._check_session(session)
        known = Roster(session, threshold, roster, self._threshold, self._peers)
        self._context = known.context
        return [party.shares(known) for party in self._parties.values()]

    def do_secure_run(
        self,
        session: bytes,
        shares: list[Any],
        stage: str,
        shared: list[Any],
        jobs: list[Any],
        blob: bytes | None = None,
    ) -> list[list[Any]]:
        """Runs a stage, as `do_run` does, and masks what each client sends."""
        self._check_session(session)
        parties = [self._parties.pop(client) for client, *_ in jobs]
        rows = super().do_run(stage, shared, jobs, blob)
        context = context_of_stage(self._context, stage, shared)
        sent = [
            party.mask(received, own, context)
            for party, received, own in zip(parties, shares, rows, strict=True)
        ]
        self._parties = {job[0]: party for job, party in zip(jobs, parties, strict=True)}
        return sent

    def do_secure_sign(self, session: bytes, present: list[int]) -> list[bytes]:
        self._check_session(session)
        return [party.sign(present) for party in self._parties.values()]

    def do_secure_unmask(
        self, session: bytes, present: list[int], signatures: list[Any]
    ) -> list[Any]:
        self._check_session(session)
        return [party.unmask(present, signatures) for party in self._parties.values()]

    def _check_session(self, session: bytes) -> None:
        if session != self._session or not session:
            raise runtime.RefusedError("this is not the sum that was begun last")


def _ends(sender: int, receiver: int) -> bytes:
    return struct.pack("<II", sender, receiver)


def _check_bytes(found: Sequence[Any], sizes: Sequence[int]) -> None:
    if [len(x) if isinstance(x, bytes) else None for x in found] != list(sizes):
        raise runtime.RefusedError("keys or signatures do not have the right sizes")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], add_help=False)
    parser.add_argument("--secure", help="a number of clients, or a share of them with a point")
    parser.add_argument("--identities", help="MODULE:FUNCTION or FILE.py:FUNCTION")
    parser.add_argument("--number", type=int, default=0)
    own, rest = parser.parse_known_args()
    identities: Any = own.identities and runtime.load(own.identities, own.number)
    threshold = float(own.secure) if "." in own.secure else int(own.secure)
    make = functools.partial(SecureClients, threshold=threshold, identities=identities)
    runtime.main(make, [*rest, "--number", str(own.number)])


if __name__ == "__main__":
    main()
