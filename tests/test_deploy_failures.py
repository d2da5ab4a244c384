"""Clients' processes are killed, stopped and delayed at random: results are right, or errors."""

import concurrent.futures
import contextlib
import gc
import os
import random
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fax
from fax import deploy

PROCESSES, CLIENTS = 3, 6  # two clients each
# What each process loads. The rows are also known here, for the jitted program.
DATA = """
import numpy as np

def rows(client):
    rng = np.random.default_rng(client)
    return {"x": rng.normal(size=4), "n": np.float64(client % 3 + 1)}

def load(number):
    return {client: rows(client) for client in range(6) if client % 3 == number}
"""
LONG = 120.0  # seconds in which any machine answers


@fax.program(clients=CLIENTS)
def mean_loss(scale, rows):
    def loss(scale, x, n):
        return jnp.mean((scale * x - 1) ** 2), n

    losses, n = fax.map(loss, fax.broadcast(scale), rows["x"], rows["n"])
    return fax.mean(losses, weights=n)


def train(scale, rows):
    """Several stages: steps with both halves of a gradient, and rows that stay with the clients."""
    step = jax.value_and_grad(mean_loss)

    def again(scale, _):
        loss, slope = step(scale, rows)
        return scale - 0.1 * slope, loss

    scale, losses = jax.lax.scan(again, scale, None, length=3)
    return scale, losses, rows["x"] * scale


class Pool:
    """Processes that are replaced when they end, and the results of the jitted program."""

    def __init__(self, folder):
        file = folder / "own_data.py"
        file.write_text(DATA)
        names = {}
        exec(DATA, names)
        rows = [names["rows"](client) for client in range(CLIENTS)]
        self.rows = {name: np.stack([row[name] for row in rows]) for name in ("x", "n")}
        self.jitted = jax.jit(train)
        self.plan = deploy.cut(train, 1.5, self.rows, held=["x", "n"])
        self.backend = deploy.Processes(PROCESSES, load=f"{file}:load", timeout=LONG)
        self.held = self.backend.held()
        self.seen = {link.process for link in self.backend._links}

    def run(self, **options):
        """Runs the plan, and checks its results. A run that hangs is an error."""
        worker = concurrent.futures.ThreadPoolExecutor(1)
        run = worker.submit(self.plan.run, self.backend, 1.5, self.held, **options)
        scale, losses, own = run.result(LONG)
        worker.shutdown()
        here = np.isin(np.arange(CLIENTS), own.present)
        absent = {"x": self.rows["x"], "n": self.rows["n"] * here}
        expected = self.jitted(1.5, absent)
        np.testing.assert_allclose(scale, expected[0], rtol=1e-12)
        np.testing.assert_allclose(losses, expected[1], rtol=1e-12)
        return own

    def process(self, number):
        return self.backend._links[number].process

    def repair(self):
        """Everybody is there again, holds the same, and nobody holds anything else."""
        self.backend._timeout = LONG
        for number in range(PROCESSES):
            self.process(number).send_signal(signal.SIGCONT)
            if self.process(number).poll() is not None:
                self.backend.restart(number)
                self.seen.add(self.process(number))
        own = self.run(quorum=CLIENTS)
        assert len(own.present) == CLIENTS
        fetched = self.plan.fetch(self.backend, own)
        np.testing.assert_allclose(fetched[0] / self.rows["x"][0], fetched[1] / self.rows["x"][1])
        gc.collect()
        self.backend._free_now()
        about = []
        requests = {number: {} for number in range(PROCESSES)}
        self.backend._ask("about", requests, lambda _, answer: about.extend(answer))
        assert len(about) == 2 * CLIENTS + len(own.rows)

    def close(self):
        self.backend.stop()
        for process in self.seen:
            assert process.returncode is not None
            with pytest.raises(ProcessLookupError):
                os.kill(process.pid, 0)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    made = Pool(tmp_path_factory.mktemp("pool"))
    yield made
    made.close()


def test_a_client_that_is_too_late(pool):
    """The first two processes are enough, and the third answers later, when nobody needs it."""
    pool.run()
    pool.process(1).send_signal(signal.SIGSTOP)
    for _ in range(3):
        own = pool.run(take=4)
        assert own.present == (0, 2, 3, 5)
    pool.backend.kill(1)
    with pytest.raises(deploy.ClientError, match=r"4 of 6 .* quorum of 5.*process 1 has ended"):
        pool.run(take=5)
    del own
    pool.repair()


def disturb(pool, rng, seconds):
    """Kills, stops and delays processes during a run, which is right, or ends with an error."""
    timers, killed = [], []

    def later(after, number, what):
        timers.append(threading.Timer(after, pool.process(number).send_signal, [what]))

    for number in rng.sample(range(PROCESSES), rng.choice([1, 1, 2])):
        what, after = rng.choice(["kill", "stop", "delay"]), rng.uniform(0, seconds)
        if what == "kill":
            later(after, number, signal.SIGKILL)
            killed.append(pool.process(number))
        else:
            later(after, number, signal.SIGSTOP)
        if what == "delay":
            later(after + rng.uniform(0, seconds), number, signal.SIGCONT)
    options = rng.choice([{"quorum": 1}, {"quorum": 4}, {"take": 2}, {"take": 4, "quorum": 2}, {}])
    pool.backend._timeout = 1.0
    for timer in timers:
        timer.start()
    with contextlib.suppress(deploy.ClientError):
        found = len(pool.run(**options).present)
        assert found >= options.get("quorum", options.get("take", CLIENTS))
    for timer in timers:
        timer.join()
    for process in killed:
        process.wait(LONG)


@pytest.mark.parametrize("times", [1, pytest.param(50, marks=pytest.mark.long)])
def test_clients_that_fail_at_random(pool, times):
    rng = random.Random(times)
    pool.repair()
    start = time.monotonic()
    pool.run()
    seconds = time.monotonic() - start
    for _ in range(times):
        disturb(pool, rng, seconds)
        pool.repair()
