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


def cohorts(rows, batch_size, steps, step):
    """Those of two learners from a step on, with the rows of each."""
    return fax.data.cohorts(
        fax.data.InMemory({str(i): own for i, own in enumerate(rows)}),
        2,
        batch_size=batch_size,
        sampler="stream",
        max_steps=steps,
        placement="replicas",
        start=step // steps,
        resident=False,
    )


def own_part(number, of_both):
    """What `of_both(step)` yields, for one of the learners."""

    def of_one(step):
        for cohort in of_both(step):
            yield jax.tree.map(lambda x: x[number : number + 1], cohort)

    return of_one


def data(step):
    return cohorts([{"x": x} for x in TARGETS], 2, STEPS, step)


def learner(config):
    """The learner with the number of the node's configuration. Its examples have 1 or 3 tokens."""
    number = config["partition-id"]
    if number == 2:
        raise ValueError("the secret is 42")
    fax.sharding.use_cpu_devices(2)
    jax.set_mesh(fax.sharding.make_mesh(data=1, model=2))
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, START))
    return fax.deploy.Learner(
        loss,
        INNER,
        own_part(number, data),
        shapes,
        sharding={"w": P("model")},
        tokens=1 + 2 * number,
    )


def outer():
    return optax.sgd(0.5, momentum=0.9, nesterov=True)


def expected(rounds):
    """The parameters after each round of `fax.algorithms.diloco` with the same replicas."""
    algorithm = fax.algorithms.diloco(loss, INNER, outer(), replicas=2, steps=STEPS, weighted=True)
    state, step = algorithm.init(START), jax.jit(algorithm.round)
    found = []
    for cohort in itertools.islice(data(0), rounds):
        cohort = fax.data.Cohort(
            cohort.batches, cohort.mask, np.array([1, 3], np.int32), cohort.positions, cohort.keys
        )
        state, _ = step(state, cohort)
        found.append(np.asarray(algorithm.params(state)["w"]))
    return found
