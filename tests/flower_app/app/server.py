"""The ServerApp of the tests. It writes down its results, and how long they took."""

import os
import pathlib
import signal
import time

import jax
import numpy as np
from flwr.serverapp import ServerApp

from app import programs
from fax import deploy

app = ServerApp()
HELD = ("batches", "mask", "num_examples")


@app.main()
def main(grid, context):
    folder = pathlib.Path(str(context.run_config["folder"]))
    victim = int(context.run_config["victim"])
    (secure if context.run_config["secure"] else rounds)(grid, folder, victim)
    (folder / "done").touch()


def save(folder, name, tree):
    leaves = [np.asarray(programs.plain(x)) for x in jax.tree.leaves(tree)]
    np.savez(folder / f"{name}.npz", *leaves)


def rounds(grid, folder, victim):
    """Rounds of two algorithms, and a mean without a node that is killed before it."""
    backend = deploy.Flower(grid, 3, timeout=90.0)
    rows = backend.held()
    cohorts = [programs.cohort(rows, number) for number in range(2)]
    seconds = {}

    def run(name, plan, *args, **how):
        began = time.perf_counter()
        found = plan.run(backend, *args, **how)
        seconds[f"{len(seconds)} {name}"] = time.perf_counter() - began
        (folder / "seconds").write_text(str(seconds))
        return found

    algorithm = programs.fedavg()
    state = algorithm.init(programs.PARAMS)
    plan = deploy.cut(algorithm.round, state, cohorts[0])
    state, metrics = run("fedavg", plan, state, cohorts[0])
    save(folder, "fedavg", (state, metrics["loss"]))

    algorithm = programs.scaffold()
    state = algorithm.init(programs.PARAMS)
    plan = deploy.cut(algorithm.round, state, cohorts[0], held=[*HELD, "clients"])
    for number in range(2):
        state, metrics = run("scaffold", plan, state, cohorts[number])
    save(folder, "scaffold", (plan.fetch(backend, state), metrics["loss"]))

    plan = deploy.cut(programs.mean, {"x": rows["x"]}, held=["x"])
    os.kill(victim, signal.SIGKILL)
    backend._timeout = 5 + 2 * max(seconds.values())
    save(folder, "mean", run("mean", plan, {"x": rows["x"]}, quorum=2))


def secure(grid, folder, victim):
    """A round as a secure sum of all nodes, and one without a node that is killed in the sum."""
    backend = deploy.Flower(grid, 3, timeout=90.0, secure=deploy.SecureSums(0.5))
    cohort = programs.cohort(backend.held(), 0)
    state, step = programs.secure_fedavg()
    plan = deploy.cut(step, state, cohort, held=HELD)
    save(folder, "all", plan.run(backend, state, cohort))
    ask = backend._ask

    def without_one(do, requests, read):
        if do == "secure_run":  # the nodes have agreed on their masks
            os.kill(victim, signal.SIGKILL)
            backend._timeout = 30.0
        ask(do, requests, read)

    backend._ask = without_one
    save(folder, "without", plan.run(backend, state, cohort, quorum=2))
