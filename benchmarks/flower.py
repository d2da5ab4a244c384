"""What fax adds to a round on Flower: rounds of federated averaging, and an echo, on three nodes.

The clients are those of `examples/flower_digits.py`. An echo sends the model's parameters to every
node and back, by Flower's `send_and_receive`, and as `fax.deploy.Flower` does, which looks for
answers more often. Each round measures all three in random order, and waits at random before each,
because a node looks for messages only every three seconds. Processor time is that of all processes
of the federation, most of which Flower starts for each message. Needs the extra `flower`.

    python benchmarks/flower.py --rounds 20
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import fax

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from _flower import federation  # noqa: E402

CLIENT = """
from flower_digits.fax_client import client_app
from flwr.app import Message

app = client_app("flower_digits.data:load")


@app.query("echo")
def echo(message, context):
    return Message(message.content, reply_to=message)
"""
SERVER = """
import contextlib
import os
import pathlib
import time

import fax
import jax
import numpy as np
import optax
from flower_digits.server import CLIENTS, loss
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


def processor_time():
    # The seconds that all processes of the federation have worked, also those that have ended.
    mark, total = f"FLWR_HOME={os.environ['FLWR_HOME']}".encode(), 0
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(bytes(1)):
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                total += sum(map(int, fields[11:15]))
    return total / os.sysconf("SC_CLK_TCK")


@app.main()
def main(grid, context):
    rng = np.random.default_rng(0)
    params = {
        "in": rng.normal(0, 1 / 8, (64, 32)).astype(np.float32),
        "out": np.zeros((32, 10), np.float32),
    }
    algorithm = fax.algorithms.fedavg(loss, optax.sgd(0.1))
    state = algorithm.init(params)
    backend = fax.deploy.Flower(grid, CLIENTS)
    held = backend.held()
    cohort = fax.data.Cohort(
        {"x": held["x"], "y": held["y"]},
        held["mask"],
        held["num_examples"],
        positions=np.arange(CLIENTS, dtype=np.int32),
        keys=jax.random.split(jax.random.key(0), CLIENTS),
    )
    plan = fax.deploy.cut(algorithm.round, state, cohort)
    arrays = {name: Array(ndarray=x) for name, x in params.items()}

    def messages():
        content = RecordDict({"arrays": ArrayRecord(array_dict=arrays)})
        return [Message(content, node, "query.echo") for node in grid.get_node_ids()]

    def by_flower():
        assert len(list(grid.send_and_receive(messages()))) == CLIENTS

    def polled():
        waiting = set(grid.push_messages(messages()))
        while waiting:
            for message in grid.pull_messages(list(waiting)):
                waiting.remove(message.metadata.reply_to_message_id)
            if waiting:
                time.sleep(0.1)

    def by_fax():
        jax.block_until_ready(plan.run(backend, state, cohort)[0].params)

    ways = {
        "an echo by send_and_receive": by_flower,
        "an echo that looks for answers as fax does": polled,
        "a round of fax": by_fax,
    }
    found = {name: [] for name in ways}  # seconds, processor time of all processes, and of this one
    for number in range(1 + context.run_config["rounds"]):
        for name in rng.permutation(list(ways)):
            # Nodes look for messages every three seconds, and so in step with what came before.
            time.sleep(rng.uniform(0, 3))
            began, worked, own = time.perf_counter(), processor_time(), time.process_time()
            ways[name]()
            seconds = time.perf_counter() - began
            times = seconds, processor_time() - worked, time.process_time() - own
            found[name].append(times)
            print(number, name, *(f"{x:.3f} s" for x in times), flush=True)
    for name, times in found.items():
        times = np.array(times[1:])  # the first round compiles
        clock, all_processes, own = np.median(times, axis=0)
        error = times[:, 0].std(ddof=1) / np.sqrt(len(times))
        print(
            f"{name}: mean {times[:, 0].mean():.2f} s, +- {error:.2f} s, median {clock:.2f} s, "
            f"processor time {all_processes:.2f} s, of which the server's process {own:.3f} s",
            flush=True,
        )
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        app = shutil.copytree(EXAMPLES / "flower_digits", Path(folder) / "flower_digits")
        package = app / "flower_digits"
        fax.deploy.write_flower_client(package / "fax_client")
        (package / "client.py").write_text(CLIENT)
        (package / "benchmark.py").write_text(SERVER)
        settings = app / "pyproject.toml"
        text = settings.read_text().replace("server:app", "benchmark:app")
        settings.write_text(text)
        with federation(folder, 3) as here:
            here.run(app, rounds=options.rounds)


if __name__ == "__main__":
    main()
