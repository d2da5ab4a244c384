"""Optimizers by name: those of optax, and the server optimizers of `fax.algorithms`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax

import fax.algorithms
from fax import _arguments

# L-BFGS evaluates the loss several times for each step. The other one is deprecated.
_LEFT_OUT = ("lbfgs", "optimistic_adam")


@functools.cache
def optimizers() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """All functions of optax and `fax.algorithms` that make an optimizer from a learning rate.

    Noisy SGD is not among them, because it needs a key.
    """
    found: dict[str, Callable[..., optax.GradientTransformation]] = {}
    for home in (optax, fax.algorithms):
        for name, value in sorted(vars(home).items()):
            left_out = name.startswith(("_", "scale_by_")) or name in _LEFT_OUT
            if not left_out and inspect.isfunction(value):
                own = list(inspect.signature(value).parameters)
                if own[:1] == ["learning_rate"] and "key" not in own:
                    found[name] = value
    return found


def options_of(name: str) -> dict[str, Any]:
    """The options of an optimizer that are numbers or switches, with their defaults."""
    parameters = list(inspect.signature(optimizers()[name]).parameters.values())[1:]
    return {
        p.name: p.default
        for p in parameters
        if isinstance(p.default, bool | int | float) or p.name == "momentum"
    }


def optimizer(where: str, table: Mapping[str, Any]) -> optax.GradientTransformation:
    """The optimizer of a table: its name, its learning rate, and its options.

    Args:
      where: the name of the table, for messages.
      table: ``{"optimizer": "sgd", "rate": 0.1, "momentum": 0.9}``. Numbers may be traced.

    Raises:
      ValueError: if there is no such optimizer, or a value is not a number.
      TypeError: if it has no such option.
    """
    if not isinstance(table, Mapping) or not {"optimizer", "rate"} <= table.keys():
        raise ValueError(
            f"{where} is {table!r:.80}, expected a dict with an optimizer and its learning rate, "
            "such as {'optimizer': 'sgd', 'rate': 0.1}."
        )
    name = _arguments.choice(where, "optimizer", table["optimizer"], list(optimizers()))
    options = {key: value for key, value in table.items() if key not in ("optimizer", "rate")}
    _arguments.options(f"{where}: {name}", options, list(options_of(name)))
    for key, value in {"rate": table["rate"], **options}.items():
        if isinstance(options_of(name).get(key), bool):
            _arguments.flag(where, key, value)
        else:
            _arguments.number(where, key, value)
    return optimizers()[name](table["rate"], **options)
