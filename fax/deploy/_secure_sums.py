"""How a backend sums securely, and what plans it then runs."""

from __future__ import annotations

import dataclasses
from typing import Any

from fax import _arguments, _extras
from fax.deploy._audit import Audit
from fax.deploy._values import CutError


@dataclasses.dataclass(frozen=True)
class SecureSums:
    """Has a backend add up what clients send by secure sums, so that it learns only the sums.

    Clients mask the integers of a stage, and the server learns their sum mod 2^32, or mod 2^64 for
    integers of 64 bits, over those who answered. The clients of such a backend refuse to send
    anything else, such as rows. A plan whose stages send anything but sums of integers is a
    `CutError`. `fax.aggregators.secure_sum` with ``masked=False`` makes integers of updates.

    A run with ``quorum=`` goes on without clients that fail, in the sum in which they fail. It
    cannot start again once a sum is known, as the difference of two sums over different clients
    would reveal what the others have sent. If a client fails after that, the run is an error.

    Args:
      threshold: how many clients have to answer until the end, so that the sum can be unmasked. A
        float is a share of those that take part: more than this, from 0.5 to less than 1. An int
        is a number of clients. It has to be more than half of the clients, since otherwise a server
        could unmask a client by telling some clients that it failed, and others that it did not.
        Less than this number of clients reveal nothing to the server by giving it all they know.
      identities: ``"module:function"`` or ``"file.py:function"``, called in each process of
        `Processes` with its number. It returns the private keys (Ed25519, 32 bytes) by which its
        clients sign, ``{client: key}``, and the public keys of all clients. With these, clients
        notice if the server replaces their keys, or tells them different things about who is
        present. Default: none, which protects against a server that follows the protocol.

    Raises:
      ValueError: if the threshold is out of range.
      ModuleNotFoundError: if the package ``cryptography`` is missing; install ``fax-jax[secure]``.

    References:
      Bonawitz et al., Practical secure aggregation for privacy-preserving machine learning, CCS
      2017.

    Example::

      with fax.deploy.Processes(4, secure=fax.deploy.SecureSums()) as backend:
          total = plan.run(backend, rows, quorum=3)
    """

    threshold: float = 2 / 3
    identities: str | None = None

    def __post_init__(self) -> None:
        where = "fax.deploy.SecureSums"
        _extras.require(where, "cryptography", "secure")
        _arguments.number(where, "threshold", self.threshold, above=0)
        if isinstance(self.threshold, int):
            _arguments.count(where, "threshold", self.threshold, least=2)
        elif not 0.5 <= self.threshold < 1:
            raise ValueError(
                f"{where}: threshold is {self.threshold}, expected an int, or a float from 0.5 to "
                "less than 1: more than half of the clients have to take part until the end."
            )


_INTEGERS = {"bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))}


def check_secure(caller: str, secure: Any) -> None:
    """Checks the argument ``secure`` of a backend.

    Raises:
      TypeError: if it is neither None nor `SecureSums`.
    """
    if not isinstance(secure, SecureSums | None):
        raise TypeError(
            f"{caller}: secure is {_arguments.shown(secure)}, expected a fax.deploy.SecureSums."
        )


def check_plan(audit: Audit) -> None:
    """Checks that clients send nothing but sums of integers over several clients.

    Raises:
      CutError: if they send anything else.
    """
    for exchange in audit.exchanges:
        for message in exchange.messages:
            if message.mode not in ("sum", "max", "min", "fetched"):
                continue
            what = f"With secure=, clients send only sums of integers, but {exchange.stage!r}"
            if message.mode != "sum" or message.type.partition("[")[0] not in _INTEGERS:
                raise CutError(
                    f"{what} sends {message.type} as {message.mode}. Make integers of it in the "
                    "program, of updates by fax.aggregators.secure_sum(..., masked=False). Or "
                    "leave out of the function that is cut what needs it, such as metrics."
                )
            if exchange.clients < 2:
                raise CutError(f"{what} sums over one client, which hides nothing.")
