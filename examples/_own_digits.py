"""What each client of `hand_over.py` loads: its own digits. It runs in processes without fax."""

import numpy as np
from sklearn.datasets import load_digits

CLIENTS, STEPS, BATCH_SIZE = 3, 40, 10


def load(number):
    """The data of one of the clients, by name: batches [steps, batch, ...] and what is padding.

    Clients have different digits. Examples that fill no batch are left out.
    """
    images, labels = load_digits(return_X_y=True)
    own = np.array_split(np.argsort(labels, kind="stable"), CLIENTS)[number]
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
