"""FedJAX 0.0.17: federated averaging as in its examples. Variants: its jit and pmap backends."""

from __future__ import annotations

import os
import sys

if "pmap" in sys.argv:  # a device for each core, with JAX's own choice of threads
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import fedjax
import jax
from fedjax.algorithms import fed_avg
from fedjax.models import emnist

from peers import harness, workloads

MODELS = {
    "W1": emnist.create_conv_model,
    "W2": emnist.create_logistic_model,
    "W3": emnist.create_dense_model,
}


def main() -> None:
    chosen = harness.options(["jit", "pmap"])
    report = harness.Report(chosen, ["fedjax", "jax", "numpy"])
    clients = {
        client: fedjax.ClientDataset({"x": x.reshape(-1, 28, 28, 1), "y": y})
        for client in report.load()
        for x, y in [workloads.examples(client)]
    }
    model = MODELS[chosen.name]()
    fedjax.set_for_each_client_backend(chosen.variant)
    batching = fedjax.ShuffleRepeatBatchHParams(workloads.BATCH, num_epochs=1, seed=None)
    algorithm = fed_avg.federated_averaging(
        fedjax.model_grad(model),
        fedjax.optimizers.sgd(workloads.CLIENT_RATE),
        fedjax.optimizers.adam(
            workloads.SERVER_RATE,
            b1=workloads.SERVER_B1,
            b2=workloads.SERVER_B2,
            eps=workloads.SERVER_EPS,
        ),
        batching,
    )
    params = model.init(jax.random.PRNGKey(0))
    names = list(params)  # in the order of the layers
    state = algorithm.init(
        {
            name: {key: jax.numpy.asarray(value) for key, value in layer.items()}
            for name, layer in zip(names, workloads.initial(chosen.workload))
        }
    )
    cohorts = []

    def one_round(number: int) -> None:
        nonlocal state
        drawn = workloads.cohort(number, chosen.workload.clients)
        keys = jax.random.split(jax.random.PRNGKey(number), len(drawn))
        with_data = [(c, clients[int(c)], key) for c, key in zip(drawn, keys)]
        state, diagnostics = algorithm.apply(state, with_data)
        jax.block_until_ready(state.params)
        cohorts.append(list(diagnostics))

    report.run(one_round, lambda: [jax.device_get(state.params[name]) for name in names])
    for drawn in cohorts:  # counted afterward, since FedJAX does not report it
        batches = (clients[int(c)].shuffle_repeat_batch(batching) for c in drawn)
        report.cohort(drawn, sum(1 for own in batches for _ in own))
    report.finish()


if __name__ == "__main__":
    main()
