"""Branches and loops that all devices go through together.

A client function may be sharded over other mesh axes, and then a branch can contain a collective
over these. Devices along the placement work for different participants, which may take different
branches. But if only some devices reach a collective, all of them wait forever. So all devices take
the first branch, and they take another branch if any of their participants does. A loop runs until
the last participant is done. Results that a participant does not need are discarded. A loop in such
a branch does not wait for participants that have not taken the branch: for them it might never end.

If branches contain only elementwise operations and sums, as those of `optax.apply_if_finite` do,
all of them are computed instead. This costs about as much as selecting the results, and no device
has to know what others do. Branches that do not depend on the participant are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var
from jax.extend.core.primitives import cond_p, remat_p, scan_p, while_p

from fax import _compat
from fax.primitives import _jaxpr
from fax.primitives._halves import depends
from fax.primitives._rowwise import may_be_rowwise

Axes = tuple[str, ...]


def make_uniform(jaxpr: ClosedJaxpr, varies: Sequence[bool], axes: Axes) -> ClosedJaxpr:
    """The jaxpr with branches and loops that the devices along mesh axes go through together.

    Call it with the axes in scope.

    Args:
      jaxpr: what a device does, with the axes manual.
      varies: which inputs can differ between the devices.
      axes: the mesh axes.
    """
    if not _jaxpr.any_equation(jaxpr, _branches):
        return jaxpr
    return _jaxpr.trace(lambda *xs: _evaluate(jaxpr, varies, axes, xs)[0], jaxpr.in_avals)[0]


def _branches(eqn: JaxprEqn) -> bool:
    return eqn.primitive in (cond_p, while_p)


def _is_elementwise(jaxpr: ClosedJaxpr) -> bool:
    """Whether it contains only elementwise operations and sums."""

    def heavy(eqn: JaxprEqn) -> bool:
        inside = eqn.primitive is cond_p or eqn.primitive in _compat.CALLS
        return not (inside or may_be_rowwise(eqn))

    return not _jaxpr.any_equation(jaxpr, heavy)


class _Value(NamedTuple):
    """A value, and whether it can differ between devices."""

    array: Any
    varies: bool


def _evaluate(
    jaxpr: ClosedJaxpr,
    varies: Sequence[bool],
    axes: Axes,
    operands: Sequence[Any],
    wanted: jax.Array | None = None,
) -> tuple[list[Any], list[bool]]:
    """The jaxpr's outputs, and which of them can differ between devices.

    ``wanted`` says whether this device needs them, if that differs between devices.
    """

    def step(eqn: JaxprEqn, seen: list[_Value]) -> Iterator[_Value]:
        values, flags = [x.array for x in seen], [x.varies for x in seen]
        matters = any(flags) or wanted is not None
        holds = matters and (_branches(eqn) or _jaxpr.any_inside(eqn, _branches))
        rule = _RULES.get(eqn.primitive) if holds else None
        with eqn.ctx.manager:
            if rule is not None:
                outs, out_flags = rule(eqn, flags, axes, values, wanted)
            else:
                outs = _jaxpr.bind(eqn, values)
                out_flags = [any(flags)] * len(outs)
        return map(_Value, outs, out_flags)

    given = map(_Value, operands, varies)
    outs = _jaxpr.interpret(jaxpr, given, step, constant=lambda x: _Value(x, False))
    return [x.array for x in outs], [x.varies for x in outs]


def _somewhere(predicate: jax.Array, axes: Axes) -> jax.Array:
    """Whether a predicate, or any in a batch of predicates, holds on any device."""
    return lax.psum(jnp.any(predicate).astype(jnp.int32), axes) > 0


def _choose(predicate: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Selects by a predicate. Under `jax.vmap` a loop has one for each member of the batch."""
    each = lax.broadcast_in_dim(predicate, new.shape, range(predicate.ndim))
    return lax.select(each, new, old)


def _both(one: jax.Array, other: jax.Array | None) -> jax.Array:
    return one if other is None else one & other


def _cond(eqn, flags, axes, values, wanted):
    """Runs the first branch, and each other that any device takes; elementwise ones always."""
    index, *operands = values

    def taken(branch, wanted):
        return lambda *operands: _evaluate(branch, flags[1:], axes, operands, wanted)[0]

    branches = eqn.params["branches"]
    if not flags[0]:
        which = [taken(branch, wanted) for branch in branches]
        outs = lax.switch(index.astype(np.int32), which, *operands)
        return outs, [True] * len(outs)
    elementwise = all(map(_is_elementwise, branches))
    results = taken(branches[0], _both(index == 0, wanted))(*operands)
    for number, branch in enumerate(branches[1:], start=1):
        mine = _both(index == number, wanted)
        kept, run = results, taken(branch, mine)
        if elementwise:
            made = run(*operands)
        else:
            made = lax.cond(_somewhere(mine, axes), run, lambda *_, kept=kept: kept, *operands)
        results = [lax.select(mine, new, old) for new, old in zip(made, results, strict=True)]
    return results, [True] * len(results)


def _while(eqn, flags, axes, values, wanted):
    """Runs a loop until all devices are done. A participant that is done keeps its result."""
    params = eqn.params
    condition, body = params["cond_jaxpr"], params["body_jaxpr"]
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts, start = values[:first], values[first:second], values[second:]
    carried = _settle(flags[second:], lambda c: depends(body, [*flags[first:second], *c]))
    cond_flags, body_flags = [*flags[:first], *carried], [*flags[first:second], *carried]

    def goes_on(carry, still):
        (more,), _ = _evaluate(condition, cond_flags, axes, [*cond_consts, *carry], still)
        return _both(more, still)

    if wanted is None and not depends(condition, cond_flags)[0]:
        body = make_uniform(body, body_flags, axes)
        return _jaxpr.bind(eqn.replace(params=dict(params, body_jaxpr=body)), values), carried

    def step(state):
        mine, _, carry = state
        new, _ = _evaluate(body, body_flags, axes, [*body_consts, *carry], jnp.any(mine))
        carry = [_choose(mine, x, old) for x, old in zip(new, carry, strict=True)]
        mine = mine & goes_on(carry, jnp.any(mine))
        return mine, _somewhere(mine, axes), carry

    mine = goes_on(start, wanted)
    state = (mine, _somewhere(mine, axes), start)
    return lax.while_loop(lambda state: state[1], step, state)[2], [True] * len(start)


def _scan(eqn, flags, axes, values, wanted):
    params, body = eqn.params, eqn.params["jaxpr"]
    fixed, count = _compat.scan_sizes(eqn)
    carries = fixed + count
    consts, xs = flags[:fixed], flags[carries:]
    carried = _settle(flags[fixed:carries], lambda c: depends(body, [*consts, *c, *xs])[: len(c)])
    flags = [*consts, *carried, *xs]

    def step(carry, rows):
        outs, _ = _evaluate(body, flags, axes, [*values[:fixed], *carry, *rows], wanted)
        return outs[:count], outs[count:]

    how = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, rows = lax.scan(step, values[fixed:carries], values[carries:], **how)
    return [*carry, *rows], depends(body, flags)


def _settle(carried, step):
    """The carried values that can differ between devices after any number of steps."""
    while True:
        after = [a or b for a, b in zip(carried, step(carried), strict=True)]
        if after == carried:
            return carried
        carried = after


def _checkpoint(eqn, flags, axes, values, wanted):
    """The parameters that keep the compiler from merging the call with another do not change."""
    inner, extra = ClosedJaxpr(eqn.params["jaxpr"], []), [] if wanted is None else [wanted]

    def call(*operands):
        rest, own = operands[: len(flags)], operands[len(flags) :]
        return _evaluate(inner, flags, axes, rest, *own)[0]

    avals = list(map(jax.typeof, extra))
    jaxpr, _ = _jaxpr.trace(call, [*inner.in_avals, *avals])
    params = _compat.checkpoint_params(eqn.params, jaxpr.jaxpr, len(extra))
    eqn = eqn.replace(invars=[*eqn.invars, *map(Var, avals)], params=params)
    outs = _jaxpr.bind(eqn, [*values, *extra])
    return outs, [True] * len(outs)


def _call(eqn, flags, axes, values, wanted):
    return _evaluate(eqn.params[_compat.CALLS[eqn.primitive]], flags, axes, values, wanted)


_RULES: dict[Any, Callable] = {cond_p: _cond, while_p: _while, scan_p: _scan, remat_p: _checkpoint}
_RULES.update(dict.fromkeys(_compat.CALLS, _call))
