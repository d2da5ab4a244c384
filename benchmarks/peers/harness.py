"""Runs a peer: its options, its timing, and its report as a line of JSON.

    python -m peers.PEER --workload W1|W2|W3 [--variant NAME] [--warm-up 3] [--rounds 12]

This file imports only NumPy, because every peer has its own environment.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata

import numpy as np

from peers import workloads

CORES = 2
CHECKED = 6  # rounds after which losses are compared: about half of the first is left


def options(variants: Sequence[str]) -> argparse.Namespace:
    """Parses the command line, and adds the `Workload` with the given name."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=workloads.WORKLOADS, required=True)
    parser.add_argument("--variant", choices=variants, default=variants[0])
    parser.add_argument("--warm-up", type=int, default=3, help="rounds that do not count")
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds")
    chosen = parser.parse_args()
    chosen.name, chosen.workload = chosen.workload, workloads.WORKLOADS[chosen.workload]
    chosen.total = chosen.warm_up + chosen.rounds
    return chosen


def virtual_devices(count: int) -> None:
    """Makes JAX see ``count`` CPU devices. Call it before JAX is imported.

    Several devices share the cores, so each has a single thread.
    """
    if count > 1:
        flags = f"--xla_force_host_platform_device_count={count}"
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"


class Report:
    """The report of a process about its rounds."""

    def __init__(self, chosen: argparse.Namespace, packages: Iterable[str]):
        self.chosen = chosen
        self.seconds: list[float] = []
        self.steps: list[int] = []
        self.cohorts: list[str] = []
        self._versions = {name: metadata.version(name) for name in packages}
        self._before: float | None = None
        self._params: dict[int, workloads.Params] = {}  # by number of rounds

    def load(self) -> list[int]:
        """Makes the examples of all clients in the cohorts. Returns the clients' numbers."""
        count = self.chosen.workload.clients
        cohorts = [workloads.cohort(number, count) for number in range(self.chosen.total)]
        loaded = [int(client) for client in np.unique(np.concatenate(cohorts))]
        self.data = sum(x.nbytes + y.nbytes for x, y in map(workloads.examples, loaded)) / 2**20
        return loaded

    def cohort(self, clients: Iterable[int], steps: int) -> None:
        """Records the clients and the number of SGD steps of a round, as the peer reports them."""
        drawn = np.sort(np.asarray(list(clients), np.int32))
        self.cohorts.append(f"{zlib.crc32(drawn.tobytes()):08x}")
        self.steps.append(int(steps))

    def run(self, one_round: Callable[[int], None], params: Callable[[], workloads.Params]) -> None:
        """Times rounds. ``one_round`` returns when the server's new state is ready."""
        self.start()
        for number in range(self.chosen.total):
            start = time.perf_counter()
            one_round(number)
            self.done(time.perf_counter() - start, params)

    def start(self) -> None:
        """Records the memory before the first round. For peers with their own loop."""
        self._before = resident()

    def done(self, seconds: float, params: Callable[[], workloads.Params]) -> None:
        """Records the end of a round, and keeps the parameters if their loss is reported."""
        self.seconds.append(seconds)
        if len(self.seconds) in (CHECKED, self.chosen.total):
            self._params[len(self.seconds)] = [
                {name: np.array(value) for name, value in layer.items()} for layer in params()
            ]

    def finish(self, peak: float | None = None, on_devices: float = 0.0) -> None:
        """Prints the line.

        ``peak``: MiB of all processes, where there are several; ``on_devices``: those of examples
        that stay there.
        """
        peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        losses = {count: workloads.evaluate(kept) for count, kept in self._params.items()}
        line = dict(
            workload=self.chosen.name,
            variant=self.chosen.variant,
            seconds=self.seconds[self.chosen.warm_up :],
            first_round=self.seconds[0],
            peak_mib=peak,
            before_mib=self._before,
            data_mib=self.data,
            on_devices_mib=on_devices,
            loss=losses[min(CHECKED, self.chosen.total)],
            final_loss=losses[self.chosen.total],
            cohorts=self.cohorts,
            steps=self.steps,
            versions=self._versions,
        )
        print(json.dumps(line), flush=True)


def resident() -> float:
    """The memory of this process, in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
