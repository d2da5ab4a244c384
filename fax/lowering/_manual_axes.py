"""A client function as it is typed on one device of a placement's mesh axes.

Client functions are traced, fused and differentiated with the types of the program around
them, so that equations can move between the server and the participants. Only when a map is
lowered, types change: the mesh axes that its rows are split over become manual, and the
others are left to the compiler, with the shardings that were explicit as constraints. Every
type in the jaxpr, and every mesh that an equation names, then has to say so.
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
from jax.extend.core.primitives import psum_p
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from fax.primitives import _jaxpr
from fax.sharding._types import unchecked

# What only says how a value is sharded, and the name of the parameter that says it.
_SHARDINGS = {"reshard": "dst_sharding", "sharding_constraint": "sharding"}


class Retyping:
    """Changes the types of mesh axes in jaxprs.

    Whether a value varies over the ``unchecked`` axes, which are manual, is left out, as in a
    `jax.shard_map` with ``check_vma=False``. What came from outside names no mesh, nor does a
    gradient that goes back to it; it is on the mesh in scope.
    """

    def __init__(self, types: Mapping[str, AxisType], unchecked: Iterable[str]):
        self._types = dict(types)
        self._unchecked = frozenset(unchecked)
        self._scope = jax.sharding.get_abstract_mesh()
        self._context = functools.cache(self._make_context)

    def __call__(self, jaxpr: ClosedJaxpr) -> ClosedJaxpr:
        return ClosedJaxpr(self._jaxpr(jaxpr.jaxpr), jaxpr.consts)

    def _jaxpr(self, jaxpr: Jaxpr) -> Jaxpr:
        env: dict[Var, Any] = {}

        def write(var: Any) -> Any:
            env[var] = Var(self._aval(var.aval))
            return env[var]

        def read(atom: Any) -> Any:
            if isinstance(atom, Var):
                return env[atom]
            typed = isinstance(atom.val, np.ndarray)  # these carry a type of their own in JAX
            return Literal(np.array(atom.val), self._aval(atom.aval)) if typed else atom

        constvars, invars = list(map(write, jaxpr.constvars)), list(map(write, jaxpr.invars))
        eqns = []
        for eqn in jaxpr.eqns:
            if self._is_moot(eqn):
                env[eqn.outvars[0]] = read(eqn.invars[0])
                continue
            operands = list(map(read, eqn.invars))
            results = list(map(write, eqn.outvars))
            eqns.append(self._eqn(eqn).replace(invars=operands, outvars=results))
        outvars = list(map(read, jaxpr.outvars))
        return jaxpr.replace(constvars=constvars, invars=invars, outvars=outvars, eqns=eqns)

    def _is_moot(self, eqn: JaxprEqn) -> bool:
        """Whether an equation only says what need not be said any more."""
        if str(eqn.primitive) == "pvary":
            return self._unchecked.issuperset(eqn.params["axes"])
        wanted = eqn.params.get(_SHARDINGS.get(str(eqn.primitive), ""))
        if not isinstance(wanted, NamedSharding) or self._mesh(wanted.mesh.abstract_mesh).auto_axes:
            return False
        names = [name for entry in wanted.spec for name in _names(entry)]
        return all(wanted.mesh.shape[name] == 1 for name in names)

    def _eqn(self, eqn: JaxprEqn) -> JaxprEqn:
        if eqn.primitive.name == "reshard":
            return self._constraint(eqn)
        if eqn.primitive.name == "psum_invariant" and self._unchecked.issuperset(
            eqn.params["axes"]
        ):
            params = dict(axes=eqn.params["axes"], axis_index_groups=None)
            return eqn.replace(primitive=psum_p, params=params, ctx=self._context(eqn.ctx))
        if eqn.primitive.name == "pvary":
            axes = tuple(axis for axis in eqn.params["axes"] if axis not in self._unchecked)
            return eqn.replace(params=dict(axes=axes), ctx=self._context(eqn.ctx))
        params = {name: self._value(value) for name, value in eqn.params.items()}
        if eqn.primitive.name != "sharding_constraint":  # what is left of types as parameters
            params.update((k, None) for k, v in params.items() if isinstance(v, NamedSharding))
        if "newly_manual_axes" in params:  # a `jax.shard_map` over all axes: some are there
            params["newly_manual_axes"] = params["newly_manual_axes"].difference(self._manual)
        return eqn.replace(params=params, ctx=self._context(eqn.ctx))

    def _constraint(self, eqn: JaxprEqn) -> JaxprEqn:
        """What a change of an explicit sharding asks of the compiler."""
        (x,), spec = eqn.invars, eqn.params["dst_sharding"].spec
        mesh = self._mesh(eqn.params["dst_sharding"].mesh)
        with jax.sharding.use_abstract_mesh(mesh):
            jaxpr, _ = _jaxpr.trace(
                lambda x: [lax.with_sharding_constraint(x, NamedSharding(mesh, spec))],
                [self._aval(x.aval)],
            )
        return jaxpr.jaxpr.eqns[0]

    @property
    def _manual(self) -> set[str]:
        return {axis for axis, kind in self._types.items() if kind == AxisType.Manual}

    def _aval(self, aval: Any) -> Any:
        if not isinstance(aval, ShapedArray) or aval.sharding.mesh.empty:
            return aval
        mesh = self._mesh(aval.sharding.mesh)
        # Only explicit axes may be left in a type, and none of those that change is.
        spec = PartitionSpec(*(self._kept(entry) for entry in aval.sharding.spec))
        return unchecked(aval.update(sharding=NamedSharding(mesh, spec)), self._unchecked)

    def _kept(self, entry: Any) -> Any:
        return tuple(name for name in _names(entry) if name not in self._types) or None

    def _value(self, value: Any) -> Any:
        if isinstance(value, ClosedJaxpr):
            return self(value)
        if isinstance(value, Jaxpr):
            return self._jaxpr(value)
        if isinstance(value, NamedSharding):
            return value.update(mesh=self._mesh(value.mesh.abstract_mesh))
        if isinstance(value, AbstractMesh | Mesh):
            return self._mesh(value.abstract_mesh)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self._value, value))
        if type(value) in (tuple, list):
            return type(value)(map(self._value, value))
        return value

    def _mesh(self, mesh: AbstractMesh) -> AbstractMesh:
        mesh = self._scope if mesh.empty else mesh
        # What is manual in a `jax.shard_map` of the client function's own stays so.
        types = zip(mesh.axis_names, mesh.axis_types, strict=True)
        left = {axis for axis, kind in types if kind != AxisType.Manual}
        return mesh.update_axis_types({a: k for a, k in self._types.items() if a in left})

    def _make_context(self, context: Any) -> Any:
        """An equation's context, which has no constructor, with the types of the axes changed."""
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
