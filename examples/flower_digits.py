"""Federated averaging of digits that stay with three SuperNodes of Flower, one of which is killed.

Starts a SuperLink and three SuperNodes on this machine, each of which loads the handwritten digits
of one client, and runs the app in the folder `flower_digits` on them. In the middle, one node is
killed, and training goes on with the other two. Needs the extra `flower`.

    python examples/flower_digits.py
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fax

CLIENTS = 3
APP = Path(__file__).with_name("flower_digits")
BIN = Path(sys.executable).parent


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=60.0, help="until a node counts as failed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        app = shutil.copytree(APP, folder / "flower_digits")
        fax.deploy.write_flower_client(app / "flower_digits" / "fax_client")
        env = os.environ | {
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(Path(fax.__file__).parents[1]),
        }

        def start(command, *arguments):
            with (folder / "log").open("a") as log:
                process = subprocess.Popen(
                    [BIN / command, *arguments],
                    env=env,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            stack.callback(end, process)
            return process

        port, *others = map(str, free_ports(1 + CLIENTS))
        address = ["--host", "127.0.0.1", "--port"]
        start(
            *("flower-superlink", "--insecure", "--disable-runtime-dependency-installation"),
            *(*address, port),
        )
        wait_for(int(port))
        nodes = [
            start(
                *("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"),
                *(*address, own),
                *("--node-config", f"partition-id={number} num-partitions={CLIENTS}"),
            )
            for number, own in enumerate(others)
        ]
        (folder / "home").mkdir(exist_ok=True)
        (folder / "home" / "config.toml").write_text(
            '[superlink]\ndefault = "local"\n[superlink.local]\n'
            f'address = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        settings = f"rounds={options.rounds} timeout={options.timeout} victim={nodes[1].pid}"
        command = [BIN / "flwr", "run", app, "--stream", "--run-config", settings]
        subprocess.run(command, env=env, check=True)


def free_ports(number):
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)
        ]
        return [server.getsockname()[1] for server in servers]


def wait_for(port):
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.1)


def end(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    main()
