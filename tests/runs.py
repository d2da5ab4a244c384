"""Runs of a small algorithm, which is compiled once, and how they are compared."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fax
from fax import experiment


class StoppedError(Exception):
    pass


class StopAt:
    """Ends the run by an error after a round, before anything of it is saved."""

    def __init__(self, number):
        self.number = number

    def after_round(self, run):
        if run.round == self.number:
            raise StoppedError


def assert_same_state(one, other):
    """Bits, dtypes, weak types and structure."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert jax.typeof(x).dtype == jax.typeof(y).dtype
        assert jax.typeof(x).weak_type == jax.typeof(y).weak_type
        x, y = np.asarray(x), np.asarray(y)
        assert x.tobytes() == y.tobytes()


def assert_same_run(one, other):
    assert_same_state(one.state, other.state)
    # NaN is equal to NaN here
    assert json.dumps(one.history) == json.dumps(other.history)


def loss(params, batch, key):
    # NaN below -1
    return ((batch["x"][:, None] - params["w"]) ** 2).sum(1) * jnp.sqrt(1 + batch["x"])


PARAMS = {"w": np.zeros(3)}
DATA = fax.data.InMemory({f"client {i}": {"x": np.arange(i + 1.0)} for i in range(8)})
ALGORITHM = fax.algorithms.fedavg(loss, optax.sgd(0.1), optax.adam(0.1))
PERSONAL = fax.algorithms.apfl(loss, optax.sgd(0.1), num_clients=8)


def train(folder, *, algorithm=ALGORITHM, state=None, data=DATA, seed=0, **options):
    """Six rounds, with evaluation and a checkpoint after each second one."""
    options = dict(rounds=6, every=2, evaluate=lambda params: {"sum": params["w"].sum()}) | options
    if state is None:
        state = algorithm.init(PARAMS)
    with fax.data.cohorts(data, clients=4, batch_size=8, seed=seed) as cohorts:
        return experiment.run(algorithm, state, cohorts, folder=folder, **options)


def stopped(folder, number, **options):
    """A run that has ended by an error after a round."""
    with pytest.raises(StoppedError):
        train(folder, callbacks=[*options.pop("callbacks", []), StopAt(number)], **options)


def rounds_of(folder):
    return sorted(int(path.name) for path in Path(folder, "checkpoints").iterdir())
