"""Partial evaluation of `federated_map`, which reverse differentiation is based on.

The client function is split in two, and so is the round: a map of what is known, which also
returns the residuals that the rest needs, and a map of the rest. A residual that is an input is
passed on in the mode of that input, and the server computes one that depends only on server values.
So neither becomes n copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import JaxprEqn, Var

from fax._compat import on_device
from fax.primitives import _jaxpr
from fax.primitives._halves import PartialEvaluation, hoist
from fax.primitives._jaxpr import Atom
from fax.primitives._mask import either
from fax.primitives._round import (
    PLACED,
    SERVER,
    Contribution,
    Round,
    expand,
    federated_map_p,
    pick,
)


def partial_eval(trace: Any, *tracers: Any, **params: Any) -> list[Any]:
    """The rule that `jax.linearize` and `jax.grad` use."""
    this = Round.of(params)
    unknown = [not tracer.is_known() for tracer in tracers]
    known = [not u for u in unknown]
    operands = [tracer.pval.get_known() for tracer in pick(known, tracers)]
    if all(known):
        return this.bind(*operands)
    halves = _evaluate_client(this, unknown)
    unknown_out = halves.unknown_out[: len(this.outputs)]
    if not all(i.tangent for i in pick(unknown, this.inputs)):
        return _without_residuals(trace, this, tracers, unknown_out)

    # The rest takes residuals first, and computes the masks again.
    inner = halves.rest.jaxpr
    masks = inner.outvars[len(inner.outvars) - this.mask_count :]
    outvars = [*expand(unknown_out, inner.outvars), *masks]
    inputs = [PLACED] * len(halves.forwarded) + pick(unknown, this.inputs)
    parts = pick(unknown_out, this.contributions(outvars))
    rest, used = this.assemble(inputs, inner.invars, parts, inner.eqns).keep([True] * len(parts))
    used_unknown = used[len(halves.forwarded) :]
    computed = [u and f is None for u, f in zip(used, halves.forwarded, strict=False)]

    # The known part returns outputs, then the residuals that the rest uses and are not inputs.
    known_round, known_masks, residuals = _known_round(this, halves, unknown)
    mask, extra = either(
        [o.mask is not None and known_masks[o.mask] for o in pick(unknown_out, this.outputs)]
    )
    residuals = pick(computed, expand((f is None for f in halves.forwarded), residuals))
    parts = known_round.contributions()
    values = len(parts)
    for residual in residuals:
        # One that a policy of `jax.checkpoint` offloads is where nothing can be computed.
        parts.append(Contribution(residual, "placed", mask if on_device(residual.aval) else None))
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
    return [next(later_outs if u else known_outs) for u in unknown_out]


def _without_residuals(
    trace: Any, this: Round, tracers: Sequence[Any], unknown_out: Sequence[bool]
) -> list[Any]:
    """Evaluates what is known without residuals, and leaves the rest for later.

    Not everything that is unknown is a tangent, so this is not differentiation. A scan over rounds
    does it to find out what it could compute before it starts. Intermediate values of many
    participants are not worth storing through all of the rounds.
    """
    if this.jaxpr.effects or all(unknown_out):
        unknown_out, known_outs = [True] * len(unknown_out), iter(())  # effects happen once
    else:
        known, used = this.keep([not u for u in unknown_out])
        known_outs = iter(known.bind(*(t.pval.get_known() for t in pick(used, tracers))))
    rest, used = this.keep(unknown_out)
    operands = [
        trace.new_instantiated_const(t.pval.get_known()) if t.is_known() else t
        for t in pick(used, tracers)
    ]
    rest_outs = iter(trace.default_process_primitive(federated_map_p, operands, rest.params))
    return [next(rest_outs if u else known_outs) for u in unknown_out]


def partial_eval_custom(
    saveable: Any, unknown: Sequence[bool], instantiated: Sequence[bool], eqn: JaxprEqn
) -> tuple[JaxprEqn | None, JaxprEqn, list[bool], list[bool], list[Var]]:
    """The rule for `jax.checkpoint`: nothing of the round is saved, and the rest recomputes it."""
    del saveable
    this = Round.of(eqn.params)
    halves = _evaluate_client(this, unknown)
    unknown_out = halves.unknown_out[: len(eqn.outvars)]
    known_eqn = None
    if halves.consts:
        unknown_out = [True] * len(unknown_out)  # an equation cannot hold them
    elif not all(unknown_out):
        known, *_ = _known_round(this, halves, unknown)
        known, used = known.keep([True] * unknown_out.count(False))
        known_eqn = eqn.replace(
            invars=pick(used, pick((not u for u in unknown), eqn.invars)),
            outvars=pick((not u for u in unknown_out), eqn.outvars),
            params=known.params,
            effects=known.jaxpr.effects,
        )
    missing = _jaxpr.variables(pick((not i for i in instantiated), eqn.invars))
    return known_eqn, eqn, unknown_out, [True] * len(unknown_out), missing


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


def _in_parts(items: Sequence[Any], *sizes: int) -> list[Any]:
    """Consecutive parts of the given sizes, and the remaining items."""
    parts = []
    for size in sizes:
        parts.append(items[:size])
        items = items[size:]
    return [*parts, items]
