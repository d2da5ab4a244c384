"""What the server of the tests runs, and the test for comparison."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fax
from app.data import CLASSES, CLIENTS, FEATURES

jax.config.update("jax_enable_x64", True)
PARAMS = {"w": np.zeros((FEATURES, CLASSES)), "b": np.zeros(CLASSES)}


def loss(params, batch, key):
    logits = batch["x"] @ params["w"] + params["b"] + 0.1 * jax.random.normal(key, (CLASSES,))
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def fedavg():
    return fax.algorithms.fedavg(loss, optax.sgd(0.1), optax.adam(0.1))


def secure_fedavg():
    """Without metrics, so that clients send nothing but integers."""
    integers = fax.aggregators.secure_sum(1.0, 16, rounding="nearest", masked=False)
    algorithm = fax.algorithms.fedavg(loss, optax.sgd(0.1), aggregator=integers)
    return algorithm.init(PARAMS), lambda state, cohort: algorithm.round(state, cohort)[0]


def scaffold():
    return fax.algorithms.scaffold(loss, 0.1, num_clients=CLIENTS)


def two_rounds(algorithm):
    """Two rounds as one program."""

    def run(state, cohort, other):
        state, _ = algorithm.round(state, cohort)
        return algorithm.round(state, other)

    return run


def cohort(rows, number):
    """A cohort of all clients, from their rows or references to them."""
    return fax.data.Cohort(
        {"x": rows["x"], "y": rows["y"]},
        rows["mask"],
        rows["num_examples"],
        positions=np.arange(CLIENTS, dtype=np.int32),
        keys=jax.random.split(jax.random.key(number), CLIENTS),
    )


def plain(x):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else x


@fax.program(clients=CLIENTS)
def mean(rows):
    ones = fax.map(lambda x: jnp.ones(()), rows["x"])
    return fax.mean(fax.map(lambda x: x**2, rows["x"]), weights=ones)
