"""One map that does the work of two, the second fed by the first."""

from __future__ import annotations

from collections.abc import Sequence

from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var
from jax.extend.core.primitives import remat_p

from fax.primitives import _jaxpr
from fax.primitives._convolutions import has_convolutions
from fax.primitives._cut import depends, either
from fax.primitives._jaxpr import Atom
from fax.primitives._round import Contribution, Round, select
from fax.sharding._schedule import ALL_AT_ONCE


def compose(first: JaxprEqn, second: JaxprEqn) -> JaxprEqn | None:
    """Composes two maps, the results of both kept, or returns None if they do not fit.

    They have to be over the same placement, with the same batch size and the same setting for
    convolutions, if both have any, and the second one must take the first one's results as
    rows, not all of them at once as a server value.
    """
    a, b = Round.of(first.params), Round.of(second.params)
    batch_sizes = {a.batch_size, b.batch_size} - {ALL_AT_ONCE}
    convolutions = _setting(a, b)
    if a.group != b.group or len(batch_sizes) > 1 or convolutions is None:
        return None

    invars, operands, inputs = list(a.jaxpr.jaxpr.invars), list(first.invars), list(a.inputs)
    eqns, parts = list(a.jaxpr.jaxpr.eqns), a.contributions()
    made = dict(zip(first.outvars, parts, strict=True))
    seen = dict(zip(zip(map(id, operands), inputs, strict=True), invars, strict=True))
    args: list[Atom] = []
    for atom, mine, aval in zip(second.invars, b.inputs, b.jaxpr.in_avals, strict=True):
        part = made.get(atom) if isinstance(atom, Var) else None
        if part is not None:
            if mine.mode != "placed" or part.mode != "placed":
                return None
            extra, value = _rows_of(part)
            eqns += extra
            args.append(value)
            continue
        if (id(atom), mine) not in seen:
            seen[id(atom), mine] = Var(aval)
            invars.append(seen[id(atom), mine])
            operands.append(atom)
            inputs.append(mine)
        args.append(seen[id(atom), mine])

    host = _host(eqns, args, invars) if b.batch_size == ALL_AT_ONCE else None
    if host is None:
        extra, results, _ = _jaxpr.splice(b.jaxpr, args)
        eqns += extra
    else:
        eqns[host], results = _inside(eqns[host], b.jaxpr, args)

    batch_size = batch_sizes.pop() if batch_sizes else ALL_AT_ONCE
    mask, extra = _silent(b, [made.get(x) if isinstance(x, Var) else None for x in second.invars])
    eqns += extra
    parts += [
        part._replace(mask=mask) if mask is not None and part.mask is None else part
        for part in b.contributions(results)
    ]
    like = a.replace(batch_size=batch_size, convolutions=convolutions)
    both = like.assemble(inputs, invars, parts, eqns)
    return second.replace(
        invars=operands,
        outvars=[*first.outvars, *second.outvars],
        params=both.params,
        effects=both.jaxpr.effects,
    )


def _setting(a: Round, b: Round) -> str | None:
    """How two maps compute their convolutions, or None if they differ in it."""
    if a.convolutions == b.convolutions or not has_convolutions(b.jaxpr):
        return a.convolutions
    return None if has_convolutions(a.jaxpr) else b.convolutions


def _silent(
    this: Round, sources: Sequence[Contribution | None]
) -> tuple[Atom | None, list[JaxprEqn]]:
    """A mask for the results of a map that is linear in tangents which are all masked.

    Where these are zero so are its results, be its derivatives infinite.
    """
    tangents = [i.tangent for i in this.inputs]
    masks = [
        None if source is None else source.mask
        for source, tangent in zip(sources, tangents, strict=True)
        if tangent
    ]
    outputs = len(this.outputs)
    if not masks or None in masks or not all(depends(this.jaxpr, tangents)[:outputs]):
        return None, []
    return either(masks)


def _rows_of(part: Contribution) -> tuple[list[JaxprEqn], Atom]:
    """A participant's row of a placed output, with the equations that make it."""
    if part.mask is None:
        return [], part.value
    masked = _masked(part.mask.aval, part.value.aval)
    eqns, (value,), _ = _jaxpr.splice(masked, [part.mask, part.value])
    return eqns, value


def _host(eqns: Sequence[JaxprEqn], args: Sequence[Atom], invars: Sequence[Var]) -> int | None:
    """The one `jax.checkpoint` that makes all the args which are not inputs, if there is one.

    The product of a weighted mean belongs inside: outside, the gradient with respect to the
    weights would have to store every participant's update.
    """
    made = set(_jaxpr.variables(args)).difference(invars)
    for i, eqn in enumerate(eqns):
        if eqn.primitive is remat_p and made and made.issubset(eqn.outvars):
            return i
    return None


def _inside(host: JaxprEqn, tail: ClosedJaxpr, args: Sequence[Atom]) -> tuple[JaxprEqn, list[Atom]]:
    """Extends a checkpoint by a jaxpr that works on its results. Returns that jaxpr's results."""
    inner = host.params["jaxpr"]
    pairs = [
        *zip(host.invars, inner.invars, strict=True),
        *zip(host.outvars, inner.outvars, strict=True),
    ]
    env: dict[Var, Atom] = {there: here for there, here in pairs if isinstance(there, Var)}
    new = [var for var in dict.fromkeys(_jaxpr.variables(args)) if var not in env]
    env.update((var, Var(var.aval)) for var in new)
    operands = [env[atom] if isinstance(atom, Var) else atom for atom in args]
    eqns, outs, _ = _jaxpr.splice(tail, operands)
    invars = [*inner.invars, *(env[var] for var in new)]
    outvars, eqns = [*inner.outvars, *outs], [*inner.eqns, *eqns]
    extended = _jaxpr.rebuild(ClosedJaxpr(inner, []), invars, outvars, eqns)
    results: list[Atom] = [Var(out.aval) for out in outs]
    params = dict(host.params, jaxpr=extended.jaxpr)
    if isinstance(params["prevent_cse"], tuple):
        params["prevent_cse"] += (True,) * len(new)
    return host.replace(
        invars=[*host.invars, *new], outvars=[*host.outvars, *results], params=params
    ), results


@_jaxpr.cached
def _masked(mask: ShapedArray, value: ShapedArray) -> ClosedJaxpr:
    return _jaxpr.trace(lambda mask, value: [select(mask, value)], [mask, value])[0]
