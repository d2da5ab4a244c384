"""Finds the source of NaN and infinities under `jax.debug_nans` and `jax.debug_infs`.

JAX runs a jitted function and checks its results. If one is invalid, it runs the function again,
one operation at a time, to find the first invalid one. Rounds and programs do the same. So values
that a mask leaves out are not checked, as they do not reach any result. And the client function
runs again for only one participant, not for all.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jax.extend.core.primitives import copy_p

from fax._placement import Placement
from fax.primitives import _jaxpr
from fax.primitives._round import Out, Round, pick, select
from fax.sharding._types import gather_rows

Run = Callable[..., Sequence[Any]]
Test = Callable[[Any], Any]


def _wanted() -> dict[str, Test]:
    """The tests for what to look for."""
    config: Any = jax.config
    tests: dict[str, tuple[bool, Test]] = {
        "nan": (config.jax_debug_nans, jnp.isnan),
        "inf": (config.jax_debug_infs, jnp.isinf),
    }
    return {kind: test for kind, (on, test) in tests.items() if on}


@contextlib.contextmanager
def _unwatched() -> Iterator[None]:
    with jax.debug_nans(False), jax.debug_infs(False):
        yield


def watch_program(run: Run, jaxpr: ClosedJaxpr, operands: Sequence[Any]) -> Sequence[Any]:
    """Runs a program, and reports which of its operations made an invalid result.

    The operands can be tracers of a transformation. Results are checked once they are concrete.
    """
    if not _wanted():
        return run(*operands)
    with _unwatched():
        outs = run(*operands)
    try:
        # JAX checks the results of an operation; this one is the identity.
        return [copy_p.bind(x) if _is_inexact(x) else x for x in outs]
    except FloatingPointError as found:
        error = FloatingPointError(
            f"{found}, in the results of a fax.program. None of its operations makes an invalid "
            "value when they run one at a time: it is among the arguments, or it comes from how "
            "the compiler combines operations."
        )
    _jaxpr.evaluate(jaxpr, *operands)
    raise error


def watch_round(run: Run, this: Round, operands: Sequence[Any]) -> Sequence[Any]:
    """Runs a round, and reports which operation of the client function made an invalid result."""
    wanted = _wanted()
    if not wanted:
        return run(*operands)
    with _unwatched():
        outs = run(*operands)
        checks = (
            (k, kind)
            for k, x in enumerate(outs)
            for kind, test in wanted.items()
            if _is_inexact(x) and bool(jnp.any(test(x)))
        )
        k, kind = next(checks, (None, ""))
        if k is None:
            return outs
        kept, used = this.keep([k == i for i in range(len(outs))])
        operands = pick(used, operands)
        who = _first(kept, operands, wanted[kind])
        rows = [
            _gathered(x, this.group)[who] if i.mode == "placed" else x
            for x, i in zip(operands, kept.inputs, strict=True)
        ]
    name, mode = this.group.name, this.outputs[k].mode
    if who is None:
        raise FloatingPointError(
            f"invalid value ({kind}) encountered in the {mode} over {name}. The participants' "
            "contributions to it are valid."
        )
    try:
        _jaxpr.evaluate_in_steps(kept.jaxpr, *rows, plain=True)
    except FloatingPointError as error:
        error.add_note(f"It was encountered in the function mapped over {name}, for row {who}.")
        raise
    raise FloatingPointError(
        f"invalid value ({kind}) encountered in federated_map, in the result for row {who} of "
        f"{name}. None of the mapped function's operations makes one when they run one at a time: "
        "it is among the arguments, or it comes from how the compiler combines operations."
    )


def _first(kept: Round, operands: Sequence[Any], test: Test) -> int | None:
    """The first participant whose contribution to the only output is invalid."""

    def contribution(*rows):
        ((value, _, mask),) = kept.contributions(_jaxpr.evaluate(kept.jaxpr, *rows))
        return [jnp.any(test(value if mask is None else select(mask, value)))]

    jaxpr, _ = _jaxpr.trace(contribution, kept.jaxpr.in_avals)
    (invalid,) = kept.replace(outputs=(Out("placed"),), jaxpr=jaxpr).bind(*operands)
    invalid = _gathered(invalid, kept.group)
    return int(jnp.argmax(invalid)) if bool(jnp.any(invalid)) else None


@functools.partial(jax.jit, static_argnums=1)
def _gathered(x: jax.Array, group: Placement) -> jax.Array:
    """All rows. Only a jitted call can move an array from one device to those of a mesh."""
    return gather_rows(x, group)


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(jax.typeof(x).dtype, jnp.inexact)
