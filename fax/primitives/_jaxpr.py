"""Tools to trace, rebuild, prune and splice the jaxprs that fax's primitives carry.

All of these jaxprs are closed and hold no constants: what a function closes over becomes
leading inputs, so that arrays and tracers of an outer transformation are treated alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
from jax.api_util import debug_info
from jax.core import ShapedArray, eval_jaxpr
from jax.extend import linear_util as lu
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var, jaxprs_in_params
from jax.extend.core.primitives import custom_jvp_call_p, custom_vjp_call_p, jit_p, remat_p
from jax.interpreters import partial_eval as pe

from fax import _compat

Atom: TypeAlias = Any  # a Var or a Literal

# What only calls a jaxpr where nothing is differentiated, and the parameter that it is in.
CALLS = {jit_p: "jaxpr", custom_jvp_call_p: "call_jaxpr", custom_vjp_call_p: "call_jaxpr"}


def trace(
    fn: Callable, avals: Iterable[ShapedArray], about: Any = None
) -> tuple[ClosedJaxpr, list[Any]]:
    """The jaxpr of a flat function, and the arrays or tracers that it closes over.

    The latter are its leading inputs. Unlike `jax.make_jaxpr` this keeps every part of an
    input's type and lets a function close over tracers. Error messages name ``about``.
    """
    info = debug_info("fax", about or fn, (), {}).with_unknown_names()
    flat = lu.wrap_init(fn, debug_info=info)
    jaxpr, _, consts = pe.trace_to_jaxpr_dynamic(flat, list(avals))
    return close(jaxpr), list(consts)


def cached(fn: Callable) -> Callable:
    """Remembers what a function traces, which depends on the mesh in scope, too."""
    remembered = functools.lru_cache(lambda mesh, *args: fn(*args))

    @functools.wraps(fn)
    def traced(*args):
        return remembered(jax.sharding.get_abstract_mesh(), *args)

    return traced


def close(jaxpr: Jaxpr) -> ClosedJaxpr:
    """Makes constants the leading inputs."""
    invars = [*jaxpr.constvars, *jaxpr.invars]
    return ClosedJaxpr(jaxpr.replace(constvars=[], invars=invars), [])


def rebuild(
    like: ClosedJaxpr, invars: Iterable[Var], outvars: Iterable[Atom], eqns: Iterable[JaxprEqn]
) -> ClosedJaxpr:
    """A jaxpr of other equations that keeps the debugging facts of ``like``."""
    eqns = list(eqns)
    jaxpr = like.jaxpr.replace(
        constvars=[],
        invars=list(invars),
        outvars=list(outvars),
        eqns=eqns,
        effects=set().union(*(eqn.effects for eqn in eqns)),
        debug_info=like.jaxpr.debug_info.with_unknown_names(),
    )
    return ClosedJaxpr(jaxpr, [])


def evaluate(jaxpr: ClosedJaxpr, *operands: Any) -> list[Any]:
    """The outputs of a jaxpr.

    Under `jax.debug_nans` a call of `jax.jit` that gives NaN is looked into, so that the error
    names an operation.
    """
    try:
        return eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *operands)
    except Exception as error:
        if not _compat.is_invalid_result_of_jit(error):
            raise
    return evaluate_in_steps(jaxpr, *operands)


def evaluate_in_steps(jaxpr: ClosedJaxpr, *operands: Any, plain: bool = False) -> list[Any]:
    """The outputs of a jaxpr, one equation after the other, for errors of `jax.debug_nans`.

    ``plain`` leaves out rules for differentiation, where JAX does not look for NaN and jet fails.
    That is right where nothing is left to be differentiated by them.
    """
    env: dict[Atom, Any] = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    env.update(zip(jaxpr.jaxpr.invars, operands, strict=True))

    def read(atom: Atom) -> Any:
        return env[atom] if isinstance(atom, Var) else atom.val

    for eqn in jaxpr.jaxpr.eqns:
        values, called = list(map(read, eqn.invars)), _called(eqn)
        outs = None
        if called is None or eqn.primitive is jit_p or not plain:
            try:
                outs = bind(eqn, values)
            except Exception as error:
                if called is None or not _compat.is_invalid_result_of_jit(error):
                    raise
        if outs is None:
            assert called is not None
            outs = evaluate_in_steps(called, *values, plain=plain)
        env.update(zip(eqn.outvars, outs, strict=True))
    return list(map(read, jaxpr.jaxpr.outvars))


def bind(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluates an equation, in its context, on other values."""
    own = {a: x for a, x in zip(eqn.invars, values, strict=True) if isinstance(a, Var)}
    nothing, _ = trace(list, [])
    return eval_jaxpr(rebuild(nothing, own, eqn.outvars, [eqn]).jaxpr, [], *own.values())


def _called(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """What an equation calls, if it does nothing else."""
    if eqn.primitive is remat_p:
        return ClosedJaxpr(eqn.params["jaxpr"], [])
    return eqn.params[CALLS[eqn.primitive]] if eqn.primitive in CALLS else None


def inner(eqn: JaxprEqn) -> list[Jaxpr]:
    """The jaxprs in an equation's parameters."""
    return list(jaxprs_in_params(eqn.params))


def prune(
    jaxpr: ClosedJaxpr, outputs: Sequence[bool], keep_inputs: bool = False
) -> tuple[ClosedJaxpr, list[bool]]:
    """Keeps some outputs, with the inputs and equations that they (or effects) need."""
    pruned, used = pe.dce_jaxpr(jaxpr.jaxpr, list(outputs), keep_inputs)
    return close(pruned), used


def parts(
    jaxpr: ClosedJaxpr, groups: Iterable[Sequence[int]]
) -> list[tuple[ClosedJaxpr, list[int]]]:
    """For each group of outputs, the jaxpr that computes them and the inputs that it takes.

    It takes no longer than to go through the equations of all parts. Effects are in the first.
    """
    inner = jaxpr.jaxpr
    makers = {var: i for i, eqn in enumerate(inner.eqns) for var in eqn.outvars}
    inputs = {var: i for i, var in enumerate(inner.invars)}
    first = [i for i, eqn in enumerate(inner.eqns) if eqn.effects]
    found = []
    for outputs in groups:
        outvars = [inner.outvars[k] for k in outputs]
        chosen, used = set(first), set()
        wanted = variables([*outvars, *(atom for i in first for atom in inner.eqns[i].invars)])
        while wanted:
            var = wanted.pop()
            if var in inputs:
                used.add(inputs[var])
            elif makers[var] not in chosen:
                chosen.add(makers[var])
                wanted += variables(inner.eqns[makers[var]].invars)
        invars = [inner.invars[i] for i in sorted(used)]
        part = rebuild(jaxpr, invars, outvars, [inner.eqns[i] for i in sorted(chosen)])
        part, needed = prune(part, [True] * len(outvars))
        found.append((part, [i for i, need in zip(sorted(used), needed, strict=True) if need]))
        first = []
    return found


def variables(atoms: Iterable[Atom]) -> list[Var]:
    """The atoms that are not literals."""
    return [atom for atom in atoms if isinstance(atom, Var)]


def splice(
    jaxpr: ClosedJaxpr, operands: Sequence[Atom]
) -> tuple[list[JaxprEqn], list[Atom], list[tuple[Var, Any]]]:
    """The equations of a jaxpr on other operands, for use in another jaxpr.

    Returns them, the atoms that hold its outputs, and its constants.
    """
    inner = jaxpr.jaxpr
    consts = [(Var(v.aval), c) for v, c in zip(inner.constvars, jaxpr.consts, strict=True)]
    env: dict[Var, Atom] = dict(zip(inner.constvars, (v for v, _ in consts), strict=True))
    env.update(zip(inner.invars, operands, strict=True))

    def read(atom: Atom) -> Atom:
        return env[atom] if isinstance(atom, Var) else atom

    eqns = []
    for eqn in inner.eqns:
        env.update((var, Var(var.aval)) for var in eqn.outvars)
        eqns.append(
            eqn.replace(invars=list(map(read, eqn.invars)), outvars=list(map(read, eqn.outvars)))
        )
    return eqns, list(map(read, inner.outvars)), consts


def renamed(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """The same jaxpr in variables of its own."""
    invars = [Var(var.aval) for var in jaxpr.jaxpr.invars]
    eqns, outvars, _ = splice(jaxpr, invars)
    return rebuild(jaxpr, invars, outvars, eqns)


def inline_jit(
    jaxpr: ClosedJaxpr, wanted: Callable[[JaxprEqn], bool]
) -> tuple[ClosedJaxpr, list[Any]]:
    """Replaces the wanted `jax.jit` calls by what they call, and theirs in turn.

    Returns the jaxpr and the constants of the calls, its new leading inputs.
    """
    consts: list[tuple[Var, Any]] = []
    env: dict[Var, Atom] = {}

    def read(atom: Atom) -> Atom:
        return env.get(atom, atom) if isinstance(atom, Var) else atom

    def flatten(eqns: Iterable[JaxprEqn]) -> list[JaxprEqn]:
        flat = []
        for eqn in eqns:
            eqn = eqn.replace(invars=list(map(read, eqn.invars)))
            if eqn.primitive is jit_p and wanted(eqn):
                inner, outs, captured = splice(eqn.params["jaxpr"], eqn.invars)
                consts.extend(captured)
                flat.extend(flatten(inner))
                env.update(zip(eqn.outvars, map(read, outs), strict=True))
            else:
                flat.append(eqn)
        return flat

    if not any(eqn.primitive is jit_p and wanted(eqn) for eqn in jaxpr.jaxpr.eqns):
        return jaxpr, []
    eqns = flatten(jaxpr.jaxpr.eqns)
    invars = [*(var for var, _ in consts), *jaxpr.jaxpr.invars]
    flat = rebuild(jaxpr, invars, map(read, jaxpr.jaxpr.outvars), eqns)
    return flat, [value for _, value in consts]


def touched(jaxpr: ClosedJaxpr, inputs: Iterable[Var]) -> set[Var]:
    """The variables that are computed from some of the inputs. Calls count as a whole."""
    reached = set(inputs)
    for eqn in jaxpr.jaxpr.eqns:
        if not reached.isdisjoint(variables(eqn.invars)):
            reached.update(eqn.outvars)
    return reached
