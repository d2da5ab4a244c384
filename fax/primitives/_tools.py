"""Rules for JAX's tools: `checkify`, `jax.debug_key_reuse` and `jax.experimental.jet`.

Each of them works inside the client function as under `jax.vmap`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from fax import _compat
from fax._placement import Placement
from fax.primitives import _jaxpr
from fax.primitives._broadcast import broadcast_p
from fax.primitives._collect import collect_p, distribute_p
from fax.primitives._map import reduce_late
from fax.primitives._reduce import max_p, mean_p, min_p, sum_p
from fax.primitives._round import (
    SERVER,
    Contribution,
    Out,
    Round,
    federated_map_p,
    pick,
    seen_avals,
)

if TYPE_CHECKING:
    from jax.experimental import checkify

# Errors
#
# The client function is replaced by one that also returns its errors. The error of the first
# participant that has one is reported. Participants left out of all results are ignored.


def _check(kinds, *operands, **params):
    from jax.experimental import checkify

    this = Round.of(params)
    count = len(this.outputs)
    checked = checkify.checkify(functools.partial(_jaxpr.evaluate, this.jaxpr), errors=kinds)
    structure: Any = None

    def client(*rows):
        nonlocal structure
        error, outs = checked(*rows)
        if this.outputs and all(out.mask is not None for out in this.outputs):
            counts = functools.reduce(jnp.logical_or, outs[count:])
            found, *rest = _parts(error)
            error = jax.tree.unflatten(
                jax.tree.structure(error), jax.tree.leaves(([x & counts for x in found], rest))
            )
        leaves, structure = jax.tree.flatten(error)
        return [*outs[:count], *map(jnp.asarray, leaves), *outs[count:]]

    jaxpr, consts = _jaxpr.trace(client, seen_avals(operands, this.inputs))
    outs = this.replace(
        inputs=(SERVER,) * len(consts) + this.inputs,
        outputs=this.outputs + (Out("placed"),) * structure.num_leaves,
        jaxpr=jaxpr,
    ).bind(*consts, *operands)
    return _of_first(jax.tree.unflatten(structure, outs[count:]), this.group), outs[:count]


def _parts(error: checkify.Error) -> tuple[list[Any], list[Any], list[Any]]:
    """Whether errors of each type were found, which ones, and what their messages show."""
    (found, which, shown), _ = error.tree_flatten()
    return jax.tree.leaves(found), jax.tree.leaves(which), jax.tree.leaves(shown)


def _of_first(errors: checkify.Error, group: Placement) -> checkify.Error:
    """The error of the first participant that has one, from a row for each participant."""
    everybody = jax.tree.map(lambda x: collect_p.bind(x, **group.params), errors)
    found, *_ = _parts(everybody)
    if not found:
        return errors
    first = jnp.argmax(functools.reduce(jnp.logical_or, found))
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, first, keepdims=False), everybody)


# Random keys
#
# A key that a client function consumes is consumed, whether it is a participant's or the server's.
# In the latter case all participants draw the same numbers. As under `jax.vmap`, that is allowed.


def _widen(eqn: JaxprEqn, number: int, used: bool | np.ndarray) -> bool | np.ndarray:
    """Which keys of an operand are consumed, given which ones of a participant's row are."""
    if isinstance(used, bool) or eqn.params["in"][number].mode == "server":
        return used
    return np.broadcast_to(used, (eqn.params["size"], *used.shape)).copy()


# Taylor series
#
# Terms have the mode of their value. Those of a maximum come from the participants that attain it.


def _jet(operands: Sequence[Any], terms: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    from jax.experimental.jet import jet

    this = Round.of(params)
    order = len(terms[0])
    moving = [jnp.issubdtype(aval.dtype, jnp.inexact) for aval in this.jaxpr.in_avals]
    if not any(moving):
        results = this.bind(*operands)
        return results, [[jnp.zeros_like(x)] * order for x in results]
    inexact = [jnp.issubdtype(aval.dtype, jnp.inexact) for aval in this.value_avals]
    late = [i and out.mode in ("max", "min") for i, out in zip(inexact, this.outputs, strict=True)]
    count = len(operands)

    def client(*rows):
        own = iter(rows[count:])
        series = [[next(own) for _ in range(order)] for _ in range(sum(moving))]

        def of_moving(*values):
            given = iter(values)
            seen = [next(given) if m else x for x, m in zip(rows[:count], moving, strict=True)]
            # JAX's jet fails in rules of `jax.custom_jvp` and `jax.custom_vjp`.
            return _jaxpr.evaluate_in_steps(this.jaxpr, *seen, plain=True)

        outs, out_terms = jet(
            of_moving, tuple(pick(moving, rows[:count])), series, factorial_scaled=False
        )
        return [*outs, *(t for own in pick(inexact, out_terms[: len(inexact)]) for t in own)]

    modes = pick(moving, this.inputs)
    inputs = (*this.inputs, *(mode for mode in modes for _ in range(order)))
    operands = [*operands, *(t for own in pick(moving, terms) for t in own)]
    jaxpr, consts = _jaxpr.trace(client, seen_avals(operands, inputs))
    outvars = jaxpr.jaxpr.outvars
    own = iter(outvars[len(this.jaxpr.out_avals) :])
    values = [
        part._replace(mode="placed") if waits else part
        for part, waits in zip(this.contributions(outvars), late, strict=True)
    ]
    parts = [*values]
    for part, i in zip(values, inexact, strict=True):
        parts += [part._replace(value=next(own)) for _ in range(order if i else 0)]
    masks = [part.mask for part in pick(late, values) if part.mask is not None]
    parts += [Contribution(mask, "placed") for mask in masks]
    inputs = (*[SERVER] * len(consts), *inputs)
    bound = this.assemble(inputs, jaxpr.jaxpr.invars, parts, jaxpr.jaxpr.eqns)
    outs = iter(bound.bind(*consts, *operands))
    results = [next(outs) for _ in values]
    series = [
        [next(outs) if i else jnp.zeros_like(x) for _ in range(order)]
        for x, i in zip(results, inexact, strict=True)
    ]
    for k, (out, waits) in enumerate(zip(this.outputs, late, strict=True)):
        if waits:
            mask = None if out.mask is None else next(outs)
            results[k], series[k] = _reduce_late(out.mode, results[k], series[k], mask, this.group)
    return results, series


def _reduce_late(mode, rows, series, mask, group):
    order = len(series)
    reduced = reduce_late([mode] * order, [rows] * order, series, [mask] * order, group)
    return reduced[0][0], [term for _, term in reduced]


def _jet_linear(primitive, operands, terms, **params):
    (x,), (own,) = operands, terms
    return primitive.bind(x, **params), [primitive.bind(term, **params) for term in own]


def _jet_extremum(mode, operands, terms, **params):
    return _reduce_late(mode, operands[0], terms[0], None, Placement.of(params))


_compat.register_error_check(federated_map_p, _check)
_compat.register_key_reuse(federated_map_p, "jaxpr", _widen)
_compat.register_jet(federated_map_p, _jet)
for _linear in (broadcast_p, collect_p, distribute_p, sum_p, mean_p):
    _compat.register_jet(_linear, functools.partial(_jet_linear, _linear))
for _primitive in (broadcast_p, collect_p, distribute_p):
    _compat.register_key_reuse(_primitive)
for _extremum in (max_p, min_p):
    _compat.register_jet(_extremum, functools.partial(_jet_extremum, _extremum.name))
