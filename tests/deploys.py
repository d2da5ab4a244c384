"""What tests of plans share: a cohort, programs, and the comparison with the jitted program."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems

import fax
from fax import aggregators, deploy

N = len(problems.SIZES)
PARAMS = problems.Logistic.start()
DATA = ("batches", "mask", "num_examples")


def loss(params, batch, key):
    return problems.Logistic.loss(params, batch, key)


def cohort_of(**settings):
    settings = dict(clients=4, batch_size=2, max_steps=2, resident=False) | settings
    return next(fax.data.cohorts(problems.data(), **settings))


def without_keys(tree):
    def plain(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(plain, tree)


def held_in(tree):
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, deploy.Held))
    return [x for x in leaves if isinstance(x, deploy.Held)]


def check_plan(fn, args, *, held=DATA, pull=False, clients=None, backend=None):
    """The plan's results, compared with those of the jitted function."""
    plan = deploy.cut(fn, *args, held=held, pull=pull)
    backend = backend or deploy.InProcess()
    found = plan.run(backend, *args, clients=clients)
    expected = without_keys(jax.jit(fn)(*args))
    for own, other in zip(
        jax.tree.leaves(without_keys(plan.fetch(backend, found))),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_allclose(own, other, rtol=1e-12, atol=1e-13)
    return plan, found


def sgd():
    return optax.sgd(0.1)


FEDAVG = {
    "mean": None,
    "clipped, Gaussian": lambda: aggregators.gaussian(1.0, 1.0, expected_clients=4),
    "quantized": lambda: aggregators.uniform_quantization(16),
    "secure sum": lambda: aggregators.secure_sum(1.0, 64.0),
}


@fax.program(clients=3)
def squares(scale, rows):
    return fax.mean(fax.map(lambda s, x: jnp.sum((s * x) ** 2), fax.broadcast(scale), rows["x"]))


ROWS = {"x": np.random.default_rng(0).normal(size=(3, 4))}


class Failing(deploy.InProcess):
    """Some clients fail when a stage runs for the nth time, and from then on."""

    def __init__(self, clients, nth=1):
        super().__init__()
        self.clients, self.left = set(clients), nth

    def run(self, stage, clients, operands):
        self.left -= 1
        failed = self.clients.intersection(clients)
        if self.left <= 0 and failed:
            raise deploy.ClientError("failed", failed)
        return super().run(stage, clients, operands)
