"""Partial evaluation of `federated_map`, which reverse differentiation is based on.

The client function is split in two, and so is the round: a map of what is known, which also
returns the residuals that the rest needs, and a map of the rest. A residual that is an input is
passed on in the mode of that input, and the server computes one that depends only on server values.
So neither becomes n copies.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import linear_util as lu
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var, jaxpr_as_fun
from jax.interpreters import partial_eval as pe

from fax.primitives import _jaxpr
from fax.primitives._jaxpr import Atom
from fax.primitives._round import (
    PLACED,
    SERVER,
    Contribution,
    Round,
    expand,
    federated_map_p,
    pick,
)


class PartialEvaluation:
    """A jaxpr in two halves: what depends only on the known inputs, and the rest.

    Attributes:
      known: maps ``consts`` and the known inputs to the known outputs and to the residuals,
        the intermediate values that the rest needs.
      rest: maps residuals and unknown inputs to the unknown outputs.
      unknown_out: which outputs are unknown.
      forwarded: for each residual of the rest, the index of the known input that it is, or None
        for one that ``known`` computes and returns.
    """

    def __init__(
        self,
        jaxpr: ClosedJaxpr,
        unknown: Sequence[bool],
        instantiate: Sequence[bool] | bool = False,
    ):
        """``instantiate`` marks outputs that count as unknown, whatever they depend on."""
        avals = jaxpr.in_avals
        info = jaxpr.jaxpr.debug_info.with_unknown_names()
        fun = lu.wrap_init(jaxpr_as_fun(jaxpr), debug_info=info)

        def known_part(*inputs):
            values = iter(inputs)
            pvals = [
                pe.PartialVal.unknown(aval) if is_unknown else pe.PartialVal.known(next(values))
                for aval, is_unknown in zip(avals, unknown, strict=True)
            ]
            rest, outs, residuals = pe.trace_to_jaxpr_nounits(fun, pvals, instantiate)
            self.rest = _jaxpr.close(rest)
            self.unknown_out = [not out.is_known() for out in outs]
            positions = {id(x): i for i, x in enumerate(inputs)}
            self.forwarded = [positions.get(id(r)) for r in residuals]
            return [out.get_known() for out in outs if out.is_known()] + [
                r for r, i in zip(residuals, self.forwarded, strict=True) if i is None
            ]

        known_avals = pick((not u for u in unknown), avals)
        self.known, self.consts = _jaxpr.trace(known_part, known_avals)


def depends(jaxpr: ClosedJaxpr, inputs: Sequence[bool]) -> list[bool]:
    """Which outputs depend on the marked inputs, also through calls and loops."""
    return PartialEvaluation(jaxpr, inputs).unknown_out


def partial_eval(trace: Any, *tracers: Any, **params: Any) -> list[Any]:
    """The rule that `jax.linearize` and `jax.grad` use."""
    this = Round.of(params)
    unknown = [not tracer.is_known() for tracer in tracers]
    known = [not u for u in unknown]
    operands = [tracer.pval.get_known() for tracer in pick(known, tracers)]
    if all(known):
        return this.bind(*operands)
    halves = _evaluate_client(this, unknown)
    late = halves.unknown_out[: len(this.outputs)]
    if not all(i.tangent for i in pick(unknown, this.inputs)):
        return _without_residuals(trace, this, tracers, late)

    # The rest takes residuals first, and computes the masks again.
    inner = halves.rest.jaxpr
    masks = inner.outvars[len(inner.outvars) - this.mask_count :]
    outvars = [*expand(late, inner.outvars), *masks]
    inputs = [PLACED] * len(halves.forwarded) + pick(unknown, this.inputs)
    parts = pick(late, this.contributions(outvars))
    rest, used = this.assemble(inputs, inner.invars, parts, inner.eqns).keep([True] * len(parts))
    used_unknown = used[len(halves.forwarded) :]
    computed = [u and f is None for u, f in zip(used, halves.forwarded, strict=False)]

    # The known part returns outputs, then the residuals that the rest uses and are not inputs.
    known_round, known_masks, residuals = _known_round(this, halves, unknown)
    mask, extra = either(
        [o.mask is not None and known_masks[o.mask] for o in pick(late, this.outputs)]
    )
    residuals = pick(computed, expand((f is None for f in halves.forwarded), residuals))
    parts = known_round.contributions()
    values = len(parts)
    parts += [Contribution(residual, "placed", mask) for residual in residuals]
    inner = known_round.jaxpr.jaxpr
    first = known_round.assemble(known_round.inputs, inner.invars, parts, [*inner.eqns, *extra])
    operands = [*halves.consts, *operands]
    outs, on_server = _bind_hoisted(first, operands, [False] * values + [True] * len(residuals))

    # Residuals get their modes, and the rest is left for later.
    found = iter(zip(outs[values:], on_server[values:], strict=True))
    inputs, held = [], []
    for position in pick(used[: len(halves.forwarded)], halves.forwarded):
        if position is None:
            value, server = next(found)
            inputs.append(SERVER if server else PLACED)
            held.append(value)
        else:
            inputs.append(first.inputs[len(halves.consts) + position])
            held.append(operands[len(halves.consts) + position])
    rest = rest.replace(inputs=(*inputs, *rest.inputs[len(inputs) :]))
    later = [trace.new_instantiated_const(x) for x in held]
    later += pick(used_unknown, pick(unknown, tracers))
    later = trace.default_process_primitive(federated_map_p, later, rest.params)
    known_outs, later_outs = iter(outs), iter(later)
    return [next(later_outs if u else known_outs) for u in late]


def _without_residuals(
    trace: Any, this: Round, tracers: Sequence[Any], late: Sequence[bool]
) -> list[Any]:
    """Evaluates what is known without residuals, and leaves the rest for later.

    Not everything that is unknown is a tangent, so this is not differentiation. A scan over rounds
    does it to find out what it could compute before it starts. Intermediate values of many
    participants are not worth storing through all of the rounds.
    """
    if this.jaxpr.effects or all(late):
        late, known_outs = [True] * len(late), iter(())  # effects happen once
    else:
        known, used = this.keep([not u for u in late])
        known_outs = iter(known.bind(*(t.pval.get_known() for t in pick(used, tracers))))
    rest, used = this.keep(late)
    operands = [
        trace.new_instantiated_const(t.pval.get_known()) if t.is_known() else t
        for t in pick(used, tracers)
    ]
    rest_outs = iter(trace.default_process_primitive(federated_map_p, operands, rest.params))
    return [next(rest_outs if u else known_outs) for u in late]


def _evaluate_client(this: Round, unknown: Sequence[bool]) -> PartialEvaluation:
    """Evaluates the client function, with its masks also among the outputs of the rest."""
    inner, count = this.jaxpr.jaxpr, len(this.outputs)
    outvars = [*inner.outvars, *inner.outvars[count:]]
    doubled = _jaxpr.rebuild(this.jaxpr, inner.invars, outvars, inner.eqns)
    waits = [False] * count
    while True:
        forced = [*waits, *[False] * this.mask_count, *[True] * this.mask_count]
        halves = PartialEvaluation(doubled, unknown, forced)
        waits = [o.mask is not None and halves.unknown_out[count + o.mask] for o in this.outputs]
        if not any(w and not u for w, u in zip(waits, halves.unknown_out, strict=False)):
            return halves  # no known value has a mask that is unknown


def _known_round(
    this: Round, halves: PartialEvaluation, unknown: Sequence[bool]
) -> tuple[Round, list[Atom | None], list[Atom]]:
    """The round of what is known, on the constants of its half and the known operands.

    Returns it with the masks, None for those that are not known, and the residuals.
    """
    count, inner = len(this.outputs), halves.known.jaxpr
    early = [not u for u in halves.unknown_out[:count]]
    known_masks = [not u for u in halves.unknown_out[count : count + this.mask_count]]
    values, masks, residuals = _in_parts(inner.outvars, sum(early), sum(known_masks))
    masks = expand(known_masks, masks)
    parts = pick(early, this.contributions([*expand(early, values), *masks]))
    inputs = [SERVER] * len(halves.consts) + pick((not u for u in unknown), this.inputs)
    return this.assemble(inputs, inner.invars, parts, inner.eqns), masks, residuals


def either(masks: Sequence[Atom]) -> tuple[Atom | None, list[JaxprEqn]]:
    """The disjunction of masks, if none is None, with its equations.

    If all uses of a residual are masked, the residual can be masked, too. Then its cotangents are
    zero where it is masked when the derivative is differentiated.
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


def _bind_hoisted(
    this: Round, operands: Sequence[Any], candidates: Sequence[bool]
) -> tuple[list[Any], list[bool]]:
    """Binds a round; the server computes the candidates that depend only on server values.

    Returns the outputs, and which of them are such server values.
    """
    fixed = [i.mode == "server" for i in this.inputs]
    candidates = [*candidates, *[False] * this.mask_count]
    outer, inner, moved = hoist(this.jaxpr, fixed, candidates)
    computed = _jaxpr.evaluate(outer, *pick(fixed, operands))
    moved_values, shared = computed[: sum(moved)], computed[sum(moved) :]
    moved = moved[: len(this.outputs)]
    rest = this.replace(
        inputs=(*this.inputs, *[SERVER] * len(shared)),
        outputs=tuple(pick((not m for m in moved), this.outputs)),
        jaxpr=inner,
    )
    ours, others = iter(moved_values), iter(rest.bind_pruned([*operands, *shared]))
    return [next(ours if m else others) for m in moved], moved


def hoist(
    jaxpr: ClosedJaxpr, fixed: Sequence[bool], candidates: Sequence[bool]
) -> tuple[ClosedJaxpr, ClosedJaxpr, list[bool]]:
    """Moves the candidate outputs that depend only on fixed inputs out of a jaxpr.

    Returns:
      outer: maps the fixed inputs to the outputs that were moved, then to those of their
        intermediate values that the inner jaxpr needs, too.
      inner: maps the inputs, then those values, to the outputs that were not moved.
      moved: which outputs were moved.
    """
    own = pick(fixed, jaxpr.jaxpr.invars)
    varies = depends(jaxpr, [not f for f in fixed])
    moved = [c and not v for c, v in zip(candidates, varies, strict=True)]
    if not any(moved):
        return _jaxpr.rebuild(jaxpr, own, [], []), jaxpr, moved

    # A jitted call can have both varying and fixed results; then it is inlined.
    still = _fixed_variables(jaxpr, own)
    if not still.issuperset(_jaxpr.variables(pick(moved, jaxpr.jaxpr.outvars))):
        flat, consts = _jaxpr.inline_jit(jaxpr, lambda eqn: not still.issuperset(eqn.outvars))
        if not consts:
            jaxpr, still = flat, _fixed_variables(flat, own)
    outvars = jaxpr.jaxpr.outvars
    moved = [
        m and (not isinstance(atom, Var) or atom in still)
        for m, atom in zip(moved, outvars, strict=True)
    ]

    needed = set(_jaxpr.variables(pick(moved, outvars)))
    outside, inside = [], []
    for eqn in reversed(jaxpr.jaxpr.eqns):
        if needed.isdisjoint(eqn.outvars):
            inside.append(eqn)
        else:
            outside.append(eqn)
            needed.update(_jaxpr.variables(eqn.invars))
    kept = pick((not m for m in moved), outvars)
    wanted = set(_jaxpr.variables([*kept, *(atom for eqn in inside for atom in eqn.invars)]))
    shared = [var for eqn in outside for var in eqn.outvars if var in wanted]
    outer = _jaxpr.rebuild(jaxpr, own, [*pick(moved, outvars), *shared], outside[::-1])
    inner = _jaxpr.rebuild(jaxpr, [*jaxpr.jaxpr.invars, *shared], kept, inside[::-1])
    return outer, inner, moved


def _fixed_variables(jaxpr: ClosedJaxpr, inputs: Iterable[Var]) -> set[Var]:
    """The variables that are computed, without effects, from only the given inputs."""
    still = set(inputs)
    for eqn in jaxpr.jaxpr.eqns:
        if not eqn.effects and still.issuperset(_jaxpr.variables(eqn.invars)):
            still.update(eqn.outvars)
    return still


def _in_parts(items: Sequence[Any], *sizes: int) -> list[Any]:
    """Consecutive parts of the given sizes, and the remaining items."""
    parts = []
    for size in sizes:
        parts.append(items[:size])
        items = items[size:]
    return [*parts, items]


def partial_eval_custom(
    saveable: Any, unknown: Sequence[bool], instantiated: Sequence[bool], eqn: JaxprEqn
) -> tuple[JaxprEqn | None, JaxprEqn, list[bool], list[bool], list[Var]]:
    """The rule for `jax.checkpoint`: nothing of the round is saved, and the rest recomputes it."""
    del saveable
    this = Round.of(eqn.params)
    halves = _evaluate_client(this, unknown)
    late = halves.unknown_out[: len(eqn.outvars)]
    known_eqn = None
    if halves.consts:
        late = [True] * len(late)  # an equation cannot hold them
    elif not all(late):
        known, used = _known_round(this, halves, unknown)[0].keep([True for u in late if not u])
        known_eqn = eqn.replace(
            invars=pick(used, pick((not u for u in unknown), eqn.invars)),
            outvars=pick((not u for u in late), eqn.outvars),
            params=known.params,
            effects=known.jaxpr.effects,
        )
    missing = _jaxpr.variables(pick((not i for i in instantiated), eqn.invars))
    return known_eqn, eqn, late, [True] * len(late), missing


def without_outputs(eqn: JaxprEqn, wanted: Sequence[bool]) -> tuple[JaxprEqn, list[bool]]:
    """The equation reduced to some outputs, and which operands it still has."""
    kept, used = Round.of(eqn.params).keep(wanted)
    reduced = eqn.replace(
        invars=pick(used, eqn.invars),
        outvars=pick(wanted, eqn.outvars),
        params=kept.params,
        effects=kept.jaxpr.effects,
    )
    return reduced, used
