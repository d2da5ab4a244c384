"""What secure sums cost: bytes and processor time of a sum over processes, with and without masks.

Each client has a vector of int32. A plan on `fax.deploy.Processes` adds these up: as they are,
secure, and secure with a tenth of the clients left out after they have shared their keys. Several
clients run one after another in a process. The sums are compared with NumPy's. Needs the extra
`secure`, and Linux for the processor time of other processes.

    python benchmarks/secure_sums.py --clients 10 100 --length 100000
"""

import argparse
import functools
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import fax
from fax import deploy

TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """The processor time of a process so far."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def measure(name: str, backend: deploy.Processes, clients: int, run: Callable[[], Any]) -> None:
    """Prints a row of the table: medians of some runs after a first one."""
    run()
    pids = [link.process.pid for link in backend._links]
    costs = []
    for _ in range(3):
        before = backend.sent, backend.received, sum(map(cpu_seconds, pids))
        cpu, start = cpu_seconds(os.getpid()), time.perf_counter()
        run()
        costs.append(
            (
                (backend.sent - before[0]) / clients / 1e3,
                (backend.received - before[1]) / clients / 1e3,
                (sum(map(cpu_seconds, pids)) - before[2]) / clients * 1e3,
                cpu_seconds(os.getpid()) - cpu,
                time.perf_counter() - start,
            )
        )
    down, up, client, server, wall = map(statistics.median, zip(*costs, strict=True))
    print(
        f"| {clients} | {name} | {down:,.1f} | {up:,.1f} | {client:,.0f} | {server:.2f} | "
        f"{wall:.2f} |",
        flush=True,
    )


def compare(clients: int, length: int, processes: int) -> None:
    rows = np.random.default_rng(0).integers(-(2**31), 2**31, (clients, length)).astype(np.int32)

    @fax.program(clients=clients)
    def total(rows):
        kept = fax.map(lambda x: x[0], rows["x"])
        return fax.sum(rows["x"]), kept

    plan = deploy.cut(total, {"x": rows}, held=["x"])
    for secure in (None, deploy.SecureSums()):
        with deploy.Processes(processes, secure=secure, timeout=1000.0) as backend:
            placed = backend.put(range(clients), list(rows))
            held = deploy.Held(tuple(placed), tuple(range(clients)), rows.shape, rows.dtype)

            def run(backend=backend, held=held, **settings):
                found, kept = plan.run(backend, {"x": held}, **settings)
                left = rows[list(kept.present)]
                np.testing.assert_array_equal(found, np.sum(left, axis=0, dtype=np.int32))

            measure("as they are" if secure is None else "secure", backend, clients, run)
            if secure is not None:
                failing = functools.partial(run, take=clients - clients // 10)
                measure("secure, a tenth fails", backend, clients, failing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--length", type=int, default=100_000, help="of each client's vector")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    print("| clients | sums | kB down | kB up | ms of a client | s of the server | s in all |")
    print("|---|---|---|---|---|---|---|")
    for clients in args.clients:
        compare(clients, args.length, args.processes)


if __name__ == "__main__":
    main()
