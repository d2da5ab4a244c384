"""Federations of Flower on this machine: a SuperLink, SuperNodes, and what they send."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from processes import PACKAGE, free_ports

from fax import deploy

BIN = Path(sys.executable).parent
ENV = os.environ | {
    "PYTHONPATH": str(PACKAGE),
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "JAX_PLATFORMS": "cpu",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_SUPERGRID_API_URL": "http://127.0.0.1:9",  # where it would ask for updates
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
}


class Federation:
    """A SuperLink and SuperNodes, each a group of processes.

    Attributes:
      nodes: the processes of the SuperNodes.
      traffic: all bytes between the SuperLink and the nodes, of each direction of a connection.
    """

    def __init__(self, folder, configs, stack):
        self.folder = folder
        self.env = ENV | {"FLWR_HOME": str(folder / "flwr"), "FAX_TESTS": str(folder)}
        (folder / "flwr").mkdir()
        self._stack = stack
        port, *others = free_ports(1 + len(configs))
        options = ("--insecure", "--disable-runtime-dependency-installation")
        self._start("superlink", *options, "--host", "127.0.0.1", "--port", port)
        self.address = f"127.0.0.1:{port}"
        _wait_for(port)
        config = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{self.address}"\n'
        (folder / "flwr" / "config.toml").write_text(f"{config}insecure = true\n")
        self.traffic: list[bytearray] = []
        self._through = stack.enter_context(proxy(port, self.traffic))
        self.nodes = [self.start_node(*own) for own in zip(configs, others, strict=True)]

    def start_node(self, config, port):
        """Starts a SuperNode with a configuration, on a port that is free."""
        return self._start(
            "supernode",
            *("--insecure", "--superlink", f"127.0.0.1:{self._through}"),
            *("--host", "127.0.0.1", "--port", port),
            *("--node-config", config),
        )

    def _start(self, what, *options):
        number = len(list(self.folder.glob("*.log")))
        with (self.folder / f"{number} {what}.log").open("w") as log:
            process = subprocess.Popen(
                [BIN / f"flower-{what}", *map(str, options)],
                env=self.env,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._stack.callback(_end, process)
        return process

    def run(self, app, timeout, **config):
        """Runs an app until it ends, and returns what it printed."""
        settings = " ".join(f"{name}={json.dumps(value)}" for name, value in config.items())
        command = [BIN / "flwr", "run", app, "--stream", "--run-config", settings]
        with (self.folder / "run.log").open("w") as log:
            try:
                subprocess.run(
                    command, env=self.env, cwd=self.folder, stdout=log, stderr=log, timeout=timeout
                )
            except subprocess.TimeoutExpired:
                raise AssertionError(f"The app still runs.\n{self.logs}") from None
        return (self.folder / "run.log").read_text()

    @property
    def logs(self):
        return "\n".join(f"== {log.name}\n{log.read_text()}" for log in self.folder.glob("*.log"))


@contextlib.contextmanager
def federation(folder, configs):
    """A federation with a node for each configuration, whose processes end with the context."""
    with contextlib.ExitStack() as stack:
        yield Federation(folder, configs, stack)


@contextlib.contextmanager
def app_in(folder, name, package):
    """A copy of an app of the tests that can be imported, with fax's files in a package of it."""
    copy = shutil.copytree(Path(__file__).with_name(name), folder / "app")
    deploy.write_flower_client(copy / package / "fax_client")
    sys.path.insert(0, str(copy))
    try:
        yield copy
    finally:
        sys.path.remove(str(copy))


def check_ended(folder):
    """Checks that the processes with a path in a folder among their arguments end soon."""
    end = time.monotonic() + 20
    while _processes_of(folder) and time.monotonic() < end:
        time.sleep(0.2)
    assert not _processes_of(folder)


def _processes_of(folder):
    """The numbers of the processes with a path in a folder among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def _end(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_for(port, seconds=60.0):
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


@contextlib.contextmanager
def proxy(port, traffic):
    """A port that leads to another one, with all bytes written down."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threads = []

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    one = server.accept()[0]
                    try:
                        other = socket.create_connection(("127.0.0.1", port))
                    except OSError:  # the SuperLink has ended
                        one.close()
                        continue
                    for source, sink in ((one, other), (other, one)):
                        threads.append(threading.Thread(target=copy, args=(source, sink)))
                        threads[-1].start()

        def copy(source, sink):
            traffic.append(own := bytearray())
            with contextlib.suppress(OSError), source:
                while data := source.recv(2**16):
                    own.extend(data)
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_WR)

        main = threading.Thread(target=accept)
        main.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            for thread in [main, *threads]:
                thread.join()
