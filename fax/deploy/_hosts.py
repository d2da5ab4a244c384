"""Clients on hosts, which are processes or nodes: who runs where, and what comes back from them."""

from __future__ import annotations

import abc
import collections
import contextlib
import itertools
import operator
import os
import pathlib
import secrets
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fax.deploy import _client as runtime
from fax.deploy._backend import ClientError, combine
from fax.deploy._secure_server import SecureSum
from fax.deploy._secure_sums import SecureSums
from fax.deploy._stages import Stage
from fax.deploy._values import Held, Row, named

Read = Callable[[int, Any], bool]


class _Job(NamedTuple):
    """What hosts are asked for to run a stage.

    Attributes:
      stage: the stage.
      clients: who runs it.
      parts: the positions in ``clients`` of those that each host runs.
      kept: for each client and output the name under which it stays there, None if it is sent.
      requests: to each host.
    """

    stage: Stage
    clients: Sequence[Hashable]
    parts: dict[int, list[int]]
    kept: list[list[str | None]]
    requests: dict[int, dict[str, Any]]


class Hosts(abc.ABC):
    """A backend whose clients run on hosts, each of which runs several with `_client.Clients`.

    Args:
      plan: a folder that `Plan.save` wrote, if the hosts run only its stages.
      secure: how the server learns sums only, None if it learns what each client sends.

    Attributes:
      _host, _hosts: what hosts are called in errors: one, and several.
      _platforms: what stages are compiled for.
      _numbers: the numbers of the hosts, which subclasses set.
      _lock: held by the thread that asks hosts, so that each gets the answers to its own requests.
    """

    _host: str
    _hosts: str
    _platforms: tuple[str, ...]
    _numbers: Sequence[int]

    def __init__(self, plan: str | os.PathLike[str] | None, secure: SecureSums | None = None):
        self.secure = secure
        self._lock = threading.RLock()
        # The same run may continue with another backend, so slots of this one differ.
        name = secrets.token_hex(4)
        self._slots = (f"{name}.{i}" for i in itertools.count())
        self._home: dict[Hashable, int] = {}
        self._about: dict[int, list[tuple[Hashable, str, str, tuple[int, ...]]]] = {}
        self._freed: collections.deque[tuple[Hashable, str]] = collections.deque()
        self._saved: dict[str, str] | None = None  # stages by what they compute
        if plan is not None:
            stages = runtime.read_plan(pathlib.Path(plan))["stages"]
            self._saved = {stage.get("program"): name for name, stage in stages.items()}

    @abc.abstractmethod
    def _ask(self, do: str, requests: Mapping[int, Mapping[str, Any]], read: Read) -> None:
        """Sends requests to hosts, and waits for all answers, for as long as `timeout` says.

        Args:
          do: what to do.
          requests: what with, by host.
          read: called with each host and its answer: whether no more answers are needed. It raises
            a `ValueError` or a `TypeError` if the answer is wrong.

        Raises:
          ClientError: if some hosts did not answer, or not as they should, and are needed. It names
            all of their clients.
        """

    def held(self, clients: Sequence[Hashable] | None = None) -> dict[str, Held]:
        """What the clients loaded, by name: for some clients, or for all in the order of names.

        Clients may have different numbers of steps, which are the leading axis; see ``ragged`` of
        `cut`.

        Raises:
          ValueError: if an array has other different shapes or dtypes at different clients, or is
            missing at some.
        """
        about = itertools.chain.from_iterable(self._about.values())
        return _held(f"{type(self).__name__}.held", about, clients)

    def run(self, stage: Stage, clients: Sequence[Hashable], operands: Sequence[Any]) -> list[Any]:
        return self.race(stage, clients, operands, len(clients))[1]

    def race(
        self, stage: Stage, clients: Sequence[Hashable], operands: Sequence[Any], take: int
    ) -> tuple[list[int], list[Any]]:
        if self.secure is not None and stage.sent:
            return self.gather(stage, clients, operands, take, take)
        job = self._job(stage, clients, operands)
        sent: dict[int, list[Any]] = {}

        def read(host: int, answer: Any) -> bool:
            numbers = job.parts[host]
            check_answer(stage, [clients[i] for i in numbers], answer)
            sent.update(zip(numbers[: take - len(sent)], answer))
            return len(sent) == take

        with self._freed_unless_done(job):
            self._ask("run", job.requests, read)
        first = sorted(sent)
        contributions = iter(zip(*(sent[i] for i in first), strict=True))
        totals = (combine(m, next(contributions)) for m in stage.outputs if m != "placed")
        return first, self._results(job, first, totals)

    def gather(
        self,
        stage: Stage,
        clients: Sequence[Hashable],
        operands: Sequence[Any],
        take: int,
        least: int,
    ) -> tuple[list[int], list[Any]]:
        """Does what ``race`` does by a secure sum, which goes on if ``least`` clients are left."""
        assert self.secure is not None
        job = self._job(stage, clients, operands)
        threshold = self.secure.threshold
        total = SecureSum(self._ask, threshold, stage, clients, job.parts, take, least)
        with self._freed_unless_done(job), self._lock:  # a client takes part in one sum at a time
            first, totals = total.run(job.requests)
        return first, self._results(job, first, iter(totals))

    def fetch(self, rows: Sequence[Row]) -> list[np.ndarray]:
        parts = self._by_host([row.client for row in rows])
        found: dict[int, Any] = {}

        def read(host: int, answer: Any) -> bool:
            found.update(zip(parts[host], answer, strict=True))
            return False

        wanted = {
            host: {"rows": [[rows[i].client, rows[i].slot] for i in own]}
            for host, own in parts.items()
        }
        self._ask("fetch", wanted, read)
        return [found[i] for i in range(len(rows))]

    def free(self, rows: Iterable[tuple[Hashable, str]]) -> None:
        self._freed.extend(rows)  # later, because this may be called at any moment

    def _take_freed(self) -> list[tuple[Hashable, str]]:
        """What was freed since the last call. Other threads may free more meanwhile."""
        return [self._freed.popleft() for _ in range(len(self._freed))]

    def _look(self, hosts: Iterable[int]) -> None:
        """Finds out what the clients of some hosts have loaded."""

        def read(host: int, answer: Any) -> bool:
            about = [
                (client, str(name), str(jax.numpy.dtype(dtype)), tuple(map(operator.index, shape)))
                for client, name, dtype, shape in answer
            ]
            for client, *_ in about:
                if not isinstance(client, int | str):
                    raise TypeError(f"the client {client!r} is neither an int nor a string")
                if self._home.setdefault(client, host) != host:
                    raise ClientError(
                        f"fax.deploy.{type(self).__name__}: two {self._hosts} have a client "
                        f"{client!r}."
                    )
            self._about[host] = about
            return False

        self._ask("about", {host: {} for host in hosts}, read)

    def _job(self, stage: Stage, clients: Sequence[Hashable], operands: Sequence[Any]) -> _Job:
        """What hosts are asked for to run a stage."""
        parts = self._by_host(clients)
        name, blob = self._artifact(stage)
        kept = [
            [next(self._slots) if m == "placed" else None for m in stage.outputs] for _ in clients
        ]
        shared = [None if m == "placed" else x for x, m in zip(operands, stage.inputs, strict=True)]
        placed = [x for x, m in zip(operands, stage.inputs, strict=True) if m == "placed"]
        requests = {}
        for host, numbers in parts.items():
            jobs = [[clients[i], [_named(x[i]) for x in placed], kept[i]] for i in numbers]
            requests[host] = {"stage": name, "blob": blob, "shared": shared, "jobs": jobs}
        return _Job(stage, clients, parts, kept, requests)

    @contextlib.contextmanager
    def _freed_unless_done(self, job: _Job) -> Iterator[None]:
        try:
            yield
        except ClientError:
            self._free_slots(job, range(len(job.clients)))
            raise

    def _results(self, job: _Job, first: Sequence[int], totals: Iterator[Any]) -> list[Any]:
        """What a stage returns: rows of the first clients, and totals."""
        # What those keep that were too late is freed when they have computed it.
        self._free_slots(job, set(range(len(job.clients))).difference(first))
        return [
            [Row(job.clients[i], str(job.kept[i][k])) for i in first]
            if mode == "placed"
            else next(totals)
            for k, mode in enumerate(job.stage.outputs)
        ]

    def _free_slots(self, job: _Job, numbers: Iterable[int]) -> None:
        self.free(
            (job.clients[i], slot) for i in numbers for slot in job.kept[i] if slot is not None
        )

    def _artifact(self, stage: Stage) -> tuple[str, bytes | None]:
        """The name of a stage, and what hosts need that do not know it."""
        if self._saved is None:
            return stage.artifact(self._platforms)
        if stage.digest not in self._saved:
            raise ClientError(
                f"The stage {stage.name!r} is not in the plan of these {self._hosts}. Save the "
                "plan that runs there, with the same version of JAX."
            )
        return self._saved[stage.digest], None

    def _by_host(self, clients: Sequence[Hashable]) -> dict[int, list[int]]:
        """The positions in ``clients`` of those that each host runs."""
        parts: dict[int, list[int]] = {}
        for number, client in enumerate(clients):
            next_host = self._numbers[len(self._home) % len(self._numbers)]
            parts.setdefault(self._home.setdefault(client, next_host), []).append(number)
        return parts

    def _failed(self, failed: Mapping[int, object]) -> ClientError:
        """The error for hosts that failed, from what each of them did."""
        text = "; ".join(f"{self._host} {host} {what}" for host, what in failed.items())
        clients = sorted((own for own, home in self._home.items() if home in failed), key=str)
        return ClientError(f"{text}. Their clients: {clients}.", clients)


def _named(x: Any) -> Any:
    """The name of what a client holds, or a value for it."""
    return x.slot if isinstance(x, Row) else x


def _held(
    where: str,
    about: Iterable[tuple[Hashable, str, str, Sequence[int]]],
    clients: Sequence[Hashable] | None,
) -> dict[str, Held]:
    """What clients loaded, by name: for some clients, or for all in the order of names.

    Args:
      where: the caller, for errors.
      about: what they loaded: the client, and the name, dtype and shape of an array.
      clients: which clients.

    Raises:
      ValueError: if an array has different shapes or dtypes at different clients, apart from the
        size of the leading axis, or is missing at some.
    """
    types: dict[tuple[Hashable, str], tuple[str, tuple[int | None, ...]]]
    types = {(client, name): (dtype, tuple(shape)) for client, name, dtype, shape in about}
    everybody = sorted({client for client, _ in types}, key=lambda c: (isinstance(c, str), c))
    chosen = everybody if clients is None else named(clients)
    found = {}
    for name in dict.fromkeys(name for _, name in types):
        own = {types.get((client, name)) for client in chosen}
        found_types = {t and (t[0], len(t[1]), t[1][1:]) for t in own}
        if len(found_types) != 1 or None in own:
            raise ValueError(
                f"{where}: {name!r} differs between clients, expected one shape and dtype: "
                f"{sorted(map(str, own))}."
            )
        dtype, shape = next(t for t in own if t is not None)
        if len(own) > 1:
            shape = (None, *shape[1:])
        rows = tuple(Row(client, name) for client in chosen)
        found[name] = Held(rows, tuple(chosen), (len(chosen), *shape), jax.numpy.dtype(dtype))
    return found


def check_answer(stage: Stage, clients: Sequence[Hashable], answer: Any) -> None:
    """Checks that each client has sent what the stage sends."""

    def is_right(row: Any) -> bool:
        return (
            isinstance(row, list)
            and all(hasattr(x, "dtype") for x in row)
            and [(x.shape, x.dtype) for x in row] == stage.sent
        )

    if not isinstance(answer, list) or [*map(is_right, answer)] != [True] * len(clients):
        shown = ", ".join(f"{dtype}{list(shape)}" for shape, dtype in stage.sent)
        raise ValueError(
            f"expected for each of the clients {clients} what the stage {stage.name!r} sends: "
            f"{shown}"
        )
