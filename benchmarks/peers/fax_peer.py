"""fax, on as many virtual CPU devices as there are cores.

Variants: `matmul` uses the models of `models.py`, in which convolutions are matrix products;
`nnx` uses the stock layers of flax.nnx, whose convolutions fax rewrites.
"""

from __future__ import annotations

import jax
import numpy as np
import optax

import fax
from peers import harness, models, workloads


def matmul(workload: workloads.Workload):
    """Returns initial parameters, a loss, and a conversion to the parameters of `harness`."""

    def loss(params, batch, key):
        key = key if workload.convolutional else None
        return models.losses(params, batch["x"], batch["y"], key)

    return workloads.initial(workload), loss, lambda params: params


def nnx(workload: workloads.Workload):
    """The same for a network of flax.nnx."""
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self):
            layers = []
            for shape, values in zip(workload.layers, workloads.initial(workload), strict=True):
                if len(shape) == 4:
                    layer = nnx.Conv(*shape[2:], shape[:2], padding="VALID", rngs=nnx.Rngs(0))
                else:
                    layer = nnx.Linear(*shape, rngs=nnx.Rngs(0))
                layer.kernel[...], layer.bias[...] = values["w"], values["b"]
                layers.append(layer)
            self.layers = nnx.List(layers)
            self.dropout = nnx.List([nnx.Dropout(rate) for rate in workloads.DROPOUT])

        def __call__(self, x, rngs):
            convolutions = [layer for layer in self.layers if isinstance(layer, nnx.Conv)]
            *dense, last = self.layers[len(convolutions) :]
            h = x.reshape(-1, workloads.SIDE, workloads.SIDE, 1) if convolutions else x
            for convolution in convolutions:
                h = nnx.relu(convolution(h))
            if convolutions:
                h = nnx.max_pool(h, (2, 2), strides=(2, 2))
                h = self.dropout[0](h, rngs=rngs)
            h = h.reshape(len(h), -1)
            for layer in dense:
                h = nnx.relu(layer(h))
            return last(self.dropout[1](h, rngs=rngs) if convolutions else h)

    structure, initial = nnx.split(Network())

    def loss(params, batch, key):
        network = nnx.merge(structure, params)
        scores = network(batch["x"], nnx.Rngs(key))
        return optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"])

    def layers(params):
        network = nnx.merge(structure, params)
        return [{"w": np.asarray(x.kernel), "b": np.asarray(x.bias)} for x in network.layers]

    return initial, loss, layers


VARIANTS = {"matmul": matmul, "nnx": nnx}


def main() -> None:
    chosen = harness.options(list(VARIANTS))
    report = harness.Report(chosen, ["jax", "flax", "optax", "numpy"])
    jax.set_mesh(fax.sharding.use_cpu_devices())
    clients = report.load()
    position = {client: i for i, client in enumerate(clients)}

    def sampler(number: int) -> list[int]:
        drawn = workloads.cohort(number, chosen.workload.clients)
        return [position[int(client)] for client in drawn]

    data = fax.data.InMemory(
        {str(c): dict(zip("xy", workloads.examples(c), strict=True)) for c in clients}
    )
    cohorts = fax.data.cohorts(data, chosen.workload.clients, workloads.BATCH, sampler=sampler)
    initial, loss, layers = VARIANTS[chosen.variant](chosen.workload)
    algorithm = fax.algorithms.fedavg(
        loss, optax.sgd(workloads.CLIENT_RATE), models.server_optimizer()
    )
    train = jax.jit(algorithm.round, donate_argnums=0)
    state = algorithm.init(initial)
    seen: list[tuple] = []

    def one_round(number: int) -> None:
        nonlocal state
        cohort = next(cohorts)
        state, _ = jax.block_until_ready(train(state, cohort))
        seen.append((cohort.positions, cohort.mask))

    report.run(one_round, lambda: layers(jax.device_get(algorithm.params(state))))
    for positions, mask in jax.device_get(seen):
        report.cohort([clients[i] for i in positions], mask.any(-1).sum())
    shards = [shard for array in jax.live_arrays() for shard in array.addressable_shards]
    report.finish(on_devices=sum(shard.data.nbytes for shard in shards) / 2**20)


if __name__ == "__main__":
    main()
