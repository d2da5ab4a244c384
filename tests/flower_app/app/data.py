"""What the clients of the tests hold. Imported by their processes, and by the test."""

import pathlib
import sys

import numpy as np

CLIENTS, STEPS, BATCH_SIZE, FEATURES, CLASSES = 3, 2, 4, 5, 3
SENTINEL = 0.1234567891234


def rows(client):
    """A client's data, with numbers that would be recognized anywhere."""
    rng = np.random.default_rng(client)
    x = rng.normal(size=(STEPS, BATCH_SIZE, FEATURES))
    x[..., 0] = SENTINEL + client
    mask = np.ones((STEPS, BATCH_SIZE), bool)
    mask[-1, client:] = False
    y = rng.integers(0, CLASSES, (STEPS, BATCH_SIZE)).astype(np.int32)
    return {"x": x, "y": y, "mask": mask, "num_examples": np.int32(mask.sum())}


def load(config):
    refuse("worker", ["fax", "flwr", "flax", "optax", "app.programs"], config["log"])
    client = config["partition-id"]
    (pathlib.Path(config["log"]) / f"loaded {client}").touch()
    return {client: rows(client)}


def refuse(who, modules, log=None):
    """Writes down which of the modules are imported, now or later."""

    def imported(name):
        if log and (name in modules or name.partition(".")[0] in modules):
            (pathlib.Path(log) / f"{who} imported {name}").touch()

    def hook(event, args):
        if event == "import":
            imported(args[0])

    for name in list(sys.modules):
        imported(name)
    sys.addaudithook(hook)
