"""Lookups in tables that may be sharded, by a client function that is sharded over several axes.

Indexing by an array and `jax.numpy.take_along_axis` are gathers, and their derivatives are
scatters. If the table is sharded over one mesh axis and the indices over another, XLA's partitioner
splits them by one after the other. If a third axis is manual, as that of the placement is, this
aborts the process: "Check failed: partition_group_list" (jax 0.10.2 to 0.12.0.1). Often the
compiler alone knows how arrays are sharded. So each device has the whole table, except along axes
that table and indices share.
"""

from __future__ import annotations

from typing import Any

from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var
from jax.extend.core import primitives as p
from jax.sharding import PartitionSpec

from fax import _compat
from fax.primitives import _jaxpr
from fax.primitives._jaxpr import AnyJaxpr, Atom, Replacement
from fax.primitives._round import federated_map_p

_SCATTERS = (p.scatter_p, p.scatter_add_p, p.scatter_mul_p, p.scatter_min_p, p.scatter_max_p)


def with_whole_tables(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """The jaxpr with sharding constraints on tables.

    A table to which the client function applies one itself stays as it is, if that one keeps the
    indexed axes whole. Call it with the types that the jaxpr has on one device of the placement.
    """
    return _rewritten(jaxpr) if _jaxpr.any_equation(jaxpr, _is_lookup, _looks_inside) else jaxpr


def _rewritten(jaxpr: AnyJaxpr) -> AnyJaxpr:
    known: dict[Var, PartitionSpec] = {}
    for eqn in _jaxpr.opened(jaxpr).eqns:
        if eqn.primitive is p.sharding_constraint_p:
            # On the operand, too: what a scatter makes is constrained after it is made.
            both = _jaxpr.variables([*eqn.invars, *eqn.outvars])
            known |= dict.fromkeys(both, eqn.params["sharding"].spec)

    def replace(eqn: JaxprEqn) -> Replacement:
        if not _is_lookup(eqn):
            return _jaxpr.map_jaxprs(_rewritten, eqn) if _looks_inside(eqn) else eqn
        table, *rest = eqn.invars
        is_scatter = eqn.primitive in _SCATTERS
        own = eqn.outvars if is_scatter else _jaxpr.variables([table])
        if any(var in known and _is_whole(known[var], _indexed(eqn)) for var in own):
            return eqn
        shared = eqn.params["dimension_numbers"].operand_batching_dims
        before, table = _constrained(eqn, table, shared)
        if not is_scatter:
            return [*before, eqn.replace(invars=[table, *rest])], eqn.outvars
        made = Var(eqn.outvars[0].aval)
        after, whole = _constrained(eqn, made, shared)
        scatter = eqn.replace(invars=[table, *rest], outvars=[made])
        return [*before, scatter, *after], [whole]

    return _jaxpr.rewrite(jaxpr, replace)


def _constrained(eqn: JaxprEqn, table: Atom, shared: tuple[int, ...]) -> tuple[list, Atom]:
    """Equations that make a table whole, except along some axes, and their result."""
    free = PartitionSpec.UNCONSTRAINED
    spec = PartitionSpec(*(free if axis in shared else None for axis in range(table.aval.ndim)))
    with eqn.ctx.manager:
        whole, _ = _jaxpr.trace(lambda x: [lax.with_sharding_constraint(x, spec)], [table.aval])
    eqns, (result,) = _jaxpr.splice(whole, [table])
    return eqns, result


def _is_lookup(eqn: JaxprEqn) -> bool:
    return (eqn.primitive is p.gather_p or eqn.primitive in _SCATTERS) and bool(_indexed(eqn))


def _indexed(eqn: JaxprEqn) -> list[int]:
    """The axes of the table along which the indices choose."""
    numbers: Any = eqn.params["dimension_numbers"]
    if eqn.primitive in _SCATTERS:
        return list(numbers.scatter_dims_to_operand_dims)
    table: Any = eqn.invars[0].aval
    shape, sizes = table.shape, eqn.params["slice_sizes"]
    return [axis for axis in numbers.start_index_map if sizes[axis] < shape[axis]]


def _is_whole(spec: PartitionSpec, axes: list[int]) -> bool:
    return all(axis >= len(spec) or spec[axis] is None for axis in axes)


def _looks_inside(eqn: JaxprEqn) -> bool:
    """A map inside is lowered by itself, and `jax.shard_map` has other manual axes."""
    return eqn.primitive is not federated_map_p and eqn.primitive.name != _compat.Named.SHARD_MAP
