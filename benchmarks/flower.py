"""What fax adds to a round on Flower: rounds of federated averaging, and an echo, on three nodes.

The clients are those of `examples/flower_digits.py`. An echo sends the model's parameters to every
node and back, by Flower's `send_and_receive`, and as `fax.deploy.Flower` does, which looks for
answers more often. The three are measured in turn. Needs the extra `flower`.

    python benchmarks/flower.py --rounds 10
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
import statistics
import time

import fax
import jax
import numpy as np
import optax
from flower_digits.server import CLIENTS, loss
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


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
    seconds, busy = {name: [] for name in ways}, {name: [] for name in ways}
    for number in range(1 + context.run_config["rounds"]):
        for name, way in ways.items():
            began, worked = time.perf_counter(), time.process_time()
            way()
            if number:  # the first one compiles
                seconds[name].append(time.perf_counter() - began)
                busy[name].append(time.process_time() - worked)
    for name, own in seconds.items():
        low, middle, high = statistics.quantiles(own, n=4)
        print(
            f"{name}: {middle:.2f} s ({low:.2f} to {high:.2f}), of which the server's process "
            f"works {statistics.median(busy[name]):.3f} s",
            flush=True,
        )
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        app = shutil.copytree(EXAMPLES / "flower_digits", Path(folder) / "flower_digits")
        package = app / "flower_digits"
        fax.deploy.write_flower_client(package / "fax_client")
        (package / "client.py").write_text(CLIENT)
        (package / "benchmark.py").write_text(SERVER)
        settings = app / "pyproject.toml"
        settings.write_text(settings.read_text().replace("server:app", "benchmark:app"))
        with federation(folder, 3) as here:
            here.run(app, rounds=options.rounds)


if __name__ == "__main__":
    main()
