"""Models of small pictures: the convolutional, dense and logistic ones of FedJAX."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import jax
from flax import nnx
from flax.nnx import initializers

# Haiku's: a normal distribution of variance 1 / fan-in, cut off at two standard deviations
# (which leaves it a little narrower).
fan_in = initializers.variance_scaling(0.87962566103423978**2, "fan_in", "truncated_normal")
Linear = functools.partial(nnx.Linear, kernel_init=fan_in)
Conv3x3 = functools.partial(nnx.Conv, kernel_size=(3, 3), padding="VALID", kernel_init=fan_in)

EMNIST, CIFAR = (28, 28, 1), (24, 24, 3)


def shaped(x: jax.Array, shape: tuple[int, ...], wanted: tuple[int, ...]) -> jax.Array:
    """Checks that there is an array of a shape for each example, and gives it the one wanted."""
    if x.ndim < 2 or math.prod(x.shape[1:]) != math.prod(shape):
        raise ValueError(
            f"feature 'x' has shape {x.shape}, expected {('batch', *shape)}, or other axes of as "
            "many numbers."
        )
    return x.reshape(len(x), *wanted)


class EmnistConv(nnx.Module):
    """Two convolutions and a dense layer, with dropout: FedJAX's, and of arXiv:2003.00295.

    1,206,590 parameters for 62 classes. ``"x"`` is float [batch, 28, 28, 1].
    """

    def __init__(self, num_classes: int = 62, *, rngs: nnx.Rngs):
        self.conv1 = Conv3x3(1, 32, rngs=rngs)
        self.conv2 = Conv3x3(32, 64, rngs=rngs)
        self.dropout1 = nnx.Dropout(0.25, rngs=rngs)
        self.hidden = Linear(12 * 12 * 64, 128, rngs=rngs)
        self.dropout2 = nnx.Dropout(0.5, rngs=rngs)
        self.out = Linear(128, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv1(shaped(x, EMNIST, EMNIST)))
        x = nnx.relu(self.conv2(x))
        x = nnx.max_pool(x, (2, 2), (2, 2))
        x = self.dropout1(x).reshape(len(x), -1)
        return self.out(self.dropout2(nnx.relu(self.hidden(x))))


class Dense(nnx.Module):
    """Dense layers with rectifiers between them.

    Attributes:
      sizes: the numbers of inputs, of each hidden layer's units, and of classes.
    """

    def __init__(self, sizes: Sequence[int] = (64, 512, 10), *, rngs: nnx.Rngs):
        if len(sizes) < 2:
            raise ValueError(f"sizes is {sizes}, expected the numbers of inputs and of classes.")
        self.sizes = tuple(sizes)
        self.layers = nnx.List(
            [Linear(one, other, rngs=rngs) for one, other in itertools.pairwise(sizes)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = shaped(x, self.sizes[:1], self.sizes[:1])
        *hidden, out = self.layers
        for layer in hidden:
            x = nnx.relu(layer(x))
        return out(x)


class EmnistDense(Dense):
    """Two hidden layers of 200: FedJAX's. 209,662 parameters for 62 classes."""

    def __init__(self, num_classes: int = 62, *, rngs: nnx.Rngs):
        super().__init__((math.prod(EMNIST), 200, 200, num_classes), rngs=rngs)


class EmnistLogistic(Dense):
    """Logistic regression of 28 x 28 pixels. 48,670 parameters for 62 classes."""

    def __init__(self, num_classes: int = 62, *, rngs: nnx.Rngs):
        super().__init__((math.prod(EMNIST), num_classes), rngs=rngs)


class Cifar100Logistic(Dense):
    """Logistic regression of crops, float [batch, 24, 24, 3]. 172,900 parameters."""

    def __init__(self, num_classes: int = 100, *, rngs: nnx.Rngs):
        super().__init__((math.prod(CIFAR), num_classes), rngs=rngs)
