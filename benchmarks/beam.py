"""Clients per second, and memory, of one pipeline of Apache Beam.

    make bench-beam

A client is a line of a text file with 16 numbers. The program is a mean of a function of these, and
the runner is Beam's FnApiRunner, in one process. Each number of clients has a process of its own.
Seconds are of the processor, so that other programs matter less.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import fax

CLIENTS = (10_000, 100_000, 1_000_000)
NUMBERS = 16


def parse(line: str) -> tuple[str, dict[str, np.ndarray]]:
    name, *numbers = line.split()
    return name, {"x": np.array(numbers, np.float32)}


def measure(clients: int) -> dict[str, float]:
    """One pipeline, after one of the same shapes that compiles."""
    import apache_beam as beam

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clients.txt")
        with path.open("w") as file:
            for number in range(clients):
                file.write(f"{number} {' '.join(str((number + i) % 10) for i in range(NUMBERS))}\n")

        @fax.program(clients=clients)
        def mean(scale, clients):
            return fax.mean(
                fax.map(lambda s, x: jnp.tanh(s * x), fax.broadcast(scale), clients["x"])
            )

        backend = fax.deploy.Beam(
            lambda pipeline: pipeline | beam.io.ReadFromText(str(path)) | beam.Map(parse),
            clients,
            {"x": jax.ShapeDtypeStruct((NUMBERS,), jnp.float32)},
        )
        held = backend.held()
        plan = fax.deploy.cut(mean, np.float32(1), held, held=["x"])
        wall, processor = time.perf_counter(), time.process_time()
        found = plan.run(backend, np.float32(1), held)
        expected = np.tanh(np.arange(10)).mean()
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        return {
            "clients": clients,
            "seconds": time.perf_counter() - wall,
            "processor seconds": time.process_time() - processor,
            "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    parser.add_argument("--one", type=int, help="only measure, in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    print(f"{'clients':>10}{'seconds':>10}{'processor':>12}{'µs/client':>12}{'peak MB':>10}")
    for number in options.clients:
        command = [sys.executable, __file__, "--one", str(number)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        own = json.loads(done.stdout)
        used = own["processor seconds"]
        print(
            f"{number:10,}{own['seconds']:10.1f}{used:12.1f}{1e6 * used / number:12.1f}"
            f"{own['peak MB']:10.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
