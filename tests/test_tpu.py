"""Programs compiled for TPUs by their own compiler, which needs no TPU and runs nothing.

That a program compiles is worth a test: the compiler knows fewer dtypes and operations than that
for CPUs. What it sends and holds is read from what is compiled.
"""

import jax
import jax.numpy as jnp
import pytest
import tpus
from jax import lax
from tpus import AUTO, EXPLICIT, shaped

import fax
from fax.inspect import report

tpus.require()

WIDTH = 128
MODEL_BYTES = 2 * 4 * WIDTH * WIDTH


@pytest.fixture(autouse=True, scope="module")
def in_32_bits():
    """As on TPUs, where numbers of 64 bits are emulated and take long to compile."""
    with jax.enable_x64(False):
        yield


# A round


def train(params, batches):
    def loss(p, x):
        return jnp.mean((jnp.tanh(x @ p[0]) @ p[1] - x) ** 2)

    def step(p, x):
        return jax.tree.map(lambda w, g: w - 0.1 * g, p, jax.grad(loss)(p, x)), None

    trained, _ = lax.scan(step, params, batches)
    return jax.tree.map(jnp.subtract, trained, params)


def fedavg(n, vectorize=None):
    @fax.program(clients=n)
    def program(params, batches, weights):
        updates = fax.map(
            jax.checkpoint(train), fax.broadcast(params), batches, vectorize=vectorize
        )
        return fax.mean(updates, weights=weights)

    return program


def squares(program):
    return lambda *args: sum(jnp.sum(x**2) for x in jax.tree.leaves(program(*args)))


def arguments(n):
    rows = "clients" if n % jax.sharding.get_mesh().shape["clients"] == 0 else None
    params = [shaped((WIDTH, WIDTH))] * 2
    return params, shaped((n, 2, 8, WIDTH), rows), shaped((n,), rows)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
def test_a_round_and_its_gradient(kind):
    with jax.set_mesh(tpus.mesh(kind)):
        forward = report(fedavg(8), *arguments(8))
        backward = report(jax.grad(squares(fedavg(8)), (0, 2)), *arguments(8))
    assert {c.operation for c in forward.collectives} == {"all-reduce"}
    assert sum(c.total_bytes for c in forward.collectives) == MODEL_BYTES + 4  # the total weight
    assert {c.operation for c in backward.collectives} == {"all-reduce"}
    assert (
        2 * MODEL_BYTES <= sum(c.total_bytes for c in backward.collectives) <= 2 * MODEL_BYTES + 16
    )
