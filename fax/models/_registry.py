"""Models by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from fax import _arguments
from fax.models import _images, _losses, _resnet, _text
from fax.models._model import Model, functional

_CLASSES: dict[str, Callable] = {
    "cifar100_logistic": _images.Cifar100Logistic,
    "dense": _images.Dense,
    "emnist_conv": _images.EmnistConv,
    "emnist_dense": _images.EmnistDense,
    "emnist_logistic": _images.EmnistLogistic,
    "resnet18": _resnet.ResNet18,
}
_SEQUENCES: dict[str, Callable] = {
    "char_lstm": _text.CharLSTM,
    "shakespeare_lstm": _text.ShakespeareLSTM,
    "stackoverflow_lstm": _text.StackOverflowLSTM,
}
_IMAGES: dict[str, Callable] = {"denoiser": _images.Denoiser}
MODELS = {**_CLASSES, **_SEQUENCES, **_IMAGES}


def options_of(name: str) -> list[str]:
    """The options of a model."""
    own = {*inspect.signature(vars(MODELS[name])["__init__"]).parameters} - {"self", "rngs"}
    return sorted(own | ({"loss_length"} if name in _SEQUENCES else set()))


def create(name: str, *, loss_length: float | None = None, **options: Any) -> Model:
    """A model by its name.

    ``cifar100_logistic``, ``dense``, ``emnist_conv``, ``emnist_dense``, ``emnist_logistic`` and
    ``resnet18`` are trained by `fax.models.cross_entropy`; ``char_lstm``, ``shakespeare_lstm`` and
    ``stackoverflow_lstm`` by `fax.models.sequence_cross_entropy`; ``denoiser`` by
    `fax.models.squared_error`. The same name and options return the same functions, so that they
    are compiled only once.

    Args:
      name: of the model.
      loss_length: for language models, the ``length`` of `fax.models.sequence_cross_entropy`.
      **options: arguments of the module, such as ``num_classes=10`` or ``tied=True``.

    Returns:
      The model.

    Raises:
      ValueError: if there is no such model, or an option is out of range.
      TypeError: if the model has no such option.

    Example:

      >>> model = fax.models.create("emnist_logistic", num_classes=10)
      >>> params = model.init(jax.random.key(0))
      >>> sum(x.size for x in jax.tree.leaves(params))
      7850
    """
    _arguments.choice("fax.models.create", "name", name, sorted(MODELS))
    where = f"fax.models.create({name!r})"
    if loss_length is not None:
        options["loss_length"] = loss_length
    _arguments.options(where, options, options_of(name))
    if loss_length is not None:
        length = _arguments.number(where, "loss_length", loss_length, above=0)
        options["loss_length"] = float(length)
    for option, value in options.items():
        if option in ("num_classes", "num_tokens", "hidden", "depth", "channels"):
            options[option] = _arguments.count(where, option, value)
    if "sizes" in options:
        sizes = _arguments.whole_numbers(where, "sizes", options["sizes"], "(64, 512, 10)", least=1)
        options["sizes"] = sizes
    if "tied" in options:
        _arguments.flag(where, "tied", options["tied"])
    return _made(name, tuple(sorted(options.items())))


@functools.cache
def _made(name: str, options: tuple[tuple[str, Any], ...]) -> Model:
    own = dict(options)
    if name in _CLASSES:
        return functional(lambda rngs: _CLASSES[name](**own, rngs=rngs))
    if name in _IMAGES:
        return functional(lambda rngs: _IMAGES[name](**own, rngs=rngs), _losses.squared_error)
    loss = functools.partial(_losses.sequence_cross_entropy, length=own.pop("loss_length", None))
    return functional(lambda rngs: _SEQUENCES[name](**own, rngs=rngs), loss)
