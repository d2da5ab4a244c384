"""ResNet-18 with group normalization, which unlike batch normalization has no state."""

from __future__ import annotations

import functools
import itertools

import jax
from flax import nnx
from flax.nnx import initializers

from fax.models._images import Linear

_he = initializers.he_normal()
_Conv = functools.partial(nnx.Conv, use_bias=False, kernel_init=_he)
_GROUPS = 2


class _Block(nnx.Module):
    """Two 3 x 3 convolutions with a residual connection."""

    conv1: nnx.Conv
    norm1: nnx.GroupNorm
    conv2: nnx.Conv
    norm2: nnx.GroupNorm
    project: bool
    shortcut: nnx.Conv
    shortcut_norm: nnx.GroupNorm

    def __init__(self, channels: int, out: int, strides: int, *, rngs: nnx.Rngs):
        self.conv1 = _Conv(channels, out, (3, 3), strides, rngs=rngs)
        self.norm1 = nnx.GroupNorm(out, _GROUPS, rngs=rngs)
        self.conv2 = _Conv(out, out, (3, 3), rngs=rngs)
        self.norm2 = nnx.GroupNorm(out, _GROUPS, rngs=rngs)
        self.project = channels != out
        if self.project:
            self.shortcut = _Conv(channels, out, (1, 1), strides, rngs=rngs)
            self.shortcut_norm = nnx.GroupNorm(out, _GROUPS, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + (self.shortcut_norm(self.shortcut(x)) if self.project else x))


class ResNet18(nnx.Module):
    """ResNet-18 for small images, with normalization over two groups of channels.

    Like the model for CIFAR-100 of arXiv:2003.00295, after He et al., arXiv:1512.03385, and Hsieh
    et al., arXiv:1910.00189. It starts with a 3 x 3 convolution and has no pooling before the end,
    as is usual for images of this size. 11,220,132 parameters for 100 classes.

    ``"x"`` is float [batch, height, width, channels].

    Example:

      >>> model = fax.models.create("resnet18", num_classes=10)
      >>> params = jax.eval_shape(model.init, jax.random.key(0))
      >>> params["out"]["kernel"].shape
      (512, 10)
    """

    channels: int
    stem: nnx.Conv
    norm: nnx.GroupNorm
    blocks: nnx.List[_Block]
    out: nnx.Linear

    def __init__(self, num_classes: int = 100, channels: int = 3, *, rngs: nnx.Rngs):
        self.channels = channels
        self.stem = _Conv(channels, 64, (3, 3), rngs=rngs)
        self.norm = nnx.GroupNorm(64, _GROUPS, rngs=rngs)
        sizes = (64, 64, 64, 128, 128, 256, 256, 512, 512)
        self.blocks = nnx.List(
            [_Block(a, b, 1 if a == b else 2, rngs=rngs) for a, b in itertools.pairwise(sizes)]
        )
        self.out = Linear(512, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The scores, [batch, classes]."""
        if x.ndim != 4 or x.shape[-1] != self.channels:
            raise ValueError(
                f"fax.models: feature 'x' has shape {x.shape}, expected "
                f"{('batch', 'height', 'width', self.channels)}."
            )
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.out(x.mean((1, 2)))
