"""DrJAX 0.2.1: a jitted round of broadcast, map of a scan over masked batches, weighted mean."""

from __future__ import annotations

import logging

import drjax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from peers import harness, models, workloads

logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of a missing mesh at every call
STEPS_MULTIPLE = 5  # padded to these, so that few shapes are compiled


def client(params, key, x, y, mask):
    def body(carry, batch):
        return models.step(*carry, *batch), None

    (trained, _), _ = lax.scan(body, (params, key), (x, y, mask))
    return jax.tree.map(jnp.subtract, params, trained)


def prepare(number: int, drawn: np.ndarray) -> tuple[np.ndarray, ...]:
    """An epoch of each client, shuffled and padded to the longest."""
    steps = -(-max(workloads.steps(drawn)) // STEPS_MULTIPLE) * STEPS_MULTIPLE
    x = np.zeros((len(drawn), steps * workloads.BATCH, workloads.PIXELS), np.float32)
    y = np.zeros(x.shape[:2], np.int32)
    mask = np.zeros(x.shape[:2], np.float32)
    for i, own in enumerate(map(int, drawn)):
        order = workloads.epoch_order(number, own)
        own_x, own_y = workloads.examples(own)
        x[i, : len(order)], y[i, : len(order)] = own_x[order], own_y[order]
        mask[i, : len(order)] = 1
    shape = (len(drawn), steps, workloads.BATCH)
    return x.reshape(*shape, -1), y.reshape(shape), mask.reshape(shape)


def main() -> None:
    chosen = harness.options(["matmul"])
    report = harness.Report(chosen, ["drjax", "jax", "numpy"])
    report.load()

    @jax.jit
    @drjax.program(placements={"clients": chosen.workload.clients})
    def train(params, state, keys, x, y, mask, counts):
        work = (drjax.broadcast(params), keys, x, y, mask)
        updates = drjax.map_fn(client, work)
        weights = jax.tree.map(lambda u: counts.reshape(-1, *[1] * (u.ndim - 1)), updates)
        return models.server_step(params, state, drjax.reduce_weighted_mean(updates, weights))

    params = jax.device_put(workloads.initial(chosen.workload))
    state = models.server_optimizer().init(params)

    def one_round(number: int) -> None:
        nonlocal params, state
        drawn = workloads.cohort(number, chosen.workload.clients)
        x, y, mask = prepare(number, drawn)
        keys = jax.random.split(jax.random.PRNGKey(number), len(drawn))
        counts = mask.sum((1, 2))
        params, state = jax.block_until_ready(train(params, state, keys, x, y, mask, counts))
        report.cohort(drawn, mask.any(-1).sum())

    report.run(one_round, lambda: jax.device_get(params))
    report.finish()


if __name__ == "__main__":
    main()
