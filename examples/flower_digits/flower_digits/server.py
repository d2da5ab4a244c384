"""The ServerApp: federated averaging of the clients that are there."""

import json
import os
import pathlib
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flwr.serverapp import ServerApp
from sklearn.datasets import load_digits

import fax

CLIENTS = 3
app = ServerApp()


def logits(params, x):
    return jax.nn.relu(x @ params["in"]) @ params["out"]


def loss(params, batch, key):
    found = logits(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(found, batch["y"])


@app.main()
def main(grid, context):
    config = context.run_config
    start, key = jax.random.split(jax.random.key(0))
    params = {"in": jax.random.normal(start, (64, 32)) / 8, "out": jnp.zeros((32, 10))}
    algorithm = fax.algorithms.fedavg(loss, optax.sgd(0.5))
    state = algorithm.init(params)
    images, labels = load_digits(return_X_y=True)
    images, labels = images[1::2] / 16, labels[1::2]

    backend = fax.deploy.Flower(grid, CLIENTS, timeout=config["timeout"])
    held = backend.held()  # what the clients loaded, by reference

    def cohort(number):
        return fax.data.Cohort(
            {"x": held["x"], "y": held["y"]},
            held["mask"],
            held["num_examples"],
            positions=np.arange(CLIENTS, dtype=np.int32),
            keys=jax.random.split(jax.random.fold_in(key, number), CLIENTS),
        )

    plan = fax.deploy.cut(algorithm.round, state, cohort(0))
    print(plan.audit(), end="\n\n")
    history = []
    for number in range(config["rounds"]):
        if number == config["rounds"] // 2 and config["victim"]:
            print("A node is killed.")
            os.kill(config["victim"], signal.SIGKILL)
        began = time.perf_counter()
        state, metrics = plan.run(backend, state, cohort(number), quorum=2)
        present = sum(row is not None for row in metrics["clients/loss"].rows)
        right = jnp.mean(logits(algorithm.params(state), images).argmax(1) == labels)
        print(
            f"round {number}: {present} clients, training loss "
            f"{float(metrics['loss']):.3f}, accuracy on other digits {float(right):.1%}, "
            f"{time.perf_counter() - began:.1f} s",
            flush=True,
        )
        history.append((present, float(right)))
    if config["history"]:
        pathlib.Path(config["history"]).write_text(json.dumps(history))
