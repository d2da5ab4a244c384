"""Clients in processes of their own: they have JAX alone, and send what the plan says."""

import concurrent.futures
import io
import json
import multiprocessing.connection
import os
import pickle
import random
import signal
import socket
import struct
import sys
import threading
import types
import unittest.mock
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scripts
from processes import sends_at_once
from scripts import EXAMPLES

import fax
from fax import deploy
from fax.deploy import _client as runtime
from fax.deploy import _hosts, _learner_process, _links

CLIENTS = ["ann", "bob", "cleo"]
# What each process does: it holds rows that would be recognized anywhere.
DATA = """
import atexit, pathlib, sys
import numpy as np

CLIENTS = ["ann", "bob", "cleo"]

def rows(number):
    return {CLIENTS[number]: {"x": np.arange(4.0) + 1234.5 * (number + 1)}}

def at_exit():
    assert not any(name.split(".")[0] in ("fax", "flax", "optax") for name in sys.modules)
    pathlib.Path(__file__).with_name(f"left_{number_of_this}").touch()

def load(number):
    global number_of_this
    number_of_this = number
    atexit.register(at_exit)
    return rows(number)
"""


@fax.program(clients=3)
def squares(scale, x):
    return fax.mean(fax.map(lambda s, x: jnp.sum((s * x) ** 2), fax.broadcast(scale), x))


def steps(scale, rows):
    """Three steps of gradient descent, and the rows of a client that stay there."""
    step = jax.grad(lambda s: jnp.log(squares(s, rows["x"])))
    scale = jax.lax.fori_loop(0, 3, lambda i, s: s - 0.1 * step(s), scale)
    return scale, rows["x"] * scale


@pytest.fixture
def traffic(monkeypatch):
    """Everything that the server sends and receives."""
    found = []
    send, receive = _links.Link.send, _links.Link._answer

    def recorded_send(self, do, **what):
        found.append(runtime.encode(what))
        send(self, do, **what)

    def recorded_receive(self, message):
        for answer in receive(self, message):
            found.append(runtime.encode(answer))
            yield answer

    monkeypatch.setattr(_links.Link, "send", recorded_send)
    monkeypatch.setattr(_links.Link, "_answer", recorded_receive)
    return found


def test_data_never_leave(tmp_path, traffic):
    file = tmp_path / "own_data.py"
    file.write_text(DATA)
    names = {"__file__": str(file)}
    exec(DATA, names)
    rows = np.stack([names["rows"](i)[name]["x"] for i, name in enumerate(CLIENTS)])
    plan = deploy.cut(steps, 1.5, {"x": rows}, held=["x"])
    with deploy.Processes(3, load=f"{file}:load") as backend:
        held = backend.held()
        assert held["x"].clients == tuple(CLIENTS)
        assert held["x"].shape == (3, 4)
        found, own = plan.run(backend, 1.5, held)
        expected = jax.jit(steps)(1.5, {"x": rows})
        np.testing.assert_allclose(found, expected[0], rtol=1e-12)
        everything = b"".join(traffic)
        for row in rows:
            assert row.tobytes() not in everything
            assert all(struct.pack("d", x) not in everything for x in row)
        np.testing.assert_allclose(plan.fetch(backend, own), expected[1], rtol=1e-12)
    assert {f"left_{i}" for i in range(3)} <= {path.name for path in tmp_path.iterdir()}


@pytest.fixture(scope="module")
def processes():
    """Processes that tests share, because most of a start is importing JAX."""
    with deploy.Processes(3) as backend:
        yield backend


@pytest.fixture
def backend(processes):
    """Three processes, all of which run."""
    for number, link in enumerate(processes._links):
        if link.process.poll() is not None:
            processes.restart(number)
    return processes


def placed(backend, x):
    """An array whose rows are with clients 0, 1, 2 and so on."""
    clients = tuple(range(len(x)))
    return deploy.Held(tuple(backend.put(clients, list(x))), clients, x.shape, x.dtype)


def array_bytes(message):
    """The bytes of the arrays in a message."""
    (size,) = struct.unpack_from("<Q", message)
    return len(message) - 8 - size


def test_late_answers_are_ignored(backend, monkeypatch):
    """A process that stops for a while is left out, and takes part again later."""

    @fax.program(clients=3)
    def mean(rows):
        return fax.mean(rows["x"], weights=fax.map(lambda x: jnp.ones(()), rows["x"]))

    x = np.random.default_rng(0).normal(size=(3, 4))
    plan = deploy.cut(mean, {"x": x}, held=["x"])
    rows = {"x": placed(backend, x)}
    np.testing.assert_allclose(plan.run(backend, rows), x.mean(0))
    # Names like the positions of a cohort, which are an array.
    np.testing.assert_allclose(plan.run(backend, {"x": x}, clients=np.arange(3)), x.mean(0))
    process = backend._links[1].process
    process.send_signal(signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "_timeout", 1.0)
        for _ in range(2):
            np.testing.assert_allclose(plan.run(backend, rows, quorum=2), x[[0, 2]].mean(0))
    process.send_signal(signal.SIGCONT)
    monkeypatch.setattr(backend, "_timeout", 100.0)
    for _ in range(2):
        np.testing.assert_allclose(plan.run(backend, rows), x.mean(0))


def test_what_does_not_end_processes(backend):
    """A process that was forked neither uses nor ends them, and an interrupt is for the server."""
    with pytest.raises(TypeError, match=r"cannot be pickled.*Make a backend in each process"):
        pickle.dumps(backend)
    with warnings.catch_warnings(action="ignore"):  # this child uses no JAX
        child = os.fork()
    if not child:
        refused = 0
        try:
            uses = [lambda: backend.kill(0), lambda: backend.restart(0)]
            for use in [*uses, lambda: backend._links[0].send("about")]:
                with pytest.raises(RuntimeError, match="this one was forked"):
                    use()
                refused += 1
            backend.stop()
        finally:
            os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    for link in backend._links:  # as Ctrl-C does
        link.process.send_signal(signal.SIGINT)
    backend._look(backend._numbers)  # they still answer


def test_several_threads_run_plans(backend, monkeypatch):
    """Each gets the answers to its own requests."""
    x = np.random.default_rng(0).normal(size=(3, 4))
    plan = deploy.cut(lambda s, rows: squares(s, rows["x"]), 1.5, {"x": x}, held=["x"])
    rows = {"x": placed(backend, x)}
    monkeypatch.setattr(backend, "_timeout", 20.0)

    def run(scale):
        return scale, plan.run(backend, scale, rows)

    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        for scale, found in threads.map(run, np.arange(1.0, 31.0)):
            np.testing.assert_allclose(found, np.mean(np.sum((scale * x) ** 2, axis=1)))


def test_rows_are_freed_once_although_a_thread_sends_what_is_freed_meanwhile(backend):
    backend._free_now()
    sent = []

    def rows():
        yield 0, "a"
        sent.extend(backend._take_freed())  # as the other thread does, at this moment
        yield 0, "b"

    backend.free(rows())
    sent += backend._take_freed()
    assert sent == [(0, "a"), (0, "b")]


def test_the_server_does_not_delay_messages(backend):
    assert all(map(sends_at_once, backend._links))


def test_a_process_that_dies_is_noticed_and_traffic_is_the_audits(backend, traffic):
    x = np.random.default_rng(0).normal(size=(3, 4))
    plan = deploy.cut(
        squares_of_rows := (lambda s, r: squares(s, r["x"])), 1.5, {"x": x}, held=["x"]
    )
    rows = {"x": placed(backend, x)}
    plan.run(backend, 1.5, rows)
    traffic.clear()
    np.testing.assert_allclose(plan.run(backend, 1.5, rows), squares_of_rows(1.5, {"x": x}))
    (exchange,) = plan.audit().exchanges
    sent = sum(map(array_bytes, traffic))
    assert sent == exchange.clients * exchange.bytes("down", "row", "sum")
    backend.kill(1)
    with pytest.raises(deploy.ClientError, match=r"process 1 has ended with status -9.*\[1\]"):
        plan.run(backend, 1.5, rows)


def test_a_function_that_fails_says_so(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("def load(number):\n    raise SystemExit(7)\n")
    with pytest.raises(deploy.ClientError, match="ended at its start, with status 7"):
        deploy.Processes(1, load=f"{file}:load")


@pytest.mark.docs
def test_the_example(run):
    text = run(EXAMPLES / "hand_over.py", "--rounds", 20)
    assert "[1].batches['x']  only through sums over 3" in text
    pattern = r"training loss ([\d.]+), accuracy on all digits ([\d.]+)%"
    loss, accuracy = scripts.numbers(pattern, text)
    assert loss < 1
    assert accuracy > 70
    assert "process 1 has ended with status -9. Their clients: ['client 1']." in text


# Messages


MESSAGE = {
    "do": "run",
    "with": {
        "none": None,
        "list": [1, 2.5, "text", True],
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "short": np.ones(3, ml_dtypes.bfloat16),
        "empty": np.zeros((0, 2), np.float32),
        "bytes": b"\x00\xff",
        "scalar": np.float64(2.5),
    },
}


def test_messages_come_back():
    found = runtime.decode(runtime.encode(MESSAGE))
    assert found["do"] == "run"
    for name, value in MESSAGE["with"].items():
        own = found["with"][name]
        if isinstance(value, np.ndarray | np.generic):
            assert own.dtype == value.dtype
            np.testing.assert_array_equal(own, value)
        else:
            assert own == value
    key = jax.random.key(3, impl="rbg")
    own = runtime.decode(runtime.encode([key]))[0]
    assert jax.random.key_impl(own) == jax.random.key_impl(key)
    np.testing.assert_array_equal(jax.random.key_data(own), jax.random.key_data(key))


def test_other_byte_orders():
    (own,) = runtime.decode(runtime.encode([np.arange(3, dtype=">i4")]))
    np.testing.assert_array_equal(own, np.arange(3))


def test_messages_hold_no_objects():
    with pytest.raises(TypeError, match="cannot hold"):
        runtime.encode([object()])


def mutated(data, rng):
    """The bytes with one of them changed, some left out, or some more."""
    data, at = bytearray(data), rng.randrange(len(data))
    match rng.randrange(4):
        case 0:
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            del data[at:]
        case 2:
            del data[at : at + rng.randrange(1, 9)]
        case 3:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
    return bytes(data)


class Link:
    """A connection with requests that are known."""

    def __init__(self, requests):
        self.requests, self.answers = list(requests), []

    def recv_bytes(self, largest):
        if not self.requests:
            raise EOFError
        return self.requests.pop(0)

    def send_bytes(self, data):
        self.answers.append(runtime.decode(data))


def test_a_client_survives_wrong_messages(tmp_path):
    """Each of them gets an answer, and what the client holds is not changed by most of them."""
    plan = deploy.cut(lambda s, r: squares(s, r["x"]), 1.5, {"x": np.ones((3, 4))}, held=["x"])
    plan.save(tmp_path, ["cpu"])
    manifest = runtime.read_plan(tmp_path)
    (name,) = manifest["stages"]
    clients = runtime.Clients({"ann": {"x": np.arange(4.0)}}, manifest, tmp_path)
    job = ["ann", ["x"], [None]]
    what = {"stage": name, "shared": [np.float64(2.0), None], "jobs": [job]}
    right = runtime.encode({"number": 1, "do": "run", "with": what})
    rng = random.Random(0)
    wrong = [mutated(right, rng) for _ in range(1000)]
    link = Link([*wrong, right])
    runtime.serve(link, clients)
    assert len(link.answers) == 1001
    assert link.answers[-1]["result"] == [[np.sum((2 * np.arange(4.0)) ** 2)]]
    secret = np.arange(4.0).tolist()
    for answer in link.answers:
        assert set(answer) in ({"number", "error"}, {"number", "result"})
        if "result" in answer:  # a number of the request has changed
            assert np.shape(answer["result"]) == (1, 1)
        assert secret not in jax.tree.map(lambda x: np.asarray(x).tolist(), answer).values()


def test_arrays_that_are_too_large():
    (size,) = struct.unpack_from("<Q", data := runtime.encode([np.zeros(3)]))
    text = data[8 : 8 + size].replace(b"[3]", b"[3000000000000]")
    with pytest.raises(runtime.MessageError, match="too large"):
        runtime.decode(struct.pack("<Q", len(text)) + text + bytes(24))


LARGE = struct.pack("!iQ", -1, 2**60)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("!i", 4) + b"junk", "sent what is not an answer"),
        (struct.pack("!i", 10) + runtime.encode([]), "sent what is not an answer"),
        (struct.pack("!i", 100) + b"only half of it", "did not answer in time"),
        (LARGE, "sent a message that is too large"),
        (b"", "did not answer in time"),
    ],
    ids=["no message", "no number", "stopped", "too large", "silent"],
)
def test_a_client_that_answers_anything(data, message):
    own, other = multiprocessing.Pipe()
    link = _links.Link(types.SimpleNamespace(wait=lambda timeout: 0), own)
    os.write(other.fileno(), data)
    answers, failed = _links.exchange({3: link}, 0.1 if "in time" in message else 30.0)
    link.close()
    assert not answers
    assert message in str(failed[3])


def test_others_that_connect(monkeypatch):
    """Nobody waits for one who says nothing, and those without the key are sent away."""
    own = runtime.limit
    monkeypatch.setattr(runtime, "limit", lambda link, seconds: own(link, seconds and 0.2))

    def speak():
        with pytest.raises(multiprocessing.AuthenticationError):
            multiprocessing.connection.Client(listener.address, authkey=b"another")
        with multiprocessing.connection.Client(listener.address, authkey=b"key") as line:
            line.send_bytes(b"hello")

    with multiprocessing.connection.Listener(("127.0.0.1", 0)) as listener:
        socket.create_connection(listener.address).close()
        with socket.create_connection(listener.address):
            thread = threading.Thread(target=speak)
            thread.start()
            with _links._accept(listener, b"key", [], 10.0) as line:
                assert line.recv_bytes() == b"hello"
        thread.join()


@pytest.mark.parametrize("module", [runtime, _learner_process], ids=["client", "learner"])
def test_processes_do_not_delay_messages(module, monkeypatch):
    """The end of a message would wait for 40 ms until its beginning is confirmed."""
    found = []

    def serve(link, _):
        found.append(sends_at_once(getattr(link, "_link", link)))

    monkeypatch.setattr(module, "serve", serve)
    monkeypatch.setattr(_learner_process, "make", lambda *_: None)
    monkeypatch.setattr("sys.stdin", io.StringIO("key\n"))
    with multiprocessing.connection.Listener(("127.0.0.1", 0), authkey=b"key") as listener:
        arguments = ["main", "{}:{}".format(*listener.address), "--number", "0"]
        more = ["--make", "module:function"] if module is _learner_process else []
        monkeypatch.setattr("sys.argv", arguments + more)
        thread = threading.Thread(target=module.main)
        thread.start()
        with listener.accept() as link:
            link.recv_bytes()
            thread.join()
    assert found == [True]


def test_a_client_that_does_not_read():
    """Others are not delayed, and it gets the rest of what it was sent when it reads again."""
    (own, other), (prompt, client) = multiprocessing.Pipe(), multiprocessing.Pipe()
    links = {i: _links.Link(types.SimpleNamespace(), line) for i, line in enumerate([own, prompt])}
    links[0].send("put", values=[np.zeros(2**18)])
    links[1].send("about")
    reader = threading.Thread(target=runtime.serve, args=[client, runtime.Clients({})])
    reader.start()
    answers, failed = _links.exchange(links, 30.0, lambda number, answer: True)
    assert answers == {1: []}
    assert "did not answer in time" in str(failed[0])
    links[0].send("run")  # never arrives
    assert not _links.exchange({0: links[0]}, 0.1)[0]
    links[0].send("about")
    reader_of_rest = threading.Thread(target=runtime.serve, args=[other, runtime.Clients({})])
    reader_of_rest.start()
    answers, failed = _links.exchange({0: links[0]}, 30.0)
    assert answers == {0: []}
    for link in links.values():
        link.close()
    reader.join(30)
    reader_of_rest.join(30)


def test_a_client_that_sends_other_types():
    plan = deploy.cut(lambda s, r: squares(s, r["x"]), 1.5, {"x": np.ones((3, 4))}, held=["x"])
    (stage,) = plan.stages
    right = [[np.zeros((), np.float64)]] * 2
    _hosts.check_answer(stage, ["ann", "bob"], right)
    for wrong in (None, right[:1], [[1.0]] * 2, [[np.zeros(1)]] * 2, [[np.float32(0)]] * 2):
        with pytest.raises(ValueError, match=r"for each.*float64\[\]"):
            _hosts.check_answer(stage, ["ann", "bob"], wrong)


def test_what_clients_hold_is_in_dtypes_of_jax():
    """Without 64 bits, NumPy's own are made shorter, as in a program. Nothing else changes."""
    data = {np.int64(3): {"x": np.array([0.1, np.inf]), "n": 40, 1: [True]}}
    clients = runtime.Clients(data)
    with jax.enable_x64(False):
        about = [[3, "x", "float32", [2]], [3, "n", "int32", []], [3, "1", "bool", [1]]]
        assert clients.do_about() == about
        (row,) = clients.do_fetch([[3, "x"]])
        assert row.dtype == np.float32
        for wrong in (np.array([2**40]), np.array([1e300])):
            with pytest.raises(
                runtime.RefusedError, match=r"do not fit .* set jax_enable_x64"
            ) as e:
                runtime.Clients({"ann": {"x": wrong}}).do_about()
            assert str(wrong[0]) not in str(e.value)  # which the server reads
    whether = [False, True]  # the server's setting counts, also if it has changed
    requests = [{"number": 1, "do": "about", "with": {}, "x64": x64} for x64 in whether]
    link = Link(map(runtime.encode, requests))
    runtime.serve(link, clients)
    assert [answer["result"][0][2] for answer in link.answers] == ["float32", "float64"]
    link = Link(map(runtime.encode, requests))
    runtime.serve(link, runtime.Clients({frozenset(): {"x": np.ones(3)}}))
    says = {"number": 1, "error": "TypeError: a message cannot hold a frozenset"}
    assert link.answers == [says, says]  # and it goes on
    with pytest.raises(runtime.RefusedError, match="'x' of the client 'ann' is <U6, expected num"):
        runtime.Clients({"ann": {"x": np.array(["secret"])}}).do_about()
    with pytest.raises(TypeError, match=r"not a dict of dicts, expected {client: {name: array}}"):
        runtime.Clients({"x": np.ones(3)})


def test_functions_of_clients(tmp_path):
    (tmp_path / "beside_it.py").write_text("VALUE = 5")
    file = tmp_path / "own.py"
    file.write_text("from beside_it import VALUE\n\ndef load(number):\n    return number + VALUE")
    with unittest.mock.patch("sys.path", sys.path[:]):
        assert runtime.load(f"{file}:load", 2) == 7
        with pytest.raises(AttributeError, match=r"own.py has no function 'nothing'"):
            runtime.load(f"{file}:nothing", 2)
    with pytest.raises(ModuleNotFoundError, match=r"name the file, not_there.py:load, or set PYTH"):
        runtime.load("not_there:load", 2)
    with pytest.raises(ValueError, match=r'load is .own.py., expected "module:function"'):
        deploy.Processes(1, load="own.py")


ABOUT = [["ann", "x", "float64", [4]], ["bob", "x", "float64", [4]]]


@pytest.mark.parametrize(
    "wrong",
    [None, 1, [1], [[["ann"], "x", "float64", [4]]], [[None, "x", "float64", [4]]]]
    + [[["ann", "x", dtype, shape]] for dtype, shape in [("junk", [4]), ("float64", [np.inf])]],
    ids=str,
)
def test_what_clients_have_loaded(wrong):
    class Backend(_hosts.Hosts):
        _numbers = (0,)

        def _ask(self, do, requests, read):
            read(0, self.answer)

    backend = Backend(None)
    backend.answer = ABOUT
    backend._look([0])
    assert backend.held()["x"].shape == (2, 4)
    names = backend.held(np.array(["bob", "ann"]))["x"].clients
    assert [(type(name), name) for name in names] == [(str, "bob"), (str, "ann")]
    backend.answer = wrong
    with pytest.raises((TypeError, ValueError)):  # which counts as a failure of the host
        backend._look([0])
    assert backend.held()["x"].clients == ("ann", "bob")


def test_a_server_whose_message_is_too_large():
    own, other = multiprocessing.Pipe()
    os.write(other.fileno(), LARGE)
    runtime.serve(own, runtime.Clients({}))  # ends


# Saved plans


@fax.program(clients=3)
def sines(rows, function=jnp.sin):
    stays = fax.map(function, rows["x"])
    return fax.sum(fax.map(jnp.sum, stays)), stays


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan") / "squares"

    plan = deploy.cut(sines, {"x": np.ones((3, 4))}, held=["x"])
    plan.save(folder)
    return folder, plan


def test_what_is_saved(saved):
    folder, plan = saved
    manifest = json.loads((folder / "plan.json").read_text())
    assert manifest["format"] == 1
    assert manifest["platforms"] == ["cpu", "cuda", "tpu"]
    assert manifest["statements"] == {"[0]['x']": "only through sums over 3"}
    (stage,) = manifest["stages"].values()
    assert sorted(stage["outputs"]) == ["placed", "sum"]
    assert (folder / "audit.txt").read_text() == f"{plan.audit()}\n"
    with pytest.raises(FileExistsError, match="not empty"):
        plan.save(folder)
    for platforms in ("cpu", [], ["cpu", "gpus"]):
        with pytest.raises(ValueError, match=r"platforms is .*, expected a list with some of"):
            plan.save(folder / "other", platforms=platforms)
    assert not (folder / "other").exists()


def test_processes_with_a_plan(saved):
    folder, plan = saved
    x = np.random.default_rng(0).normal(size=(3, 4))
    other = deploy.cut(lambda rows: squares(2.0, rows["x"]), {"x": x}, held=["x"])
    cosines = deploy.cut(lambda rows: sines(rows, jnp.cos), {"x": x}, held=["x"])
    with deploy.Processes(1, plan=folder) as backend:
        total, stays = plan.run(backend, {"x": x})
        np.testing.assert_allclose(total, np.sin(x).sum())
        with pytest.raises(deploy.ClientError, match="fetches no rows"):
            plan.fetch(backend, stays)
        for program in (other, cosines):
            with pytest.raises(deploy.ClientError, match="is not in the plan of these processes"):
                program.run(backend, {"x": x})
        deploy.cut(sines, {"x": x}, held=["x"]).run(backend, {"x": x})  # traced again
        rows = {"x": placed(deploy.InProcess(), x)}  # not taken for rows of the same number
        with pytest.raises(deploy.ClientError, match=r"LostError: the client 0 has no value"):
            plan.run(backend, rows)


def test_plans_with_other_constants():
    """Those of jitted functions are in their jaxprs, and not in the text of these."""

    def digest(weights):
        function = jax.jit(lambda x: weights * x)
        plan = deploy.cut(lambda rows: sines(rows, function), {"x": np.ones((3, 4))}, held=["x"])
        return plan.stages[0].digest

    weights = np.arange(4.0)
    assert digest(weights) == digest(weights.copy())  # traced again
    assert digest(weights) != digest(weights + 1)


def test_what_a_client_with_a_plan_refuses(saved, tmp_path):
    folder, _ = saved
    manifest = runtime.read_plan(folder)
    ((name, stage),) = manifest["stages"].items()
    clients = runtime.Clients({0: {"x": np.ones(4)}}, manifest, folder)
    keeps = ["kept" if mode == "placed" else None for mode in stage["outputs"]]

    def run(keep, stage=name, **blob):
        request = {"stage": stage, "shared": [None], "jobs": [[0, ["x"], keep]], **blob}
        return clients.answer({"do": "run", "with": request})

    np.testing.assert_allclose(run(keeps)[0], [4 * np.sin(1.0)])
    with pytest.raises(runtime.RefusedError, match="stays with the client"):
        run([None, None])
    with pytest.raises(runtime.RefusedError, match="unknown"):
        run(keeps, "0" * 64)
    with pytest.raises(runtime.RefusedError, match="fetches no rows"):
        clients.answer({"do": "fetch", "with": {"rows": [[0, "kept"]]}})
    for do, what in (
        ("put", {"clients": [0], "slots": ["x"], "values": [np.zeros(4)]}),
        (
            "run",
            {"stage": name, "shared": [None], "jobs": [[0, ["x"], [k and "x" for k in keeps]]]},
        ),
    ):
        with pytest.raises(runtime.RefusedError, match="data would be replaced"):
            clients.answer({"do": do, "with": what})
    clients.answer({"do": "free", "with": {"rows": [[0, "x"]]}})
    np.testing.assert_allclose(run(keeps)[0], [4 * np.sin(1.0)])
    blob = (folder / stage["file"]).read_bytes()
    with pytest.raises(runtime.RefusedError, match="not in the plan"):
        run(keeps, blob=blob)
    outside = {"stages": {name: stage | {"file": f"../{folder.name}/{stage['file']}"}}}
    with pytest.raises(runtime.RefusedError, match="not a file in the plan's folder"):
        runtime.Clients({}, outside, folder)
    for part in folder.iterdir():
        (tmp_path / part.name).write_bytes(part.read_bytes())
    (tmp_path / stage["file"]).write_bytes(blob[:-1])
    with pytest.raises(runtime.RefusedError, match="not what the plan's manifest says"):
        runtime.Clients({}, manifest, tmp_path)


def test_a_plan_of_another_format(tmp_path):
    (tmp_path / "plan.json").write_text('{"format": 2}')
    with pytest.raises(
        runtime.RefusedError, match=r"format 2, expected 1. Another version of fax saved it"
    ):
        runtime.read_plan(tmp_path)
    no_types = '{"format": 1, "fetches": false, "stages": {"a": {"file": "a"}}}'
    for text in ('{"format": 1', "[1]", "{}", '{"format": 1}', no_types):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(runtime.RefusedError, match=r"plan.json is damaged, or not that of a"):
            runtime.read_plan(tmp_path)
