"""Photographs in color that come with scikit-image and scikit-learn, so that none is downloaded."""

from __future__ import annotations

import numpy as np

import fax.data
from fax import _extras
from fax.tasks._local_datasets import Split

SIDE = 16  # pixels
# The photographs in color that scikit-image's wheel contains, by the functions that return them.
_OF_SCIKIT_IMAGE = (
    *("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry"),
    *("retina", "rocket", "stereo_motorcycle"),
)
_OF_SCIKIT_LEARN = ("china", "flower")


def photographs(noise: float, seed: int) -> Split:
    """Ten photographs with noise: a client for each, with squares of 16 x 16 pixels as examples.

    A photograph is halved in both directions, by the means of 2 x 2 pixels, which removes most of
    its own noise, and cut into squares. They are the targets, from 0 to 1. Gaussian noise is added
    to each value, with a standard deviation of ``noise / 255``. Every fifth square is held out.
    """
    rng = np.random.default_rng(seed)
    train, test = {}, {}
    for name, image in _images().items():
        y = _squares(image)
        x = y + rng.normal(0, noise / 255, y.shape).astype(np.float32)
        out = np.arange(len(y)) % 5 == 4
        train[name] = {"x": x[~out], "y": y[~out]}
        test[name] = {"x": x[out], "y": y[out]}
    return fax.data.InMemory(train), fax.data.InMemory(test)


def _images() -> dict[str, np.ndarray]:
    """Photographs, uint8 [height, width, 3], by name."""
    where = "fax.tasks.load('photographs')"
    _extras.require(where, "sklearn", "tasks")
    _extras.require(where, "skimage", "datasets")
    import skimage.data
    from sklearn.datasets import load_sample_image

    images = {name: getattr(skimage.data, name)() for name in _OF_SCIKIT_IMAGE}
    images["stereo_motorcycle"] = images["stereo_motorcycle"][0]  # as the left eye sees it
    return images | {name: load_sample_image(f"{name}.jpg") for name in _OF_SCIKIT_LEARN}


def _squares(image: np.ndarray) -> np.ndarray:
    """The image at half its size, in floats [squares, SIDE, SIDE, 3], from left to right and down.

    What is left over at the right and at the bottom is not used.
    """
    rows, columns = (size // (2 * SIDE) for size in image.shape[:2])
    image = image[: rows * 2 * SIDE, : columns * 2 * SIDE].astype(np.float32) / 255
    parts = image.reshape(rows, SIDE, 2, columns, SIDE, 2, 3).mean((2, 5), dtype=np.float32)
    return parts.swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3)
