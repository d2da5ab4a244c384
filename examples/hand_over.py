"""Federated averaging of processes that keep their data: a program becomes a plan.

Each of three processes loads the handwritten digits of one client. It has JAX and scikit-learn, and
imports neither fax nor the model. The server divides a round of federated averaging into stages,
prints what the plan proves about the clients' data, and trains. At the end one process is killed,
and the server says so.

    python examples/hand_over.py
"""

import argparse
import time
from pathlib import Path

import _own_digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import fax

CLIENTS = [f"client {i}" for i in range(_own_digits.CLIENTS)]


def loss(params, batch, key):
    logits = jax.nn.relu(batch["x"] @ params["in"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()

    start, key = jax.random.split(jax.random.key(0))
    params = {
        "in": jax.random.normal(start, (64, 32)) / 8,
        "out": jnp.zeros((32, 10)),
    }
    algorithm = fax.algorithms.fedavg(loss, optax.sgd(0.05))
    state = algorithm.init(params)
    images, labels = load_digits(return_X_y=True)

    @jax.jit
    def accuracy(params):
        logits = jax.nn.relu(images / 16 @ params["in"]) @ params["out"]
        return jnp.mean(logits.argmax(1) == labels)

    own = Path(_own_digits.__file__)
    with fax.deploy.Processes(len(CLIENTS), load=f"{own}:load") as backend:
        held = backend.held(CLIENTS)

        def cohort(number):
            """What the clients hold, by reference, and the random keys of a round."""
            return fax.data.Cohort(
                {"x": held["x"], "y": held["y"]},
                held["mask"],
                held["num_examples"],
                positions=np.arange(len(CLIENTS), dtype=np.int32),
                keys=jax.random.split(jax.random.fold_in(key, number), len(CLIENTS)),
            )

        plan = fax.deploy.cut(algorithm.round, state, cohort(0))
        print(plan.audit(), end="\n\n")
        seconds = []
        for number in range(options.rounds):
            began = time.perf_counter()
            state, metrics = plan.run(backend, state, cohort(number))
            seconds.append(time.perf_counter() - began)
        share = float(accuracy(algorithm.params(state)))
        print(
            f"{options.rounds} rounds, training loss {float(metrics['loss']):.3f}, accuracy on all "
            f"digits {share:.1%}, {np.median(seconds):.4f} s per round, "
            f"{backend.received / options.rounds / 1e3:.1f} kB received per round"
        )
        backend.kill(1)
        try:
            plan.run(backend, state, cohort(options.rounds))
        except fax.deploy.ClientError as error:
            print(f"After one process was killed: {error}")


if __name__ == "__main__":
    main()
