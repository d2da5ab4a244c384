"""Checks of functions that users pass: whether they take the arguments that fax calls them with."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fax._arguments import shown


def function(
    caller: str,
    name: str,
    value: Any,
    forms: dict[int, str],
    *,
    keywords: Sequence[str] = (),
    error: type[ValueError] = ValueError,
) -> None:
    """Checks that a value can be called.

    Args:
      caller: the public function that was called.
      name: the name of the argument.
      value: its value.
      forms: how it is called, by number of positional arguments: ``{2: "apply(params, x)"}``.
      keywords: arguments that are passed by name if its signature has them.
      error: the error to raise.
    """
    expected = f"expected a function {', or '.join(forms.values())}"
    if not callable(value) or isinstance(value, type):
        raise error(f"{caller}: {name} is {shown(value)}, {expected}.{_part(name, value)}")
    if not any(takes(value, number, keywords) for number in forms):
        raise error(
            f"{caller}: {name} is {shown(value)}, which takes {inspect.signature(value)}, "
            f"{expected}."
        )


def takes(
    fn: Callable, positional: int, keywords: Sequence[str] = (), *, always: Sequence[str] = ()
) -> bool:
    """Whether a function can be called with these arguments, as far as its signature shows.

    Of the arguments passed by name, ``keywords`` are optional in the signature, ``always`` are not.
    """
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return True
    named = {name: None for name in keywords if name in signature.parameters}
    named |= dict.fromkeys(always)
    try:
        signature.bind(*[None] * positional, **named)
    except TypeError:
        return False
    return True


def _part(name: str, value: Any) -> str:
    """How to fix it if an object was passed in place of one of its functions, such as a model."""
    for path in (name, f"model.{name}"):
        try:
            found = operator.attrgetter(path)(value)
        except AttributeError:
            continue
        if callable(found):
            return f" Pass its .{path}."
    return ""


def optimizer(caller: str, name: str, value: Any) -> None:
    """Checks that a value is an optax optimizer, or has the same interface."""
    parts = [getattr(value, part, None) for part in ("init", "update")]
    if not isinstance(value, type) and all(map(callable, parts)):
        if takes(value.update, 3):
            return
        named = inspect.signature(value.update).parameters.values()
        if more := [x.name for x in named if x.kind is x.KEYWORD_ONLY and x.default is x.empty]:
            raise ValueError(
                f"{caller}: {name} is {shown(value)}, whose update needs {', '.join(more)}. "
                "Expected an optimizer that needs only the gradient, its state and the parameters, "
                "such as optax.sgd(0.1)."
            )
    fix = "Pass one, as in optax.sgd(0.1)."
    if inspect.isfunction(value) and value.__module__.startswith("optax"):
        fix = f"Call it, as in optax.{value.__name__}(0.1)."
    elif callable(value):
        fix = "Call it with its settings, as in optax.sgd(0.1)."
    elif isinstance(value, int | float) or (np.ndim(value) == 0 and hasattr(value, "dtype")):
        rate = "rate" if isinstance(value, jax.core.Tracer) else value
        fix = f"For this learning rate, pass optax.sgd({rate})."
    raise ValueError(
        f"{caller}: {name} is {shown(value)}, expected an optax optimizer "
        f"(optax.GradientTransformation). {fix}"
    )
