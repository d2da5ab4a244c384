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
    backend = deploy.Flower(grid, 3, timeout=90.0)
    rows = backend.held()
    cohorts = [programs.cohort(rows, number) for number in range(2)]
    seconds = {}

    def save(name, tree):
        leaves = [np.asarray(programs.plain(x)) for x in jax.tree.leaves(tree)]
        np.savez(folder / f"{name}.npz", *leaves)

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
    save("fedavg", (state, metrics["loss"]))

    algorithm = programs.scaffold()
    state = algorithm.init(programs.PARAMS)
    plan = deploy.cut(algorithm.round, state, cohorts[0], held=[*HELD, "clients"])
    for number in range(2):
        state, metrics = run("scaffold", plan, state, cohorts[number])
    save("scaffold", (plan.fetch(backend, state), metrics["loss"]))

    plan = deploy.cut(programs.mean, {"x": rows["x"]}, held=["x"])
    os.kill(int(context.run_config["victim"]), signal.SIGKILL)
    backend._timeout = 5 + 2 * max(seconds.values())
    save("mean", run("mean", plan, {"x": rows["x"]}, quorum=2))
    (folder / "done").touch()
