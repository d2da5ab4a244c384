"""Clients in processes of their own on this machine, which share nothing with the server."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import pathlib
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fax import _arguments
from fax.deploy import _client as runtime
from fax.deploy import _links
from fax.deploy._backend import ClientError, combine, held_rows, is_answer
from fax.deploy._links import Link, LinkError
from fax.deploy._stages import Stage
from fax.deploy._values import Held, Row


class Processes:
    """Clients in processes on this machine. A process runs several clients one after another.

    The processes run `fax/deploy/_client.py` with JAX alone. They hold what is put there, or the
    data that they load themselves, and send what stages send. Everything goes over sockets of this
    machine's loopback interface, with a key that only these processes know.

    Args:
      number: how many processes.
      load: ``"module:function"`` or ``"file.py:function"``, called in each process with its number,
        which returns the data of its clients, ``{client: {name: array}}``. Clients are ints or
        strings. See `held`.
      plan: a folder that `Plan.save` wrote. The processes then run only its stages.
      timeout: seconds to wait for a process to start, and for the clients of a stage to answer.
        Answers that come later are ignored.

    Raises:
      ClientError: in any method, if a process fails, ends, or does not answer in time.

    Example::

      with fax.deploy.Processes(4) as backend:
          state, metrics = plan.run(backend, state, cohort)
    """

    def __init__(
        self,
        number: int,
        *,
        load: str | None = None,
        plan: str | os.PathLike[str] | None = None,
        timeout: float = 300.0,
    ):
        where = "fax.deploy.Processes"
        _arguments.count(where, "number", number)
        _arguments.number(where, "timeout", timeout, above=0)
        self._timeout = timeout
        self._slots = itertools.count()
        self._freed: list[tuple[Hashable, str]] = []
        self._home: dict[Hashable, int] = {}
        self._known: list[set[str]] = [set() for _ in range(number)]
        self._saved: dict[str, str] | None = None  # stages by what they compute
        options = [] if load is None else ["--load", load]
        if plan is not None:
            options += ["--plan", os.fspath(plan)]
            stages = runtime.read_plan(pathlib.Path(plan))["stages"]
            self._saved = {stage.get("program"): name for name, stage in stages.items()}
        self._options = options
        self._about: dict[int, list[Any]] = {}
        self._links = _links.start(range(number), options, timeout)
        self._finalizer = weakref.finalize(self, _links.stop, self._links)
        self._look(range(number))

    def _look(self, processes: Iterable[int]) -> None:
        """Finds out what the clients of some processes have loaded."""
        if "--load" not in self._options:
            return
        self._about |= self._ask("about", {process: {} for process in processes})
        for process, rows in self._about.items():
            for client, *_ in rows:
                if self._home.setdefault(client, process) != process:
                    raise ClientError(
                        f"fax.deploy.Processes: two processes have a client {client!r}."
                    )

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def sent(self) -> int:
        """The bytes of all messages to processes so far."""
        return sum(link.sent for link in self._links)

    @property
    def received(self) -> int:
        """The bytes of all messages from processes so far."""
        return sum(link.received for link in self._links)

    def stop(self) -> None:
        """Stops the processes."""
        self._finalizer()

    def kill(self, process: int) -> None:
        """Kills a process, to try what happens then."""
        self._links[process].process.kill()
        self._links[process].process.wait()

    def restart(self, process: int) -> None:
        """Starts a process anew, for example because it has ended.

        Its clients load their data again. What else they held is lost, so a plan that needs it
        continues without these clients, or not at all.

        Raises:
          ClientError: if the process does not start.
        """
        _links.stop([self._links[process]])
        (self._links[process],) = _links.start([process], self._options, self._timeout)
        self._known[process] = set()
        self._look([process])

    def held(self, clients: Sequence[Hashable] | None = None) -> dict[str, Held]:
        """What the clients loaded, by name: for some clients, or for all in the order of names.

        Clients may have different numbers of steps, which are the leading axis; see ``ragged`` of
        `cut`.

        Raises:
          ValueError: if an array has other different shapes or dtypes at different clients, or is
            missing at some.
        """
        about = [tuple(row) for rows in self._about.values() for row in rows]
        return held_rows("Processes.held", about, clients)

    def put(self, clients: Sequence[Hashable], rows: Sequence[Any]) -> list[Row]:
        made = [Row(client, self._slot()) for client in clients]
        requests = {
            process: {
                "clients": [clients[i] for i in own],
                "slots": [made[i].slot for i in own],
                "values": [rows[i] for i in own],
            }
            for process, own in self._by_process(clients).items()
        }
        self._ask("put", requests)
        return made

    def run(self, stage: Stage, clients: Sequence[Hashable], operands: Sequence[Any]) -> list[Any]:
        return self.race(stage, clients, operands, len(clients))[1]

    def race(
        self, stage: Stage, clients: Sequence[Hashable], operands: Sequence[Any], take: int
    ) -> tuple[list[int], list[Any]]:
        self._free_now()
        parts = self._by_process(clients)
        name, blob = self._artifact(stage)
        kept = [[self._slot() if m == "placed" else None for m in stage.outputs] for _ in clients]
        shared = [None if m == "placed" else x for x, m in zip(operands, stage.inputs, strict=True)]
        placed = [x for x, m in zip(operands, stage.inputs, strict=True) if m == "placed"]
        requests: dict[int, dict[str, Any]] = {}
        for process, numbers in parts.items():
            jobs = [[clients[i], [_named(x[i]) for x in placed], kept[i]] for i in numbers]
            requests[process] = {"stage": name, "shared": shared, "jobs": jobs}
            if name not in self._known[process]:
                requests[process]["blob"] = blob
        sent: dict[int, list[Any]] = {}

        def is_enough(process: int, answer: Any) -> bool:
            numbers = parts[process]
            self._known[process].add(name)
            _check_answer(stage, [clients[i] for i in numbers], answer)
            sent.update(zip(numbers[: take - len(sent)], answer))
            return len(sent) == take

        try:
            self._ask("run", requests, is_enough)
        except ClientError:
            self._free_slots(clients, kept, range(len(clients)))
            raise
        first = sorted(sent)
        # Those that were too late free what they keep when they have computed it.
        self._free_slots(clients, kept, set(range(len(clients))) - sent.keys())
        contributions = iter(zip(*(sent[i] for i in first), strict=True))
        return first, [
            [Row(clients[i], str(kept[i][k])) for i in first]
            if mode == "placed"
            else combine(mode, next(contributions))
            for k, mode in enumerate(stage.outputs)
        ]

    def _free_slots(
        self, clients: Sequence[Hashable], kept: Sequence[Sequence[Any]], numbers: Iterable[int]
    ) -> None:
        self.free((clients[i], slot) for i in numbers for slot in kept[i] if slot is not None)

    def fetch(self, rows: Sequence[Row]) -> list[np.ndarray]:
        parts = self._by_process([row.client for row in rows])
        requests = {
            process: {"rows": [[rows[i].client, rows[i].slot] for i in own]}
            for process, own in parts.items()
        }
        found: dict[int, Any] = {}
        for process, answer in self._ask("fetch", requests).items():
            found.update(zip(parts[process], answer, strict=True))
        return [found[i] for i in range(len(rows))]

    def free(self, rows: Iterable[tuple[Hashable, str]]) -> None:
        self._freed += rows  # later, because this may be called at any moment

    def _free_now(self) -> None:
        freed, self._freed = self._freed, []
        for process, own in self._by_process([client for client, _ in freed]).items():
            with contextlib.suppress(LinkError):  # then it holds nothing any more
                self._links[process].send("free", rows=[list(freed[i]) for i in own])

    def _artifact(self, stage: Stage) -> tuple[str, bytes | None]:
        """The name of a stage, and what processes need that do not know it yet."""
        if self._saved is None:
            return _exported(stage)
        if stage.digest not in self._saved:
            raise ClientError(
                f"The stage {stage.name!r} is not in the plan of these processes. Save the plan "
                "that runs there, with the same version of JAX."
            )
        return self._saved[stage.digest], None

    def _by_process(self, clients: Sequence[Hashable]) -> dict[int, list[int]]:
        """The numbers of the clients that each process runs."""
        parts: dict[int, list[int]] = {}
        for number, client in enumerate(clients):
            home = self._home.setdefault(client, len(self._home) % len(self._links))
            parts.setdefault(home, []).append(number)
        return parts

    def _slot(self) -> str:
        return f"v{next(self._slots)}"

    def _ask(
        self,
        do: str,
        requests: Mapping[int, Mapping[str, Any]],
        is_enough: Callable[[int, Any], bool] = lambda process, answer: False,
    ) -> dict[int, Any]:
        """Sends requests to processes, and waits for answers, for as long as `timeout` says.

        Args:
          do: what to do.
          requests: what with, by process.
          is_enough: whether the answers of others are not needed any more; see `_links.exchange`.

        Raises:
          ClientError: if some did not answer, and are needed. It names all of their clients.
        """
        failed: dict[int, LinkError] = {}
        asked: dict[int, Link] = {}
        for process, what in requests.items():
            try:
                self._links[process].send(do, **what)
                asked[process] = self._links[process]
            except LinkError as error:
                failed[process] = error
        enough = False

        def checked(process: int, answer: Any) -> bool:
            nonlocal enough
            enough = is_enough(process, answer)
            return enough

        answers, others = _links.exchange(asked, self._timeout, checked)
        failed |= others
        if failed and not enough:
            text = "; ".join(f"process {process} {error}" for process, error in failed.items())
            clients = [client for client, home in self._home.items() if home in failed]
            raise ClientError(f"{text}. Clients that they run: {clients}.", clients)
        return answers


def _check_answer(stage: Stage, clients: list[Hashable], answer: Any) -> None:
    """Checks that each client has sent what the stage sends."""
    if not is_answer(stage, len(clients), answer):
        shown = ", ".join(f"{dtype}{list(shape)}" for shape, dtype in stage.sent)
        raise LinkError(
            f"did not send what the stage {stage.name!r} sends for each of the clients {clients}: "
            f"{shown}"
        )


def _named(x: Any) -> Any:
    """The name of what a client holds, or a value for it."""
    return x.slot if isinstance(x, Row) else x


_blobs: weakref.WeakKeyDictionary[Stage, tuple[str, bytes]] = weakref.WeakKeyDictionary()


def _exported(stage: Stage) -> tuple[str, bytes]:
    """The stage for CPUs, and its hash."""
    if stage not in _blobs:
        blob = stage.exported(["cpu"])
        _blobs[stage] = hashlib.sha256(blob).hexdigest(), blob
    return _blobs[stage]
