"""Plans on Flower: its SuperLink and SuperNodes, on this machine."""

import hashlib
import json
import random
import re
import struct
import sys
import threading
from multiprocessing import connection

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("flwr", reason="Flower is not installed; see make test-flower")

import deploys
import federations
import scripts
import test_deploy_algorithms as plans
import tpus
from flwr.app import RecordDict
from local_grids import LocalGrid, ending
from processes import sends_at_once

import fax
from fax import deploy
from fax.deploy import _client as runtime
from fax.deploy import _flower_client as wire

RESULTS = ("fedavg", "scaffold", "mean")


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The app of the tests, with fax's files for clients."""
    with federations.app_in(tmp_path_factory.mktemp("flower"), "flower_app", "app") as app:
        yield app


def test_a_federation(app, tmp_path):
    """Two algorithms equal the jitted functions, and a node that is killed is left out."""
    configs = [f"partition-id={client}" for client in range(3)]
    with federations.federation(tmp_path, configs) as here:
        victim = here.nodes[1].pid
        here.run(app, timeout=600, folder=str(tmp_path), victim=victim)
        assert (tmp_path / "done").exists(), here.logs
        traffic = b"".join(here.traffic)
    results = {name: list(np.load(tmp_path / f"{name}.npz").values()) for name in RESULTS}

    from app import data, programs

    rows = [data.rows(client) for client in range(3)]
    stacked = {name: np.stack([own[name] for own in rows]) for name in rows[0]}
    cohorts = [programs.cohort(stacked, number) for number in range(2)]
    fedavg, scaffold = programs.fedavg(), programs.scaffold()
    for name, algorithm, program, args in (
        ("fedavg", fedavg, fedavg.round, cohorts[:1]),
        ("scaffold", scaffold, programs.two_rounds(scaffold), cohorts),
    ):
        state, metrics = jax.jit(program)(algorithm.init(programs.PARAMS), *args)
        expected = jax.tree.leaves((state, metrics["loss"]))
        for own, other in zip(results[name], expected, strict=True):
            np.testing.assert_allclose(own, programs.plain(other), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(results["mean"][0], (stacked["x"][[0, 2]] ** 2).mean(0))

    seen = {path.name for path in tmp_path.iterdir()}
    assert {"message", *(f"loaded {client}" for client in range(3))} <= seen
    assert not [name for name in seen if "imported" in name]
    for own in rows:
        assert own["x"].tobytes() not in traffic
        assert all(struct.pack("d", x) not in traffic for x in own["x"].ravel())
    assert (rows[0]["x"] ** 2).tobytes() in traffic  # which is what a client sends
    federations.check_ended(tmp_path)


@pytest.mark.long  # `test_secure_sums` does this without Flower's servers
def test_a_federation_with_secure_sums(app, tmp_path, monkeypatch):
    """Rounds of FedAvg as secure sums, of all nodes and without one that is killed in the sum."""
    monkeypatch.setitem(federations.ENV, "FAX_TESTS_SECURE", "1")
    configs = [f"partition-id={client}" for client in range(3)]
    with federations.federation(tmp_path, configs) as here:
        here.run(app, timeout=600, folder=str(tmp_path), victim=here.nodes[1].pid, secure=True)
        assert (tmp_path / "done").exists(), here.logs

    from app import data, programs

    rows = [data.rows(client) for client in range(3)]
    stacked = {name: np.stack([own[name] for own in rows]) for name in rows[0]}
    state, step = programs.secure_fedavg()
    for name, kept in (("all", [1, 1, 1]), ("without", [1, 0, 1])):
        left = stacked | {"num_examples": stacked["num_examples"] * np.int32(kept)}
        expected = jax.jit(step)(state, programs.cohort(left, 0))
        found = np.load(tmp_path / f"{name}.npz").values()
        for own, other in zip(found, jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(own, programs.plain(other), rtol=1e-6, atol=1e-6)
    federations.check_ended(tmp_path)


# Without Flower's servers

CONFIGS = [{"partition-id": i} for i in range(3)]


@pytest.fixture(scope="module")
def grid(app):
    """Makes a grid with a node for each configuration, whose workers end with the tests."""
    from app import fax_client

    with ending(fax_client) as made:

        def make(*configs, load=None, **options):
            made.append(LocalGrid(fax_client.client_app(load, **options), configs))
            return made[-1]

        yield make


def test_messages_to_workers_are_not_delayed(app):
    from app import fax_client

    with connection.Listener(("127.0.0.1", 0), authkey=b"key") as listener:
        thread = threading.Thread(target=lambda: listener.accept().close())
        thread.start()
        with fax_client._link_to(listener.address[1], b"key") as link:
            assert sends_at_once(link)
        thread.join()


VALUES = {
    "bfloat16": np.array([1.5, -2.25, np.nan], ml_dtypes.bfloat16),
    "float8": np.array([0.5, 448], ml_dtypes.float8_e4m3fn),
    "int4": np.arange(-8, 8).astype(ml_dtypes.int4),
    "float16": np.array([[65504, 6e-8]], np.float16),
    "float64": np.array(np.pi),
    "int64": np.array([2**62 + 1]),
    "uint32": np.array([2**32 - 1], np.uint32),
    "bool": np.array([True, False]),
    "complex64": np.array([1 - 2j], np.complex64),
    "empty": np.zeros((0, 3), np.float32),
    "float0": np.zeros((2,), jax.dtypes.float0),
    "key": jax.random.key(3),
    "rbg key": jax.random.key(3, impl="rbg"),
}


def test_nothing_is_converted(grid):
    """Values keep their types and bits on the way to a client and back, and in its state."""
    here = grid({})
    backend = deploy.Flower(here, 1)
    rows = backend.put(["ann"] * len(VALUES), list(VALUES.values()))
    for _ in range(2):
        for own, (name, value) in zip(backend.fetch(rows), VALUES.items(), strict=True):
            if "key" in name:
                assert jax.random.key_impl(own) == jax.random.key_impl(value)
                own, value = jax.random.key_data(own), jax.random.key_data(value)
            assert own.dtype == value.dtype
            assert own.shape == value.shape
            assert np.asarray(own).tobytes() == np.asarray(value).tobytes()
        here.kill_worker(100)
    backend.free((row.client, row.slot) for row in rows)
    backend.fetch(backend.put(["ann"], [np.ones(1)]))
    assert len(here.states[100]["fax.values"]) == 1


@fax.program(clients=3)
def total(rows):
    ones = fax.map(lambda x: jnp.ones(()), rows["x"])
    kept = fax.map(lambda x: 2 * x, rows["x"])
    return fax.mean(kept, weights=ones), kept


CONFIGS = [{"partition-id": i, "log": ""} for i in range(3)]


@pytest.fixture(scope="module")
def three(grid):
    """Three nodes with a client each, a plan, and the clients' rows."""
    here = grid(*CONFIGS, load="app.data:load")
    backend = deploy.Flower(here, 3, timeout=60.0)
    from app import data

    x = np.stack([data.rows(client)["x"] for client in range(3)])
    held = {"x": backend.held()["x"]}
    return here, backend, deploy.cut(total, held, held=["x"]), held, x


def test_nodes_that_fail(three):
    here, backend, plan, held, x = three
    found, kept = plan.run(backend, held)
    np.testing.assert_allclose(found, 2 * x.mean(0))
    # The worker of a node is ahead of the node's state, or has ended and gets it from there.
    del here.states[100]["fax.values"]
    here.kill_worker(101)
    np.testing.assert_allclose(plan.fetch(backend, kept), 2 * x)

    def run_without(node):
        with pytest.raises(deploy.ClientError, match=rf"node {node} .*: \[{node - 100}\]") as error:
            plan.run(backend, held)
        left = [i for i in range(3) if i != node - 100]
        found, rows = plan.run(backend, held, quorum=2)
        np.testing.assert_allclose(found, 2 * x[left].mean(0))
        assert rows.rows[node - 100] is None
        return str(error.value)

    right = here.apps[101]

    def broken(message, context):
        raise ZeroDivisionError("out of order")

    here.apps[101] = broken
    del kept  # which is freed when the node works again
    assert "node 101 failed: <class 'ZeroDivisionError'>:<'out of order'>" in run_without(101)
    here.apps[101] = right
    for _ in range(2):
        plan.run(backend, held)
    assert len(here.states[101]["fax.values"]) == 1  # the last run's
    # It is slow: without it, or in time, or too late.
    here.slow = {102}
    found, rows = plan.run(backend, held, take=2)
    np.testing.assert_allclose(found, 2 * x[:2].mean(0))
    assert rows.rows[2] is None
    backend._timeout = 3.0
    assert "did not answer in time" in run_without(102)
    with pytest.raises(deploy.ClientError, match="fewer than the quorum of 3"):
        plan.run(backend, held, quorum=3)
    here.slow = set()
    backend._timeout = 60.0
    for _ in range(2):
        np.testing.assert_allclose(plan.run(backend, held)[0], 2 * x.mean(0))
    # It is known to be gone.
    here.get_node_ids = lambda: [100, 101]
    assert "node 102 cannot be reached" in run_without(102)
    del here.get_node_ids
    # Messages cannot be pushed.
    push = here.push_messages

    def without_102(messages):
        numbers = zip(push(messages), messages, strict=True)
        return [n if m.metadata.dst_node_id != 102 else None for n, m in numbers]

    here.push_messages = without_102
    assert "node 102 cannot be reached" in run_without(102)
    here.push_messages = lambda messages: []
    with pytest.raises(deploy.ClientError, match="did not take the messages"):
        plan.run(backend, held)
    here.push_messages = push


def test_data_that_cannot_be_loaded(grid):
    """What the error says stays with the node, as it may quote the data."""
    here = grid({}, load="app.data:broken")
    with pytest.raises(deploy.ClientError, match="the worker ended at its start") as error:
        deploy.Flower(here, 1)
    assert "secret" not in str(error.value)
    assert b"secret" not in b"".join(here.traffic)


def test_clients_and_nodes(grid):
    with pytest.raises(deploy.ClientError, match="two nodes have a client 1"):
        deploy.Flower(grid(CONFIGS[1], CONFIGS[1], load="app.data:load"), 2)
    with pytest.raises(deploy.ClientError, match=r"1 nodes are connected.*expected 2"):
        deploy.Flower(grid({}), 2, timeout=0.1)
    with pytest.raises(ValueError, match="nodes"):
        deploy.Flower(grid({}), 0)


def test_answers_that_are_wrong(three):
    """Whatever a node answers, a run ends with a `ClientError`, or with the right types."""
    here, backend, plan, held, _ = three
    rng = random.Random(0)
    refused = 0

    def tamper(content):
        text = bytearray(content["message"]["text"].encode())
        at = rng.randrange(len(text))
        match rng.randrange(4):
            case 0:
                text[at] ^= 1
            case 1:
                del text[at:]
            case 2:
                content["message"]["text"] = json.dumps(rng.choice([None, 1, [], {"": 1}, [[1]]]))
                return content
            case 3:
                del content["arrays"]["0"]
        content["message"]["text"] = text.decode()
        return content

    here.tamper = tamper
    for _ in range(30):
        try:
            found, _ = plan.run(backend, held)
            assert found.dtype == np.float64
        except deploy.ClientError as error:
            refused += "sent what is not an answer" in error.args[0]
    assert refused > 20
    here.tamper = lambda content: content


def test_messages_that_are_wrong(three):
    """A node refuses them, and what it holds does not change."""
    here, backend, plan, held, x = three
    _, kept = plan.run(backend, held)
    before = set(here.states[100]["fax.values"])
    (stage,) = plan.stages
    blob = stage.exported(["cpu"])
    name = hashlib.sha256(blob).hexdigest()
    keep = ["new" if mode == "placed" else None for mode in stage.outputs]
    run = {"stage": name, "blob": blob, "shared": [None], "jobs": [[0, ["x"], keep]]}
    requests = [{"do": "run", "with": run}]
    right = {"format": 1, "x64": True, "requests": requests}

    def send(content):
        (number,) = here.push_messages([wire.request(content, 100, 60.0)])
        (reply,) = here.pull_messages([number])
        return reply

    wrong = [
        right | {"format": 2},
        right | {"requests": []},
        right | {"requests": [*requests, {"do": "nothing", "with": {}}]},
        {"requests": 3},
        [],
    ]
    for message in wrong:
        assert send(wire.records(runtime.parts(message))).has_error()
        assert set(here.states[100]["fax.values"]) == before
    assert send(RecordDict()).has_error()
    rng = random.Random(0)
    for _ in range(100):
        content = wire.records(runtime.parts(right))
        text = bytearray(content["message"]["text"].encode())
        text[rng.randrange(len(text))] ^= 1 << rng.randrange(7)
        content["message"]["text"] = text.decode()
        send(content)
    assert send(wire.records(runtime.parts(right))).has_content()
    np.testing.assert_allclose(plan.fetch(backend, kept), 2 * x)


def test_what_a_node_with_a_plan_refuses(grid, tmp_path):
    x = np.arange(12.0).reshape(3, 4)
    plan = deploy.cut(total, {"x": x}, held=["x"])
    plan.save(tmp_path / "plan", ["cpu"])
    other = deploy.cut(lambda rows: total({"x": rows["x"] ** 2}), {"x": x}, held=["x"])
    here = grid({"fax-plan": str(tmp_path / "plan")})
    backend = deploy.Flower(here, 1, plan=tmp_path / "plan")
    found, kept = plan.run(backend, {"x": x})
    np.testing.assert_allclose(found, 2 * x.mean(0))
    with pytest.raises(deploy.ClientError, match="is not in the plan of these nodes"):
        other.run(backend, {"x": x})
    with pytest.raises(deploy.ClientError, match=r"RefusedError.*fetches no rows"):
        plan.fetch(backend, kept)
    stubborn = deploy.Flower(here, 1)
    with pytest.raises(deploy.ClientError, match=r"RefusedError.*not in the plan"):
        other.run(stubborn, {"x": x})


def test_an_extra_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fax-jax\[flower\]'"):
        deploy.Flower(None, 1)


def test_the_files_of_clients(tmp_path):
    (tmp_path / "there").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        deploy.write_flower_client(tmp_path)


@fax.program(clients=3)
def labels_total(rows):
    doubled, kept = fax.map(lambda y: (2 * y, 3 * y), rows["y"])
    return fax.sum(doubled), kept


def test_secure_sums(grid, app):
    """The server gets masked integers, and the sum without a node that fails in it."""
    from app import data

    labels = np.stack([data.rows(client)["y"] for client in range(3)])
    plan = deploy.cut(labels_total, {"y": labels}, held=["y"])
    here = grid(*CONFIGS, load="app.data:load", secure=0.5)
    backend = deploy.Flower(here, 3, secure=deploy.SecureSums(0.5))
    held = {"y": backend.held()["y"]}
    found, kept = plan.run(backend, held)
    np.testing.assert_array_equal(found, 2 * labels.sum(0))
    traffic = b"".join(here.traffic)  # with what nodes keep
    for row in labels.astype(np.int64):
        assert (2 * row).tobytes() not in traffic
    with pytest.raises(deploy.ClientError, match="this client sends no rows"):
        plan.fetch(backend, kept)
    with pytest.raises(deploy.ClientError, match="sends no results as they are"):
        plan.run(deploy.Flower(here, 3), held)
    ask = backend._ask

    def without_one(do, requests, read):
        if do == "secure_run":
            here.down.add(101)
            backend._timeout = 2.0
        ask(do, requests, read)

    backend._ask = without_one
    found, kept = plan.run(backend, held, quorum=2)
    np.testing.assert_array_equal(found, 2 * labels[[0, 2]].sum(0))
    assert kept.present == (0, 2)
    with pytest.raises(ValueError, match="secure has identities, expected None"):
        deploy.Flower(here, 3, secure=deploy.SecureSums(identities="app.data:keys"))


QUICK = ("apfl", "diloco")


@pytest.fixture(scope="module")
def two(grid):
    return grid({}, {})


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.long)
        for name in tpus.ALGORITHMS
        if name not in plans.OF_ROWS
    ],
)
def test_every_algorithm(two, name):
    """A round on two nodes equals the jitted function. Clients' state and replicas stay there."""
    fn, args, held = plans.a_round(name)
    clients = None
    if set(held) != set(deploys.DATA) and name not in tpus.OF_REPLICAS:
        clients = np.asarray(args[1].positions).tolist()
    backend = deploy.Flower(two, 2)
    deploys.check_plan(fn, args, held=held, clients=clients, backend=backend)


@pytest.mark.long
def test_the_example(run, tmp_path):
    """Three nodes learn, and two of them after one is killed."""
    printed = run(scripts.EXAMPLES / "flower_digits.py", "--rounds=6", timeout=600)
    assert "[1].batches['x']  only through sums over 3" in printed
    pattern = (
        r"round (\d): (\d) clients, training loss ([\d.]+), accuracy on other digits ([\d.]+)%"
    )
    rounds = re.findall(pattern, printed)
    assert [int(clients) for _, clients, _, _ in rounds] == [3, 3, 3, 2, 2, 2]
    assert float(rounds[-1][3]) > 80
    assert scripts.is_figure(tmp_path / "runs" / "flower_digits.png")
