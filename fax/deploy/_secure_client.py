"""The client's part of secure sums. It needs JAX and cryptography, and neither fax nor the model.

    python _secure_client.py ADDRESS --secure THRESHOLD [--identities MODULE:FUNCTION] ...

is `_client.py` for clients that send nothing but masked integers, and whatever helps to unmask the
sum over at least as many clients as the threshold says. What they refuse does not depend on what
the server says about itself. See `_secure_server.py` for the protocol.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import pathlib
import sys
from typing import TYPE_CHECKING, Any


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
    from fax.deploy import _secure_party as protocol
else:  # where clients are: it is a script, and these files are beside it
    runtime, _, _, protocol = map(_beside, ["_client", "_masks", "_shamir", "_secure_party"])

Identities = tuple[dict[Any, bytes], dict[Any, bytes]]


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
        self._parties: dict[Any, protocol.Party] = {}

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
        protocol.check_bytes([session], [protocol.SESSION])
        if session in self._seen:
            raise runtime.RefusedError("there was a sum with this number already")
        if self._peers is not None and not self._signing.keys() >= set(clients):
            raise runtime.RefusedError("this process has no keys to sign for these clients")
        self._seen.add(session)
        self._session = session
        self._parties = {c: protocol.Party(c, session, self._signing.get(c)) for c in clients}
        return [party.entry for party in self._parties.values()]

    def do_secure_shares(
        self, session: bytes, clients: list[Any], threshold: int, roster: list[Any]
    ) -> list[Any]:
        self._check_session(session)
        known = protocol.Roster(session, threshold, roster, self._threshold, self._peers)
        return [self._party(client).shares(known) for client in clients]

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
        parties = [self._party(client) for client, *_ in jobs]
        for client, *_ in jobs:  # if this fails, they take no other step
            del self._parties[client]
        rows = super().do_run(stage, shared, jobs, blob)
        task = protocol.task_of(stage, shared)
        sent = [
            party.mask(received, own, task)
            for party, received, own in zip(parties, shares, rows, strict=True)
        ]
        self._parties |= {job[0]: party for job, party in zip(jobs, parties, strict=True)}
        return sent

    def do_secure_sign(self, session: bytes, clients: list[Any], present: list[int]) -> list[bytes]:
        self._check_session(session)
        return [self._party(client).sign(present) for client in clients]

    def do_secure_unmask(
        self, session: bytes, clients: list[Any], present: list[int], signatures: list[Any]
    ) -> list[Any]:
        self._check_session(session)
        return [self._party(client).unmask(present, signatures) for client in clients]

    def _party(self, client: Any) -> protocol.Party:
        if client not in self._parties:
            raise runtime.RefusedError(
                f"the client {client!r} has no keys in this sum, or has failed in it"
            )
        return self._parties[client]

    def _check_session(self, session: bytes) -> None:
        if session != self._session or not session:
            raise runtime.RefusedError("this is not the sum that was begun last")


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
