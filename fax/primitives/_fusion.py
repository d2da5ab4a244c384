"""The pass that turns a program into rounds; `fax.program` runs it on its jaxpr.

    broadcast -> map          the map takes the server's value itself
    map -> map                one map, if nothing has to happen in between
    map -> sum, max, min      the map reduces as it goes
    map -> mean               the map sums, and the server divides

A value that is both reduced and needed row by row leaves its map in both modes. Casts and
sums of placed values count as maps. Calls of `jax.jit` that hold operators are inlined, and
loops, branches, checkpoints and client functions are fused inside. The pass only regroups:
every equation is still there once, and effects keep their order.
"""

from __future__ import annotations

from typing import Any

from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

from fax._placement import Placement
from fax.primitives import _jaxpr
from fax.primitives._broadcast import broadcast_p
from fax.primitives._collect import collect_p, distribute_p
from fax.primitives._compose import compose
from fax.primitives._reduce import max_p, mean_p, min_p, sum_p
from fax.primitives._round import Contribution, Round, federated_map_p
from fax.primitives._rowwise import as_map, is_elementwise, may_be_rowwise
from fax.sharding._schedule import accumulator_dtype
from fax.sharding._types import row_aval

_REDUCTIONS = (sum_p, mean_p, max_p, min_p)
_OPERATORS = (broadcast_p, collect_p, distribute_p, federated_map_p, *_REDUCTIONS)


def fuse(jaxpr: ClosedJaxpr) -> tuple[ClosedJaxpr, list[Any]]:
    """Fuses a program. Returns its jaxpr, and the constants that are the leading inputs."""
    jaxpr, consts = _jaxpr.inline_jit(jaxpr, lambda eqn: has_operators(eqn.params["jaxpr"]))
    return _fuse(jaxpr), consts


def _fuse(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    program = _Program()
    # Calls of `jax.jit` between operators are looked into if they treat each row alike.
    jaxpr, consts = _jaxpr.inline_jit(jaxpr, may_be_rowwise)
    assert not consts
    for eqn in jaxpr.jaxpr.eqns:
        eqn = eqn.replace(params={name: _fuse_inside(x) for name, x in eqn.params.items()})
        if eqn.primitive is federated_map_p:
            program.add_map(eqn)
        elif eqn.primitive in _REDUCTIONS:
            program.add_reduction(eqn)
        elif may_be_rowwise(eqn):
            program.add_rowwise(eqn)
        else:
            program.add(eqn)
    fused = _jaxpr.rebuild(jaxpr, jaxpr.jaxpr.invars, jaxpr.jaxpr.outvars, program.eqns)
    return _jaxpr.prune(fused, [True] * len(fused.out_avals), keep_inputs=True)[0]


def _fuse_inside(param: Any) -> Any:
    """Fuses the jaxprs in a parameter of an equation."""
    if type(param) in (tuple, list):
        return type(param)(map(_fuse_inside, param))
    if not isinstance(param, ClosedJaxpr | Jaxpr) or not has_operators(param):
        return param
    closed = isinstance(param, ClosedJaxpr)
    if param.consts if closed else param.constvars:
        return param

    def wanted(eqn: JaxprEqn) -> bool:
        return has_operators(eqn.params["jaxpr"]) and not eqn.params["jaxpr"].consts

    fused = _fuse(_jaxpr.inline_jit(param if closed else ClosedJaxpr(param, []), wanted)[0])
    return fused if closed else fused.jaxpr


def has_operators(jaxpr: ClosedJaxpr | Jaxpr) -> bool:
    """Whether an operator is used, however deep."""
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return any(
        eqn.primitive in _OPERATORS or any(map(has_operators, _jaxpr.inner(eqn)))
        for eqn in inner.eqns
    )


class _Program:
    """The equations fused so far, in an order in which they can be evaluated."""

    def __init__(self) -> None:
        self.eqns: list[JaxprEqn] = []
        self._maker: dict[Var, JaxprEqn] = {}

    def add(self, eqn: JaxprEqn) -> None:
        self._put(len(self.eqns), len(self.eqns), [eqn])

    def add_map(self, eqn: JaxprEqn) -> bool:
        """Adds a map, merged with those that feed it. Returns whether there were any."""
        eqn = self._take_broadcasts(eqn)
        self.add(eqn)
        merged = False
        for var in _jaxpr.variables(eqn.invars):
            producer = self._maker.get(var)
            if producer is None or producer is eqn or producer.primitive is not federated_map_p:
                continue
            both = self._merge(producer, eqn)
            eqn, merged = both or eqn, merged or both is not None
        return merged

    def add_reduction(self, eqn: JaxprEqn) -> None:
        """Adds a reduction, as one more output of the map whose rows it reduces."""
        rows: Any = eqn.invars[0]
        result: Any = eqn.outvars[0]
        maker = self._maker.get(rows) if isinstance(rows, Var) else None
        if maker is None or maker.primitive is not federated_map_p or not _same_group(maker, eqn):
            return self.add(eqn)
        mode, mask = maker.params["out"][maker.outvars.index(rows)]
        additive = eqn.primitive in (sum_p, mean_p)
        if mode != "placed" or (mask is not None and not additive):
            return self.add(eqn)
        if eqn.primitive is not mean_p:
            return self._replace(maker, _with_output(maker, rows, eqn.primitive.name, result))
        aval = result.aval
        total = Var(aval.update(dtype=accumulator_dtype(aval.dtype)))
        self._replace(maker, _with_output(maker, rows, "sum", total))
        division = _division(total.aval, eqn.params["size"], aval.dtype)
        eqns, (quotient,), _ = _jaxpr.splice(division, [total])
        eqns[-1] = eqns[-1].replace(
            outvars=[result if v is quotient else v for v in eqns[-1].outvars]
        )
        for eqn in eqns:
            self.add(eqn)
        return None

    def add_rowwise(self, eqn: JaxprEqn) -> None:
        """Adds an equation that may treat all rows alike, which is a map on placed values."""
        makers = [self._maker_of_rows(v) for v in _jaxpr.variables(eqn.invars)]
        if self._stays_broadcast(eqn, makers):
            return
        maps = [m for m in makers if m is not None and m.primitive is federated_map_p]
        mapped = as_map(eqn, maps[0], self._is_masked) if maps else None
        if mapped is None:
            self.add(eqn)
        elif not self.add_map(mapped):
            self._replace(self.eqns[-1], eqn)

    def _stays_broadcast(self, eqn: JaxprEqn, makers: list[JaxprEqn | None]) -> bool:
        """Adds an element-wise operation on broadcast values as one before the broadcast."""
        operands, result = _jaxpr.variables(eqn.invars), eqn.outvars[0]
        result_aval: Any = result.aval
        sent = [maker for maker in makers if maker is not None and maker.primitive is broadcast_p]
        alike = all(_shape(v) == _shape(result) for v in operands)
        if not makers or len(sent) < len(makers) or not alike or not is_elementwise(eqn):
            return False
        if not all(_same_group(maker, sent[0]) for maker in sent):
            return False
        values = iter(maker.invars[0] for maker in sent)
        row: Any = Var(row_aval(result_aval))
        invars = [next(values) if isinstance(v, Var) else v for v in eqn.invars]
        self.add(eqn.replace(invars=invars, outvars=[row]))
        self.add(sent[0].replace(invars=[row], outvars=[result]))
        return True

    def _is_masked(self, var: Var) -> bool:
        """Whether a placed value is zero for the participants that a mask leaves out."""
        maker = self._maker_of_rows(var)
        if maker is None or maker.primitive is not federated_map_p:
            return False
        return maker.params["out"][maker.outvars.index(var)].mask is not None

    def _maker_of_rows(self, var: Var) -> JaxprEqn | None:
        """The broadcast or map whose result a placed value is."""
        maker = self._maker.get(var)
        if maker is None or maker.primitive is broadcast_p:
            return maker
        if maker.primitive is not federated_map_p:
            return None
        return maker if maker.params["out"][maker.outvars.index(var)].mode == "placed" else None

    def _take_broadcasts(self, eqn: JaxprEqn) -> JaxprEqn:
        """Lets a map see what is broadcast to it as the server's value."""
        operands, inputs = [], []
        for atom, mine in zip(eqn.invars, eqn.params["in"], strict=True):
            maker = self._maker.get(atom) if isinstance(atom, Var) else None
            sent = maker is not None and maker.primitive is broadcast_p and _same_group(maker, eqn)
            if maker is not None and sent and mine.mode == "placed":
                (atom,), mine = maker.invars, mine._replace(mode="server")
            operands.append(atom)
            inputs.append(mine)
        params = Round.of(eqn.params).replace(inputs=tuple(inputs)).params
        return eqn.replace(invars=operands, params=params)

    def _merge(self, producer: JaxprEqn, consumer: JaxprEqn) -> JaxprEqn | None:
        """Merges two maps, unless the second waits for something that follows from the first."""
        start, end = self._index(producer), self._index(consumer)
        between = self.eqns[start + 1 : end]
        reached, follows = set(producer.outvars), []
        for eqn in between:
            follows.append(any(v in reached for v in eqn.invars if isinstance(v, Var)))
            if follows[-1]:
                reached.update(eqn.outvars)
        waits = reached.difference(producer.outvars)
        if any(v in waits for v in consumer.invars if isinstance(v, Var)):
            return None
        effectful = [eqn for eqn in (producer, *between, consumer) if eqn.effects]
        if len(effectful) > 1:
            return None
        both = compose(producer, consumer)
        if both is None:
            return None
        before = [eqn for eqn, f in zip(between, follows, strict=True) if not f]
        after = [eqn for eqn, f in zip(between, follows, strict=True) if f]
        self._put(start, end + 1, [*before, both, *after])
        return both

    def _replace(self, old: JaxprEqn, new: JaxprEqn) -> None:
        at = self._index(old)
        self._put(at, at + 1, [new])

    def _put(self, start: int, end: int, eqns: list[JaxprEqn]) -> None:
        self.eqns[start:end] = eqns
        self._maker.update((var, eqn) for eqn in eqns for var in eqn.outvars)

    def _index(self, eqn: JaxprEqn) -> int:
        """Where an equation is, looked for from the end, where it mostly is."""
        return next(i for i in range(len(self.eqns) - 1, -1, -1) if self.eqns[i] is eqn)


def _same_group(one: JaxprEqn, other: JaxprEqn) -> bool:
    return Placement.of(one.params) == Placement.of(other.params)


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


def _with_output(maker: JaxprEqn, rows: Any, mode: str, total: Any) -> JaxprEqn:
    """A map that also reduces the contributions to one of its outputs."""
    this = Round.of(maker.params)
    parts, inner = this.contributions(), this.jaxpr.jaxpr
    value, _, mask = parts[maker.outvars.index(rows)]
    eqns, dtype = inner.eqns, total.aval.dtype
    if value.aval.dtype != dtype:
        extra, (value,), _ = _jaxpr.splice(_cast(value.aval, dtype), [value])
        eqns = [*eqns, *extra]
    parts.append(Contribution(value, mode, mask))
    this = this.assemble(this.inputs, inner.invars, parts, eqns)
    return maker.replace(outvars=[*maker.outvars, total], params=this.params)


@_jaxpr.cached
def _cast(aval: ShapedArray, dtype: Any) -> ClosedJaxpr:
    return _jaxpr.trace(lambda x: [x.astype(dtype)], [aval])[0]


@_jaxpr.cached
def _division(aval: ShapedArray, size: int, dtype: Any) -> ClosedJaxpr:
    return _jaxpr.trace(lambda total: [(total / size).astype(dtype)], [aval])[0]
