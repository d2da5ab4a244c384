"""Checks of arguments. Errors say what was passed, what was expected, and how to fix it.

Every check is passed the names of the function that was called and of the argument. It raises
`ValueError`, or the subclass that is passed as ``error``. CONTRIBUTING.md says which error is for
which mistake. A traced argument has no value to check, only a shape and a dtype.
"""

from __future__ import annotations

import itertools
import operator
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np


def number(
    caller: str,
    name: str,
    value: Any,
    *,
    above: float = -np.inf,
    least: float = -np.inf,
    below: float = np.inf,
    most: float = np.inf,
    what: str = "",
    error: type[ValueError] = ValueError,
) -> Any:
    """Checks that a scalar is finite and in a range, and returns it as it is.

    ``what`` says what the number stands for, or what else to do. It ends the message.
    """
    traced = isinstance(value, jax.core.Tracer)
    if traced and np.ndim(value) == 0:
        return value
    if np.isfinite(least) and np.isfinite(most):
        bounds = f"from {least:g} to {most:g}"
    else:
        bounds = " and ".join(
            text
            for bound, text in (
                (above, f"above {above:g}"),
                (least, f"of at least {least:g}"),
                (below, f"below {below:g}"),
                (most, f"of at most {most:g}"),
            )
            if np.isfinite(bound)
        )
    not_a_number = traced or isinstance(value, bool | np.bool_ | str | bytes)
    try:
        found = np.nan if not_a_number or np.ndim(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = np.nan
    if not (np.isfinite(found) and above < found < below and least <= found <= most):
        expected = f"a number {bounds}".rstrip()
        came = shown(value) if traced else _written(value)
        raise error(f"{caller}: {name} is {came}, expected {expected}{what and f', {what}'}.")
    return value


def count(
    caller: str,
    name: str,
    value: Any,
    *,
    least: int | None = 1,
    most: int | None = None,
    what: str = "",
    expected: str | None = None,
    error: type[ValueError] = ValueError,
) -> int:
    """Checks an int in a range, whose value has to be known when a program is traced.

    ``what`` says what the number stands for, or what else to do. It ends the message. Where a range
    depends on another argument, ``expected`` describes it.
    """
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    fits = found is not None and (least is None or found >= least)
    if found is None or not fits or (most is not None and found > most):
        wanted = "an int"
        if least is not None:
            wanted += f" of at least {least}" if most is None else f" from {least} to {most}"
        if least is not None and least == most:
            wanted = f"{least}"
        wanted = expected or wanted
        raise error(
            f"{caller}: {name} is {_written(value)}, expected {wanted}{what and f', {what}'}."
        )
    return found


def seed(caller: str, value: Any, *, error: type[ValueError] = ValueError) -> int:
    """Checks a seed: an int that NumPy and JAX can both make random numbers from."""
    return count(caller, "seed", value, least=0, most=2**31 - 1, error=error)


def numbers(
    caller: str,
    name: str,
    values: Any,
    size: int,
    what: str,
    *,
    least: float = -np.inf,
    error: type[ValueError] = ValueError,
) -> Any:
    """Checks a sequence of real numbers, and returns them as an array.

    If there is a ``least`` number, all of them have to be finite.
    """
    known = concrete(values)
    try:
        array = np.asarray(values, float) if known else jax.numpy.asarray(values)
    except (TypeError, ValueError):
        raise error(
            f"{caller}: {name} is {values!r:.80}, expected {size} numbers, {what}."
        ) from None
    if array.shape != (size,):
        raise error(f"{caller}: {name} has shape {array.shape}, expected ({size},), {what}.")
    if known and least > -np.inf:
        bad = np.flatnonzero(~(np.isfinite(array) & (array >= least)))
        if len(bad):
            raise error(
                f"{caller}: {name}[{bad[0]}] is {array[bad[0]]:g}, expected finite numbers of at "
                f"least {least:g}, {what}."
            )
    return array


def unmasked(caller: str, name: str, values: Any) -> None:
    """Checks that no value of a masked array is hidden. NumPy would use it nevertheless."""
    if np.ma.is_masked(values):
        raise ValueError(f"{caller}: {name} has masked values. Pass only those that count.")


def flag(caller: str, name: str, value: Any, *, error: type[ValueError] = ValueError) -> bool:
    """Checks that a switch is True or False, and not any other value with a truth value."""
    if not isinstance(value, bool | np.bool_):
        raise error(f"{caller}: {name} is {shown(value)}, expected True or False.")
    return bool(value)


def choice(
    caller: str,
    name: str,
    value: Any,
    known: Sequence[str],
    *,
    error: type[ValueError] = ValueError,
) -> str:
    """Checks that a string is one of the known ones."""
    if not isinstance(value, str) or value not in known:
        raise error(f"{caller}: {name} is {value!r:.80}, expected {either(known)}.")
    return value


def options(caller: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Checks the names of keyword arguments that are passed on. An unknown one is a `TypeError`."""
    unknown = sorted(given.keys() - set(known))
    if unknown:
        has = f"It has {', '.join(map(repr, known))}." if known else "It has none."
        raise TypeError(f"{caller} has no option {unknown[0]!r}. {has}")


def text(
    caller: str, name: str, value: Any, what: str, *, error: type[ValueError] = ValueError
) -> str:
    """Checks that a value is a string. ``what`` describes it, as in "the name of a feature"."""
    if not isinstance(value, str):
        raise error(f"{caller}: {name} is {shown(value)}, expected a string, {what}.")
    return value


def path(
    caller: str, name: str, value: Any, *, error: type[ValueError] = ValueError
) -> str | os.PathLike:
    """Checks that a value names a file or a folder."""
    if not isinstance(value, str | os.PathLike):
        raise error(f"{caller}: {name} is {shown(value)}, expected a path.")
    return value


def whole_numbers(
    caller: str, name: str, values: Any, example: str, *, least: int = -sys.maxsize
) -> tuple[int, ...]:
    """Checks a sequence of ints."""
    try:
        return tuple(count(caller, name, value, least=least) for value in values)
    except (TypeError, ValueError):
        bound = "" if least < 0 else f" of at least {least}"
        raise ValueError(
            f"{caller}: {name} is {values!r:.80}, expected a sequence of ints{bound}, as in "
            f"{name}={example}."
        ) from None


def key(caller: str, name: str, value: Any, *, error: type[ValueError] = ValueError) -> None:
    """Checks that a value is a single random key."""
    dtype, shape = dtype_of(value), getattr(value, "shape", None)
    typed = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    if not (typed and shape == ()) and not (dtype == np.uint32 and shape in ((2,), (4,))):
        raise error(
            f"{caller}: {name} is {shown(value)}, expected a random key, as in jax.random.key(0)."
        )


def arrays(name: str, tree: Any, *, keys: bool) -> None:
    """Checks that the leaves of a pytree are arrays or numbers, or random keys if ``keys``."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = dtype_of(leaf)
        if dtype is None or (not keys and jax.dtypes.issubdtype(dtype, jax.dtypes.extended)):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} is {shown(leaf)}, expected an array of "
                "numbers or bools."
            )


def floats(name: str, tree: Any) -> None:
    """Checks that the leaves of a pytree are arrays of real floats."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = dtype_of(leaf)
        if dtype is None or not jax.dtypes.issubdtype(dtype, np.floating):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} is {shown(leaf)}, expected an array of real "
                "floats. What is counted, and not trained, belongs in the model_state."
            )


def dtype_of(leaf: Any) -> Any:
    """The dtype of an array or a number, and None for anything else."""
    try:
        return jax.typeof(leaf).dtype
    except (AttributeError, TypeError, OverflowError):
        return None


def either(words: Sequence[str]) -> str:
    """Lists strings in quotes, as alternatives."""
    quoted = [repr(word) for word in words]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def shown(value: Any) -> str:
    """Describes a value in an error message, in at most one line and without its address."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return f"{value!r:.80}"
    if isinstance(value, type):
        return f"the class {_public(value)}"
    if callable(value) and hasattr(value, "__qualname__"):
        name = getattr(value, "__name__", "")
        return "a lambda" if name == "<lambda>" else f"the function {_public(value)}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return of_type(value)


def _written(value: Any) -> str:
    """A value as it is written, or a description of it if that is long or has several lines."""
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else shown(value)


def of_type(value: Any) -> str:
    """The type of a value with its article, as in ``an int``."""
    name = type(value).__name__.lstrip("_")
    return f"{'an' if name[:1] in 'AEIOUaeiou' else 'a'} {name}"


def _public(value: Any) -> str:
    """The name of a function or class as users know it, without private modules."""
    parts = str(getattr(value, "__module__", None) or "").split(".")
    public = itertools.takewhile(lambda p: not p.startswith("_") and p != "builtins", parts)
    return ".".join(filter(None, [*public, value.__qualname__.rpartition("<locals>.")[2]]))


def concrete(x: Any) -> bool:
    """Whether no leaf of a pytree is traced, so that its values can be checked."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x))
