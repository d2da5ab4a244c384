"""Branches and loops on which devices agree.

A client function may be sharded over mesh axes of its own, and then a collective over them
can end up in a branch. Devices along the placement work for different participants, which take
different branches; but a collective that only some devices reach is one that all wait for.
So the first branch is taken by all devices and another one by all if one of their participants
takes it, and a loop goes on until the last one is through; what a participant does not want is
discarded. A loop in such a branch does not wait for those who only keep the others company, for
whom it might never end.

Branches that do not depend on who the participant is are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var
from jax.extend.core.primitives import cond_p, remat_p, scan_p, while_p

from fax.primitives import _jaxpr
from fax.primitives._cut import depends

Axes = tuple[str, ...]


def agree(jaxpr: ClosedJaxpr, varies: Sequence[bool], axes: Axes) -> ClosedJaxpr:
    """The jaxpr with branches on which the devices along mesh axes agree.

    Args:
      jaxpr: what a device does, with the axes manual. Traced with axes in scope.
      varies: which inputs can differ between the devices.
      axes: the mesh axes.
    """
    if not _branches(jaxpr.jaxpr):
        return jaxpr
    return _jaxpr.trace(lambda *xs: _evaluate(jaxpr, varies, axes, xs)[0], jaxpr.in_avals)[0]


def _branches(jaxpr: Jaxpr | ClosedJaxpr) -> bool:
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return any(
        eqn.primitive in (cond_p, while_p) or any(map(_branches, _jaxpr.inner(eqn)))
        for eqn in inner.eqns
    )


def _evaluate(
    jaxpr: ClosedJaxpr,
    varies: Sequence[bool],
    axes: Axes,
    operands: Sequence[Any],
    wanted: jax.Array | None = None,
) -> tuple[list[Any], list[bool]]:
    """The jaxpr's outputs, and which of them can differ between devices.

    ``wanted`` says whether they are of use on this device, where that differs.
    """
    inner = jaxpr.jaxpr
    env: dict[Var, Any] = dict(zip(inner.constvars, jaxpr.consts, strict=True))
    env.update(zip(inner.invars, operands, strict=True))
    varying = {var for var, v in zip(inner.invars, varies, strict=True) if v}

    def read(atom: Any) -> Any:
        return env[atom] if isinstance(atom, Var) else atom.val

    def differs(atom: Any) -> bool:
        return isinstance(atom, Var) and atom in varying

    for eqn in inner.eqns:
        flags = list(map(differs, eqn.invars))
        values = list(map(read, eqn.invars))
        matters = any(flags) or wanted is not None
        rule = _RULES.get(eqn.primitive) if matters and _branches_in(eqn) else None
        with eqn.ctx.manager:
            if rule is not None:
                outs, out_flags = rule(eqn, flags, axes, values, wanted)
            else:
                outs = _jaxpr.bind(eqn, values)
                out_flags = [any(flags)] * len(outs)
        env.update(zip(eqn.outvars, outs, strict=True))
        varying.update(var for var, flag in zip(eqn.outvars, out_flags, strict=True) if flag)
    return list(map(read, inner.outvars)), list(map(differs, inner.outvars))


def _branches_in(eqn: JaxprEqn) -> bool:
    return eqn.primitive in (cond_p, while_p) or any(map(_branches, _jaxpr.inner(eqn)))


def _somewhere(predicate: jax.Array, axes: Axes) -> jax.Array:
    """Whether a predicate, or one of a batch of them, holds on any device."""
    return lax.psum(jnp.any(predicate).astype(jnp.int32), axes) > 0


def _choose(predicate: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Under `jax.vmap` a loop has a predicate for each of its batch."""
    each = lax.broadcast_in_dim(predicate, new.shape, range(predicate.ndim))
    return lax.select(each, new, old)


def _both(one: jax.Array, other: jax.Array | None) -> jax.Array:
    return one if other is None else one & other


def _cond(eqn, flags, axes, values, wanted):
    """The first branch, and every other one that some device takes, one after the other."""
    index, *operands = values

    def taken(branch, wanted):
        return lambda *operands: _evaluate(branch, flags[1:], axes, operands, wanted)[0]

    branches = eqn.params["branches"]
    if not flags[0]:
        which = [taken(branch, wanted) for branch in branches]
        outs = lax.switch(index.astype(np.int32), which, *operands)
        return outs, [True] * len(outs)
    results = taken(branches[0], _both(index == 0, wanted))(*operands)
    for number, branch in enumerate(branches[1:], start=1):
        mine = _both(index == number, wanted)
        kept = results
        made = lax.cond(
            _somewhere(mine, axes), taken(branch, mine), lambda *_, kept=kept: kept, *operands
        )
        results = [lax.select(mine, new, old) for new, old in zip(made, results, strict=True)]
    return results, [True] * len(results)


def _while(eqn, flags, axes, values, wanted):
    """As many steps as some device takes. A participant that is through keeps its result."""
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
        body = agree(body, body_flags, axes)
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
    # Inputs are constants, carried values and rows; outputs carried values and rows. The names
    # of the parameters that count them differ between versions of JAX, but rows have one axis
    # less in the body.
    params, body = eqn.params, eqn.params["jaxpr"]
    carries = _alike(eqn.invars, body.in_avals)
    count = _alike(eqn.outvars, body.out_avals)
    fixed = carries - count
    consts, xs = flags[:fixed], flags[carries:]
    carried = _settle(flags[fixed:carries], lambda c: depends(body, [*consts, *c, *xs])[: len(c)])
    flags = [*consts, *carried, *xs]

    def step(carry, rows):
        outs, _ = _evaluate(body, flags, axes, [*values[:fixed], *carry, *rows], wanted)
        return outs[:count], outs[count:]

    how = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, rows = lax.scan(step, values[fixed:carries], values[carries:], **how)
    return [*carry, *rows], depends(body, flags)


def _alike(atoms, avals):
    """How many have as many axes as they have in a loop's body."""
    return sum(atom.aval.ndim == aval.ndim for atom, aval in zip(atoms, avals, strict=True))


def _settle(carried, step):
    """The carried values that differ after any number of steps."""
    while True:
        after = [a or b for a, b in zip(carried, step(carried), strict=True)]
        if after == carried:
            return carried
        carried = after


def _checkpoint(eqn, flags, axes, values, wanted):
    """What keeps the compiler from merging the call with another one stays as it is."""
    inner, extra = ClosedJaxpr(eqn.params["jaxpr"], []), [] if wanted is None else [wanted]

    def call(*operands):
        rest, own = operands[: len(flags)], operands[len(flags) :]
        return _evaluate(inner, flags, axes, rest, *own)[0]

    avals = list(map(jax.typeof, extra))
    jaxpr, _ = _jaxpr.trace(call, [*inner.in_avals, *avals])
    params = dict(eqn.params, jaxpr=jaxpr.jaxpr)
    if isinstance(params["prevent_cse"], tuple):
        params["prevent_cse"] += (True,) * len(extra)
    eqn = eqn.replace(invars=[*eqn.invars, *map(Var, avals)], params=params)
    outs = _jaxpr.bind(eqn, [*values, *extra])
    return outs, [True] * len(outs)


def _call(eqn, flags, axes, values, wanted):
    return _evaluate(eqn.params[_jaxpr.CALLS[eqn.primitive]], flags, axes, values, wanted)


_RULES = {cond_p: _cond, while_p: _while, scan_p: _scan, remat_p: _checkpoint}
_RULES.update(dict.fromkeys(_jaxpr.CALLS, _call))
