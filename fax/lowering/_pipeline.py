"""How one `federated_map` becomes XLA, from top to bottom.

    evaluate          runs a map outside of any transformation, compiled once for all equal maps
    lowered           the rule that JAX calls for a map in a function that it compiles; equal maps
                      share a trace of what follows
    _compute          makes Explicit mesh axes Auto
    _run              runs one map on the mesh in scope, in six steps:

      manual axes           the client function gets the types that it has on one device
      lookups               keep the tables whole that XLA cannot split
      convolutions          are rewritten into operations that are fast in a loop
      uniform control flow  if the client function is sharded, devices branch together
      schedule              one device goes through its participants, batch after batch
      devices               participants are divided over devices, and totals reduced across them

All of this happens after differentiation and vectorization, whose rules do not depend on it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr
from jax.interpreters import mlir
from jax.sharding import AxisType

from fax import _compat
from fax.lowering import _devices, _schedule, _vectorize
from fax.lowering._lookups import with_whole_tables
from fax.lowering._manual_axes import with_axis_types
from fax.lowering._uniform_control_flow import make_uniform
from fax.lowering._vectorize import Device
from fax.lowering.convolutions._rewrite import rewrite as rewrite_convolutions
from fax.primitives import _effects, _jaxpr
from fax.primitives._compile_key import Structure, context, execute
from fax.primitives._debug_nans import watch_round
from fax.primitives._mask import apply_masks
from fax.primitives._round import AtMost, Round, federated_map_p
from fax.sharding._mesh import other_axes, split_axes
from fax.sharding._types import without_explicit_axes


def evaluate(*operands: Any, **params: Any) -> Sequence[Any]:
    """Evaluates a map that is called outside of any transformation."""
    return watch_round(functools.partial(_evaluate, **params), Round.of(params), operands)


def _evaluate(*operands: Any, **params: Any) -> Sequence[Any]:
    if jax.config.jax_disable_jit:
        device = Device(jax.default_backend(), jax.devices()[0].device_kind)
        return _compute(*operands, device=device, **params)
    jaxpr, _ = _jaxpr.trace(lambda *xs: Round.of(params).bind(*xs), map(jax.typeof, operands))
    return execute(Structure(jaxpr), *operands)


def lowered(platform: str) -> Callable:
    """The lowering rule for a platform. In a `jax.shard_map`, it does not check varying axes."""

    def lower(ctx: Any, *operands: Any, **params: Any) -> Any:
        device = Device(platform, _compat.device_kind(ctx, platform))
        avals = tuple(map(_compat.type_without_varying, ctx.avals_in))
        compute = functools.partial(_compute, device=device, **params)
        traces = _compat.cache_of_module(ctx)
        key = (federated_map_p, device, context(), avals, *_params_key(**params))
        own = ctx.replace(avals_in=avals)
        with _compat.unchecked():
            if key not in traces:  # most maps are the only one of their kind
                traces[key], run = None, compute
            else:
                if traces[key] is None:
                    jaxpr, consts = _jaxpr.trace(compute, avals)
                    traces[key] = functools.partial(_jaxpr.evaluate, jaxpr, *consts)
                run = traces[key]
            outs = mlir.lower_fun(run)(own, *operands)
        ctx.set_tokens_out(own.tokens_out)  # for the order of effects
        return outs

    return lower


def _params_key(jaxpr: ClosedJaxpr, **params: Any) -> tuple[Hashable, ...]:
    """The parameters of a map; jaxprs are equal if they compute the same, in the same lines."""
    sources = tuple(map(_compat.source_of, jaxpr.jaxpr.eqns))
    return Structure(jaxpr), sources, tuple(sorted(params.items()))


def _compute(*operands: Any, device: Device, **params: Any) -> Sequence[Any]:
    this = Round.of(params)
    run = functools.partial(_run, this, device)
    return without_explicit_axes(run, [a.sharding.spec for a in this.result_avals])(*operands)


def _run(this: Round, device: Device, *operands: Any) -> list[Any]:
    mesh = jax.sharding.get_abstract_mesh()
    axes = () if jax.config.jax_disable_jit else split_axes(this.group)
    along, others = (*mesh.manual_axes, *axes), other_axes(axes, mesh)
    if isinstance(this.vectorize, AtMost | None) and _effects.is_ordered(this):
        this = this.replace(vectorize=1)
    vectorized = _vectorize.vectorized(device, this)
    _effects.check(this, along, others, vectorized)
    dtypes = [aval.dtype for aval in this.value_avals]

    # Manual axes. JAX allows effects only if all axes are manual, including those of one device.
    manual = tuple(mesh.axis_names) if axes and _effects.has_effects(this) else axes
    types = dict.fromkeys(mesh.auto_axes, AxisType.Auto) | dict.fromkeys(manual, AxisType.Manual)
    if not mesh.empty:
        this = this.replace(jaxpr=with_axis_types(this.jaxpr, types, unchecked=along))

    # Lookups
    if along and len(others) > 1:
        this = this.replace(jaxpr=with_whole_tables(this.jaxpr))

    # Convolutions
    together, sharded = vectorized(this.group.size) > 1, bool(others)
    fast = rewrite_convolutions(
        this.jaxpr, this.convolutions, device.platform, vectorized=together, sharded=sharded
    )
    this = this.replace(jaxpr=fast)

    # Uniform control flow. The client function is traced with the axes in scope.
    varies = [i.mode == "placed" or bool(mesh.manual_axes) for i in this.inputs]
    uniform = bool(along and others)

    def client(*rows: Any) -> list[Any]:
        jaxpr = make_uniform(this.jaxpr, varies, along) if uniform else this.jaxpr
        return apply_masks(this, _jaxpr.evaluate(jaxpr, *rows))

    # Schedule. On CPU, joined totals compile faster but take longer to add up.
    apart = sharded or device.platform == "cpu"

    def on_one_device(operands: Sequence[Any], size: int) -> Sequence[Any]:
        return _schedule.run(client, this, operands, size, vectorized(size), apart)

    # Devices
    outs = _devices.run(on_one_device, this, operands, axes, manual, device.platform)
    return list(map(lax.convert_element_type, outs, dtypes))
