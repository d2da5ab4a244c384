"""Clients in processes of their own on this machine, which share nothing with the server."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from fax import _arguments
from fax.deploy import _links
from fax.deploy._hosts import Hosts, Read
from fax.deploy._links import Link, LinkError
from fax.deploy._secure_sums import SecureSums, check_secure
from fax.deploy._values import Row

_FUNCTION = '"module:function" or "file.py:function"'


class Processes(Hosts):
    """Clients in processes on this machine. A process runs several clients one after another.

    The processes run `fax/deploy/_client.py` with JAX alone. They hold what is put there, or the
    data that they load themselves, and send what stages send. Everything goes over sockets of this
    machine's loopback interface, with a key that only these processes know. Several threads may run
    plans; their stages take turns.

    Args:
      number: how many processes.
      load: ``"module:function"`` or ``"file.py:function"``, called in each process with its number,
        which returns the data of its clients, ``{client: {name: array}}``. Clients are ints or
        strings. See `held`.
      plan: a folder that `Plan.save` wrote. The processes then run only its stages.
      timeout: seconds to wait for a process to start, and for the clients of a stage to answer.
        Answers that come later are ignored.
      secure: has the server learn nothing but sums; see `SecureSums`. The processes then run
        `fax/deploy/_secure_client.py`, and need the package ``cryptography``, too.

    Raises:
      ClientError: in any method, if a process fails, ends, or does not answer in time.

    Example::

      with fax.deploy.Processes(4) as backend:
          state, metrics = plan.run(backend, state, cohort)
    """

    _host, _hosts = "process", "processes"
    _platforms = ("cpu",)

    def __init__(
        self,
        number: int,
        *,
        load: str | None = None,
        plan: str | os.PathLike[str] | None = None,
        timeout: float = 300.0,
        secure: SecureSums | None = None,
    ):
        where = "fax.deploy.Processes"
        check_secure(where, secure)
        _arguments.count(where, "number", number)
        _arguments.number(where, "timeout", timeout, above=0)
        if load is not None and ":" not in _arguments.text(where, "load", load, _FUNCTION):
            raise ValueError(f"{where}: load is {load!r:.80}, expected {_FUNCTION}.")
        super().__init__(plan, secure)
        self._timeout = timeout
        self._known: list[set[str]] = [set() for _ in range(number)]  # stages
        # Paths are those of now, also if a process is started again from another folder.
        self._options = [] if load is None else ["--load", _from_anywhere(load)]
        if plan is not None:
            self._options += ["--plan", os.path.abspath(plan)]
        if secure is not None:
            self._options += ["--secure", str(secure.threshold)]
            if secure.identities is not None:
                self._options += ["--identities", _from_anywhere(secure.identities)]
        self._numbers = range(number)
        self._links = _links.start(self._numbers, self._options, timeout)
        self._finalizer = weakref.finalize(self, _links.stop, self._links)
        self._look(self._numbers)

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
        """Stops the processes. In a process that was forked from this one, it does nothing."""
        self._finalizer()

    def kill(self, process: int) -> None:
        """Kills a process, to try what happens then."""
        self._links[process].check_own()
        self._links[process].process.kill()
        self._links[process].process.wait()

    def restart(self, process: int) -> None:
        """Starts a process anew, for example because it has ended.

        Its clients load their data again. What else they held is lost, so a plan that needs it
        continues without these clients, or not at all.

        Raises:
          ClientError: if the process does not start.
        """
        self._links[process].check_own()
        with self._lock:
            _links.stop([self._links[process]])
            (self._links[process],) = _links.start([process], self._options, self._timeout)
            self._known[process] = set()
            self._look([process])

    def put(self, clients: Sequence[Hashable], rows: Sequence[Any]) -> list[Row]:
        made = [Row(client, next(self._slots)) for client in clients]
        requests = {
            process: {
                "clients": [clients[i] for i in own],
                "slots": [made[i].slot for i in own],
                "values": [rows[i] for i in own],
            }
            for process, own in self._by_host(clients).items()
        }
        self._ask("put", requests, lambda process, answer: False)
        return made

    def __reduce__(self) -> Any:
        raise TypeError(
            "fax.deploy.Processes cannot be pickled or copied: its processes answer only the one "
            "that started them. Make a backend in each process."
        )

    def _free_now(self) -> None:
        freed = self._take_freed()
        for process, own in self._by_host([client for client, _ in freed]).items():
            with contextlib.suppress(LinkError):  # then it holds nothing any more
                self._links[process].send("free", rows=[list(freed[i]) for i in own])

    def _ask(self, do: str, requests: Mapping[int, Mapping[str, Any]], read: Read) -> None:
        for process in requests:
            self._links[process].check_own()
        with self._lock:
            self._exchange(do, requests, read)

    def _exchange(self, do: str, requests: Mapping[int, Mapping[str, Any]], read: Read) -> None:
        self._free_now()
        failed: dict[int, LinkError] = {}
        asked: dict[int, Link] = {}
        for process, what in requests.items():
            if what.get("stage") in self._known[process]:
                what = {**what, "blob": None}
            try:
                self._links[process].send(do, **what)
                asked[process] = self._links[process]
            except LinkError as error:
                failed[process] = error
        enough = False

        def is_enough(process: int, answer: Any) -> bool:
            nonlocal enough
            if "stage" in requests[process]:
                self._known[process].add(requests[process]["stage"])
            try:
                enough = read(process, answer)
            except (ValueError, TypeError) as error:
                raise LinkError(f"sent what is not an answer: {error}") from error
            return enough

        failed |= _links.exchange(asked, self._timeout, is_enough)[1]
        if failed and not enough:
            raise self._failed(failed)


def _from_anywhere(name: str) -> str:
    """The name of a function, with the whole path if it is in a file."""
    module, _, function = name.rpartition(":")
    return f"{os.path.abspath(module)}:{function}" if module.endswith(".py") else name
