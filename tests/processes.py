"""Scripts that run in several processes, or in one that starts with nothing set up."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import fax

PACKAGE = Path(fax.__file__).parents[1]
EXAMPLES = Path(__file__).parents[1] / "examples"
ENV = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(PACKAGE), str(EXAMPLES)]),
    "PYTHONWARNINGS": "error",
    "JAX_PLATFORMS": "cpu",
}
PRELUDE = """
    import json, os, signal, sys, time
    import jax
    import jax.numpy as jnp
    import numpy as np
    import fax

    me, count, port = map(int, sys.argv[1:])
    jax.config.update("jax_num_cpu_devices", 2)

    def start(**options):
        options = dict(initialization_timeout=60, shutdown_timeout=60) | options
        fax.sharding.initialize(f"localhost:{port}", count, me, **options)

    def refused(fn, *args, **kwargs):
        try:
            return f"nothing was raised, but {fn(*args, **kwargs)} returned"
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"

    def report(result):
        print("REPORT", json.dumps(result), flush=True)
"""


def free_ports(count):
    """Ports that nobody listens on, all of them different."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def free_port():
    return free_ports(1)[0]


@contextlib.contextmanager
def running(script, count):
    """The processes of a run, for as long as the context lasts."""
    code = textwrap.dedent(PRELUDE) + textwrap.dedent(script)
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(i), str(count), str(port)],
            env=ENV,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ends(processes):
    """The exit statuses, and what was printed to stdout and to stderr."""
    outputs = [process.communicate(timeout=60) for process in processes]
    statuses = [process.returncode for process in processes]
    return statuses, [out for out, _ in outputs], [err for _, err in outputs]


def reports(script, count):
    """What the processes report, after they have ended as they should."""
    with running(script, count) as processes:
        statuses, outs, errs = ends(processes)
    assert statuses == [0] * count, errs
    return [json.loads(line[7:]) for o in outs for line in o.splitlines() if "REPORT" in line[:6]]


def sends_at_once(link):
    """Whether a TCP connection sends what is short without waiting for more of it."""
    with socket.socket(fileno=os.dup(link.fileno())) as own:
        return own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
