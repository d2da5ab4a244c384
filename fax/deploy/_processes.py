"""Clients in processes of their own on this machine, which share nothing with the server."""

from __future__ import annotations

import hashlib
import itertools
import os
import pathlib
import secrets
import subprocess
import sys
import weakref
from collections.abc import Hashable, Iterable, Sequence
from multiprocessing import connection
from typing import Any

import jax
import numpy as np

from fax import _arguments
from fax.deploy import _client as runtime
from fax.deploy._backend import combine
from fax.deploy._stages import Stage
from fax.deploy._values import Held, Row

_FILE = pathlib.Path(runtime.__file__)


class ClientError(RuntimeError):
    """A client's process failed, or has ended."""


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
      timeout: seconds to wait for a process to start or to answer.

    Attributes:
      sent, received: the bytes of all messages to and from processes so far.

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
        plan: str | os.PathLike | None = None,
        timeout: float = 300.0,
    ):
        where = "fax.deploy.Processes"
        _arguments.count(where, "number", number)
        _arguments.number(where, "timeout", timeout, above=0)
        self.sent = self.received = 0
        self._timeout = timeout
        self._plan = plan
        self._saved: dict[str, str] | None = None  # the names of stages and their hashes
        if plan is not None:
            stages = runtime.read_plan(pathlib.Path(plan))["stages"]
            self._saved = {stage["name"]: name for name, stage in stages.items()}
        self._slots = itertools.count()
        self._freed: list[tuple[Hashable, str]] = []
        self._home: dict[Hashable, int] = {}
        self._links: list[Any] = []
        self._processes: list[subprocess.Popen] = []
        self._finalizer = weakref.finalize(self, _stop, self._links, self._processes)
        self._start(number, load)
        self._known: list[set[str]] = [set() for _ in range(number)]
        self._about = [self._ask(i, "about") for i in range(number)] if load else []
        for process, rows in enumerate(self._about):
            for client, *_ in rows:
                if self._home.setdefault(client, process) != process:
                    raise ClientError(f"{where}: two processes have a client {client!r}.")

    def _start(self, number: int, load: str | None) -> None:
        key = secrets.token_hex(32)
        with connection.Listener(("127.0.0.1", 0), authkey=key.encode()) as listener:
            host, port = listener.address
            for i in range(number):
                # With -P, the folder of the file is not where it looks for modules.
                command = [sys.executable, "-P", str(_FILE), f"{host}:{port}", "--number", str(i)]
                command += [] if load is None else ["--load", load]
                command += [] if self._plan is None else ["--plan", str(self._plan)]
                x64 = str(int(jax.config.jax_enable_x64))
                env = {"JAX_PLATFORMS": "cpu"} | os.environ | {"JAX_ENABLE_X64": x64}
                process = subprocess.Popen(command, stdin=subprocess.PIPE, env=env, text=True)
                assert process.stdin is not None
                process.stdin.write(f"{key}\n")
                process.stdin.close()
                self._processes.append(process)
            links = {}
            # The listener has no timeout of its own.
            listener._listener._socket.settimeout(1.0)  # type: ignore[attr-defined]
            for _ in range(number):
                link = self._accept(listener)
                links[runtime.decode(link.recv_bytes())["number"]] = link
        self._links += [links[i] for i in range(number)]

    def _accept(self, listener: connection.Listener) -> Any:
        for _ in range(max(1, round(self._timeout))):
            try:
                return listener.accept()
            except TimeoutError:
                ended = [p.returncode for p in self._processes if p.poll() is not None]
                if ended:
                    raise ClientError(
                        f"A client's process ended at its start, with status {ended[0]}; its error "
                        "is above."
                    ) from None
        raise ClientError(f"A client's process did not start within {self._timeout:g} seconds.")

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stops the processes."""
        self._finalizer()

    def kill(self, process: int) -> None:
        """Kills a process, to try what happens then."""
        self._processes[process].kill()
        self._processes[process].wait()

    def held(self, clients: Sequence[Hashable] | None = None) -> dict[str, Held]:
        """What the clients loaded, by name: for some clients, or for all in the order of names.

        Raises:
          ValueError: if an array has different shapes or dtypes at different clients, or is
            missing at some.
        """
        types = {(c, n): (t, tuple(s)) for rows in self._about for c, n, t, s in rows}
        everybody = sorted(self._home, key=lambda c: (isinstance(c, str), c))
        chosen = everybody if clients is None else list(clients)
        found = {}
        for name in dict.fromkeys(name for _, name in types):
            own = {types.get((client, name)) for client in chosen}
            if len(own) != 1 or None in own:
                raise ValueError(
                    f"Processes.held: {name!r} differs between clients, expected one shape and "
                    f"dtype: {sorted(map(str, own))}."
                )
            ((dtype, shape),) = own  # type: ignore[misc]
            rows = tuple(Row(client, name) for client in chosen)
            found[name] = Held(rows, (len(chosen), *shape), jax.numpy.dtype(dtype))
        return found

    def put(self, clients: Sequence[Hashable], rows: Sequence[Any]) -> list[Row]:
        made = [Row(client, self._slot()) for client in clients]
        parts = self._by_process(clients)
        for process, own in parts.items():
            self._send(
                process,
                "put",
                clients=[clients[i] for i in own],
                slots=[made[i].slot for i in own],
                values=[rows[i] for i in own],
            )
        for process in parts:
            self._receive(process)
        return made

    def run(self, stage: Stage, clients: Sequence[Hashable], operands: Sequence[Any]) -> list[Any]:
        self._free_now()
        name = self._deploy(stage, {self._process(client) for client in clients})
        kept = [[self._slot() if m == "placed" else None for m in stage.outputs] for _ in clients]
        shared = [None if m == "placed" else x for x, m in zip(operands, stage.inputs, strict=True)]
        placed = [x for x, m in zip(operands, stage.inputs, strict=True) if m == "placed"]
        parts = self._by_process(clients)
        for process, numbers in parts.items():
            jobs = [[clients[i], [_named(x[i]) for x in placed], kept[i]] for i in numbers]
            self._send(process, "run", stage=name, shared=shared, jobs=jobs)
        sent: dict[int, list[Any]] = {}
        for process, numbers in parts.items():
            sent.update(zip(numbers, self._receive(process), strict=True))
        contributions = iter(zip(*(sent[i] for i in range(len(clients))), strict=True))
        return [
            [Row(client, str(own[k])) for client, own in zip(clients, kept, strict=True)]
            if mode == "placed"
            else combine(mode, next(contributions))
            for k, mode in enumerate(stage.outputs)
        ]

    def fetch(self, rows: Sequence[Row]) -> list[np.ndarray]:
        found: dict[int, Any] = {}
        for process, numbers in self._by_process([row.client for row in rows]).items():
            own = [[rows[i].client, rows[i].slot] for i in numbers]
            found.update(zip(numbers, self._ask(process, "fetch", rows=own), strict=True))
        return [found[i] for i in range(len(rows))]

    def free(self, rows: Iterable[tuple[Hashable, str]]) -> None:
        self._freed += rows  # later, because this may be called at any moment

    def _free_now(self) -> None:
        freed, self._freed = self._freed, []
        parts: dict[int, list[Any]] = {}
        for client, slot in freed:
            parts.setdefault(self._process(client), []).append([client, slot])
        for process, rows in parts.items():
            self._ask(process, "free", rows=rows)

    def _deploy(self, stage: Stage, processes: Iterable[int]) -> str:
        """Sends a stage where it is not known yet, and returns its name there."""
        if self._saved is not None:
            if stage.name not in self._saved:
                raise ClientError(
                    f"The stage {stage.name!r} is not in the plan in {self._plan}, which has "
                    f"{list(self._saved)}."
                )
            return self._saved[stage.name]
        name, blob = _exported(stage)
        for process in processes:
            if name not in self._known[process]:
                self._ask(process, "stage", name=name, blob=blob)
                self._known[process].add(name)
        return name

    def _by_process(self, clients: Sequence[Hashable]) -> dict[int, list[int]]:
        """The numbers of the clients that each process runs."""
        parts: dict[int, list[int]] = {}
        for number, client in enumerate(clients):
            parts.setdefault(self._process(client), []).append(number)
        return parts

    def _process(self, client: Hashable) -> int:
        return self._home.setdefault(client, len(self._home) % len(self._links))

    def _slot(self) -> str:
        return f"v{next(self._slots)}"

    def _ask(self, process: int, do: str, **what: Any) -> Any:
        self._send(process, do, **what)
        return self._receive(process)

    def _send(self, process: int, do: str, **what: Any) -> None:
        data = runtime.encode({"do": do, "with": what})
        try:
            self._links[process].send_bytes(data)
        except (OSError, ValueError) as error:
            raise self._ended(process) from error
        self.sent += len(data)

    def _receive(self, process: int) -> Any:
        link = self._links[process]
        try:
            if not link.poll(self._timeout):
                raise ClientError(
                    f"Process {process} did not answer within {self._timeout:g} seconds."
                )
            data = link.recv_bytes()
        except (EOFError, OSError) as error:
            raise self._ended(process) from error
        self.received += len(data)
        answer = runtime.decode(data)
        if "error" in answer:
            raise ClientError(f"Process {process}: {answer['error']}")
        return answer["result"]

    def _ended(self, process: int) -> ClientError:
        clients = [client for client, home in self._home.items() if home == process]
        try:
            status = self._processes[process].wait(5)
        except subprocess.TimeoutExpired:
            return ClientError(f"Process {process} closed its connection.")
        return ClientError(
            f"Process {process} has ended with status {status}. It ran the clients {clients}."
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


def _stop(links: list[Any], processes: list[subprocess.Popen]) -> None:
    for link in links:
        try:
            link.send_bytes(runtime.encode({"do": "stop", "with": {}}))
            link.close()
        except (OSError, ValueError):
            pass
    for process in processes:
        try:
            process.wait(5 if links else 0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
