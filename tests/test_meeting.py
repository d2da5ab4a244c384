"""How processes connect: unknown connections, tokens, numbers and addresses."""

import contextlib
import json
import re
import secrets
import select
import socket
import threading
import time
import warnings

import pytest
from processes import free_port

import fax
from fax.sharding import _address, _connection, _distributed, _handshake, _joining, _meeting, _peers

TOKEN = "a token of this test, and of no other"


class Meeting(threading.Thread):
    """A process that meets others, here in a thread."""

    def __init__(self, port, me, count=2, timeout=20.0, host="127.0.0.1", token=TOKEN, **options):
        super().__init__()
        self._call = (f"{host}:{port}", count, me, timeout), {"token": token, **options}
        self.result = None
        self.start()

    def run(self):
        arguments, options = self._call
        try:
            self.result = _peers.meet(*arguments, **options)
        except RuntimeError as error:
            self.result = str(error)


def outcomes(*meetings):
    """The errors, or "met"."""
    found = []
    for meeting in meetings:
        meeting.join()
        for peer in getattr(meeting.result, "_peers", {}).values():
            peer.socket.close()
        found.append(meeting.result if isinstance(meeting.result, str) else "met")
    return found


def connected(port, host="127.0.0.1"):
    """A socket to process 0, as soon as that listens."""
    while True:
        with contextlib.suppress(OSError):
            return socket.create_connection((host, port), timeout=10)
        time.sleep(0.01)


def known(port, me, count=2, token=TOKEN):
    """A connection that process 0 has let in, with nobody behind it."""
    connection = _connection.Connection(connected(port))
    key, deadline = _handshake.run_key(token, ""), time.monotonic() + 10
    assert _joining._introduce(connection, count, me, key, deadline) == ""
    return connection


# Strangers


def hello(nonce, token=TOKEN, **changed):
    """What process 1 of 2 says."""
    said = {"nonce": secrets.token_hex(16), "process": 1, "of": 2, "host": "here"} | changed
    order = [said[name] for name in ("nonce", "process", "of", "host")]
    proof = _handshake.proof(_handshake.run_key(token, ""), "hello", nonce, *order)
    return {"fax": _handshake.VERSION, "proof": proof, **said} | changed


STRANGERS = {
    "silent": lambda nonce: b"",
    "half a line": lambda nonce: b'{"process": 1, ',
    "another protocol": lambda nonce: b"GET / HTTP/1.1\r\n\r\n",
    "a length and garbage": lambda nonce: (64).to_bytes(4, "big") + secrets.token_bytes(60) + b"\n",
    "too long": lambda nonce: b"x" * (1 << 18),
    "too deep": lambda nonce: b"[" * 60_000 + b"\n",
    "no text": lambda nonce: b'{"process": "\xff\xfe"}\n',
    "no dict": lambda nonce: b"[]\n\n1e999\nNaN\n",
    "nothing that is due": lambda nonce: b"{}\n",
    "what fax 1 said": lambda nonce: b'{"process": 1, "of": 2, "host": "here"}\n',
    "a proof of strange letters": lambda nonce: (
        json.dumps(hello(nonce) | {"proof": "\u00e9\ud800" * 32}).encode() + b"\n"
    ),
    "a proof that is no text": lambda nonce: json.dumps(hello(nonce, proof=[1])).encode() + b"\n",
    "another number than is proved": lambda nonce: (
        json.dumps(hello(nonce, process=0) | {"process": 1}).encode() + b"\n"
    ),
    "another token": lambda nonce: json.dumps(hello(nonce, token="x" * 20)).encode() + b"\n",
    "another version": lambda nonce: json.dumps(hello(nonce, fax=1)).encode() + b"\n",
    "numbers that are none": lambda nonce: json.dumps(hello(nonce, process=1.0)).encode() + b"\n",
}


def test_strangers_neither_end_nor_delay_the_start():
    port = free_port()
    first = Meeting(port, 0)
    with contextlib.ExitStack() as stack:
        for words in STRANGERS.values():
            stranger = stack.enter_context(connected(port))
            nonce = json.loads(stranger.makefile().readline())["nonce"]
            with contextlib.suppress(OSError):  # it has enough
                stranger.sendall(words(nonce))
        for _ in range(2 * _meeting._MAX_UNKNOWN):  # some of whom have to go, so that others come
            stack.enter_context(connected(port))
        assert outcomes(first, Meeting(port, 1)) == ["met", "met"]


def test_what_was_overheard_is_of_no_use():
    port = free_port()
    first = Meeting(port, 0)
    overheard = b""
    for _ in range(2):
        with connected(port) as stranger:
            nonce = json.loads(stranger.makefile().readline())["nonce"]
            overheard = overheard or json.dumps(hello(nonce)).encode() + b"\n"
            stranger.sendall(overheard)
            heard = stranger.makefile().readline()
    assert heard == ""
    assert outcomes(first, Meeting(port, 1)) == ["met", "met"]


def test_a_stranger_in_the_place_of_process_0_is_not_believed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        rank = Meeting(server.getsockname()[1], 1, timeout=1)
        peer, _ = server.accept()
        with peer:
            peer.sendall(b'{"fax": 2, "nonce": "00"}\n')
            peer.makefile().readline()
            peer.sendall(b'{"welcome": 1}\n{"go": 1}\n{"refused": "all of you"}\n')
            (message,) = outcomes(rank)
    assert "the server at this address did not answer as process 0 of this run" in message


def test_processes_of_other_runs_are_strangers():
    port = free_port()
    others = {"token": {"token": "y" * 16}, "job": {"job": "OMPI 2"}, "no token": {"token": None}}
    first = Meeting(port, 0, timeout=1.5)
    late = [Meeting(port, 1, timeout=1.0, **options) for options in others.values()]
    missing, *refused = outcomes(first, *late)
    assert "but process 1 did not connect" in missing
    assert re.search(
        r"connections were rejected, the last from 127.0.0.1, which did not know the tok", missing
    )
    for message in refused:
        assert "it has another token, or belongs to another run" in message


def test_what_processes_print_of_each_other_is_harmless():
    assert _connection.printable("\x1b[2Jhost\r\n\ud800\u202e" + "x" * 500) == "[2Jhost" + "x" * 288


# Numbers


def test_a_process_that_was_started_again_takes_its_place():
    port = free_port()
    first = Meeting(port, 0, count=3)
    known(port, 1, 3).socket.close()  # died
    cut_off = known(port, 1, 3)  # without a word
    again = Meeting(port, 1, count=3)
    assert outcomes(first, again, Meeting(port, 2, count=3)) == ["met"] * 3
    cut_off.socket.close()


def test_a_double_is_refused_whoever_comes_first():
    port = free_port()
    first, *doubles = [Meeting(port, 0, count=3), *(Meeting(port, 2, count=3) for _ in range(2))]
    messages = outcomes(first, *doubles)
    assert all("two processes have process_id 2: one on" in message for message in messages)
    coordinator = Meeting(port, 0, count=3)
    other = known(port, 0, 3)
    (message,) = outcomes(coordinator)
    other.socket.close()
    assert "two processes have process_id 0: one on the coordinator, one on" in message


def test_one_who_came_and_does_not_answer_is_named():
    port = free_port()
    first = Meeting(port, 0, count=3, timeout=1)
    silent = known(port, 1, 3)
    second = Meeting(port, 2, count=3)
    messages = outcomes(first, second)
    silent.socket.close()
    assert all("for 2 others, but process 1 did not answer" in message for message in messages)


# Addresses


def test_process_0_listens_at_its_address_only(monkeypatch):
    port = free_port()
    first = Meeting(port, 0)
    rank = Meeting(port, 1)
    first.join()
    assert first.result.bind == f"127.0.0.1:{port}"
    assert outcomes(first, rank) == ["met", "met"]
    listeners = _address.listen(f"127.0.0.1:{port}")
    with listeners[0]:
        assert [x.getsockname() for x in listeners] == [("127.0.0.1", port)]
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", port), timeout=5)


def test_names_and_addresses_of_both_kinds():
    port = free_port()
    for host in ("localhost", *(["[::1]"] if socket.has_dualstack_ipv6() else [])):
        first, rank = Meeting(port, 0, host=host), Meeting(port, 1, host=host)
        first.join()
        assert re.fullmatch(rf"(127.0.0.1|\[::1\]):{port}", first.result.bind)
        assert outcomes(first, rank) == ["met", "met"]


def test_addresses_where_process_0_cannot_listen(monkeypatch):
    with pytest.raises(RuntimeError, match=r"192.0.2.1 is not an address of its .*BIND_ADDRESS"):
        _address.listen("192.0.2.1:4000")
    with pytest.raises(RuntimeError, match=r"cannot find the address of 'no\.such\.host"):
        _address.listen("no.such.host.invalid:4000")
    port = free_port()
    with pytest.raises(RuntimeError, match=r"cannot find the address of 'a\.\.b'"):
        _address.listen("a..b:4000")
    (message,) = outcomes(Meeting(port, 1, timeout=0.3, host="a..b"))
    assert "could not connect to process 0 at a..b" in message
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "7")
    with pytest.raises(ValueError, match="JAX_COORDINATOR_BIND_ADDRESS is '7', expected the host"):
        _distributed._check("192.0.2.1:4000", 2, 0)
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", f"127.0.0.1:{port}")
    (listener,) = _address.listen("192.0.2.1:4000")
    with listener:
        assert listener.getsockname() == ("127.0.0.1", port)
        assert _address.bind_address([listener], []) is None  # JAX reads the variable, too


def test_a_machine_that_calls_itself_loopback_is_reached_by_others(monkeypatch):
    def find(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", find)
    monkeypatch.setattr(socket, "gethostname", lambda: "node7.cluster")
    port = free_port()
    for host, everywhere in (("node7", True), ("localhost", False), ("node8", False)):
        (listener,) = _address.listen(f"{host}:{port}")
        with listener:
            assert (listener.getsockname()[0] in ("::", "0.0.0.0")) == everywhere


def test_without_a_token_others_are_warned_of():
    with pytest.warns(UserWarning, match="there is no token. Set FAX_TOKEN to the same secret"):
        _peers.meet(f"0.0.0.0:{free_port()}", 1, 0, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _peers.meet(f"127.0.0.1:{free_port()}", 1, 0, 5)
        _peers.meet(f"0.0.0.0:{free_port()}", 1, 0, 5, token=TOKEN)


def test_tokens_and_ports_that_cannot_be(monkeypatch):
    start = fax.sharding.initialize
    with pytest.raises(ValueError, match="token has 5 characters, expected a str of at least 16"):
        _distributed._token("short")
    with pytest.raises(ValueError, match="token is not a str"):
        _distributed._token(b"x" * 20)
    monkeypatch.setenv("FAX_TOKEN", "")
    with pytest.raises(ValueError, match="environment variable FAX_TOKEN has 0 characters"):
        _distributed._token(None)
    assert _distributed._token(TOKEN) == TOKEN
    monkeypatch.setenv("FAX_TOKEN", TOKEN + "!")
    assert _distributed._token(None) == TOKEN + "!"
    for port in (0, 65536):
        with pytest.raises(ValueError, match="expected a port from 1 to 65535"):
            _distributed._check(f"localhost:{port}", 2, 0)
    assert start.__kwdefaults__["token"] is None


def test_jobs_of_launchers_are_told_apart():
    slurm = {
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",
        "SLURM_STEP_NODELIST": "n",
        "SLURM_JOB_ID": "7",
    }
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    jobs = [
        _distributed.job_of(env)
        for env in (
            slurm,
            slurm | {"SLURM_STEP_ID": "1"},
            slurm | {"SLURM_JOB_ID": "8"},
            mpi | {"PMIX_NAMESPACE": "7"},
            mpi | {"PMIX_NAMESPACE": "8"},
        )
    ]
    assert len(set(jobs)) == 5
    assert _distributed.job_of(slurm | {"SLURM_PROCID": "1"}) == jobs[0]
    assert {_distributed.job_of(env) for env in ({}, mpi, {"SLURM_JOB_ID": "7"})} == {""}


def test_a_process_that_fails_ignores_its_own_news(monkeypatch):
    """Process 0 passes it on to everybody, also to the process that sent it."""

    def end(self, news):
        raise SystemExit(news)

    monkeypatch.setattr(_peers.Watch, "_exit", end)
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = _connection.Connection(socket.create_connection(server.getsockname()))
        ours = _connection.Connection(server.accept()[0])
    watch = _peers.Watch(1, {0: ours})
    with contextlib.closing(ours.socket), contextlib.closing(theirs.socket):
        for leaving, lost in ((True, contextlib.nullcontext()), (False, pytest.raises(SystemExit))):
            watch._leaving = leaving
            theirs.send(gone="process 1 failed")
            assert select.select([ours.socket], [], [], 10)[0]
            with lost:
                watch._receive(0)
