"""Secure sums of processes: they have JAX and cryptography alone, and send nothing else."""

import json
import struct
import sys

import numpy as np
import pytest
from local_hosts import identities_of

import fax
from fax import deploy
from fax.deploy import _client as runtime
from fax.deploy import _links

CLIENTS = ["ann", "bob", "cleo", "dora", "emil", "fred"]
ROWS = np.random.default_rng(0).integers(2**40, 2**41, (6, 4))  # which would be recognized anywhere
# What each process does.
DATA = """
import atexit, json, pathlib, sys
import numpy as np

HERE = pathlib.Path(__file__).parent

def at_exit():
    assert not any(name.split(".")[0] in ("fax", "flax", "optax") for name in sys.modules)
    HERE.joinpath(f"left_{number_of_this}").touch()

def clients(number):
    return json.loads((HERE / "clients.json").read_text())[number]

def load(number):
    global number_of_this
    number_of_this = number
    atexit.register(at_exit)
    rows = np.load(HERE / "rows.npz")
    return {client: {"x": rows[client]} for client in clients(number)}

def identities(number):
    keys = json.loads((HERE / "identities.json").read_text())
    private, public = ({c: bytes.fromhex(key) for c, key in own.items()} for own in keys)
    return {client: private[client] for client in clients(number)}, public
"""


@fax.program(clients=6)
def total(rows):
    doubled = fax.map(lambda x: 2 * x, rows["x"])
    return fax.sum(doubled), doubled


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clients")
    (path / "own_data.py").write_text(DATA)
    (path / "clients.json").write_text(json.dumps([CLIENTS[:2], CLIENTS[2:4], CLIENTS[4:]]))
    np.savez(path / "rows.npz", **dict(zip(CLIENTS, ROWS)))
    keys = [{c: key.hex() for c, key in own.items()} for own in identities_of(CLIENTS)]
    (path / "identities.json").write_text(json.dumps(keys))
    return path


def test_processes(folder, monkeypatch):
    """Sums are exact, also if a process is killed in one, and no rows are ever sent."""
    traffic, killed = [], []
    send, receive = _links.Link.send, _links.Link._answer

    def recorded_send(link, do, **what):
        if do == "secure_run" and killed:
            killed.pop().kill(1)
        traffic.append(runtime.encode(what))
        send(link, do, **what)

    def recorded_receive(link, message):
        traffic.append(message)
        yield from receive(link, message)

    monkeypatch.setattr(_links.Link, "send", recorded_send)
    monkeypatch.setattr(_links.Link, "_answer", recorded_receive)

    plan = deploy.cut(total, {"x": ROWS}, held=["x"])
    plan.save(folder / "plan", ["cpu"])
    file = folder / "own_data.py"
    secure = deploy.SecureSums(0.5, identities=f"{file}:identities")
    with deploy.Processes(3, load=f"{file}:load", plan=folder / "plan", secure=secure) as backend:
        held = backend.held()
        found, doubled = plan.run(backend, held)
        np.testing.assert_array_equal(found, 2 * ROWS.sum(0))
        killed.append(backend)
        found, own = plan.run(backend, held, quorum=4)
        np.testing.assert_array_equal(found, 2 * ROWS[[0, 1, 4, 5]].sum(0))
        assert own.present == ("ann", "bob", "emil", "fred")
        with pytest.raises(deploy.ClientError, match="RefusedError: this client sends no rows"):
            plan.fetch(backend, doubled)
        link = backend._links[0]
        (stage,) = plan.stages
        what = {"stage": stage.artifact(["cpu"])[0], "shared": [None]}
        for keep in ([None, None], [None, "y"]):
            link.send("run", **what, jobs=[["ann", ["x"], keep]])
            answers, failed = _links.exchange({0: link}, 100.0)
            assert not answers
            assert "this client sends no results as they are, only masked sums" in str(failed[0])
    everything = b"".join(traffic)
    for row in [*ROWS, *(2 * ROWS)]:
        assert all(struct.pack("<q", x) not in everything for x in row)
    assert {path.name for path in folder.glob("left_*")} == {"left_0", "left_2"}


def test_what_is_no_setting():
    with pytest.raises(TypeError, match=r"fax.deploy.Processes: secure is 0.5, expected a"):
        deploy.Processes(1, secure=0.5)


def test_without_the_package(monkeypatch):

    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fax-jax\[secure\]'"):
        deploy.SecureSums()
