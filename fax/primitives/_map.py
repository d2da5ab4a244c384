"""The primitive `federated_map`: one round of communication.

It runs a jaxpr, the client function, once for every participant of a placement. Each input
is in mode ``server`` (every participant sees the same value) or ``placed`` (participant i
sees row i); each output is in mode ``placed`` (participant i provides row i) or reduced over
the participants as they finish: ``sum``, ``max``, ``min``.

With f_i(p) = f(p, x_i), server input p and placed input x, a ``sum`` output and its
derivatives are

    y = sum_i f_i(p)        dy = sum_i J_i dp + K_i dx_i        p' = sum_i J_i^T y'
                                                                x_i' = K_i^T y'

So the derivative of a round is a round: a tangent has the mode of its primal, and transposition
turns sums into server inputs and server inputs into sums.

An output may be masked. The client function then also computes a bool. If it is false, the output
does not count: its row is zero, reductions skip it, and its tangents and cotangents are zero on
both sides of the client function's derivative, even if the derivative is infinite.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Var
from jax.interpreters import ad, batching
from jax.interpreters import partial_eval as pe

from fax._arithmetic import accumulator_dtype
from fax._compat import is_named_axis, register_dead_code, register_lowering_of_jaxprs
from fax._placement import Placement
from fax.primitives import _effects, _jaxpr
from fax.primitives._halves import depends
from fax.primitives._mask import by_mask, mask_within
from fax.primitives._partial_eval import partial_eval, partial_eval_custom
from fax.primitives._round import (
    PLACED,
    SERVER,
    Contribution,
    In,
    Out,
    Round,
    bind_traced,
    expand,
    federated_map_p,
    map_elementwise,
    pick,
    seen_avals,
)

# Types. How a map is evaluated and compiled is in `fax.lowering`.


def _abstract_eval(*_, **params):
    this = Round.of(params)
    _effects.check_order(this, jax.sharding.get_abstract_mesh())
    return this.result_avals, this.jaxpr.effects


# Batching
#
# The client function is batched. The participants' axis of a placed value stays first, so its
# batch axis comes second. Outputs that do not depend on a batched operand stay unbatched, unless
# the client function uses the axis by its name: its index in the batch can be in any of them.


def _batch(axis, operands, dims, **params):
    this = Round.of(params)
    operands = [
        x if dim is None else jnp.moveaxis(x, dim, int(i.mode == "placed"))
        for x, dim, i in zip(operands, dims, this.inputs, strict=True)
    ]
    named = any(is_named_axis(effect, axis.name) for effect in this.jaxpr.effects)

    def of_batch():
        found = depends(this.jaxpr, [dim is not None for dim in dims])
        return [named or b for b in found]

    batched = of_batch()
    if any(batched[len(this.outputs) :]):
        this = mask_within(this)
        batched = of_batch()
    vmapped = jax.vmap(
        functools.partial(_jaxpr.evaluate, this.jaxpr),
        in_axes=tuple(None if dim is None else 0 for dim in dims),
        out_axes=[0 if b else None for b in batched],
        axis_name=axis.name,
        axis_size=axis.size,
        spmd_axis_name=axis.spmd_name,
    )
    outs = bind_traced(vmapped, operands, this)
    return outs, [
        int(out.mode == "placed") if b else None
        for out, b in zip(this.outputs, batched, strict=False)
    ]


# Forward differentiation
#
# One map of the client function's JVP returns primals and tangents together, and stores nothing.
# Which row attains a max or a min is known only after the last participant. So if such an output
# has a tangent, its rows are placed, and reduced after the map.


def _jvp(primals, tangents, **params):
    this = Round.of(params)
    moving = [not _is_zero(t) for t in tangents]
    operands = [*primals, *pick(moving, tangents)]
    inputs = (*this.inputs, *(i._replace(tangent=True) for i in pick(moving, this.inputs)))
    inexact = [jnp.issubdtype(aval.dtype, jnp.inexact) for aval in this.value_avals]

    def both(*rows):
        rows, tangents = rows[: len(moving)], rows[len(moving) :]

        def of_moving(*moving_rows):
            own = iter(moving_rows)
            seen = [next(own) if m else row for row, m in zip(rows, moving, strict=True)]
            return _jaxpr.evaluate(this.jaxpr, *seen)

        outs, out_tangents = jax.jvp(of_moving, pick(moving, rows), list(tangents))
        return [*outs, *pick(inexact, out_tangents[: len(inexact)])]

    jaxpr, consts = _jaxpr.trace(both, seen_avals(operands, inputs))
    operands, inputs = [*consts, *operands], (SERVER,) * len(consts) + inputs
    inner = jaxpr.jaxpr
    # A tangent that does not depend on another one is a zero that `jax.jvp` has instantiated.
    follows = _jaxpr.touched(jaxpr, inner.invars[len(consts) + len(primals) :])
    own_tangents = iter(inner.outvars[len(this.jaxpr.out_avals) :])
    primal_parts, tangent_parts, late = [], [], []
    for part, i in zip(this.contributions(inner.outvars), inexact, strict=True):
        tangent = next(own_tangents) if i else None
        moves = isinstance(tangent, Var) and tangent in follows
        late.append(moves and part.mode in ("max", "min"))
        primal_parts.append(part._replace(mode="placed") if late[-1] else part)
        tangent_parts.append(
            part._replace(value=tangent, mode="placed" if late[-1] else part.mode)
            if moves
            else None
        )
    late_masks = [p.mask for p in pick(late, this.contributions(inner.outvars))]
    parts = [
        *primal_parts,
        *(part for part in tangent_parts if part is not None),
        *(Contribution(mask, "placed") for mask in late_masks if mask is not None),
    ]
    outs = iter(this.assemble(inputs, inner.invars, parts, inner.eqns).bind_pruned(operands))

    primals_out = [next(outs) for _ in primal_parts]
    tangents_out = [None if part is None else next(outs) for part in tangent_parts]
    if any(late):
        masks = [None if mask is None else next(outs) for mask in late_masks]
        modes = [out.mode for out in pick(late, this.outputs)]
        rows, row_tangents = pick(late, primals_out), pick(late, tangents_out)
        found = iter(reduce_late(modes, rows, row_tangents, masks, this.group))
        for k in (k for k, is_late in enumerate(late) if is_late):
            primals_out[k], tangents_out[k] = next(found)
    return primals_out, [
        ad.Zero(jax.typeof(x).to_tangent_aval()) if t is None else t
        for x, t in zip(primals_out, tangents_out, strict=True)
    ]


def reduce_late(
    modes: Sequence[str],
    rows: Sequence[Any],
    tangents: Sequence[Any],
    masks: Sequence[Any | None],
    group: Placement,
) -> list[tuple[Any, Any]]:
    """The maxima or minima of placed rows, and the mean tangents of the rows that attain them."""
    given = [mask for mask in masks if mask is not None]
    numbers = expand((mask is not None for mask in masks), range(len(given)))
    outs = [Out(mode, number) for mode, number in zip(modes, numbers, strict=True)]
    placed = [PLACED] * (len(rows) + len(given))
    best = map_elementwise(lambda *xs: xs, [*rows, *given], placed, outs, group)

    def winners(*seen):
        own = iter(seen)
        best, values, tangents = ([next(own) for _ in rows] for _ in range(3))
        counts = expand((mask is not None for mask in masks), own)
        sums = []
        for top, value, tangent, mask in zip(best, values, tangents, counts, strict=True):
            wins = value == top if mask is None else mask & (value == top)
            wide = accumulator_dtype(tangent.dtype)
            chosen = lax.select(wins, tangent, lax.full_like(tangent, 0))
            sums += [chosen.astype(wide), wins.astype(wide)]
        return sums

    inputs = [*[SERVER] * len(rows), *[PLACED] * len(rows), *placed]
    operands = [*best, *rows, *tangents, *given]
    sums = map_elementwise(winners, operands, inputs, [Out("sum")] * (2 * len(rows)), group)
    return [
        (top, (total / jnp.maximum(count, 1)).astype(top.dtype))
        for top, total, count in zip(best, sums[::2], sums[1::2], strict=True)
    ]


def _is_zero(tangent: Any) -> bool:
    return type(tangent) is ad.Zero or jax.typeof(tangent).dtype == jax.dtypes.float0


# Transposition
#
# A round that is linear in some inputs is transposed for each participant. Where an output is
# masked, its cotangent is zero, and so are results that depend on it, even if the transposed
# function is infinite. So outputs with different masks are transposed separately, each result has
# the mask of the outputs that it depends on, and the server adds them up.


def _transpose(cotangents, *operands, **params):
    this, used = Round.of(params).keep([type(ct) is not ad.Zero for ct in cotangents])
    cotangents = [ct for ct in cotangents if type(ct) is not ad.Zero]
    linear = [ad.is_undefined_primal(x) for x in operands]
    is_linear = pick(used, linear)
    is_fixed = [not is_lin for is_lin in is_linear]
    groups = by_mask(this)
    parts = _jaxpr.parts(this.jaxpr, groups.values())
    reached = [[i for i in needed if is_linear[i]] for _, needed in parts]

    def transposed(*rows):
        fixed, cotangents = rows[: sum(is_fixed)], rows[sum(is_fixed) :]
        seen = expand(is_fixed, fixed)
        results = []
        for members, (jaxpr, needed), own in zip(groups.values(), parts, reached, strict=True):

            def of_linear(*linear_rows, jaxpr=jaxpr, needed=needed):
                own = iter(linear_rows)
                return _jaxpr.evaluate(
                    jaxpr, *(next(own) if is_linear[i] else seen[i] for i in needed)
                )

            avals = [this.jaxpr.in_avals[i] for i in own]
            results += jax.linear_transpose(of_linear, *avals)([cotangents[k] for k in members])
        return [*results, *(this.masks(seen) if set(groups) != {None} else [])]

    if not any(is_linear):
        return [None if not is_lin else ad.Zero(x.aval) for x, is_lin in zip(operands, linear)]
    cotangent_modes = ["placed" if o.mode == "placed" else "server" for o in this.outputs]
    sums = {"server": "sum", "placed": "placed"}
    like = this.replace(
        inputs=(*pick(is_fixed, this.inputs), *(In(mode, True) for mode in cotangent_modes)),
        outputs=tuple(
            Out(sums[this.inputs[i].mode], mask)
            for mask, own in zip(groups, reached, strict=True)
            for i in own
        ),
    )
    fixed = pick(is_fixed, pick(used, operands))
    outs = iter(bind_traced(transposed, [*fixed, *cotangents], like))
    totals: list[Any] = [None] * len(is_linear)
    for i in (i for own in reached for i in own):
        result = next(outs)
        totals[i] = result if totals[i] is None else lax.add(totals[i], result)
    found = iter(totals)
    results = [next(found) if use else None for use in used]
    return [
        None if not is_lin else ad.Zero(x.aval) if result is None else result
        for x, is_lin, result in zip(operands, linear, results, strict=True)
    ]


# Dead code


def _dead_code(used_outputs, eqn):
    if not any(used_outputs) and not eqn.effects:
        return [False] * len(eqn.invars), None
    if all(used_outputs):
        return [True] * len(eqn.invars), eqn
    kept, used = Round.of(eqn.params).keep(used_outputs)
    reduced = eqn.replace(
        invars=pick(used, eqn.invars),
        outvars=pick(used_outputs, eqn.outvars),
        params=kept.params,
        effects=kept.jaxpr.effects,
    )
    return used, reduced


federated_map_p.def_effectful_abstract_eval(_abstract_eval)
batching.fancy_primitive_batchers[federated_map_p] = _batch
ad.primitive_jvps[federated_map_p] = _jvp
ad.primitive_transposes[federated_map_p] = _transpose
pe.custom_partial_eval_rules[federated_map_p] = partial_eval
pe.partial_eval_jaxpr_custom_rules[federated_map_p] = partial_eval_custom
register_dead_code(federated_map_p, _dead_code)
register_lowering_of_jaxprs(federated_map_p, federated_map_p.bind, "jaxpr")
