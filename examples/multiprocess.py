"""Federated averaging in several processes, each of which loads only its own clients' data.

The processes run on this machine, with virtual CPU devices, and communicate as they would on
several hosts.

    python examples/multiprocess.py --processes 2 --check

prints the test accuracy and the difference from the result of a single process.
"""

import argparse
import functools
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import fax

ALPHA, BATCH_SIZE, HIDDEN = 0.5, 5, 64
EXIT_TIMEOUT = 10  # seconds in which processes have to end after one of them has died


def load_clients(options, rows):
    """Loads the clients ``rows`` as arrays [len(rows), steps, BATCH_SIZE, ...], and test data."""
    (images, labels), test = _digits.load(options.seed)
    owner = _digits.dirichlet_partition(labels, options.clients, ALPHA, options.seed)
    # All processes have to pad to the same size, that of the largest client of all.
    slots = -(-np.bincount(owner).max() // BATCH_SIZE) * BATCH_SIZE
    own = np.isin(owner, rows)
    number = np.searchsorted(rows, owner[own])
    clients = _digits.stack(images[own], labels[own], number, len(rows), slots)
    batches = {k: x.reshape(len(rows), -1, BATCH_SIZE, *x.shape[2:]) for k, x in clients.items()}
    return batches, test


def logits(params, images):
    return jax.nn.relu(images @ params["hidden"] + params["bias"]) @ params["out"]


def mean_loss(params, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, batch["x"]), batch["y"])
    return jnp.sum(losses, where=batch["mask"]) / jnp.maximum(batch["mask"].sum(), 1)


def local_update(params, batches):
    """Returns the change of the parameters by one epoch of a client's training."""

    def step(params, batch):
        gradient = jax.grad(mean_loss)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), None

    trained, _ = lax.scan(step, params, batches)
    return jax.tree.map(jnp.subtract, trained, params)


def train(options):
    """Runs in every process. The returned parameters are the same in all of them."""
    mesh = fax.sharding.make_mesh(clients=-1)
    with jax.set_mesh(mesh):
        rows = fax.sharding.local_rows(options.clients)
        batches, (images, labels) = load_clients(options, rows)
        batches = fax.sharding.place(batches, n=options.clients, rows=rows)
        print(
            f"process {jax.process_index()} of {jax.process_count()}, pid {os.getpid()}: "
            f"{len(rows)} of {options.clients} clients on {jax.local_device_count()} devices",
            flush=True,
        )

        @fax.program(clients=options.clients)
        def federated_round(params, batches):
            updates = fax.map(local_update, fax.broadcast(params), batches)
            num_examples = batches["mask"].sum(axis=(1, 2))
            return jax.tree.map(jnp.add, params, fax.mean(updates, weights=num_examples))

        keys = jax.random.split(jax.random.key(options.seed))
        params = {
            "hidden": jax.random.normal(keys[0], (64, HIDDEN)) / 8,
            "bias": jnp.zeros(HIDDEN),
            "out": jax.random.normal(keys[1], (HIDDEN, 10)) / 8,
        }
        run = jax.jit(federated_round)
        for _ in range(options.rounds):
            params = jax.block_until_ready(run(params, batches))
    params = jax.device_get(params)
    accuracy = np.mean(logits(params, images).argmax(axis=1) == labels)
    return params, accuracy


def work(options):
    """Runs one of the processes."""
    jax.config.update("jax_num_cpu_devices", options.devices_per_process)
    fax.sharding.initialize(
        f"localhost:{options.port}",
        options.processes,
        options.process,
        initialization_timeout=60,
        heartbeat_timeout=options.heartbeat_timeout,
    )
    start = time.perf_counter()
    params, accuracy = train(options)
    if options.process == 0:
        seconds = time.perf_counter() - start
        print(
            f"test accuracy {accuracy:.1%} after {options.rounds} rounds in {options.processes} "
            f"processes, {seconds:.1f} s"
        )
        np.savez(options.result, **params)


def launch(options, result):
    """Starts all processes and waits for them. If one dies, prints which one it was."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, *sys.argv, f"--port={port}", f"--result={result}"]
    # A secret of this run, so that no other process on this machine can join it.
    environment = os.environ | {"FAX_TOKEN": secrets.token_hex(16)}
    processes = [
        subprocess.Popen([*command, f"--process={i}"], env=environment)
        for i in range(options.processes)
    ]
    try:
        if not ended(processes, options.heartbeat_timeout):
            # If the others have connected to each other, they print why they end, and exit.
            deadline = time.monotonic() + EXIT_TIMEOUT
            while time.monotonic() < deadline and any(
                process.poll() is None and not is_stopped(process) for process in processes
            ):
                time.sleep(0.1)
            print(cause(processes), flush=True)
            sys.exit(1)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def ended(processes, patience):
    """Waits until all have ended. Returns False if one has died or was stopped for too long."""
    stopped = {}
    while any(process.poll() is None for process in processes):
        now = time.monotonic()
        stopped = {p: stopped.get(p, now) for p in processes if is_stopped(p)}
        # Processes that have connected notice it themselves, after `patience` seconds.
        long = any(now - since > patience + EXIT_TIMEOUT for since in stopped.values())
        if long or any(process.poll() for process in processes):
            return False
        time.sleep(0.1)
    return not any(process.poll() for process in processes)


def cause(processes):
    """Says which process died and ended the run."""
    stopped = [i for i, process in enumerate(processes) if is_stopped(process)]
    failed = {i: p.poll() for i, p in enumerate(processes) if p.poll()}
    # If another process was the cause, a process exits with status 3, or JAX aborts it.
    killed = [i for i, status in failed.items() if status < 0 and status != -signal.SIGABRT]
    raised = [i for i, status in failed.items() if status > 0 and status != 3]
    first = [*killed, *stopped, *raised, *failed][0]
    if first in stopped:
        return f"process {first} was stopped by a signal, and was killed"
    status = failed[first]
    how = f"signal {-status}" if status < 0 else f"an error, exit status {status}"
    return f"process {first} died of {how}"


def is_stopped(process):
    """Whether a signal has stopped a process, if the system can tell."""
    if process.poll() is not None or not hasattr(os, "waitid"):
        return False
    options = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, process.pid, options) is not None


def check(options, result):
    """Compares the result with that of this single process, on the same number of devices."""
    jax.config.update("jax_num_cpu_devices", options.processes * options.devices_per_process)
    params, _ = train(options)
    with np.load(result) as found:
        difference = max(np.abs(found[name] - params[name]).max() for name in params)
    print(f"largest difference from a single process {difference:.1e}")
    if difference > 1e-4:
        sys.exit("the results differ")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    number = functools.partial(parser.add_argument, type=int)
    number("--processes", default=2)
    number("--devices-per-process", default=2)
    number("--rounds", default=30)
    number("--clients", default=48, help="a multiple of the number of all devices")
    number("--seed", default=0)
    number(
        "--heartbeat-timeout", default=30, help="seconds of silence until a process counts as dead"
    )
    parser.add_argument("--check", action="store_true", help="compare with a single process")
    number("--process", help=argparse.SUPPRESS)
    number("--port", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if options.process is not None:
        return work(options)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.npz")
        launch(options, result)
        if options.check:
            check(options, result)


if __name__ == "__main__":
    main()
