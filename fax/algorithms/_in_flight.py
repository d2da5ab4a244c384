"""Sums that are in flight while replicas take steps: nothing may use them before these steps.

A compiler overlaps a sum over replicas with the steps that follow if nothing needs the sum before
they end. The division that makes a mean of it, or the gathering of its parts within a replica, is
enough to wait for it: compilers move such operations to an early place, and merge them with others.
They also merge a small sum with a later one, which is then sent too late. So what follows the sums
is computed after the steps, and a barrier keeps it there.
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
_CROSSING = (collect_p, max_p, mean_p, min_p, sum_p)


class Sending(NamedTuple):
    """A computation of which everything is done up to its last reductions.

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


def send(fn: Callable[..., PyTree], *args: Any) -> Sending:
    """Evaluates a function up to its last reductions over replicas. Call it in a program."""
    treedef = None

    def flat() -> list[Any]:
        nonlocal treedef
        leaves, treedef = jax.tree.flatten(fn(*args))
        return leaves

    jaxpr, operands = _jaxpr.trace(flat, ())
    start, rest, count = _split(jaxpr)
    values = _jaxpr.evaluate(start, *operands)
    return Sending(values[:count], values[count:], rest, treedef)


def receive(sending: Sequence[Sending], after: PyTree) -> tuple[list[PyTree], PyTree]:
    """The results of what was sent, computed after ``after``, which is returned, too.

    What uses the ``after`` that is returned waits for the sums in turn. So a later sum of it cannot
    be merged with these.
    """
    sums, after = lax.optimization_barrier(([each.sums for each in sending], after))
    return [each._replace(sums=own).result() for each, own in zip(sending, sums)], after


def _split(jaxpr: ClosedJaxpr) -> tuple[ClosedJaxpr, ClosedJaxpr, int]:
    """Two parts of a jaxpr: with its last reductions, and what has to wait for their results.

    The first returns the inputs of the second. As many of these as the number says are results of
    reductions.
    """
    inner = jaxpr.jaxpr
    crossing = [_crosses(eqn) for eqn in inner.eqns]
    needed: set[Var] = set()  # before something is sent
    for eqn, crosses in zip(reversed(inner.eqns), reversed(crossing)):
        if crosses or not needed.isdisjoint(eqn.outvars):
            needed.update(eqn.outvars, _jaxpr.variables(eqn.invars))
    sums: set[Var] = set()
    waiting: set[Var] = set()
    parts: tuple[list[JaxprEqn], list[JaxprEqn]] = [], []
    for eqn, crosses in zip(inner.eqns, crossing):
        if crosses:
            sums.update(eqn.outvars)
        waits = needed.isdisjoint(eqn.outvars) and not (sums | waiting).isdisjoint(
            _jaxpr.variables(eqn.invars)
        )
        if waits:
            waiting.update(eqn.outvars)
        parts[waits].append(eqn)
    read = [atom for eqn in parts[1] for atom in eqn.invars]
    between = dict.fromkeys(v for v in _jaxpr.variables([*read, *inner.outvars]))
    own = [v for v in between if v not in waiting]
    own.sort(key=lambda v: v not in sums)
    start = _jaxpr.rebuild(jaxpr, inner.invars, own, parts[0])
    rest = _jaxpr.rebuild(jaxpr, own, inner.outvars, parts[1])
    return start, rest, sum(v in sums for v in own)


def _crosses(eqn: JaxprEqn) -> bool:
    """Whether an equation reduces over replicas, or gathers from them, at any depth."""
    if eqn.primitive is federated_map_p:
        return any(out.mode != PLACED.mode for out in Round.of(eqn.params).outputs)
    return eqn.primitive in _CROSSING or _jaxpr.any_inside(eqn, _crosses)
