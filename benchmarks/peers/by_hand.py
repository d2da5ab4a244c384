"""The fastest federated averaging that we could write for CPUs in JAX alone.

All clients' examples are on the device, and the host sends the order of their rows.

- `threads-2`: the host dispatches one jitted epoch for each client, from two threads.
- `cond-N`, `gather-N`, `pre-N`: the whole round is one jitted program, a scan over the clients
  of each of N devices. Padded steps are skipped by a branch (cond) or by a traced number of steps
  (gather); pre gathers all batches of the round first.

Each device has one core and one thread, and clients are divided so that steps are balanced.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

from peers import harness, workloads

VARIANTS = ["cond-2", "gather-2", "pre-2", "threads-2", "cond-1", "gather-1", "pre-1"]
chosen = harness.options(VARIANTS)
MODE, COUNT = chosen.variant.split("-")
DEVICES = int(COUNT) if MODE != "threads" else 1
harness.virtual_devices(DEVICES)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402

from peers import models  # noqa: E402

ROWS_MULTIPLE = 100  # padded to these, so that few shapes are compiled


# A jitted epoch for each client


class Threads:
    def __init__(self, clients: list[int], params: workloads.Params):
        self.params = jax.device_put(params)
        self.state = models.server_optimizer().init(self.params)
        self.data = {client: self.padded(*workloads.examples(client)) for client in clients}
        self.pool = ThreadPoolExecutor(int(COUNT))

    def padded(self, x: np.ndarray, y: np.ndarray) -> tuple[jax.Array, jax.Array]:
        rows = -len(y) % ROWS_MULTIPLE
        return jax.device_put((np.pad(x, ((0, rows), (0, 0))), np.pad(y, (0, rows))))

    def round(self, number: int, drawn: np.ndarray) -> tuple[np.ndarray, int]:
        keys = np.asarray(jax.random.split(jax.random.PRNGKey(number), len(drawn)))
        counts = workloads.sizes()[drawn]
        steps = workloads.steps(drawn)

        def share(first: int) -> tuple:
            total = _zeros(self.params)
            for i in range(first, len(drawn), int(COUNT)):
                rows = np.full(workloads.MAX_EXAMPLES, -1, np.int32)
                rows[: counts[i]] = workloads.epoch_order(number, int(drawn[i]))
                update = _epoch(self.params, keys[i], *self.data[int(drawn[i])], rows, steps[i])
                total = _add(total, update, float(counts[i]))
            return jax.block_until_ready(total)

        totals = list(self.pool.map(share, range(int(COUNT))))
        total = functools.reduce(lambda a, b: _add(a, b, 1.0), totals)
        self.params, self.state = jax.block_until_ready(
            _server(self.params, self.state, total, float(counts.sum()))
        )
        return drawn, steps.sum()


@jax.jit
def _epoch(params, key, x, y, rows, steps):
    def body(i, carry):
        picked = lax.dynamic_slice(rows, (i * workloads.BATCH,), (workloads.BATCH,))
        mask = (picked >= 0).astype(jnp.float32)
        picked = jnp.maximum(picked, 0)
        return models.step(*carry, x[picked], y[picked], mask)

    trained, _ = lax.fori_loop(0, steps, body, (params, key))
    return jax.tree.map(jnp.subtract, params, trained)


_zeros = jax.jit(lambda params: jax.tree.map(jnp.zeros_like, params))


@functools.partial(jax.jit, donate_argnums=0)
def _add(total, update, weight):
    return jax.tree.map(lambda t, u: t + weight * u, total, update)


@jax.jit
def _server(params, state, total, examples):
    gradient = jax.tree.map(lambda t: t / examples, total)
    return models.server_step(params, state, gradient)


# The whole round in one program


class OneProgram:
    def __init__(self, clients: list[int], params: workloads.Params):
        self.offsets, parts, start = {}, [], 0
        for client in clients:
            self.offsets[client] = start
            parts.append(workloads.examples(client))
            start += len(parts[-1][1])
        self.mesh = jax.make_mesh((DEVICES,), ("clients",), (jax.sharding.AxisType.Auto,))
        everywhere = jax.NamedSharding(self.mesh, jax.P())
        self.split = jax.NamedSharding(self.mesh, jax.P("clients"))
        x, y = (np.concatenate(part) for part in zip(*parts, strict=True))
        state = models.server_optimizer().init(params)
        self.x, self.y, self.params, self.state = jax.device_put((x, y, params, state), everywhere)
        work = self.work
        if DEVICES > 1:
            specs = (*[jax.P()] * 3, *[jax.P("clients")] * 5)
            work = jax.shard_map(work, mesh=self.mesh, in_specs=specs, out_specs=jax.P())

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def train(params, state, x, y, rows, mask, steps, counts, keys):
            total = work(params, x, y, rows, mask, steps, counts, keys)
            gradient = jax.tree.map(lambda t: t / counts.sum(), total)
            return models.server_step(params, state, gradient)

        self.train = train

    def work(self, params, x, y, rows, mask, steps, counts, keys):
        """The work of a device: the weighted sum of its clients' updates."""
        start = jax.tree.map(jnp.zeros_like, params)
        if DEVICES > 1:
            start, params = jax.tree.map(
                lambda a: lax.pcast(a, ("clients",), to="varying"), (start, params)
            )
        gathered = (x[rows], y[rows]) if MODE == "pre" else (rows, rows)

        def batch(xs, ys):
            return (xs, ys) if MODE == "pre" else (x[xs], y[ys])

        def client(total, own):
            (xs, ys), mask, steps, count, key = own

            def one(carry, step):
                *data, mask = step
                return models.step(*carry, *batch(*data), mask)

            if MODE == "cond":
                trained, _ = lax.scan(
                    lambda carry, step: (
                        lax.cond(step[2][0] > 0, one, lambda c, _: c, carry, step),
                        None,
                    ),
                    (params, key),
                    (xs, ys, mask),
                )[0]
            else:

                def body(i, carry):
                    at = functools.partial(lax.dynamic_index_in_dim, index=i, keepdims=False)
                    return one(carry, (at(xs), at(ys), at(mask)))

                trained, _ = lax.fori_loop(0, steps, body, (params, key))
            return jax.tree.map(lambda t, p, q: t + count * (p - q), total, params, trained), None

        total, _ = lax.scan(client, start, (gathered, mask, steps, counts, keys))
        return lax.psum(total, "clients") if DEVICES > 1 else total

    def round(self, number: int, drawn: np.ndarray) -> tuple[np.ndarray, int]:
        keys = np.asarray(jax.random.split(jax.random.PRNGKey(number), len(drawn)))
        drawn = dealt(drawn)
        counts = workloads.sizes()[drawn]
        rows = np.zeros((len(drawn), workloads.MAX_EXAMPLES), np.int32)
        mask = np.zeros(rows.shape, np.float32)
        for i, client in enumerate(map(int, drawn)):
            rows[i, : counts[i]] = self.offsets[client] + workloads.epoch_order(number, client)
            mask[i, : counts[i]] = 1
        shape = (len(drawn), workloads.MAX_STEPS, workloads.BATCH)
        steps = workloads.steps(drawn).astype(np.int32)
        split = (rows.reshape(shape), mask.reshape(shape), steps, counts.astype(np.float32), keys)
        split = jax.device_put(split, self.split)
        self.params, self.state = jax.block_until_ready(
            self.train(self.params, self.state, self.x, self.y, *split)
        )
        return drawn, mask.reshape(shape).any(-1).sum()


def dealt(drawn: np.ndarray) -> np.ndarray:
    """Orders clients so that each device gets equally many, with about as many steps."""
    devices = [[] for _ in range(DEVICES)]
    loads = [0] * DEVICES
    for client in sorted(drawn, key=lambda c: -workloads.sizes()[c]):
        free = [d for d in range(DEVICES) if len(devices[d]) < len(drawn) // DEVICES]
        lightest = min(free, key=loads.__getitem__)
        devices[lightest].append(client)
        loads[lightest] += workloads.steps(client)
    return np.concatenate(devices).astype(drawn.dtype)


def main() -> None:
    report = harness.Report(chosen, ["jax", "numpy"])
    clients = report.load()
    way = Threads if MODE == "threads" else OneProgram
    training = way(clients, workloads.initial(chosen.workload))

    def one_round(number: int) -> None:
        drawn = workloads.cohort(number, chosen.workload.clients)
        report.cohort(*training.round(number, drawn))

    report.run(one_round, lambda: jax.device_get(training.params))
    report.finish()


if __name__ == "__main__":
    main()
