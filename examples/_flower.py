"""A federation of Flower on this machine, for the examples: a SuperLink and SuperNodes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fax

BIN = Path(sys.executable).parent


class Federation:
    """A SuperLink, and SuperNodes with the numbers ``partition-id`` from 0.

    Args:
      folder: for the configuration and the log.
      nodes: how many SuperNodes.
      stack: ends them.

    Attributes:
      nodes: their processes.
    """

    def __init__(self, folder, nodes, stack):
        self._folder, self._stack = folder, stack
        self._env = os.environ | {
            "FLWR_HOME": str(folder),
            "FLWR_TELEMETRY_ENABLED": "0",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(Path(fax.__file__).parents[1]),
        }
        port, *others = map(str, _free_ports(1 + nodes))
        here = ["--insecure", "--host", "127.0.0.1", "--port"]
        self._start("flower-superlink", *here, port, "--disable-runtime-dependency-installation")
        _wait_for(int(port))
        self.nodes = [
            self._start(
                *("flower-supernode", *here, own, "--superlink", f"127.0.0.1:{port}"),
                *("--node-config", f"partition-id={number} num-partitions={nodes}"),
            )
            for number, own in enumerate(others)
        ]
        (folder / "config.toml").write_text(
            '[superlink]\ndefault = "local"\n[superlink.local]\n'
            f'address = "127.0.0.1:{port}"\ninsecure = true\n'
        )

    def run(self, app, **config):
        """Runs an app until it ends."""
        settings = " ".join(f"{name}={value!r}" for name, value in config.items())
        command = [BIN / "flwr", "run", app, "--stream", "--run-config", settings]
        subprocess.run(command, env=self._env, check=True)

    def _start(self, command, *arguments):
        with (self._folder / "log").open("a") as log:
            process = subprocess.Popen(
                [BIN / command, *arguments],
                env=self._env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._stack.callback(_end, process)
        return process


@contextlib.contextmanager
def federation(folder, nodes):
    """A federation, whose processes end with the context."""
    with contextlib.ExitStack() as stack:
        yield Federation(Path(folder), nodes, stack)


def _free_ports(number):
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)
        ]
        return [server.getsockname()[1] for server in servers]


def _wait_for(port):
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.1)


def _end(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
