"""What the clients of the tests hold. Imported by their processes, and by the test."""

import os
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
    refuse("worker", ["fax", "flwr", "flax", "optax", "app.programs"])
    client = config["partition-id"]
    note(f"loaded {client}")
    return {client: rows(client)}


def broken(config):
    raise ValueError("the secret is 42")


def note(text):
    """Writes something down for the test, as the name of a file."""
    if folder := os.environ.get("FAX_TESTS"):
        (pathlib.Path(folder) / text).touch()


def refuse(who, modules):
    """Writes down which of the modules are imported, now or later."""

    def imported(name):
        if name in modules or name.partition(".")[0] in modules:
            note(f"{who} imported {name}")

    for name in list(sys.modules):
        imported(name)
    if "FAX_TESTS" in os.environ:
        sys.addaudithook(lambda event, args: event == "import" and imported(args[0]))
