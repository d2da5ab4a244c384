"""The data of all peers: synthetic clients, cohorts, initial parameters. Needs only NumPy.

The data have the shape of EMNIST by writer: 3,400 clients of 28 to 500 examples, images of 784
pixels in 62 classes. They are derived from the seeds in this file, and so are the cohorts and the
order of each client's examples. All peers start from the same parameters. So if two peers run the
same algorithm, their final losses can be compared.

Parameters are lists of layers `{"w": ..., "b": ...}`. A layer of four dimensions is a convolution
followed by a ReLU. After the last convolution come 2 x 2 max pooling and dropout.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

SEED = 20240
CLIENTS = 3400
SIDE = 28
PIXELS = SIDE * SIDE
CLASSES = 62
BATCH = 20
CLIENT_RATE = 0.1
SERVER_RATE, SERVER_B1, SERVER_B2, SERVER_EPS = 10**-2.5, 0.9, 0.99, 1e-3  # Adam
MAX_EXAMPLES = 500
MAX_STEPS = MAX_EXAMPLES // BATCH
DROPOUT = (0.25, 0.5)  # before the dense layers, and before the last

LOGISTIC = ((PIXELS, CLASSES),)
DENSE = ((PIXELS, 200), (200, 200), (200, CLASSES))
CONVOLUTIONAL = ((3, 3, 1, 32), (3, 3, 32, 64), (9216, 128), (128, CLASSES))

Params = list[dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, given by the shapes of its layers, and the number of clients per round."""

    title: str
    layers: tuple[tuple[int, ...], ...]
    clients: int

    @property
    def convolutional(self) -> bool:
        return len(self.layers[0]) == 4


WORKLOADS = {
    "W1": Workload("convolutional network of EMNIST, 10 clients a round", CONVOLUTIONAL, 10),
    "W2": Workload("logistic regression, 100 clients a round", LOGISTIC, 100),
    "W3": Workload("dense network 784-200-200-62, 50 clients a round", DENSE, 50),
}


@functools.cache
def sizes() -> np.ndarray:
    """The number of examples of each client."""
    spread = 0.6
    draws = np.random.default_rng(SEED).lognormal(np.log(200) - spread**2 / 2, spread, CLIENTS)
    return np.clip(draws.astype(int), 10, MAX_EXAMPLES)


def steps(clients: np.ndarray) -> np.ndarray:
    """The number of batches in an epoch of each client."""
    return -(-sizes()[clients] // BATCH)


@functools.cache
def templates() -> np.ndarray:
    """One image for each class."""
    draws = np.random.default_rng(SEED + 1).random((CLASSES, PIXELS))
    return (draws < 0.2).astype(np.float32)


@functools.cache
def examples(client: int) -> tuple[np.ndarray, np.ndarray]:
    """A client's noisy images and their classes, cached as if they had been loaded before."""
    rng = np.random.default_rng((SEED, 7, client))
    y = rng.integers(0, CLASSES, sizes()[client]).astype(np.int32)
    noise = rng.random((len(y), PIXELS), dtype=np.float32)
    return 0.5 * templates()[y] + 0.3 * noise, y


def cohort(number: int, count: int) -> np.ndarray:
    """The clients of a round."""
    return np.random.default_rng((SEED, 3, number)).choice(CLIENTS, count, replace=False)


def epoch_order(number: int, client: int) -> np.ndarray:
    """The order of a client's examples in a round, for peers that can use it."""
    return np.random.default_rng((number, client)).permutation(sizes()[client])


def initial(workload: Workload) -> Params:
    """Initial parameters: truncated normal weights scaled by the fan-in, and zero biases."""
    rng = np.random.default_rng(SEED + 2)
    return [
        {
            "w": (np.clip(rng.normal(size=shape), -2, 2) / np.sqrt(np.prod(shape[:-1]))).astype(
                np.float32
            ),
            "b": np.zeros(shape[-1], np.float32),
        }
        for shape in workload.layers
    ]


def evaluate(params: Params) -> float:
    """The cross-entropy on five clients' examples, computed in NumPy."""
    x, y = map(np.concatenate, zip(*map(examples, range(1, 6)), strict=True))
    losses = []
    for start in range(0, len(y), 100):
        h, labels = x[start : start + 100], y[start : start + 100]
        if params[0]["w"].ndim == 4:
            h = _features([layer for layer in params if layer["w"].ndim == 4], h)
        dense = [layer for layer in params if layer["w"].ndim == 2]
        for layer in dense[:-1]:
            h = np.maximum(h @ layer["w"] + layer["b"], 0)
        logits = h @ dense[-1]["w"] + dense[-1]["b"]
        logits -= logits.max(-1, keepdims=True)
        normalizer = np.log(np.exp(logits).sum(-1))
        losses.append(normalizer - logits[np.arange(len(labels)), labels])
    return float(np.concatenate(losses).mean())


def _features(convolutions: Params, x: np.ndarray) -> np.ndarray:
    h = x.reshape(-1, SIDE, SIDE, 1)
    for layer in convolutions:
        patches = np.lib.stride_tricks.sliding_window_view(h, layer["w"].shape[:2], (1, 2))
        h = np.tensordot(patches, layer["w"], ((4, 5, 3), (0, 1, 2)))
        h = np.maximum(h + layer["b"], 0)
    n, height, width, channels = h.shape
    return h.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4)).reshape(n, -1)
