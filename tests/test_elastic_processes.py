"""Learners in processes: they come, are killed, hang, and come back, and training goes on."""

import contextlib
import io
import multiprocessing
import os
import signal
import socket
import subprocess
import threading
import time
import types
from multiprocessing import connection

import numpy as np
import optax
import pytest
from processes import sends_at_once

from fax import deploy

# Each learner has two devices, and its own target of a quadratic.
LEARNER = """
import time
import jax, jax.numpy as jnp, numpy as np, optax
import fax
from jax.sharding import PartitionSpec as P

def learner(number):
    if number == 2:
        return 0.5
    fax.sharding.use_cpu_devices(2)
    jax.set_mesh(fax.sharding.make_mesh(data=1, model=2))
    target = np.arange(4.0) * (number + 1) + 1

    def loss(params, batch, key):
        return jnp.sum((params["w"] - batch["x"]) ** 2, axis=1) / 2

    def data(step):
        own = fax.data.InMemory({"own": {"x": np.tile(target, (4, 1))}})
        rounds = fax.data.cohorts(
            own, 1, 2 * (number + 1), sampler="stream", max_steps=5, placement="replicas"
        )
        for cohort in rounds:
            time.sleep(0.02)  # leave the cores to those that start
            yield cohort

    shapes = {"w": jax.ShapeDtypeStruct((4,), float)}
    return fax.deploy.Learner(
        loss, optax.sgd(0.1), data, shapes, sharding={"w": P("model")}
    )
"""
STEPS = 5


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    file = tmp_path_factory.mktemp("learner") / "my_learner.py"
    file.write_text(LEARNER)
    return f"{file}:learner"


def until(learners, server, condition):
    """Trains until something is true of a merge, which it returns."""
    end = time.monotonic() + 240
    for merge in learners.train(server):
        if condition(merge):
            return merge
        assert time.monotonic() < end
    raise AssertionError("training ended")


def more(learners, server, merges):
    """Trains for some merges."""
    last = server.state.merges + merges
    return until(learners, server, lambda merge: merge.number == last)


@contextlib.contextmanager
def leaves_nothing(learners):
    """After the block and the learners' own, no process and no thread of theirs is left."""
    threads = set(threading.enumerate())
    with learners:
        yield
        pids = [p.pid for p in learners._processes.values()]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    for thread in {*threading.enumerate()} - threads:
        thread.join(10)
        assert not thread.is_alive()


def test_learners_train_together_and_one_is_killed(make):
    learners = deploy.Learners(2, make, grace=0.2, timeout=120)
    with leaves_nothing(learners), contextlib.ExitStack() as strangers:
        # Together they take the steps of DiLoCo: with 1 and 2 shares of the examples, and SGD.
        start = {"w": np.zeros(4)}
        server = deploy.Elastic(start, optax.sgd(0.5, momentum=0.9), steps=STEPS, quorum=2)
        theta, velocity = np.zeros(4), np.zeros(4)
        targets = np.arange(4.0)[None] * np.array([[1], [2]]) + 1
        for merge in learners.train(server):
            own = targets + 0.9**STEPS * (theta - targets)
            velocity = 0.9 * velocity + theta - (own[0] + 2 * own[1]) / 3
            theta = theta - 0.5 * velocity
            assert merge.tokens == {0: 2 * STEPS, 1: 4 * STEPS}
            if merge.number == 9:
                break
        np.testing.assert_allclose(server.params["w"], theta, rtol=1e-12)
        assert [sends_at_once(own._line) for own in learners._outboxes.values()] == [True, True]

        # The same processes train with another server. One is killed: nobody misses it.
        server = deploy.Elastic(start, optax.sgd(1.0), steps=STEPS)
        until(learners, server, lambda merge: len(merge.tokens) == 2)
        learners.kill(1)
        assert learners.running == [0]
        until(learners, server, lambda merge: set(merge.tokens) == {0})
        assert set(more(learners, server, 5).tokens) == {0}
        # Nobody waits for strangers.
        strangers.enter_context(socket.create_connection(learners._address))
        with pytest.raises(multiprocessing.AuthenticationError):
            connection.Client(learners._address, authkey=b"a guess")
        assert set(more(learners, server, 5).tokens) == {0}


def test_learners_that_are_started_later_import_from_the_same_folder(monkeypatch, tmp_path):
    folders = []

    def popen(command, *, cwd=None, **how):
        folders.append(os.path.abspath(cwd or "."))
        return types.SimpleNamespace(
            stdin=io.StringIO(), pid=0, poll=lambda: 1, wait=lambda *_: 1, kill=lambda: None
        )

    monkeypatch.setattr(subprocess, "Popen", popen)
    with deploy.Learners(1, "learner.py:learner") as learners:
        monkeypatch.chdir(tmp_path)
        learners.start(0)
    assert folders[1] == folders[0] != str(tmp_path)


@pytest.mark.long
def test_learners_hang_and_come_back(make, capfd):
    learners = deploy.Learners(2, make, grace=0.2, timeout=120)
    with leaves_nothing(learners):
        server = deploy.Elastic({"w": np.zeros(4)}, optax.sgd(1.0), steps=STEPS)
        until(learners, server, lambda merge: len(merge.tokens) == 2)
        learners.kill(1)
        until(learners, server, lambda merge: set(merge.tokens) == {0})
        # It comes back, and its updates count.
        learners.start(1)
        with pytest.raises(ValueError, match="learner 1 is running; kill it first"):
            learners.start(1)
        merge = until(learners, server, lambda merge: len(merge.tokens) == 2)
        assert merge.tokens[1] % 4 == 0

        # The first one hangs. Merges wait for it once, for the grace window.
        (process,) = [p for name, p in learners._processes.items() if name.number == 0]
        os.kill(process.pid, signal.SIGSTOP)
        until(learners, server, lambda merge: set(merge.tokens) == {1})
        assert set(more(learners, server, 50).tokens) == {1}
        os.kill(process.pid, signal.SIGCONT)
        until(learners, server, lambda merge: len(merge.tokens) == 2)

        # All are gone, and one cannot start.
        for learner in range(2):
            learners.kill(learner)
        learners.start(2)
        statuses = "0 with status -9, 1 with status -9, 2 with status 1"
        with pytest.raises(deploy.ClientError, match=f"No learner is left.*{statuses}"):
            until(learners, server, lambda merge: False)
        assert "returned 0.5, expected a fax.deploy.Learner" in capfd.readouterr().err
