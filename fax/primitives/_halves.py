"""Splits a jaxpr into two halves: what depends only on some of its inputs, and the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jax.extend import linear_util as lu
from jax.extend.core import ClosedJaxpr, Var, jaxpr_as_fun
from jax.interpreters import partial_eval as pe

from fax.primitives import _jaxpr
from fax.primitives._round import pick


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
    known = _fixed_variables(jaxpr, own)
    if not known.issuperset(_jaxpr.variables(pick(moved, jaxpr.jaxpr.outvars))):
        flat, consts = _jaxpr.inline_jit(jaxpr, lambda eqn: not known.issuperset(eqn.outvars))
        if not consts:
            jaxpr, known = flat, _fixed_variables(flat, own)
    outvars = jaxpr.jaxpr.outvars
    moved = [
        m and (not isinstance(atom, Var) or atom in known)
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
    known = set(inputs)
    for eqn in jaxpr.jaxpr.eqns:
        if not eqn.effects and known.issuperset(_jaxpr.variables(eqn.invars)):
            known.update(eqn.outvars)
    return known
