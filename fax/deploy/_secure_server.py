"""Secure sums: the server adds up masked integers of clients, and learns only the sum.

    keys      each client makes keys, and the server sends the public ones to all
    shares    each client splits its secrets, and the server passes on the encrypted shares
    run       each client runs the stage, and sends integers with masks: one that it shares with
              each other client, which cancels in the sum, and one of its own
    sign      each client signs who is present, if clients can sign
    unmask    for each client that is present, the others send shares of its own mask's seed, and
              for each that has failed since it sent shares, of the key that gives its shared masks

This is the server's part; `_secure_party.py` has a client's. Nothing that the server gets before
the last step reveals anything, so until then a sum may be started again without those that failed.

Bonawitz et al., Practical secure aggregation for privacy-preserving machine learning, CCS 2017.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from fax._arithmetic import total_dtype
from fax.deploy._backend import ClientError
from fax.deploy._stages import Stage

# What Hosts._ask does: sends requests to hosts, and calls a function with each host and its answer.
Ask = Callable[[str, Mapping[int, Mapping[str, Any]], Callable[[int, Any], bool]], None]


class SecureSum:
    """One secure sum over the clients of a stage.

    Args:
      ask: sends requests to hosts.
      threshold: see `SecureSums`.
      stage: what clients run.
      clients: who they are.
      parts: the positions in ``clients`` of those that each host runs.
      take: how many answers to take.
      least: how many clients have to be left.
    """

    def __init__(
        self,
        ask: Ask,
        threshold: float,
        stage: Stage,
        clients: Sequence[Hashable],
        parts: Mapping[int, Sequence[int]],
        take: int,
        least: int,
    ):
        from fax.deploy import _masks, _secure_party, _shamir  # import cryptography

        self._protocol, self._masks, self._shamir = _secure_party, _masks, _shamir
        size, number = len(clients), _secure_party.needed(threshold, len(clients))
        if len(set(clients)) < size:
            raise ValueError("Plan.run: in a secure sum, no client may be in a cohort twice.")
        if size < 2:  # check_plan has refused plans for one client
            raise ClientError("A secure sum needs two clients, but only one is left.")
        if number > size:
            raise ClientError(
                f"A secure sum needs {number} clients, by its threshold, but only {size} are left "
                "or take part."
            )
        if number <= size // 2:
            raise ValueError(
                f"fax.deploy.SecureSums: the threshold is {number} of {size} clients, expected "
                "more than half of them."
            )
        if take < number:
            raise ValueError(
                f"Plan.run: take is {take}, expected at least the threshold of secure sums, which "
                f"is {number} of {size} clients."
            )
        self._ask, self._threshold, self._take = ask, threshold, take
        self._least = max(least, _secure_party.needed(threshold, 2))
        self._clients, self._parts, self._stage = clients, parts, stage
        self._session = secrets.token_bytes(_secure_party.SESSION)

    def run(self, requests: Mapping[int, Mapping[str, Any]]) -> tuple[list[int], list[np.ndarray]]:
        """Which clients are in the sum, by their positions, and the sum of each output.

        Args:
          requests: to each host, to run the stage.

        Raises:
          ClientError: if too few clients are left. It names those that failed only if nothing is
            known of the sum, so that it may be started again without them.
        """
        everybody = range(len(self._clients))
        keys = self._phase("keys", everybody, self._sent(), self._check_keys)
        threshold = self._protocol.needed(self._threshold, len(keys))
        self._least = max(self._least, threshold)
        roster = [[i + 1, self._clients[i], *keys[i]] for i in sorted(keys)]
        sent = self._sent(threshold=threshold, roster=roster)
        shares = self._phase("shares", keys, sent, self._shares_of(keys))

        def job(host: int, own: Sequence[int]) -> dict[str, Any]:
            jobs = dict(zip(self._parts[host], requests[host]["jobs"], strict=True))
            received = [[[j + 1, shares[j][i]] for j in shares if j != i] for i in own]
            return {**requests[host], "jobs": [jobs[i] for i in own], "shares": received}

        masked = self._phase("run", shares, job, self._check_words, self._take)
        present = sorted(masked)
        numbers = [i + 1 for i in present]
        self._least = threshold  # of those who are present, these have to be left
        signed: dict[int, bytes] = {}
        if keys[present[0]][-1] is not None:
            sent = self._sent(present=numbers)
            signed = self._phase("sign", present, sent, self._check_signature)
        try:
            signatures = [[i + 1, signature] for i, signature in signed.items()]
            sent = self._sent(present=numbers, signatures=signatures)
            check = self._revealed_of(shares)
            revealed = self._phase("unmask", signed or present, sent, check, threshold)
        except ClientError as error:
            # Clients have been asked to reveal the sum, so it must not be started again.
            raise ClientError(f"{error} The run cannot start again without them.") from error
        context = self._protocol.context_of(self._session, threshold, roster)
        request = next(iter(requests.values()))
        task = self._protocol.task_of(request["stage"], request["shared"])
        context = self._protocol.context_of_masks(context, task)
        totals = [
            np.asarray(np.sum(each, axis=0, dtype=each[0].dtype)) for each in zip(*masked.values())
        ]
        try:
            points = [i + 1 for i in revealed]
            found = self._shamir.join(points, list(revealed.values()))
            self._unmask(totals, keys, present, dict(zip(sorted(shares), found)), context)
        except ValueError as error:
            raise ClientError(f"A secure sum cannot be unmasked: {error}.") from error
        return present, [
            total.astype(np.dtype(total_dtype("sum", dtype)))
            for total, (_, dtype) in zip(totals, self._stage.sent, strict=True)
        ]

    def _phase(
        self,
        do: str,
        positions: Collection[int],
        what: Callable[[int, Sequence[int]], Mapping[str, Any]],
        check: Callable[[int, Any], Any],
        take: int | None = None,
    ) -> dict[int, Any]:
        """What those clients answer that have not failed, by their positions.

        Args:
          do: which step.
          positions: of those who are asked.
          what: what a host is sent, from its number and the positions of its clients.
          check: what an answer says. It raises a `ValueError` or a `TypeError` if that is nothing.
          take: how many answers to take.
        """
        take = len(positions) if take is None else min(take, len(positions))
        asked = set(positions)
        parts = {host: [i for i in own if i in asked] for host, own in self._parts.items()}
        found: dict[int, Any] = {}

        def read(host: int, answer: Any) -> bool:
            own = parts[host]
            if not isinstance(answer, list) or len(answer) != len(own):
                raise ValueError(f"expected one answer for each of {len(own)} clients")
            checked = list(map(check, own, answer))
            found.update(zip(own[: take - len(found)], checked))
            return len(found) == take

        requests = {
            host: {"session": self._session, **what(host, own)}
            for host, own in parts.items()
            if own
        }
        cause = None
        try:
            self._ask(f"secure_{do}", requests, read)
        except ClientError as error:
            cause = error
        if len(found) < self._least:
            failed = [self._clients[i] for i in positions if i not in found]
            raise ClientError(
                f"A secure sum needs {self._least} clients, but only {len(found)} of "
                f"{len(self._clients)} are left after the step {do!r}. {cause}",
                failed,
            ) from cause
        return found

    def _unmask(
        self,
        totals: Sequence[np.ndarray],
        keys: Mapping[int, Sequence[bytes]],
        present: Sequence[int],
        found: Mapping[int, bytes],
        context: bytes,
    ) -> None:
        """Removes from the totals all masks that have not cancelled."""
        masks, there = self._masks, set(present)
        for i, secret in found.items():
            _, public, commitment, _ = keys[i]
            made = masks.commitment(secret) if i in there else masks.public_key(secret)
            if made != (commitment if i in there else public):
                raise ValueError(
                    f"shares of a secret of the client {self._clients[i]!r} were changed, by "
                    "itself or by others"
                )
            if i in there:
                masks.add_mask(totals, masks.derive(secret, b"seed", context), -1)
                continue
            for j in present:
                key = self._protocol.mask_key(secret, keys[j][1], context, i + 1, j + 1)
                masks.add_mask(totals, key, -1 if j < i else 1)

    # What clients are sent, and what they may answer

    def _sent(self, **what: Any) -> Callable[[int, Sequence[int]], dict[str, Any]]:
        """What is sent to every host, with the names of its clients."""
        return lambda host, own: {"clients": [self._clients[i] for i in own], **what}

    def _check_keys(self, i: int, answer: Any) -> list[Any]:
        *keys, signature = answer
        if list(map(_size, keys)) != [self._masks.KEY] * 3:
            raise ValueError("expected three keys")
        if signature is not None and _size(signature) != self._masks.SIGNATURE:
            raise ValueError("expected a signature")
        return [*keys, signature]

    def _shares_of(self, keys: Collection[int]) -> Callable[[int, Any], dict[int, bytes]]:
        size = self._masks.size_encrypted(2 * self._shamir.SHARE)

        def check(i: int, answer: Any) -> dict[int, bytes]:
            found = {number - 1: data for number, data in answer}
            if found.keys() != set(keys) - {i} or any(_size(x) != size for x in found.values()):
                raise ValueError("expected encrypted shares for each other client")
            return found

        return check

    def _check_words(self, i: int, answer: Any) -> list[np.ndarray]:
        expected = [
            (shape, np.dtype("<u8" if np.dtype(dtype).itemsize == 8 else "<u4"))
            for shape, dtype in self._stage.sent
        ]
        if not isinstance(answer, list) or expected != [
            (getattr(x, "shape", None), getattr(x, "dtype", None)) for x in answer
        ]:
            raise ValueError(f"expected masked integers for what {self._stage.name!r} sends")
        return answer

    def _check_signature(self, i: int, answer: Any) -> bytes:
        if _size(answer) != self._masks.SIGNATURE:
            raise ValueError("expected a signature")
        return answer

    def _revealed_of(self, shares: Collection[int]) -> Callable[[int, Any], list[bytes]]:
        numbers = [i + 1 for i in sorted(shares)]

        def check(i: int, answer: Any) -> list[bytes]:
            found = [data for _, data in answer]
            if [number for number, _ in answer] != numbers or any(
                _size(data) != self._shamir.SHARE for data in found
            ):
                raise ValueError("expected a share of a secret of each client")
            return found

        return check


def _size(x: Any) -> int | None:
    return len(x) if isinstance(x, bytes) else None
