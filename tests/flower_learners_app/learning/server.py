"""The ServerApp of the learners in the tests. It writes down its results."""

import os
import pathlib
import signal
import time

import jax
import numpy as np
from flwr.serverapp import ServerApp

from fax import deploy
from learning import learner

app = ServerApp()
ROUNDS = 3


@app.main()
def main(grid, context):
    jax.config.update("jax_enable_x64", True)
    folder = pathlib.Path(str(context.run_config["folder"]))

    def note(text):
        (folder / text).touch()

    with deploy.FlowerLearners(grid, grace=6.0) as learners:
        # All keep up with each other.
        server = deploy.Elastic(learner.START, learner.outer(), steps=learner.STEPS, quorum=2)
        for merge in learners.train(server):
            np.save(folder / f"merge{merge.number}.npy", server.params["w"])
            if merge.number == ROUNDS - 1:
                break
        note("in step")

        # One is killed, and nobody waits for it. Another node takes its place.
        server = deploy.Elastic(learner.START, learner.outer(), steps=learner.STEPS)
        both, alone = set(), 0
        end = time.monotonic() + 300
        for merge in learners.train(server):
            assert time.monotonic() < end
            present = set(merge.tokens)
            if not both:
                if len(present) == 2:
                    both = present
                    os.kill(int(context.run_config["victim"]), signal.SIGKILL)
            elif alone < 2:
                alone += len(present) == 1
                if alone == 2:
                    note("killed")
            elif present - both:
                break
    note("done")
