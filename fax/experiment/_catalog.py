"""What a configuration can name: tasks, models, algorithms, aggregators, and their options.

Names, options and descriptions come from the functions themselves, so what is added to fax can be
named without further changes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import fax.aggregators
import fax.algorithms
import fax.tasks
from fax.models import _registry
from fax.tasks import _optimizers, _task

KINDS = ("tasks", "models", "algorithms", "aggregators", "optimizers")
# What an algorithm or aggregator gets from the rest of the configuration.
DERIVED = (
    *("loss", "client_optimizer", "server_optimizer", "inner_optimizer", "outer_optimizer"),
    *("base_optimizer", "client_learning_rate", "server_learning_rate"),
    *("num_clients", "replicas", "aggregator"),
)
# What cannot be written in a configuration, so that only a program can pass it.
_IN_CODE = ("sharding", "key", "alpha_optimizer", "personal_optimizer")


@functools.cache
def catalog(kind: str) -> dict[str, Callable[..., Any]]:
    """The functions of one of the `KINDS`, by name."""
    if kind == "algorithms":
        found = _public(fax.algorithms, "Algorithm")
        return {name: fn for name, fn in found.items() if name != "federated"}
    if kind == "aggregators":
        found = _public(fax.aggregators, "Aggregator", "Transformation")
        return {name: fn for name, fn in found.items() if name != "chain"}
    others: dict[str, dict[str, Any]] = {
        "tasks": _task.TASKS,
        "models": _registry.MODELS,
        "optimizers": _optimizers.optimizers(),
    }
    return others[kind]


def summary(kind: str, name: str) -> str:
    """One line that says what a name stands for."""
    return (inspect.getdoc(catalog(kind)[name]) or "").partition("\n")[0]


def parameters(kind: str, name: str) -> dict[str, inspect.Parameter]:
    """All parameters of an algorithm or aggregator."""
    return dict(inspect.signature(catalog(kind)[name]).parameters)


def options(kind: str, name: str) -> list[str]:
    """The options that a configuration may set."""
    if kind == "tasks":
        return ["cache", *_task.options_of(name)]
    if kind == "models":
        return _registry.options_of(name)
    if kind == "optimizers":
        return ["rate", *_optimizers.options_of(name)]
    return [own for own in parameters(kind, name) if own not in (*DERIVED, *_IN_CODE)]


def required(kind: str, name: str) -> list[str]:
    """The options that have no default."""
    if kind not in ("algorithms", "aggregators"):
        return []
    own = parameters(kind, name)
    return [key for key in options(kind, name) if own[key].default is inspect.Parameter.empty]


def _public(home: Any, *types: str) -> dict[str, Callable[..., Any]]:
    """The public functions of a package that are annotated to return one of these types."""
    return {
        name: value
        for name, value in sorted(vars(home).items())
        if not name.startswith("_")
        and inspect.isfunction(value)
        and value.__annotations__.get("return") in types
    }
