"""Models of small images: the convolutional, dense and logistic models of FedJAX, a denoiser."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import jax
from flax import nnx
from flax.nnx import initializers

# Haiku's initializer: a normal distribution of variance 1 / fan-in, truncated at two standard
# deviations, which makes its variance a little smaller.
fan_in = initializers.variance_scaling(0.87962566103423978**2, "fan_in", "truncated_normal")
Linear = functools.partial(nnx.Linear, kernel_init=fan_in)
Conv3x3 = functools.partial(nnx.Conv, kernel_size=(3, 3), padding="VALID", kernel_init=fan_in)

EMNIST, CIFAR = (28, 28, 1), (24, 24, 3)


def shaped(x: jax.Array, shape: tuple[int, ...], wanted: tuple[int, ...]) -> jax.Array:
    """Checks the shape of each example, and reshapes it to the one that is wanted."""
    if x.ndim < 2 or math.prod(x.shape[1:]) != math.prod(shape):
        raise ValueError(
            f"fax.models: feature 'x' has shape {x.shape}, expected {('batch', *shape)}, or any "
            "shape of as many elements."
        )
    return x.reshape(len(x), *wanted)


class EmnistConv(nnx.Module):
    """Two convolutions and a dense layer, with dropout, as in FedJAX and arXiv:2003.00295.

    1,206,590 parameters for 62 classes. ``"x"`` is float [batch, 28, 28, 1].

    Example:

      >>> model = fax.models.functional(lambda rngs: fax.models.EmnistConv(10, rngs=rngs))
      >>> params = jax.eval_shape(model.init, jax.random.key(0))
      >>> params["conv1"]["kernel"].shape, params["out"]["kernel"].shape
      ((3, 3, 1, 32), (128, 10))
    """

    conv1: nnx.Conv
    conv2: nnx.Conv
    dropout1: nnx.Dropout
    hidden: nnx.Linear
    dropout2: nnx.Dropout
    out: nnx.Linear

    def __init__(self, num_classes: int = 62, *, rngs: nnx.Rngs):
        self.conv1 = Conv3x3(1, 32, rngs=rngs)
        self.conv2 = Conv3x3(32, 64, rngs=rngs)
        self.dropout1 = nnx.Dropout(0.25, rngs=rngs)
        self.hidden = Linear(12 * 12 * 64, 128, rngs=rngs)
        self.dropout2 = nnx.Dropout(0.5, rngs=rngs)
        self.out = Linear(128, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The scores, [batch, classes]."""
        x = nnx.relu(self.conv1(shaped(x, EMNIST, EMNIST)))
        x = nnx.relu(self.conv2(x))
        x = nnx.max_pool(x, (2, 2), (2, 2))
        x = self.dropout1(x).reshape(len(x), -1)
        return self.out(self.dropout2(nnx.relu(self.hidden(x))))


class Denoiser(nnx.Module):
    """Images without their noise: convolutions that predict the noise, as DnCNN, arXiv:1608.03981.

    DnCNN has 17 convolutions of 64 channels, with batch normalization. This one is for a CPU: with
    the defaults, 5,523 parameters. Its last kernel is 0 at first, so it begins with the image.

    Attributes:
      hidden: the number of channels between the convolutions.
      depth: the number of convolutions.

    Example:

      >>> from flax import nnx
      >>> fax.models.Denoiser(rngs=nnx.Rngs(0))(jnp.ones((2, 16, 16, 3))).shape
      (2, 16, 16, 3)
    """

    hidden: int
    depth: int
    layers: nnx.List[nnx.Conv]

    def __init__(self, hidden: int = 16, depth: int = 4, *, rngs: nnx.Rngs):
        self.hidden, self.depth = hidden, depth
        channels = [3, *[hidden] * (depth - 1)]
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), padding="SAME", rngs=rngs)
        he, zeros = initializers.he_normal(), initializers.zeros
        layers = [conv(a, b, kernel_init=he) for a, b in itertools.pairwise(channels)]
        self.layers = nnx.List([*layers, conv(channels[-1], 3, kernel_init=zeros)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """The images without noise, [batch, height, width, 3]."""
        if x.ndim != 4 or x.shape[-1] != 3:
            raise ValueError(
                f"fax.models: feature 'x' has shape {x.shape}, expected ('batch', 'height', "
                "'width', 3)."
            )
        *hidden, last = self.layers
        noise = x
        for layer in hidden:
            noise = nnx.relu(layer(noise))
        return x - last(noise)


class Dense(nnx.Module):
    """Dense layers with ReLUs between them.

    Attributes:
      sizes: the number of inputs, the number of units of each hidden layer, and that of classes.

    Example:

      >>> from flax import nnx
      >>> model = fax.models.Dense((4, 8, 3), rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 4))).shape
      (2, 3)
    """

    sizes: tuple[int, ...]
    layers: nnx.List[nnx.Linear]

    def __init__(self, sizes: Sequence[int] = (64, 512, 10), *, rngs: nnx.Rngs):
        if len(sizes) < 2:
            raise ValueError(
                f"fax.models.Dense: sizes is {sizes}, expected at least the numbers of inputs and "
                "of classes, as in sizes=(64, 10)."
            )
        self.sizes = tuple(sizes)
        self.layers = nnx.List(
            [Linear(one, other, rngs=rngs) for one, other in itertools.pairwise(sizes)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """The scores, [batch, classes]."""
        x = shaped(x, self.sizes[:1], self.sizes[:1])
        *hidden, out = self.layers
        for layer in hidden:
            x = nnx.relu(layer(x))
        return out(x)


class EmnistDense(Dense):
    """Two hidden layers of 200 units, as in FedJAX. 209,662 parameters for 62 classes.

    Example:

      >>> from flax import nnx
      >>> fax.models.EmnistDense(10, rngs=nnx.Rngs(0))(jnp.ones((2, 28, 28))).shape
      (2, 10)
    """

    def __init__(self, num_classes: int = 62, *, rngs: nnx.Rngs):
        super().__init__((math.prod(EMNIST), 200, 200, num_classes), rngs=rngs)


class EmnistLogistic(Dense):
    """Logistic regression on 28 x 28 pixels. 48,670 parameters for 62 classes.

    Example:

      >>> from flax import nnx
      >>> fax.models.EmnistLogistic(rngs=nnx.Rngs(0))(jnp.ones((2, 28, 28, 1))).shape
      (2, 62)
    """

    def __init__(self, num_classes: int = 62, *, rngs: nnx.Rngs):
        super().__init__((math.prod(EMNIST), num_classes), rngs=rngs)


class Cifar100Logistic(Dense):
    """Logistic regression on crops, float [batch, 24, 24, 3]. 172,900 parameters.

    Example:

      >>> from flax import nnx
      >>> fax.models.Cifar100Logistic(rngs=nnx.Rngs(0))(jnp.ones((2, 24, 24, 3))).shape
      (2, 100)
    """

    def __init__(self, num_classes: int = 100, *, rngs: nnx.Rngs):
        super().__init__((math.prod(CIFAR), num_classes), rngs=rngs)
