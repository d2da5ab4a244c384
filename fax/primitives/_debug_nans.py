"""Where NaN and infinities come from, if `jax.debug_nans` or `jax.debug_infs` look for them.

JAX runs a jitted function and looks at what it returns; if that is invalid, it runs the function
once more, one operation after the other, to tell which one was first. Rounds and programs do
the same. So what a mask leaves out is not looked at: it does not reach any result. And it
is the client function of one participant that is run once more, not that of all.
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
    """What to look for."""
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
    """Runs a program, and says which of its operations an invalid result comes from.

    The operands can be those of a transformation. Results are looked at when they are there.
    """
    if not _wanted():
        return run(*operands)
    with _unwatched():
        outs = run(*operands)
    try:
        # JAX looks at what comes out of an operation; this one changes nothing.
        return [copy_p.bind(x) if _is_inexact(x) else x for x in outs]
    except FloatingPointError as found:
        error = FloatingPointError(
            f"{found}, of the results of a fax.program. None of its operations makes an invalid "
            "value when they run one after the other: it is among the arguments, or it comes from "
            "how the compiler puts operations together."
        )
    _jaxpr.evaluate(jaxpr, *operands)
    raise error


def watch_round(run: Run, this: Round, operands: Sequence[Any]) -> Sequence[Any]:
    """Runs a round, and says which operation of the client function made an invalid result."""
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
            f"invalid value ({kind}) encountered in the {mode} over {name}: what the "
            "participants contribute to it is valid."
        )
    try:
        _jaxpr.evaluate_in_steps(kept.jaxpr, *rows, plain=True)
    except FloatingPointError as error:
        error.add_note(f"It was encountered in the function mapped over {name}, for row {who}.")
        raise
    raise FloatingPointError(
        f"invalid value ({kind}) encountered in federated_map, in what row {who} of {name} "
        "returns. None of the mapped function's operations makes one when they run one after the "
        "other: it is among the arguments, or it comes from how the compiler puts operations "
        "together."
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
    """All rows. What is on one device can be brought to those of a mesh in a jitted call alone."""
    return gather_rows(x, group)


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(jax.typeof(x).dtype, jnp.inexact)
