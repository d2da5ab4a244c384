"""A client of the Flower simulation, imported by each of its worker processes.

An epoch is one jitted loop with a traced number of steps, compiled once per worker. Examples come
from memory-mapped files, so that no worker needs its own copy.
"""

from __future__ import annotations

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from peers import models, workloads

FOLDER = "FAX_BENCHMARK_DATA"


def store(folder: str, clients: list[int]) -> None:
    """Writes the clients' examples once, for all workers."""
    os.environ[FOLDER] = folder
    offsets = np.concatenate([[0], np.cumsum(workloads.sizes()[clients])])
    rows = int(offsets[-1])
    xs = np.lib.format.open_memmap(f"{folder}/x.npy", "w+", np.float32, (rows, workloads.PIXELS))
    ys = np.lib.format.open_memmap(f"{folder}/y.npy", "w+", np.int32, (rows,))
    for client, start, end in zip(clients, offsets[:-1], offsets[1:], strict=True):
        xs[start:end], ys[start:end] = workloads.examples(client)
    xs.flush()
    ys.flush()
    np.savez(f"{folder}/rows.npz", clients=clients, starts=offsets[:-1])


@functools.cache
def stored() -> tuple[np.ndarray, np.ndarray, dict[int, int]]:
    folder = pathlib.Path(os.environ[FOLDER])
    rows = np.load(folder / "rows.npz")
    starts = dict(zip(rows["clients"].tolist(), rows["starts"].tolist(), strict=True))
    x, y = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in "xy")
    return x, y, starts


@jax.jit
def epoch(params, key, x, y, mask, steps):
    def body(i, carry):
        batch = (lax.dynamic_index_in_dim(a, i, keepdims=False) for a in (x, y, mask))
        return models.step(*carry, *batch)

    return lax.fori_loop(0, steps, body, (params, key))[0]


def train(arrays: list[np.ndarray], client: int, number: int) -> tuple[list[np.ndarray], int, int]:
    """Runs an epoch. Returns new parameters and the numbers of examples and steps."""
    params = [{"w": w, "b": b} for w, b in zip(arrays[::2], arrays[1::2], strict=True)]
    all_x, all_y, starts = stored()
    order = workloads.epoch_order(number, client)
    rows = slice(starts[client], starts[client] + len(order))
    x = np.zeros((workloads.MAX_EXAMPLES, workloads.PIXELS), np.float32)
    y, mask = np.zeros(len(x), np.int32), np.zeros(len(x), np.float32)
    x[: len(order)], y[: len(order)], mask[: len(order)] = all_x[rows][order], all_y[rows][order], 1
    shape = (workloads.MAX_STEPS, workloads.BATCH)
    steps = int(workloads.steps(np.array(client)))
    batches = x.reshape(*shape, -1), y.reshape(shape), mask.reshape(shape)
    new = epoch(params, jax.random.PRNGKey(client), *batches, jnp.int32(steps))
    return [np.asarray(layer[name]) for layer in new for name in "wb"], len(order), steps
