"""The pass that turns a program into rounds; `fax.program` runs it on its jaxpr.

    broadcast -> map          the map takes the server's value directly
    map -> map                one map, if nothing has to happen in between
    map -> sum, max, min      the map reduces as it goes
    map -> mean               the map sums, and the server divides

A value that is both reduced and needed row by row is an output of its map in both modes. Equations
that treat all rows of placed values alike, such as a cast or a sum of two, count as maps
(`_rowwise`). Calls of `jax.jit` that contain operators are inlined, and the bodies of loops,
branches, checkpoints and client functions are fused. The pass only regroups: every equation still
occurs once, and effects keep their order.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

from fax._arithmetic import accumulator_dtype
from fax._placement import Placement
from fax.primitives import _jaxpr
from fax.primitives._broadcast import broadcast_p
from fax.primitives._collect import collect_p, distribute_p
from fax.primitives._jaxpr import Atom
from fax.primitives._map_builder import Find, MapBuilder
from fax.primitives._reduce import max_p, mean_p, min_p, sum_p
from fax.primitives._round import In, federated_map_p
from fax.primitives._rowwise import as_map, is_elementwise, may_be_rowwise
from fax.sharding._types import row_aval

_REDUCTIONS = (sum_p, mean_p, max_p, min_p)
_OPERATORS = (broadcast_p, collect_p, distribute_p, federated_map_p, *_REDUCTIONS)


def fuse(jaxpr: ClosedJaxpr) -> tuple[ClosedJaxpr, list[Any]]:
    """Fuses a program. Returns its jaxpr, and constants for its leading inputs."""
    jaxpr, consts = _jaxpr.inline_jit(jaxpr, lambda eqn: has_operators(eqn.params["jaxpr"]))
    return _fuse(jaxpr), consts


def _fuse(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    program = _Program()
    # Calls of `jax.jit` between operators are inlined if they may treat all rows alike.
    jaxpr, consts = _jaxpr.inline_jit(jaxpr, may_be_rowwise)
    assert not consts
    for eqn in jaxpr.jaxpr.eqns:
        eqn = _jaxpr.map_jaxprs(_fuse_inside, eqn)
        if eqn.primitive is federated_map_p:
            program.add_map(eqn)
        elif eqn.primitive in _REDUCTIONS:
            program.add_reduction(eqn)
        elif may_be_rowwise(eqn):
            program.add_rowwise(eqn)
        else:
            program.add(eqn)
    fused = _jaxpr.rebuild(jaxpr, jaxpr.jaxpr.invars, jaxpr.jaxpr.outvars, program.equations())
    return _jaxpr.prune(fused, [True] * len(fused.out_avals), keep_inputs=True)[0]


def _fuse_inside(jaxpr: ClosedJaxpr | Jaxpr) -> Any:
    """Fuses a jaxpr in an equation, unless it has constants of its own."""
    inner = _jaxpr.opened(jaxpr)
    if inner.constvars or not has_operators(inner):
        return jaxpr

    def wanted(eqn: JaxprEqn) -> bool:
        return has_operators(eqn.params["jaxpr"]) and not eqn.params["jaxpr"].consts

    fused = _fuse(_jaxpr.inline_jit(ClosedJaxpr(inner, []), wanted)[0])
    return fused.jaxpr if inner is jaxpr else fused


def has_operators(jaxpr: ClosedJaxpr | Jaxpr) -> bool:
    """Whether an operator is used, at any depth."""
    return _jaxpr.any_equation(jaxpr, is_operator)


def is_operator(eqn: JaxprEqn) -> bool:
    return eqn.primitive in _OPERATORS


class _Step:
    """An equation and its place in the order of evaluation.

    Places are numbered like sections of a book, so a step can always be put before another: the
    first one before (3, 0) is at (3, -9, 0), where -9 is far below zero, the next at (3, -8, 0).

    Attributes:
      eqn: the equation.
      needs: tokens of the effects that have to come first.
      makes: tokens of the step's own effects.
      place: its place.
      followers: steps that are known to depend on this one.
    """

    def __init__(self, eqn: JaxprEqn):
        self.eqn = eqn
        self.needs: list[object] = []
        self.makes: list[object] = []
        self.place: tuple[int, ...] = ()
        self.followers: set[_Step] = set()
        self._before = 0

    def operands(self) -> list[Any]:
        """The variables and tokens that the step depends on."""
        return [*_jaxpr.variables(self.eqn.invars), *self.needs]

    def finished(self) -> JaxprEqn:
        return self.eqn

    def let_before(self, other: _Step) -> None:
        """Moves a step right before this one, after steps that were moved there earlier."""
        self._before += 1
        other.place = (*self.place[:-1], self._before - sys.maxsize, 0)


class _Map(_Step):
    """A map under construction and its place."""

    def __init__(self, builder: MapBuilder):
        super().__init__(builder.eqn)
        self.builder = builder

    def operands(self) -> list[Any]:
        atoms = (atom for atom, _ in self.builder.inputs.values())
        return [*_jaxpr.variables(atoms), *self.needs]

    def finished(self) -> JaxprEqn:
        return self.builder.equation()


class _Program:
    """The equations fused so far."""

    def __init__(self) -> None:
        self._steps: dict[_Step, None] = {}
        self._maker: dict[Any, _Step] = {}  # by variable or token
        self._places = itertools.count()
        self._token: object | None = None  # of the last effect
        self._inside: set[Var] = set()  # the variables of client functions

    def equations(self) -> list[JaxprEqn]:
        """The equations, in an order in which they can be evaluated."""
        steps = sorted(self._steps, key=lambda step: step.place)
        return [step.finished() for step in steps]

    def add(self, eqn: JaxprEqn) -> None:
        """Adds an equation as it is."""
        step = _Step(eqn)
        self._order_effects(step, eqn)
        self._put(step, eqn.outvars)

    def add_map(self, eqn: JaxprEqn) -> None:
        """Adds a map, and merges it with those that feed it."""
        jaxpr = eqn.params["jaxpr"]
        made = (var for inner in jaxpr.jaxpr.eqns for var in inner.outvars)
        variables = {*jaxpr.jaxpr.invars, *made}
        if not variables.isdisjoint(self._inside):  # a client function traced once, mapped twice
            eqn = eqn.replace(params=dict(eqn.params, jaxpr=_jaxpr.renamed(jaxpr)))
        self._inside |= variables
        step = _Map(MapBuilder.of(eqn, self._sender(Placement.of(eqn.params))))
        self._order_effects(step, eqn)
        if not self._merge(step):
            self._put(step, eqn.outvars)

    def add_reduction(self, eqn: JaxprEqn) -> None:
        """Adds a reduction, if possible as another output of the map whose rows it reduces."""
        rows: Any = eqn.invars[0]
        result: Any = eqn.outvars[0]
        maker = self._maker_of_rows(rows)
        if not isinstance(maker, _Map) or maker.builder.like.group != Placement.of(eqn.params):
            return self.add(eqn)
        masked = maker.builder.outputs[rows].mask is not None
        if masked and eqn.primitive not in (sum_p, mean_p):
            return self.add(eqn)  # a reduction in the map would skip masked rows, which are zero
        if eqn.primitive is not mean_p:
            maker.builder.reduce(rows, eqn.primitive.name, result)
            self._maker[result] = maker
            return None
        aval = result.aval
        total = Var(aval.update(dtype=accumulator_dtype(aval.dtype)))
        maker.builder.reduce(rows, "sum", total)
        self._maker[total] = maker
        division = _division(total.aval, eqn.params["size"], aval.dtype)
        eqns, (quotient,) = _jaxpr.splice(division, [total])
        eqns[-1] = eqns[-1].replace(
            outvars=[result if v is quotient else v for v in eqns[-1].outvars]
        )
        for eqn in eqns:
            self.add(eqn)
        return None

    def add_rowwise(self, eqn: JaxprEqn) -> None:
        """Adds an equation that may treat all rows alike; on placed values it is then a map."""
        makers = list(map(self._maker_of_rows, _jaxpr.variables(eqn.invars)))
        if self._add_before_broadcast(eqn, makers):
            return
        maps = [maker.builder for maker in makers if isinstance(maker, _Map)]
        if maps:
            find = self._sender(maps[0].like.group)
            mapped = as_map(eqn, maps[0], find, self._is_masked)
            if mapped is not None and self._merge(_Map(mapped)):
                return
        self.add(eqn)

    def _add_before_broadcast(self, eqn: JaxprEqn, makers: list[_Step | None]) -> bool:
        """Adds an element-wise operation on broadcast values as one before the broadcast.

        Returns whether it is one.
        """
        operands, result = _jaxpr.variables(eqn.invars), eqn.outvars[0]
        result_aval: Any = result.aval
        sent = [own for own in map(_broadcast, makers) if own is not None]
        alike = all(_shape(v) == _shape(result) for v in operands)
        if not makers or len(sent) < len(makers) or not alike or not is_elementwise(eqn):
            return False
        if not all(Placement.of(own.params) == Placement.of(sent[0].params) for own in sent):
            return False
        values = iter(own.invars[0] for own in sent)
        row: Any = Var(row_aval(result_aval))
        invars = [next(values) if isinstance(v, Var) else v for v in eqn.invars]
        self.add(eqn.replace(invars=invars, outvars=[row]))
        self.add(sent[0].replace(invars=[row], outvars=[result]))
        return True

    def _is_masked(self, var: Var) -> bool:
        """Whether a placed value is zero for the participants that a mask leaves out."""
        maker = self._maker_of_rows(var)
        return isinstance(maker, _Map) and maker.builder.outputs[var].mask is not None

    def _maker_of_rows(self, atom: Atom) -> _Step | None:
        """The broadcast or map that a placed value comes from."""
        maker = self._maker.get(atom) if isinstance(atom, Var) else None
        if not isinstance(maker, _Map):
            return None if _broadcast(maker) is None else maker
        return maker if maker.builder.outputs[atom].mode == "placed" else None

    def _sender(self, group: Placement) -> Find:
        """Replaces broadcast operands of a map by the server's values."""

        def find(atom: Atom, mode: In) -> tuple[Atom, In]:
            sent = _broadcast(self._maker_of_rows(atom)) if mode.mode == "placed" else None
            if sent is None or Placement.of(sent.params) != group:
                return atom, mode
            return sent.invars[0], mode._replace(mode="server")

        return find

    def _merge(self, step: _Map) -> bool:
        """Merges a new map with those that feed it. Returns whether there are any."""
        new, inputs = step, step.builder.inputs.values()
        makers = {self._maker_of_rows(atom) for atom, mode in inputs if mode.mode == "placed"}
        feeding = [maker for maker in makers if isinstance(maker, _Map)]
        for maker in sorted(feeding, key=lambda maker: maker.place, reverse=True):
            if not maker.builder.fits(step.builder) or self._waits(step, maker):
                continue
            made = [*step.builder.outputs, *step.makes]
            maker.builder.absorb(step.builder)
            maker.needs += step.needs
            maker.makes += step.makes
            maker.followers |= step.followers
            self._maker.update(dict.fromkeys(made, maker))
            self._steps.pop(step, None)
            step = maker
        return step is not new

    def _waits(self, step: _Map, maker: _Map) -> bool:
        """Whether a map depends on another one by more than the rows that it is fed.

        This visits each step between the two once: those that have to stay after the other map are
        remembered, and the rest is moved before it.
        """
        fed = maker.builder.feeds
        others = [atom for atom, mode in step.builder.inputs.values() if not fed(atom, mode)]
        needed = self._makers([*_jaxpr.variables(others), *step.needs])
        if maker in needed:
            return True
        between: set[_Step] = set()
        found = needed
        while found:
            found = {s for s in found - between - maker.followers if s.place > maker.place}
            between |= found
            found = self._makers([x for s in found for x in s.operands()])
        for other in sorted(between, key=lambda other: other.place):
            before = self._makers(other.operands())
            if maker in before or not before.isdisjoint(maker.followers):
                maker.followers.add(other)
            else:
                maker.let_before(other)
        return not needed.isdisjoint(maker.followers)

    def _makers(self, keys: Iterable[Any]) -> set[_Step]:
        return {self._maker[key] for key in keys if key in self._maker}

    def _order_effects(self, step: _Step, eqn: JaxprEqn) -> None:
        """Keeps effects in order: each one waits for the one before."""
        if not eqn.effects:
            return
        if self._token is not None:
            step.needs.append(self._token)
        self._token = object()
        step.makes.append(self._token)

    def _put(self, step: _Step, results: Sequence[Var]) -> None:
        step.place = (next(self._places), 0)
        self._steps[step] = None
        self._maker.update(dict.fromkeys([*results, *step.makes], step))


def _broadcast(maker: _Step | None) -> JaxprEqn | None:
    """The step's equation if it is a broadcast."""
    return maker.eqn if maker is not None and maker.eqn.primitive is broadcast_p else None


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


@_jaxpr.cached
def _division(aval: ShapedArray, size: int, dtype: Any) -> ClosedJaxpr:
    return _jaxpr.trace(lambda total: [(total / size).astype(dtype)], [aval])[0]
