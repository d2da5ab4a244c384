"""Runs an experiment again and again, and kills its processes at random moments.

    python kills.py FOLDER KILLS PROCESSES SEED

prints a line of JSON for a run without interruption, and one for the run that was killed so often:
what is in its metrics.csv, what TensorBoard shows, and its final parameters and epsilon. Processes
are forked from this one, which has imported everything and started nothing.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import optax
from scalars import shown

import fax
from fax import aggregators, experiment
from fax.experiment import _outputs

ROUNDS, EVERY = 12, 2
MOST = 6  # rounds between a start and a kill
# Accounting takes longer than the rounds. Forked processes have what is known of it.
BUDGET = aggregators.Budget(1.0, 1e-5, 20.0)
for releases in range(ROUNDS + 1):
    BUDGET.record = {"": releases}
    BUDGET.epsilon  # noqa: B018
BUDGET.record = {}


def loss(params, batch, key):
    return ((batch["x"][:, None] - params) ** 2).sum(1)


def train(folder, ready):
    """The experiment. It writes a byte to ``ready`` before each round."""

    class Ready:
        def start(self, run):
            os.write(ready, b".")

        after_round = start

    mesh = fax.sharding.make_mesh(clients=-1)
    with jax.set_mesh(mesh):
        data = fax.data.InMemory({str(i): {"x": np.arange(i + 1.0)} for i in range(8)})
        cohorts = fax.data.cohorts(data, clients=4, batch_size=2)
        private = aggregators.gaussian(1.0, 20.0, key=jax.random.key(0))
        algorithm = fax.algorithms.fedavg(loss, optax.sgd(0.1), aggregator=private)
        result = experiment.run(
            algorithm,
            algorithm.init(np.zeros(3, np.float32)),
            cohorts,
            rounds=ROUNDS,
            folder=folder,
            every=EVERY,
            callbacks=[Ready(), experiment.StopAtBudget(BUDGET)],
            progress=False,
        )
        params = np.asarray(result.state.params).tobytes().hex()
        table = Path(folder, "metrics.csv").read_text()
        return {"params": params, "epsilon": repr(BUDGET.epsilon), "metrics": table}


def fork(folder, ready, me, count, port, report):
    """Starts a process of the run, and returns its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        _outputs.draw = lambda folder: None
        with open(os.devnull if report is None else report, "w") as out:
            if count > 1:
                # Peers that are killed are expected, and each of them would be printed.
                fax.sharding.initialize(f"localhost:{port}", count, me, shutdown_timeout=60)
            found = train(folder, ready)
            if me == 0:
                scalars = shown(Path(folder, "tensorboard"))
                json.dump({**found, "scalars": scalars}, out)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
        raise
    finally:
        sys.stderr.flush()
        os._exit(status)


def start(folder, count, report):
    """Starts all processes of a run. Returns their numbers, and the pipe that they write to."""
    from processes import free_port

    read, write = os.pipe()
    port = free_port()
    children = [fork(folder, write, me, count, port, report) for me in range(count)]
    os.close(write)
    return children, read


def end(children, read):
    """Waits for all processes. Returns whether they have ended as they should."""
    statuses = [os.waitpid(child, 0)[1] for child in children]
    os.close(read)
    return statuses == [0] * len(statuses)


def wait(read, rounds):
    """Waits until the processes have begun so many rounds, or have ended."""
    while rounds > 0 and (found := os.read(read, rounds)):
        rounds -= len(found)


def main(folder, kills, count, seed):
    folder, rng = Path(folder), random.Random(seed)
    # What is compiled here need not be compiled again.
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    children, read = start(folder / "whole", count, folder / "whole.json")
    before = time.monotonic()
    wait(read, 2 * count)
    first = time.monotonic()
    if not end(children, read):
        sys.exit("a run without interruption has failed")
    to_start, of_round = first - before, (time.monotonic() - first) / ROUNDS
    number, killed, checkpoints = 0, 0, []
    while killed < kills:
        children, read = start(folder / f"run {number}", count, None)
        if rng.random() < 0.1:
            time.sleep(rng.uniform(0, to_start))
        else:
            wait(read, count * rng.randint(1, MOST))
            time.sleep(rng.uniform(0, 2 * of_round))
        done = [os.waitpid(child, os.WNOHANG) for child in children]
        if all(pid for pid, _ in done):
            if any(status for _, status in done):
                sys.exit("a run has failed")
            os.close(read)
            number += 1
            continue
        victims = [c for c, (pid, _) in zip(children, done) if not pid]
        if rng.random() < 0.5:
            rng.shuffle(victims)
            victims = victims[:1]  # the others notice
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        for child, (pid, _) in zip(children, done):
            if not pid:
                os.waitpid(child, 0)
        os.close(read)
        killed += 1
        partial = list((folder / f"run {number}" / "checkpoints").glob("*tmp*"))
        checkpoints.append(len(partial) > 0)
    if not end(*start(folder / f"run {number}", count, folder / "killed.json")):
        sys.exit("a run has failed after it was killed")
    for name in ("whole", "killed"):
        print((folder / f"{name}.json").read_text(), flush=True)
    print(json.dumps({"killed": killed, "in a checkpoint": sum(checkpoints), "runs": number + 1}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # JAX warns of every fork; nothing of it has started here
    main(sys.argv[1], *map(int, sys.argv[2:]))
