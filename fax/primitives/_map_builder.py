"""A map under construction, which does the work of several maps.

A map absorbs the maps and reductions that it feeds, one after the other. This only collects
equations. The client function's jaxpr is built once, at the end, so the time to fuse a program is
proportional to the number of its equations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var
from jax.extend.core.primitives import remat_p

from fax import _compat
from fax.primitives import _jaxpr
from fax.primitives._halves import depends
from fax.primitives._jaxpr import Atom
from fax.primitives._mask import either
from fax.primitives._round import Contribution, In, Round, Vectorize, has_convolutions, select

# Finds the operand of a map, and its mode, for an operand of an equation.
Find = Callable[[Atom, In], tuple[Atom, In]]


class MapBuilder:
    """A map under construction.

    Attributes:
      like: the placement, the number of vectorized participants, the setting for convolutions.
      eqn: the equation that says where in the user's code the map comes from.
      inputs: for each variable that a participant sees, the operand and its mode.
      outputs: for each result, what a participant contributes to it.
      eqns: what a participant computes, in the variables of the original equations.
    """

    def __init__(self, like: Round, eqn: JaxprEqn):
        self.like = like
        self.eqn = eqn
        self.inputs: dict[Var, tuple[Atom, In]] = {}
        self.outputs: dict[Var, Contribution] = {}
        self.eqns: list[JaxprEqn | _Checkpoint] = []
        self._seen: dict[tuple[int, In], Var] = {}  # by identity, for literals have no hash
        self._same: dict[Var, Atom] = {}  # variables that turned out to be another atom
        self._checkpoints: dict[Var, _Checkpoint] = {}  # by what they make

    @classmethod
    def of(cls, eqn: JaxprEqn, find: Find) -> MapBuilder:
        """Starts from a map, and replaces its operands by those that ``find`` returns."""
        this = Round.of(eqn.params)
        builder, inner = cls(this, eqn), this.jaxpr.jaxpr
        for atom, mode, var in zip(eqn.invars, this.inputs, inner.invars, strict=True):
            seen = builder.see(*find(atom, mode), var)
            if seen is not var:
                builder._same[var] = seen
        for part in inner.eqns:
            if part.primitive is remat_p:
                checkpoint = _Checkpoint(part)
                builder.eqns.append(checkpoint)
                builder._checkpoints.update(dict.fromkeys(checkpoint.results, checkpoint))
            else:
                builder.eqns.append(part)
        builder.outputs.update(zip(eqn.outvars, this.contributions(), strict=True))
        return builder

    def see(self, atom: Atom, mode: In, var: Var) -> Var:
        """The variable of an operand: ``var``, unless the operand already has one."""
        seen = self._seen.setdefault((id(atom), mode), var)
        self.inputs.setdefault(seen, (atom, mode))
        return seen

    def reduce(self, rows: Var, mode: str, total: Var) -> None:
        """Adds a result: the contributions to another one, reduced in the dtype of the total."""
        value, _, mask = self.outputs[rows]
        dtype = total.aval.dtype  # type: ignore[attr-defined]
        if value.aval.dtype != dtype:
            value = self._splice(_cast(value.aval, dtype), value)
        self.outputs[total] = Contribution(value, mode, mask)

    def fits(self, other: MapBuilder) -> bool:
        """Whether both are over the same placement and run in the same way.

        That is, with as many participants at once and, if both have convolutions, with the same
        setting for these.
        """
        sizes = {self.like.vectorize, other.like.vectorize}.difference(Vectorize)
        alike = self.like.group == other.like.group and len(sizes) <= 1
        return alike and self._convolutions_with(other) is not None

    def feeds(self, atom: Atom, mode: In) -> bool:
        """Whether an operand in a mode is a placed result of this map, row by row."""
        part = self.outputs.get(atom) if isinstance(atom, Var) else None
        return part is not None and part.mode == mode.mode == "placed"

    def absorb(self, other: MapBuilder) -> None:
        """Absorbs a map that fits, and that depends on this one only by the rows that it is fed."""
        joins = isinstance(other.like.vectorize, Vectorize)
        vectorize = _vectorize(self.like.vectorize, other.like.vectorize)
        convolutions = self._convolutions_with(other) or self.like.convolutions
        self.like = self.like.replace(vectorize=vectorize, convolutions=convolutions)
        self.eqn = other.eqn

        fed = self._fed(other)
        silent = self._silent(other, fed)
        same: dict[Var, Atom] = {var: self._row(part) for var, part in fed.items()}
        host = self._shared_checkpoint(same.values()) if joins else None
        common = self._seen.keys() & other._seen.keys()
        same.update((other._seen[key], self._seen[key]) for key in common)
        theirs = set(other.inputs)
        for var in same:
            atom, mode = other.inputs.pop(var)
            del other._seen[id(atom), mode]
        self.inputs.update(other.inputs)
        self._seen.update(other._seen)

        if host is None:
            parts = other.outputs
            self.eqns += other.eqns
            self._same.update(other._same)
            self._same.update(same)
            self._checkpoints.update(other._checkpoints)
        else:
            parts = self._within(host, other, {var: same.get(var, var) for var in theirs})
        if silent is not None:
            parts = {
                var: p._replace(mask=silent) if p.mask is None else p for var, p in parts.items()
            }
        self.outputs.update(parts)

    def round(self) -> Round:
        """The parameters of the map."""
        modes = [mode for _, mode in self.inputs.values()]
        parts = [_on_part(part, self._read) for part in self.outputs.values()]
        eqns = [_on(eqn, self._read) for eqn in self.eqns]
        return self.like.assemble(modes, self.inputs, parts, eqns)

    def equation(self) -> JaxprEqn:
        """The map as an equation."""
        this = self.round()
        return self.eqn.replace(
            invars=[atom for atom, _ in self.inputs.values()],
            outvars=list(self.outputs),
            params=this.params,
            effects=this.jaxpr.effects,
        )

    def _within(
        self, host: _Checkpoint, other: MapBuilder, seen: Mapping[Var, Atom]
    ) -> dict[Var, Contribution]:
        """Moves another map's work into a checkpoint. ``seen`` has the map's variables here."""

        def inner(atom: Atom) -> Atom:
            atom = other._read(atom)
            given = isinstance(atom, Var) and atom in seen
            return host.within(self._read(seen[atom])) if given else atom

        def result(atom: Atom) -> Atom:
            atom = other._read(atom)
            given = isinstance(atom, Var) and atom in seen
            return self._read(seen[atom]) if given else host.outside(atom)

        host.eqns += [_on(eqn, inner) for eqn in other.eqns]
        parts = {var: _on_part(part, result) for var, part in other.outputs.items()}
        made = [part.value for part in parts.values() if isinstance(part.value, Var)]
        self._checkpoints.update((var, host) for var in made if var in host.results)
        return parts

    def _read(self, atom: Atom) -> Atom:
        while isinstance(atom, Var) and atom in self._same:
            atom = self._same[atom]
        return atom

    def _splice(self, jaxpr: ClosedJaxpr, *operands: Atom) -> Atom:
        """Adds the equations of a jaxpr, and returns their result."""
        eqns, (value,) = _jaxpr.splice(jaxpr, operands)
        self.eqns += eqns
        return value

    def _convolutions_with(self, other: MapBuilder) -> str | None:
        """How both compute their convolutions, or None if they differ."""
        one, two = self.like.convolutions, other.like.convolutions
        if one == two or not has_convolutions(other.round().jaxpr):
            return one
        return None if has_convolutions(self.round().jaxpr) else two

    def _fed(self, other: MapBuilder) -> dict[Var, Contribution]:
        """The variables of another map that are rows of this one, with their contributions."""
        seen: Iterable[Var] = other.inputs
        if len(self.outputs) < len(other.inputs):  # looks up the fewer in the many
            keys = ((id(result), In("placed", t)) for result in self.outputs for t in (False, True))
            seen = [other._seen[key] for key in keys if key in other._seen]
        fed = ((var, *other.inputs[var]) for var in seen)
        return {var: self.outputs[atom] for var, atom, mode in fed if self.feeds(atom, mode)}

    def _row(self, part: Contribution) -> Atom:
        """A participant's row of a placed result."""
        if part.mask is None:
            return part.value
        return self._splice(_row_where(part.mask.aval, part.value.aval), part.mask, part.value)

    def _silent(self, other: MapBuilder, fed: Mapping[Var, Contribution]) -> Atom | None:
        """A mask for the results of a map that is linear in tangents, if all of these are masked.

        Where these are zero, so are its results, even if its derivatives are infinite.
        """
        if all(part.mask is None for part in fed.values()):
            return None
        tangents = [var for var, (_, mode) in other.inputs.items() if mode.tangent]
        masks = [fed[var].mask if var in fed else None for var in tangents]
        if not masks or None in masks:
            return None
        this = other.round()
        reached = depends(this.jaxpr, [mode.tangent for mode in this.inputs])
        if not all(reached[: len(this.outputs)]):
            return None
        mask, eqns = either(list(map(self._read, masks)))
        self.eqns += eqns
        return mask

    def _shared_checkpoint(self, rows: Iterable[Atom]) -> _Checkpoint | None:
        """The single `jax.checkpoint` that makes all rows that are not inputs, if there is one.

        The product of a weighted mean belongs inside it: outside, the gradient with respect to the
        weights would have to store every participant's update.
        """
        made = set(_jaxpr.variables(map(self._read, rows))).difference(self.inputs)
        hosts = {self._checkpoints.get(var) for var in made}
        return hosts.pop() if len(hosts) == 1 else None


class _Checkpoint:
    """A `jax.checkpoint` in a map under construction, which can absorb what uses its results.

    Attributes:
      eqns: its equations.
      results: for each of its result variables, the atom inside.
    """

    def __init__(self, eqn: JaxprEqn):
        inner = eqn.params["jaxpr"]
        self._eqn = eqn
        self._operands: list[Atom] = list(eqn.invars)
        self._invars: list[Var] = list(inner.invars)
        self.eqns: list[JaxprEqn] = list(inner.eqns)
        self.results: dict[Var, Atom] = dict(zip(eqn.outvars, inner.outvars, strict=True))
        pairs = list(zip(self._operands, self._invars, strict=True))
        self._inner = {var: own for var, own in pairs if isinstance(var, Var)} | self.results
        self._outer = {own: var for var, own in self.results.items() if isinstance(own, Var)}
        self._outer.update((own, atom) for atom, own in pairs)

    def within(self, atom: Atom) -> Atom:
        """The atom inside for an atom outside."""
        if not isinstance(atom, Var):
            return atom
        if atom not in self._inner:
            own = Var(atom.aval)
            self._inner[atom], self._outer[own] = own, atom
            self._operands.append(atom)
            self._invars.append(own)
        return self._inner[atom]

    def outside(self, atom: Atom) -> Atom:
        """The atom outside for an atom inside."""
        if not isinstance(atom, Var):
            return atom
        if atom not in self._outer:
            result = Var(atom.aval)
            self._inner[result], self._outer[atom] = atom, result
            self.results[result] = atom
        return self._outer[atom]

    def on(self, read: Callable[[Atom], Atom]) -> JaxprEqn:
        """The checkpoint as an equation, with its operands replaced by ``read``."""
        inner = ClosedJaxpr(self._eqn.params["jaxpr"], [])
        if self.eqns == inner.jaxpr.eqns and len(self.results) == len(inner.jaxpr.outvars):
            return self._eqn.replace(invars=list(map(read, self._operands)))
        extended = _jaxpr.rebuild(inner, self._invars, self.results.values(), self.eqns)
        extra = len(self._operands) - len(self._eqn.invars)
        params = _compat.checkpoint_params(self._eqn.params, extended.jaxpr, extra)
        return self._eqn.replace(
            invars=list(map(read, self._operands)), outvars=list(self.results), params=params
        )


def _vectorize(one: Any, other: Any) -> Any:
    """How many participants the union of two maps that fit works on at once."""
    if isinstance(one, Vectorize) and isinstance(other, Vectorize):
        return one if one is Vectorize.INHERITED else other
    return other if isinstance(one, Vectorize) else one


def _on(eqn: JaxprEqn | _Checkpoint, read: Callable[[Atom], Atom]) -> JaxprEqn:
    """An equation with its operands replaced by ``read``."""
    if isinstance(eqn, _Checkpoint):
        return eqn.on(read)
    return eqn.replace(invars=list(map(read, eqn.invars)))


def _on_part(part: Contribution, read: Callable[[Atom], Atom]) -> Contribution:
    mask = None if part.mask is None else read(part.mask)
    return part._replace(value=read(part.value), mask=mask)


@_jaxpr.cached
def _cast(aval: ShapedArray, dtype: Any) -> ClosedJaxpr:
    return _jaxpr.trace(lambda x: [x.astype(dtype)], [aval])[0]


@_jaxpr.cached
def _row_where(mask: ShapedArray, value: ShapedArray) -> ClosedJaxpr:
    return _jaxpr.trace(lambda mask, value: [select(mask, value)], [mask, value])[0]
