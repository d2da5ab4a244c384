"""Handwritten digits, split over clients with uneven label distributions."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fax


def load(seed):
    """Returns training data, four fifths, and test data: pairs of images [n, 64] and labels [n]."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed
    )
    return (images[train], labels[train]), (images[held_out], labels[held_out])


def dirichlet_partition(labels, clients, alpha, seed):
    """Returns the owner of each example, [n], as chosen by `fax.data.partition.dirichlet`."""
    arrays = {"y": labels, "number": np.arange(len(labels))}
    data = fax.data.partition.dirichlet(arrays, clients, alpha=alpha, seed=seed)
    owner = np.empty(len(labels), int)
    for client, client_id in enumerate(data.client_ids()):
        owner[data.client(client_id)["number"]] = client
    return owner


def stack(images, labels, owner, clients, multiple_of=1):
    """Stacks the examples into arrays [clients, most examples of a client, ...], with a mask.

    A client's own examples come first, followed by zeros. The second axis is rounded up to a
    multiple of ``multiple_of``.
    """
    counts = np.bincount(owner, minlength=clients)
    slots = -(-counts.max() // multiple_of) * multiple_of
    mask = np.arange(slots) < counts[:, None]
    by_owner = np.argsort(owner, kind="stable")
    stacked = {"mask": mask}
    for name, values in {"x": images, "y": labels}.items():
        stacked[name] = np.zeros((clients, slots, *values.shape[1:]), values.dtype)
        stacked[name][mask] = values[by_owner]
    return stacked
