"""The learners of the tests: each with two devices, and an example of a quadratic of its own."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import fax

STEPS = 5
TARGETS = np.random.default_rng(0).normal(size=(2, 4 * STEPS, 4))
INNER = optax.sgd(0.1, momentum=0.5)
START = {"w": np.zeros(4)}


def loss(params, batch, key):
    return jnp.sum((params["w"] - batch["x"]) ** 2, axis=1) / 2


def cohorts(step):
    """Those of both learners."""
    rows = {str(i): {"x": x} for i, x in enumerate(TARGETS)}
    return fax.data.cohorts(
        fax.data.InMemory(rows),
        2,
        batch_size=2,
        sampler="stream",
        max_steps=STEPS,
        placement="replicas",
        start=step // STEPS,
        resident=False,
    )


def learner(config):
    """The learner with the number of the node's configuration. Its examples have 1 or 3 tokens."""
    number = config["partition-id"]
    if number == 2:
        raise ValueError("the secret is 42")
    fax.sharding.use_cpu_devices(2)
    jax.set_mesh(fax.sharding.make_mesh(data=1, model=2))

    def own(step):
        for cohort in cohorts(step):
            yield jax.tree.map(lambda x: x[number : number + 1], cohort)

    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, START))
    return fax.deploy.Learner(
        loss, INNER, own, shapes, sharding={"w": P("model")}, tokens=1 + 2 * number
    )


def outer():
    return optax.sgd(0.5, momentum=0.9, nesterov=True)


def expected(rounds):
    """The parameters after each round of `fax.algorithms.diloco` with the same replicas."""
    algorithm = fax.algorithms.diloco(loss, INNER, outer(), replicas=2, steps=STEPS, weighted=True)
    state, step = algorithm.init(START), jax.jit(algorithm.round)
    found = []
    for cohort in itertools.islice(cohorts(0), rounds):
        cohort = fax.data.Cohort(
            cohort.batches, cohort.mask, np.array([1, 3], np.int32), cohort.positions, cohort.keys
        )
        state, _ = step(state, cohort)
        found.append(np.asarray(algorithm.params(state)["w"]))
    return found
