"""Flower's simulation on Ray: a node for each place in the cohort, two workers, FedAdam.

Its FedAdam differs from the Adam of the others: it starts counting rounds at two in the bias
correction, and adds epsilon before the correction of the second moment. So its losses differ.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time

# Before Flower is imported, also for the workers: no telemetry, and no memory monitor.
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
}

import psutil
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam
from flwr.simulation import run_simulation

from peers import flower_client, harness, workloads

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    from peers import flower_client  # in the worker

    config = message.content["config"]
    client = int(config["clients"][context.node_config["partition-id"]])
    arrays = message.content["arrays"].to_numpy_ndarrays()
    new, examples, steps = flower_client.train(arrays, client, int(config["server-round"]) - 1)
    metrics = {"num-examples": examples, "client": client, "steps": steps}
    content = {"arrays": ArrayRecord(new), "metrics": MetricRecord(metrics)}
    return Message(content=RecordDict(content), reply_to=message)


class Timed(FedAdam):
    """FedAdam on the benchmark's cohorts, with timing."""

    def __init__(self, report: harness.Report, **options):
        super().__init__(**options)
        self.report = report

    def configure_train(self, server_round, arrays, config, grid):
        self.started = time.perf_counter()
        count = self.report.chosen.workload.clients
        config["clients"] = [int(c) for c in workloads.cohort(server_round - 1, count)]
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(f"a client failed in round {server_round}: {reply.error}")
        metrics = [reply.content["metrics"] for reply in replies]
        aggregated = super().aggregate_train(server_round, replies)
        seconds = time.perf_counter() - self.started
        arrays = aggregated[0].to_numpy_ndarrays()
        self.report.done(
            seconds,
            lambda: [{"w": w, "b": b} for w, b in zip(arrays[::2], arrays[1::2], strict=True)],
        )
        self.report.cohort((m["client"] for m in metrics), sum(m["steps"] for m in metrics))
        return aggregated


class Memory(threading.Thread):
    """The peak memory of all processes together, with shared pages counted once."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0.0

    def run(self):
        this = psutil.Process()
        while True:
            held = 0
            for process in [this, *this.children(recursive=True)]:
                try:
                    held += process.memory_full_info().pss
                except psutil.Error:  # it has ended
                    continue
            self.peak = max(self.peak, held / 2**20)
            time.sleep(0.5)


def main() -> None:
    chosen = harness.options(["ray"])
    report = harness.Report(chosen, ["flwr", "ray", "jax", "numpy"])
    server = ServerApp()

    @server.main()
    def run(grid: Grid, context: Context) -> None:
        strategy = Timed(
            report,
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=chosen.workload.clients,
            min_available_nodes=chosen.workload.clients,
            eta=workloads.SERVER_RATE,
            eta_l=workloads.CLIENT_RATE,
            beta_1=workloads.SERVER_B1,
            beta_2=workloads.SERVER_B2,
            tau=workloads.SERVER_EPS,
        )
        initial = [layer[name] for layer in workloads.initial(chosen.workload) for name in "wb"]
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(initial),
            train_config=ConfigRecord({}),
            num_rounds=chosen.total,
        )

    with tempfile.TemporaryDirectory() as folder:
        flower_client.store(folder, report.load())
        workloads.examples.cache_clear()
        memory = Memory()
        memory.start()
        report.start()
        run_simulation(
            server,
            app,
            num_supernodes=chosen.workload.clients,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {"num_cpus": harness.CORES, "include_dashboard": False},
            },
        )
    report.finish(memory.peak)


if __name__ == "__main__":
    main()
