"""Sums that are in flight while replicas take steps: nothing uses them before these steps end.

A compiler overlaps a sum over replicas with the steps that follow if nothing needs the sum before
they end. But compilers move what follows a sum, such as the division that makes a mean of it, to an
early place, and merge it with other operations there. Then the sum is received before the steps.
They also merge a small sum with a later one, and then it is sent after the steps. So what follows
the sums is computed after the steps, and a barrier keeps it there.

If several fragments are in flight at once, nothing is received between sending one and the next.
Then compilers merge what both need before they are sent, such as the largest number of each leaf,
and all are sent late. So a barrier before the next steps also waits for what is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var

from fax.primitives import _jaxpr
from fax.primitives._collect import collect_p
from fax.primitives._reduce import max_p, mean_p, min_p, sum_p
from fax.primitives._round import PLACED, Round, federated_map_p

PyTree = Any
# The last one is for what gathers in a `jax.shard_map` of its own.
_CROSSING = (collect_p, max_p, mean_p, min_p, sum_p, lax.all_gather_p)


class Event(NamedTuple):
    """After ``step`` steps of a period, some fragments are sent, and then others land."""

    step: int
    sent: list[int]
    landing: list[int]


def events_of(steps: int, fragments: int, tau: int) -> list[Event]:
    """The events of a period of ``steps`` steps, in order. The last is at its end.

    What is sent in a period lands in it, so that nothing is in flight where a program may end.
    """
    gap = -(-steps // fragments)
    if tau <= gap:
        landing = [p * steps // fragments + gap for p in range(fragments)]
    else:  # There are several fragments. The first is sent after a step, the last lands at the end.
        landing = [p * (steps - tau - 1) // (fragments - 1) + tau + 1 for p in range(fragments)]
    sent = [at - tau for at in landing]
    return [
        Event(step, *([p for p, at in enumerate(times) if at == step] for times in (sent, landing)))
        for step in sorted({*sent, *landing})
    ]


class Sending(NamedTuple):
    """A computation that has been done up to its last reductions.

    Attributes:
      sums: the results of these reductions that the rest needs.
      others: what else the rest needs.
      rest: from sums and others to the leaves of the result.
      treedef: of the result.
    """

    sums: list[jax.Array]
    others: list[jax.Array]
    rest: ClosedJaxpr
    treedef: Any

    def result(self) -> PyTree:
        leaves = _jaxpr.evaluate(self.rest, *self.sums, *self.others)
        return jax.tree.unflatten(self.treedef, leaves)


def send(fn: Callable[..., PyTree], *args: Any, before: PyTree = None) -> tuple[Sending, PyTree]:
    """Evaluates a function up to its last reductions over replicas. Call it in a program.

    Args:
      fn: the function.
      *args: its arguments.
      before: what is sent is computed from it, and so is what comes next. What uses the returned
        ``before`` waits until everything that is sent is known, but not for its sum. None: nothing
        waits.

    Returns:
      What is in flight, and ``before``.
    """
    treedef = None

    def flat() -> list[Any]:
        nonlocal treedef
        leaves, treedef = jax.tree.flatten(fn(*args))
        return leaves

    jaxpr, operands = _jaxpr.trace(flat, ())
    start, rest, count = _split(jaxpr)
    if before is not None:
        own = {id(leaf) for leaf in jax.tree.leaves(before)}
        inputs = [var for var, x in zip(jaxpr.jaxpr.invars, operands) if id(x) in own]
        known, start, held = _before_last(start, inputs)
        operands = _jaxpr.evaluate(known, *operands)
        operands[:held], before = lax.optimization_barrier((operands[:held], before))
    values = _jaxpr.evaluate(start, *operands)
    return Sending(values[:count], values[count:], rest, treedef), before


def receive(sending: Sequence[Sending], after: PyTree) -> tuple[list[PyTree], PyTree]:
    """The results of what was sent, computed after ``after``, which is returned, too.

    What uses the returned ``after`` waits for the sums, too. So a later sum that depends on it
    cannot be merged with these.
    """
    sums, after = lax.optimization_barrier(([each.sums for each in sending], after))
    return [each._replace(sums=own).result() for each, own in zip(sending, sums)], after


def _split(jaxpr: ClosedJaxpr) -> tuple[ClosedJaxpr, ClosedJaxpr, int]:
    """A jaxpr in two: up to its last reductions, and what waits for their results.

    The first part returns the inputs of the second. The number says how many of these, the first
    ones, are results of reductions.
    """
    eqns = jaxpr.jaxpr.eqns
    crossing = [_crosses(eqn) for eqn in eqns]
    needed: set[Var] = set()  # by something that is sent
    for eqn, crosses in zip(reversed(eqns), reversed(crossing)):
        if crosses or not needed.isdisjoint(eqn.outvars):
            needed.update(eqn.outvars, _jaxpr.variables(eqn.invars))
    sums: set[Var] = set()
    late: set[Var] = set()
    rest: list[JaxprEqn] = []
    for eqn, crosses in zip(eqns, crossing):
        inputs = _jaxpr.variables(eqn.invars)
        if crosses:
            sums.update(eqn.outvars)
        if needed.isdisjoint(eqn.outvars) and not (sums | late).isdisjoint(inputs):
            late.update(eqn.outvars)
            rest.append(eqn)
    return _in_two(jaxpr, rest, sums)


def _before_last(jaxpr: ClosedJaxpr, inputs: Sequence[Var]) -> tuple[ClosedJaxpr, ClosedJaxpr, int]:
    """A jaxpr in two: what is done before its last reductions, and these.

    The first part returns the inputs of the second. The number says how many of these, the first
    ones, are reduced and depend on some inputs of the jaxpr.
    """
    needed: set[Var] = set()  # by another reduction
    last: list[JaxprEqn] = []
    for eqn in reversed(jaxpr.jaxpr.eqns):
        crosses, used = _crosses(eqn), not needed.isdisjoint(eqn.outvars)
        if crosses and not used:
            last.insert(0, eqn)
        if crosses or used:
            needed.update(_jaxpr.variables(eqn.invars))
    reduced = _jaxpr.variables(atom for eqn in last for atom in eqn.invars)
    return _in_two(jaxpr, last, _jaxpr.touched(jaxpr, inputs).intersection(reduced))


def _in_two(
    jaxpr: ClosedJaxpr, second: list[JaxprEqn], first: set[Var]
) -> tuple[ClosedJaxpr, ClosedJaxpr, int]:
    """A jaxpr in two, of which the second has some equations, and the first one all others.

    The first part returns the inputs of the second. Those in ``first`` come first, and the number
    says how many there are.
    """
    outvars, made = jaxpr.jaxpr.outvars, {var for eqn in second for var in eqn.outvars}
    own = {id(eqn) for eqn in second}
    start = [eqn for eqn in jaxpr.jaxpr.eqns if id(eqn) not in own]
    read = _jaxpr.variables([*(atom for eqn in second for atom in eqn.invars), *outvars])
    between = sorted({var: None for var in read if var not in made}, key=lambda v: v not in first)
    count = sum(var in first for var in between)
    one = _jaxpr.rebuild(jaxpr, jaxpr.jaxpr.invars, between, start)
    return one, _jaxpr.rebuild(jaxpr, between, outvars, second), count


def _crosses(eqn: JaxprEqn) -> bool:
    """Whether an equation reduces over replicas, or gathers from them, at any depth."""
    if _is_map(eqn) or _reduces(eqn):
        return _reduces(eqn)
    return _jaxpr.any_inside(eqn, _reduces, inside=lambda each: not _is_map(each))


def _is_map(eqn: JaxprEqn) -> bool:
    return eqn.primitive is federated_map_p


def _reduces(eqn: JaxprEqn) -> bool:
    if _is_map(eqn):
        return any(out.mode != PLACED.mode for out in Round.of(eqn.params).outputs)
    return eqn.primitive in _CROSSING
