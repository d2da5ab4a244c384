"""Tools for jaxprs: trace, evaluate, search, rewrite, prune and splice them.

The jaxprs in the parameters of fax's primitives are closed and have no constants: what a function
closes over becomes leading inputs, so arrays and tracers of an outer transformation are treated
alike. Nothing here depends on placements.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import jax
from jax.api_util import debug_info
from jax.core import ShapedArray, eval_jaxpr
from jax.extend import linear_util as lu
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var, jaxprs_in_params
from jax.extend.core.primitives import jit_p, remat_p
from jax.interpreters import partial_eval as pe

from fax import _compat

Atom: TypeAlias = Any  # a Var or a Literal
AnyJaxpr = TypeVar("AnyJaxpr", bound=ClosedJaxpr | Jaxpr)


def trace(
    fn: Callable, avals: Iterable[ShapedArray], about: Any = None
) -> tuple[ClosedJaxpr, list[Any]]:
    """The jaxpr of a flat function, and the arrays or tracers that it closes over.

    The latter are its leading inputs. Unlike `jax.make_jaxpr`, this keeps all of an input's type
    and lets a function close over tracers. Error messages name ``about``, the user's function.
    """
    info = _OF_FAX if about is None else debug_info("fax", about, (), {}).with_unknown_names()
    flat = lu.wrap_init(fn, debug_info=info)
    jaxpr, _, consts = pe.trace_to_jaxpr_dynamic(flat, list(avals))
    return close(jaxpr), list(consts)


# It takes JAX longer to look at a function's signature than to trace a few operations.
_OF_FAX = debug_info("fax", lambda: None, (), {}).with_unknown_names()


def cached(fn: Callable) -> Callable:
    """Caches what a function traces, which also depends on the mesh in scope."""
    remembered = functools.lru_cache(lambda mesh, *args: fn(*args))

    @functools.wraps(fn)
    def traced(*args):
        return remembered(jax.sharding.get_abstract_mesh(), *args)

    return traced


@cached
def empty() -> ClosedJaxpr:
    """A jaxpr without inputs, equations or outputs, to start from."""
    return trace(list, [])[0]  # of `list`, which returns an empty list without arguments


def close(jaxpr: Jaxpr) -> ClosedJaxpr:
    """Makes constants the leading inputs."""
    invars = [*jaxpr.constvars, *jaxpr.invars]
    return ClosedJaxpr(jaxpr.replace(constvars=[], invars=invars), [])


def rebuild(
    like: ClosedJaxpr, invars: Iterable[Var], outvars: Iterable[Atom], eqns: Iterable[JaxprEqn]
) -> ClosedJaxpr:
    """A jaxpr with other equations, and with the debugging information of ``like``."""
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

    Under `jax.debug_nans`, if a call of `jax.jit` returns NaN, this evaluates its body step by
    step, so that the error names an operation.
    """
    try:
        return eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *operands)
    except Exception as error:
        if not _compat.is_invalid_result_of_jit(error):
            raise
    return evaluate_in_steps(jaxpr, *operands)


def evaluate_in_steps(jaxpr: ClosedJaxpr, *operands: Any, plain: bool = False) -> list[Any]:
    """The outputs of a jaxpr, one equation at a time, for errors of `jax.debug_nans`.

    ``plain`` ignores custom rules for differentiation, in which JAX does not look for NaN and jet
    fails. This is correct if nothing will be differentiated by them.
    """

    def step(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
        inner = called(eqn)
        if inner is None or eqn.primitive is jit_p or not plain:
            try:
                return bind(eqn, values)
            except Exception as error:
                if inner is None or not _compat.is_invalid_result_of_jit(error):
                    raise
        return evaluate_in_steps(inner, *values, plain=plain)

    return interpret(jaxpr, operands, step)


def interpret(
    jaxpr: ClosedJaxpr,
    operands: Iterable[Any],
    step: Callable[[JaxprEqn, list[Any]], Iterable[Any]],
    constant: Callable[[Any], Any] = lambda value: value,
) -> list[Any]:
    """The outputs of a jaxpr, if ``step`` evaluates its equations.

    Args:
      jaxpr: the jaxpr.
      operands: values of any kind.
      step: takes an equation and its operands, and returns its results.
      constant: converts a constant or the value of a literal to an operand.
    """
    inner = jaxpr.jaxpr
    env: dict[Var, Any] = dict(zip(inner.constvars, map(constant, jaxpr.consts), strict=True))
    env.update(zip(inner.invars, operands, strict=True))

    def read(atom: Atom) -> Any:
        return env[atom] if isinstance(atom, Var) else constant(atom.val)

    for eqn in inner.eqns:
        env.update(zip(eqn.outvars, step(eqn, list(map(read, eqn.invars))), strict=True))
    return list(map(read, inner.outvars))


def bind(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluates an equation, in its context, on other values."""
    own = {a: x for a, x in zip(eqn.invars, values, strict=True) if isinstance(a, Var)}
    return eval_jaxpr(rebuild(empty(), own, eqn.outvars, [eqn]).jaxpr, [], *own.values())


def called(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """The jaxpr that an equation calls, if it does nothing else."""
    if eqn.primitive is remat_p:
        return ClosedJaxpr(eqn.params["jaxpr"], [])
    name = _compat.CALLS.get(eqn.primitive)
    return None if name is None else eqn.params[name]


def opened(jaxpr: ClosedJaxpr | Jaxpr) -> Jaxpr:
    """The jaxpr without its constants."""
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def any_equation(
    jaxpr: ClosedJaxpr | Jaxpr,
    test: Callable[[JaxprEqn], bool],
    inside: Callable[[JaxprEqn], bool] = lambda eqn: True,
) -> bool:
    """Whether an equation passes a test, at any depth. ``inside`` says where to look."""
    return any(
        test(eqn) or (inside(eqn) and any_inside(eqn, test, inside)) for eqn in opened(jaxpr).eqns
    )


def any_inside(
    eqn: JaxprEqn,
    test: Callable[[JaxprEqn], bool],
    inside: Callable[[JaxprEqn], bool] = lambda eqn: True,
) -> bool:
    """Whether an equation in the jaxprs of an equation passes a test."""
    return any(any_equation(jaxpr, test, inside) for jaxpr in jaxprs_in_params(eqn.params))


def map_leaves(fn: Callable[[Any], Any], param: Any) -> Any:
    """An equation's parameter with a function applied to the items of its tuples and lists."""
    if type(param) in (tuple, list):
        return type(param)(map_leaves(fn, x) for x in param)
    if isinstance(param, tuple) and hasattr(param, "_fields"):
        return type(param)(*(map_leaves(fn, x) for x in param))
    return fn(param)


def map_jaxprs(fn: Callable[[Any], Any], eqn: JaxprEqn) -> JaxprEqn:
    """An equation with a function applied to the jaxprs in its parameters."""

    def apply(leaf: Any) -> Any:
        return fn(leaf) if isinstance(leaf, ClosedJaxpr | Jaxpr) else leaf

    return eqn.replace(params={name: map_leaves(apply, x) for name, x in eqn.params.items()})


# Replaces an equation: another one with the same results, or equations and their results.
Replacement = JaxprEqn | tuple[list[JaxprEqn], Sequence[Atom]]


def rewrite(
    jaxpr: AnyJaxpr,
    replace: Callable[[JaxprEqn], Replacement],
    renew: Callable[[Atom], Atom] = lambda atom: atom,
) -> AnyJaxpr:
    """A jaxpr with its equations replaced.

    Args:
      jaxpr: the jaxpr. Its constants do not change.
      replace: takes an equation, in the new variables.
      renew: makes a new variable for a variable, and a new literal for a literal.
    """
    old = opened(jaxpr)
    env: dict[Var, Atom] = {v: renew(v) for v in (*old.constvars, *old.invars)}
    constvars, invars = [env[v] for v in old.constvars], [env[v] for v in old.invars]
    eqns, outvars = _rewritten(old, env, replace, renew)
    made = old.replace(constvars=constvars, invars=invars, outvars=outvars, eqns=eqns)
    # Newer versions of JAX have one class for both, and `replace` drops the constants.
    closed = isinstance(jaxpr, ClosedJaxpr)
    return cast(AnyJaxpr, ClosedJaxpr(made, jaxpr.consts) if closed else made)


def _rewritten(
    jaxpr: Jaxpr,
    env: dict[Var, Atom],
    replace: Callable[[JaxprEqn], Replacement],
    renew: Callable[[Atom], Atom],
) -> tuple[list[JaxprEqn], list[Atom]]:
    """The new equations and outputs of a jaxpr. ``env`` has the atoms that replace its inputs."""

    def read(atom: Atom) -> Atom:
        return env[atom] if isinstance(atom, Var) else renew(atom)

    eqns: list[JaxprEqn] = []
    for eqn in jaxpr.eqns:
        env.update((var, renew(var)) for var in eqn.outvars)
        outvars = [env[var] for var in eqn.outvars]
        new = replace(eqn.replace(invars=list(map(read, eqn.invars)), outvars=outvars))
        if isinstance(new, JaxprEqn):
            eqns.append(new)
        else:
            eqns += new[0]
            env.update(zip(eqn.outvars, new[1], strict=True))
    return eqns, list(map(read, jaxpr.outvars))


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

    The time is proportional to the number of equations in all parts. Effects are in the first.
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


def splice(jaxpr: ClosedJaxpr, operands: Sequence[Atom]) -> tuple[list[JaxprEqn], list[Atom]]:
    """The equations of a jaxpr without constants on other operands, for use in another jaxpr.

    Returns the equations, in new variables, and the atoms of the outputs.
    """
    env = dict(zip(jaxpr.jaxpr.invars, operands, strict=True))
    return _rewritten(
        jaxpr.jaxpr,
        env,
        replace=lambda eqn: eqn,
        renew=lambda atom: Var(atom.aval) if isinstance(atom, Var) else atom,
    )


def renamed(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """The same jaxpr in new variables."""
    invars = [Var(var.aval) for var in jaxpr.jaxpr.invars]
    eqns, outvars = splice(jaxpr, invars)
    return rebuild(jaxpr, invars, outvars, eqns)


def inline_jit(
    jaxpr: ClosedJaxpr, wanted: Callable[[JaxprEqn], bool]
) -> tuple[ClosedJaxpr, list[Any]]:
    """Inlines the wanted calls of `jax.jit`, and those inside them.

    Returns the jaxpr and the constants of the calls, its new leading inputs.
    """
    consts: list[tuple[Var, Any]] = []

    def is_wanted(eqn: JaxprEqn) -> bool:
        return eqn.primitive is jit_p and wanted(eqn)

    def replace(eqn: JaxprEqn) -> Replacement:
        if not is_wanted(eqn):
            return eqn
        called = eqn.params["jaxpr"]
        inner, values = inline_jit(close(called.jaxpr), wanted)
        leading = [Var(v.aval) for v in inner.jaxpr.invars[: len(values) + len(called.consts)]]
        consts.extend(zip(leading[len(values) :], called.consts, strict=True))
        consts.extend(zip(leading, values, strict=False))
        return splice(inner, [*leading, *eqn.invars])

    if not any(map(is_wanted, jaxpr.jaxpr.eqns)):
        return jaxpr, []
    flat = rewrite(jaxpr, replace).jaxpr
    invars = [*(var for var, _ in consts), *flat.invars]
    return rebuild(jaxpr, invars, flat.outvars, flat.eqns), [value for _, value in consts]


def touched(jaxpr: ClosedJaxpr, inputs: Iterable[Var]) -> set[Var]:
    """The variables that depend on some of the inputs. Calls count as a whole."""
    reached = set(inputs)
    for eqn in jaxpr.jaxpr.eqns:
        if not reached.isdisjoint(variables(eqn.invars)):
            reached.update(eqn.outvars)
    return reached
