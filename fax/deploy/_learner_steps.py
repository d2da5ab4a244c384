"""The computations of a learner, compiled for its mesh: steps, updates, and what it receives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

import fax
from fax.aggregators import PerClient
from fax.algorithms._crossing import Specs
from fax.algorithms._fragments import Fragment, paste, pick
from fax.algorithms._layers import name_of
from fax.algorithms._replicas import Replica, inner_steps, mixed
from fax.algorithms._round_parts import step_of
from fax.data import Cohort
from fax.sharding._types import as_before

PyTree = Any


class _State(NamedTuple):
    """What `inner_steps` trains."""

    replicas: PerClient


class Computations(NamedTuple):
    """Jitted functions. Rows are those of a `Replica`, leaves [1, ...].

    Attributes:
      begin: ``begin(values, step) -> (outer, rows)``: the outer parameters from the values of all
        fragments, and a replica that starts from them after some steps of the others.
      train: ``train(rows, cohort, number) -> (rows, loss)``: a step on the batch of this number,
        and the sum of its losses and their number, [2]. It donates the rows.
      update: ``update(p, rows, outer) -> values``: the update of a fragment.
      land: ``land(p, rows, outer, values) -> (outer, rows)``: receives a fragment. It donates both.
    """

    begin: Callable
    train: Callable
    update: Callable
    land: Callable


def compile(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    shapes: PyTree,
    specs: Specs | None,
    parts: Sequence[Fragment],
    alpha: float,
) -> Computations:
    """The computations on the mesh in scope, on which parameters keep their sharding.

    Args:
      loss: of the learner.
      optimizer: of the learner.
      shapes: a pytree like the parameters.
      specs: how they are sharded, or None.
      parts: the fragments.
      alpha: the share of its own parameters that the learner keeps.
    """

    def begin(values: list[list[jax.Array]], step: jax.Array) -> tuple[PyTree, Replica]:
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        for part, own in zip(parts, values, strict=True):
            params = paste(params, part, _by_path(part, own, params))
        state = _continued(optimizer.init(params), step)
        return params, jax.tree.map(lambda x: x[None], Replica(params, state, None))

    @fax.program(replicas=1)
    def train(rows: Replica, cohort: Cohort, number: jax.Array) -> tuple[Replica, jax.Array]:
        state, metrics = inner_steps(
            loss, optimizer, _State(PerClient(rows)), step_of(cohort, number), number, None, specs
        )
        total = fax.sum(metrics["loss"])
        return state.replicas.rows, jnp.stack([total.total, total.weight])

    def update(p: int, rows: Replica, outer: PyTree) -> list[jax.Array]:
        own = jax.tree.map(lambda x: x[0], rows.params)
        change = optax.tree.sub(pick(own, parts[p]), pick(outer, parts[p]))
        return [change[name] for name in parts[p]]

    def land(
        p: int, rows: Replica, outer: PyTree, values: list[jax.Array]
    ) -> tuple[PyTree, Replica]:
        own, new = jax.tree.map(lambda x: x[0], rows.params), _by_path(parts[p], values, outer)
        own = paste(own, parts[p], mixed(pick(own, parts[p]), new, alpha))
        rows = rows._replace(params=jax.tree.map(lambda x: x[None], own))
        return paste(outer, parts[p], new), rows

    mesh = jax.sharding.get_mesh()
    started = trained = None
    if not mesh.empty:
        outer, replica = _shardings(mesh, optimizer, shapes, specs)
        started, trained = (outer, replica), (replica, NamedSharding(mesh, PartitionSpec()))
    return Computations(
        jax.jit(begin, out_shardings=started),
        jax.jit(train, donate_argnums=0, out_shardings=trained),
        jax.jit(update, static_argnums=0),
        jax.jit(land, static_argnums=0, donate_argnums=(1, 2), out_shardings=started),
    )


def _shardings(
    mesh: Any, optimizer: optax.GradientTransformation, shapes: PyTree, specs: Specs | None
) -> tuple[PyTree, Replica]:
    """Those of the outer parameters and of a replica. What is like parameters is sharded alike."""

    def of_params(*leading: None) -> PyTree:
        def one(path: Any, x: Any) -> NamedSharding:
            spec = specs[name_of(path)] if specs else PartitionSpec()
            return NamedSharding(mesh, PartitionSpec(*leading, *spec))

        return jax.tree.map_with_path(one, shapes)

    own = optax.tree.map_params(
        optimizer,
        lambda x, sharding: sharding,
        jax.eval_shape(optimizer.init, shapes),
        of_params(None),
        transform_non_params=lambda x: NamedSharding(mesh, PartitionSpec()),
    )
    return of_params(), Replica(of_params(None), own, None)


def _by_path(part: Fragment, values: Sequence[jax.Array], params: PyTree) -> dict[str, jax.Array]:
    """The values of a fragment by path. Along Explicit mesh axes, they are sharded as in params."""
    before = pick(params, part)
    return {
        name: as_before(x, jax.typeof(before[name])) for name, x in zip(part, values, strict=True)
    }


def _continued(state: PyTree, step: Any) -> PyTree:
    """The initial state of an optimizer, with schedules that continue after some steps."""

    def one(x: Any) -> Any:
        if isinstance(x, optax.ScaleByScheduleState):
            return x._replace(count=jnp.asarray(step, x.count.dtype))
        return x

    def is_schedule(x: Any) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    return jax.tree.map(one, state, is_leaf=is_schedule)
