"""What a node loads: the digits of one client. Imported where the data are, without fax."""

import numpy as np
from sklearn.datasets import load_digits

STEPS, BATCH_SIZE = 20, 10


def load(config):
    """The data of the node's clients, by name: batches [steps, batch, ...], and what is padding.

    Clients have digits of all kinds, but more of some. Examples that fill no batch are left out.
    """
    number, clients = config["partition-id"], config["num-partitions"]
    images, labels = load_digits(return_X_y=True)
    images, labels = images[::2], labels[::2]  # the others are for the server's evaluation
    order = np.argsort((labels + np.random.default_rng(0).normal(0, 4, len(labels))) % 10)
    own = np.array_split(order, clients)[number]
    own = np.random.default_rng(number).permutation(own)[: STEPS * BATCH_SIZE]
    shape = STEPS, BATCH_SIZE
    return {
        f"client {number}": {
            "x": (images[own] / 16).astype(np.float32).reshape(*shape, 64),
            "y": labels[own].astype(np.int32).reshape(shape),
            "mask": np.ones(shape, bool),
            "num_examples": np.int32(len(own)),
        }
    }
