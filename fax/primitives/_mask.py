"""The effect of a mask on a client function.

A masked output counts only where its mask is true; elsewhere its row is zero, and reductions skip
it. The mask is a parameter of the map, so that every rule knows where tangents and cotangents are
zero, even if the derivative of the client function is infinite.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var
from jax.extend.core.primitives import custom_vjp_call_p

from fax._arithmetic import identity
from fax.primitives import _jaxpr
from fax.primitives._jaxpr import Atom
from fax.primitives._round import Out, Round, pick, select


def apply_masks(this: Round, outs: Any) -> list[jax.Array]:
    """One participant's contributions, those that are masked replaced by what changes nothing."""
    return [
        value if mask is None else select(mask, value, _nothing(mode, value.dtype))
        for value, mode, mask in this.contributions(list(map(jnp.asarray, outs)))
    ]


def _contribute(this: Round, *rows: Any) -> list[jax.Array]:
    return apply_masks(this, _jaxpr.evaluate(this.jaxpr, *rows))


def _nothing(mode: str, dtype: Any) -> Any:
    return 0 if mode == "placed" else identity(mode, dtype)


def mask_within(this: Round) -> Round:
    """Moves the masks into the client function, because a mask is a scalar and not a batch.

    Where a masked output does not count, its inputs have no derivatives, so that tangents and
    cotangents are zero on both sides of the client function. Under differentiation this evaluates
    the function once for each mask, unless all outputs have the same one and it does not depend on
    the inputs that are differentiated. If it contains a `jax.custom_vjp`, it is evaluated once for
    each mask in any case: in the rule of a `jax.custom_jvp` its derivative would be batched before
    it is transposed, which JAX does not support.
    """
    inexact = [jnp.issubdtype(aval.dtype, jnp.inexact) for aval in this.jaxpr.in_avals]
    decides = _jaxpr.prune(this.jaxpr, this.is_mask)[1]
    groups = by_mask(this)

    def gated(mask, *rows):
        if mask is None:
            return _contribute(this, *rows)
        fixed = [lax.stop_gradient(x) if i else x for x, i in zip(rows, inexact, strict=True)]
        counts = this.masks(fixed)[mask]
        seen = zip(rows, fixed, inexact, strict=True)
        return _contribute(
            this, *(lax.select(counts, x, still) if i else x for x, still, i in seen)
        )

    def separately(*rows):
        outs = {mask: gated(mask, *rows) for mask in groups}
        return [outs[out.mask][k] for k, out in enumerate(this.outputs)]

    work = jax.custom_jvp(functools.partial(_contribute, this))
    work.defjvp(lambda primals, tangents: jax.jvp(separately, primals, tangents))
    once = len(groups) == 1 and not any(pick(decides, inexact))
    plain = once or _jaxpr.any_equation(this.jaxpr, _has_own_transpose)
    jaxpr, _ = _jaxpr.trace(separately if plain else work, this.jaxpr.in_avals)
    return this.replace(jaxpr=jaxpr, outputs=tuple(Out(out.mode) for out in this.outputs))


def _has_own_transpose(eqn: JaxprEqn) -> bool:
    return eqn.primitive is custom_vjp_call_p


def by_mask(this: Round) -> dict[int | None, list[int]]:
    """The outputs that each mask applies to."""
    groups: dict[int | None, list[int]] = {}
    for k, out in enumerate(this.outputs):
        groups.setdefault(out.mask, []).append(k)
    return groups


def either(masks: Sequence[Atom]) -> tuple[Atom | None, list[JaxprEqn]]:
    """The disjunction of masks with its equations, or None if one of the masks is None.

    If every use of a residual is masked, the residual can be masked, too. Its cotangents are then
    also zero there when the derivative is differentiated.
    """
    if not masks or not all(isinstance(mask, Var) for mask in masks):
        return None, []
    masks = list(dict.fromkeys(masks))
    eqns, (mask,) = _jaxpr.splice(_disjunction(len(masks)), masks)
    return mask, eqns


@_jaxpr.cached
def _disjunction(count: int) -> ClosedJaxpr:
    scalar = jax.typeof(np.zeros((), bool))
    fn = functools.partial(functools.reduce, jnp.logical_or)
    return _jaxpr.trace(lambda *masks: [fn(masks)], [scalar] * count)[0]
