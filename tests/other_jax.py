"""Runs saved plans on clients that have another version of JAX, and neither fax nor optax.

    python tests/other_jax.py PYTHON

The server is this Python, and the clients are processes of the other one. `.ci/run` calls it for
both directions of the oldest and the newest supported version.
"""

import pathlib
import subprocess
import sys
import tempfile
import unittest.mock

import conftest  # noqa: F401
import jax
import numpy as np
import optax
from deploys import DATA, PARAMS, N, cohort_of, loss, sgd, without_keys

from fax import aggregators, algorithms, deploy

PLANS = {
    # Its stage takes random keys, and any number of steps.
    "fedavg": algorithms.fedavg(loss, sgd(), optax.adam(0.1), aggregator=aggregators.drive()),
    "scaffold": algorithms.scaffold(loss, 0.1, num_clients=N),
}


def check(name, folder):
    """Cuts and saves a plan, which the clients load, and compares with the jitted round."""
    algorithm, cohort = PLANS[name], cohort_of()
    args = algorithm.init(PARAMS), cohort
    held, clients = [*DATA], None
    if name == "scaffold":
        held, clients = [*DATA, "clients"], np.asarray(cohort.positions).tolist()
    ragged = ["batches", "mask"] if name == "fedavg" else []
    # The plan fetches no rows, so what stays with the clients cannot be compared here.
    plan = deploy.cut(algorithm.round, *args, held=held, ragged=ragged)
    plan.save(folder)
    with deploy.Processes(2, plan=folder) as backend:
        found = plan.run(backend, *args, clients=clients)
    expected = without_keys(jax.jit(algorithm.round)(*args))
    pairs = zip(
        jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, deploy.Held)),
        jax.tree.leaves(expected),
        strict=True,
    )
    for own, other in pairs:
        if not isinstance(own, deploy.Held):
            np.testing.assert_allclose(without_keys(own), other, rtol=1e-12, atol=1e-13)


def main():
    other = str(pathlib.Path(sys.argv[1]).absolute())
    ask = [other, "-c", "import jax; print(jax.__version__)"]
    version = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    if version == jax.__version__:
        sys.exit(f"Both Pythons have jax {version}.")
    with unittest.mock.patch.object(sys, "executable", other):
        for name in PLANS:
            with tempfile.TemporaryDirectory() as folder:
                check(name, pathlib.Path(folder))
            print(f"{name}: a plan of jax {jax.__version__} runs on clients with jax {version}.")


if __name__ == "__main__":
    main()
