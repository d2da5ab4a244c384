"""The types of a client function on one device of a placement's mesh axes.

Client functions are traced, fused and differentiated with the types of the surrounding program, so
that equations can move between the server and the participants. Types change only when a map is
lowered: the mesh axes that its rows are split over become manual, and the others are left to the
compiler, with explicit shardings as constraints. This has to change every type in the jaxpr, and
every mesh that an equation names.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from fax import _compat
from fax.primitives import _jaxpr
from fax.primitives._jaxpr import AnyJaxpr, Atom, Replacement


def with_axis_types(
    jaxpr: ClosedJaxpr, types: Mapping[str, AxisType], unchecked: Iterable[str]
) -> ClosedJaxpr:
    """The jaxpr with other types of mesh axes.

    Types do not say whether a value varies over the ``unchecked`` axes, which are manual, as in a
    `jax.shard_map` with ``check_vma=False``. Values from outside name no mesh, nor do gradients
    with respect to them; they are on the mesh in scope.
    """
    return _AxisTypes(types, unchecked).jaxpr(jaxpr)


class _AxisTypes:
    def __init__(self, types: Mapping[str, AxisType], unchecked: Iterable[str]):
        self._types = dict(types)
        self._manual = {axis for axis, kind in types.items() if kind == AxisType.Manual}
        self._unchecked = frozenset(unchecked)
        self._scope = jax.sharding.get_abstract_mesh()
        self._context = functools.cache(self._make_context)

    def jaxpr(self, jaxpr: AnyJaxpr) -> AnyJaxpr:
        return _jaxpr.rewrite(jaxpr, self._replace, self._renew)

    def _renew(self, atom: Atom) -> Atom:
        if isinstance(atom, Var):
            return Var(self._aval(atom.aval))
        typed = isinstance(atom.val, np.ndarray)  # in JAX these have their own type
        return Literal(np.array(atom.val), self._aval(atom.aval)) if typed else atom

    def _replace(self, eqn: JaxprEqn) -> Replacement:
        wanted = _compat.sharding_asked_for(eqn)
        if isinstance(wanted, NamedSharding) and self._is_redundant(wanted):
            return [], eqn.invars
        if eqn.primitive.name == _compat.Named.RESHARD:
            return self._constraint(eqn, eqn.params["dst_sharding"])
        unchecked = _compat.without_varying(eqn, self._unchecked)
        if unchecked is None:
            return [], eqn.invars
        params = {
            name: _jaxpr.map_leaves(self._leaf, value) for name, value in unchecked.params.items()
        }
        if wanted is None:  # shardings in other parameters describe types
            params.update((k, None) for k, v in params.items() if isinstance(v, NamedSharding))
        params = _compat.nested_in_manual(params, self._manual)
        return unchecked.replace(params=params, ctx=self._context(eqn.ctx))

    def _is_redundant(self, wanted: NamedSharding) -> bool:
        """Whether a sharding constraint is no longer needed."""
        if self._mesh(wanted.mesh.abstract_mesh).auto_axes:
            return False
        names = [name for entry in wanted.spec for name in _names(entry)]
        return all(wanted.mesh.shape[name] == 1 for name in names)

    def _constraint(self, eqn: JaxprEqn, wanted: NamedSharding) -> JaxprEqn:
        """A sharding constraint in place of a change of an explicit sharding."""
        mesh = self._mesh(wanted.mesh.abstract_mesh)
        avals: list[Any] = [atom.aval for atom in eqn.invars]
        with jax.sharding.use_abstract_mesh(mesh):
            jaxpr, _ = _jaxpr.trace(
                lambda x: [lax.with_sharding_constraint(x, NamedSharding(mesh, wanted.spec))],
                avals,
            )
        return jaxpr.jaxpr.eqns[0].replace(invars=eqn.invars, outvars=eqn.outvars)

    def _aval(self, aval: Any) -> Any:
        if not isinstance(aval, ShapedArray) or aval.sharding.mesh.empty:
            return aval
        mesh = self._mesh(aval.sharding.mesh)
        # A type may only contain explicit axes, and none of the axes that change are explicit.
        spec = PartitionSpec(*(self._kept(entry) for entry in aval.sharding.spec))
        typed = aval.update(sharding=NamedSharding(mesh, spec))
        return _compat.type_without_varying(typed, self._unchecked)

    def _kept(self, entry: Any) -> Any:
        return tuple(name for name in _names(entry) if name not in self._types) or None

    def _leaf(self, value: Any) -> Any:
        if isinstance(value, ClosedJaxpr | Jaxpr):
            return self.jaxpr(value)
        if isinstance(value, NamedSharding):
            return value.update(mesh=self._mesh(value.mesh.abstract_mesh))
        return self._mesh(value.abstract_mesh) if isinstance(value, AbstractMesh | Mesh) else value

    def _mesh(self, mesh: AbstractMesh) -> AbstractMesh:
        mesh = self._scope if mesh.empty else mesh
        # Axes that are manual in a `jax.shard_map` inside the client function stay manual.
        types = zip(mesh.axis_names, mesh.axis_types, strict=True)
        left = {axis for axis, kind in types if kind != AxisType.Manual}
        return mesh.update_axis_types({a: k for a, k in self._types.items() if a in left})

    def _make_context(self, context: Any) -> Any:
        """An equation's context, which has no constructor, with other types of axes."""
        with context.manager:
            mesh = self._mesh(jax.sharding.get_abstract_mesh())
            with jax.sharding.use_abstract_mesh(mesh):
                scalar = jax.typeof(np.float32(0))
                return _jaxpr.trace(lambda x: [lax.neg(x)], [scalar])[0].jaxpr.eqns[0].ctx


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes that an entry of a `PartitionSpec` names."""
    if entry in (None, PartitionSpec.UNCONSTRAINED):
        return ()
    return entry if isinstance(entry, tuple) else (entry,)
