"""Learners on Flower: its SuperLink and SuperNodes, on this machine."""

import threading
import time

import numpy as np
import pytest

pytest.importorskip("flwr", reason="Flower is not installed; see make test-flower")

import federations
from local_grids import LocalGrid, ending
from processes import free_port

from fax import deploy

ROUNDS = 3


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The app of the tests, with fax's files for clients."""
    with federations.app_in(
        tmp_path_factory.mktemp("flower"), "flower_learners_app", "learning"
    ) as app:
        yield app


@pytest.fixture(scope="module")
def expected(app):
    """The parameters after each round of DiLoCo."""
    from learning import learner

    return learner.expected(ROUNDS)


def test_a_federation(app, expected, tmp_path):
    """In step, two nodes train as DiLoCo. One is killed, and another one takes its place."""
    configs = [f"partition-id={number}" for number in range(2)]
    with federations.federation(tmp_path, configs) as here:

        def replace():
            while not (tmp_path / "killed").exists():
                if ended.wait(0.2):
                    return
            here.start_node("partition-id=1", free_port())

        ended = threading.Event()
        thread = threading.Thread(target=replace)
        thread.start()
        try:
            here.run(app, timeout=600, folder=str(tmp_path), victim=here.nodes[1].pid)
        finally:
            ended.set()
            thread.join()
        assert (tmp_path / "done").exists(), here.logs
    for number, params in enumerate(expected):
        np.testing.assert_allclose(np.load(tmp_path / f"merge{number}.npy"), params, rtol=1e-12)
    assert not list(tmp_path.glob("message imported *"))
    federations.check_ended(tmp_path)


# Without Flower's servers


@pytest.fixture
def grid(app):
    """Makes a grid with a node for each number, whose workers end with the test."""
    from learning import client, fax_client

    with ending(fax_client) as made:

        def make(*numbers):
            made.append(LocalGrid(client.app, [{"partition-id": number} for number in numbers]))
            return made[-1]

        yield make


def until(learners, server, condition):
    """Trains until something is true of a merge."""
    end = time.monotonic() + 240
    for merge in learners.train(server):
        if condition(merge):
            return
        assert time.monotonic() < end
    raise AssertionError("training ended")


def test_learners_that_fail(grid, expected):
    """Whatever happens to messages, workers and nodes, training goes on with whoever is there."""
    from learning import fax_client, learner

    here = grid(0, 1)
    both, (first, second) = {100, 101}, (100, 101)
    with deploy.FlowerLearners(here, grace=0.4) as learners:
        server = deploy.Elastic(learner.START, learner.outer(), steps=learner.STEPS, quorum=2)
        found = []
        for merge in learners.train(server):
            assert merge.tokens == {first: 10, second: 30}
            found.append(np.asarray(server.params["w"]))
            if len(found) == ROUNDS:
                break
        np.testing.assert_allclose(found, expected, rtol=1e-12)

        # The same learners train with another server.
        server = deploy.Elastic(learner.START, learner.outer(), steps=learner.STEPS)
        until(learners, server, lambda merge: set(merge.tokens) == both)
        # The worker of a node is killed. The next message starts another one.
        here.kill_worker(second)
        until(learners, server, lambda merge: set(merge.tokens) == {first})
        until(learners, server, lambda merge: set(merge.tokens) == both)
        # Messages are lost on their way to a node, or back.
        apps = dict(here.apps)

        def lost_on_the_way_back(message, context):
            apps[second](message, context)
            here.apps[second] = apps[second]
            raise ZeroDivisionError

        def lost_on_the_way(message, context):
            here.apps[second] = apps[second]
            raise ZeroDivisionError

        for lost in lost_on_the_way, lost_on_the_way_back:
            here.apps[second] = lost
            until(learners, server, lambda merge: second not in merge.tokens)
            until(learners, server, lambda merge: set(merge.tokens) == both)
        # An answer is not one.
        right = here.tamper

        def tamper(content):
            here.tamper = right
            content["message"]["text"] = "[1]"
            return content

        here.tamper = tamper
        until(learners, server, lambda merge: len(merge.tokens) == 1)
        until(learners, server, lambda merge: set(merge.tokens) == both)
        # A node is gone, and comes back.
        here.get_node_ids = lambda: [first]
        until(learners, server, lambda merge: set(merge.tokens) == {first})
        del here.get_node_ids
        until(learners, server, lambda merge: set(merge.tokens) == both)
        # It does not answer.
        here.down = {second}
        until(learners, server, lambda merge: set(merge.tokens) == {first})
        here.down, talk = set(), learners._talks[second]
        talk.asked = talk.asked[0], time.monotonic()  # its time is over
        until(learners, server, lambda merge: set(merge.tokens) == both)
        assert {name.number for name in server.learners} == both
    for process in fax_client._started:  # the learners have been told to stop
        process.wait(20)


def test_nodes_whose_learners_cannot_start(grid):
    """What the error says stays with the node, as it may quote the data."""
    here = grid(2)
    server = deploy.Elastic({"w": np.zeros(4)}, steps=5)
    with (
        deploy.FlowerLearners(here, grace=0.4) as learners,
        pytest.raises(deploy.ClientError, match=r"No learner can join.*has ended") as error,
    ):
        next(learners.train(server))
    assert "secret" not in str(error.value)
    assert b"secret" not in b"".join(here.traffic)
