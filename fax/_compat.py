"""Differences between versions of JAX, and what it does not export.

Other modules use exported names of JAX, exported primitives, and parameters of equations that are
arguments of JAX's public functions. Everything else is here, and ``tests/test_compat.py`` tests
each of these functions with the installed version.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Primitive
from jax.extend.core import primitives as p
from jax.interpreters import partial_eval as pe
from jax.sharding import NamedSharding

# Devices


def is_described(device: Any) -> bool:
    """Whether a device is only part of a description, for which programs can just be compiled."""
    return type(getattr(device, "client", None)).__name__ == "CompileOnlyPyClient"


def device_kind(ctx: Any, platform: str) -> str | None:
    """The kind of device that a lowering rule lowers for, None if it is unknown, as in an export.

    It is that of the devices of the arguments or, without these, that of the mesh in scope.

    Args:
      ctx: the context of the rule.
      platform: the platform that the rule is for.
    """
    backend = ctx.module_context.backend
    if backend is not None and backend.platform == platform:
        return backend.devices()[0].device_kind
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None and device.platform == platform else None


# Equations


class Named:
    """The names of primitives that JAX does not export."""

    CUSTOM_VMAP = "custom_vmap_call"
    DIMENSION = "dim_as_value"
    OPTIMIZATION_BARRIER = "optimization_barrier"
    PURE_CALLBACK = "pure_callback"
    PSUM_INVARIANT = "psum_invariant"
    PVARY = "pvary"
    RESHARD = "reshard"
    SHARD_MAP = "shard_map"
    SPLIT = "split"
    STACK = "stack"
    UNSTACK = "unstack"


# Primitives that only call a jaxpr if nothing is differentiated, and the parameter that has it.
CALLS = {
    p.jit_p: "jaxpr",
    p.custom_jvp_call_p: "call_jaxpr",
    p.custom_vjp_call_p: "call_jaxpr",
}

# The parameters that are rules, which JAX runs some time after tracing, by primitive.
RULES = {
    p.custom_jvp_call_p.name: ("jvp_jaxpr_fun",),
    p.custom_vjp_call_p.name: ("fwd_jaxpr_thunk", "bwd"),
    Named.CUSTOM_VMAP: ("rule",),
}


def scan_sizes(eqn: JaxprEqn) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried.

    JAX 0.11 renamed the parameters that say so. But all other operands have one axis less in the
    body, and its results are carried values and rows.
    """

    def alike(atoms: Sequence[Any], avals: Sequence[Any]) -> int:
        return sum(a.aval.ndim == aval.ndim for a, aval in zip(atoms, avals, strict=True))

    body = eqn.params["jaxpr"]
    carried = alike(eqn.outvars, body.out_avals)
    return alike(eqn.invars, body.in_avals) - carried, carried


def checkpoint_params(params: Mapping[str, Any], jaxpr: Jaxpr, extra: int) -> dict[str, Any]:
    """Parameters of a `jax.checkpoint` with another jaxpr that has more operands at the end."""
    params = dict(params, jaxpr=jaxpr)
    if isinstance(params["prevent_cse"], tuple):  # one for each operand
        params["prevent_cse"] += (True,) * extra
    return params


def sharding_asked_for(eqn: JaxprEqn) -> NamedSharding | None:
    """The sharding of the result, for an equation that only asks for a sharding."""
    if eqn.primitive is p.sharding_constraint_p:
        return eqn.params["sharding"]
    return eqn.params["dst_sharding"] if eqn.primitive.name == Named.RESHARD else None


def has_sharding(eqn: JaxprEqn) -> bool:
    """Whether an equation specifies how values are sharded."""
    return eqn.primitive.name in (p.sharding_constraint_p.name, Named.RESHARD, Named.SHARD_MAP)


def without_varying(eqn: JaxprEqn, axes: frozenset[str]) -> JaxprEqn | None:
    """An equation without checks of what varies over some manual axes.

    This is its form in a `jax.shard_map` with ``check_vma=False``. None if that is the identity.
    """
    if eqn.primitive.name == Named.PVARY:
        left = tuple(axis for axis in eqn.params["axes"] if axis not in axes)
        return eqn.replace(params=dict(axes=left)) if left else None
    if eqn.primitive.name == Named.PSUM_INVARIANT and axes.issuperset(eqn.params["axes"]):
        params = dict(axes=eqn.params["axes"], axis_index_groups=None)
        return eqn.replace(primitive=p.psum_p, params=params)
    return eqn


def type_without_varying(aval: ShapedArray, axes: Iterable[str] | None = None) -> ShapedArray:
    """A type that does not say whether values vary over manual axes, all or the given ones."""
    known = aval.manual_axis_type
    left = {
        kind: frozenset() if axes is None else getattr(known, kind).difference(axes)
        for kind in ("varying", "unreduced", "reduced")
    }
    return aval.update(manual_axis_type=known.update(**left))


def on_device(aval: Any) -> bool:
    """Whether values of a type are in the memory of the device, where it can compute with them."""
    return getattr(aval, "memory_space", jax.memory.Space.Device) == jax.memory.Space.Device


def unchecked() -> contextlib.AbstractContextManager:
    """A context in which types do not say what varies over manual axes, and nothing checks it."""
    found = _names("jax._src.config", "_check_vma")
    return contextlib.nullcontext() if found is None else found[0](False)


def nested_in_manual(params: Mapping[str, Any], manual: Iterable[str]) -> dict[str, Any]:
    """Parameters of an equation inside axes that are already manual. They matter to `shard_map`."""
    axes = params.get("newly_manual_axes")
    return dict(params) if axes is None else dict(params, newly_manual_axes=axes.difference(manual))


def wrapped_function(param: Any) -> list[Any] | None:
    """What an equation's parameter holds that JAX wraps around a user's function at every trace.

    That is of a callback or a rule for batching, and None of any other parameter.
    """
    names = {"_FlatCallback": ("callback_func", "in_tree"), "ClosedRule": ("rule",)}
    held = names.get(type(param).__name__)
    known = held is not None and all(hasattr(param, name) for name in held)
    return [getattr(param, name) for name in held] if held is not None and known else None


def source_of(eqn: JaxprEqn) -> tuple[Any, Any]:
    """Where in the user's code an equation comes from, and its `jax.named_scope`."""
    return eqn.source_info.traceback, eqn.source_info.name_stack


def frames_of(eqn: JaxprEqn) -> list[tuple[str, int]]:
    """The files and lines of the calls that led to an equation, the innermost first."""
    traceback: Any = eqn.source_info.traceback
    frames = [] if traceback is None else traceback.frames
    return [(frame.file_name, frame.line_num) for frame in frames]


def is_named_axis(effect: Any, name: Any = None) -> bool:
    """Whether an effect only says that an axis name is used, or that this one is."""
    named = type(effect).__name__ == "NamedAxisEffect"
    return named and (name is None or effect.name == name)


# Rules of primitives


def register_dead_code(
    primitive: Primitive,
    rule: Callable[[list[bool], JaxprEqn], tuple[list[bool], JaxprEqn | None]],
) -> None:
    """Lets JAX remove unused results of a primitive.

    Args:
      primitive: the primitive.
      rule: takes which results are used, and the equation. Returns which operands are used, and
        the remaining equation.
    """

    def with_equation_last(used: list[bool], *rest: Any) -> tuple[list[bool], JaxprEqn | None]:
        return rule(used, rest[-1])  # JAX 0.12 passes which operands are alive before it

    pe.dce_rules[primitive] = with_equation_last


def register_lowering_of_jaxprs(
    primitive: Primitive, bind_with: Callable[..., Any], parameter: str
) -> None:
    """Lets a primitive's jaxpr contain operations of high-level JAX, new in 0.11.

    Differentiation uses them as they are; before compilation they are replaced.

    Args:
      primitive: the primitive.
      bind_with: binds it: takes the operands, and the parameters by name.
      parameter: the parameter that is a jaxpr.
    """
    lower: Callable[[Any], ClosedJaxpr] | None = getattr(pe, "lower_jaxpr2", None)
    if lower is None:
        return

    def to_lojax(*operands: Any, **params: Any) -> Any:
        return bind_with(*operands, **dict(params, **{parameter: lower(params[parameter])}))

    vars(primitive)["to_lojax"] = to_lojax


def cache_of_module(ctx: Any) -> dict[Any, Any]:
    """What lowering rules remember while JAX lowers a module. Keys need to be of a caller's own."""
    return getattr(ctx.module_context, "cached_primitive_lowerings", {})


def _names(module: str, *names: str) -> list[Any] | None:
    """Looks up names that JAX does not export. None if any of them does not exist."""
    try:
        return [getattr(importlib.import_module(module), name) for name in names]
    except (ImportError, AttributeError):
        return None


def is_invalid_result_of_jit(error: Exception) -> bool:
    """Whether an error only says that a jitted call, not which operation in it, made NaN or inf.

    Under `jax.debug_nans` JAX raises it internally, and catches it where it has the function.
    """
    return type(error).__name__ == "InternalFloatingPointError"


def is_ordered(effect: Any) -> bool:
    """Whether an effect is ordered, as with ``ordered=True``."""
    found = _names("jax._src.effects", "ordered_effects")
    return found is not None and found[0].contains(effect)


def register_error_check(
    primitive: Primitive, rule: Callable[..., tuple[Any, Sequence[Any]]]
) -> bool:
    """Lets `checkify` see errors inside a primitive.

    Args:
      primitive: the primitive.
      rule: takes the kinds of errors to look for and the operands, and the parameters by name,
        and returns an error and the results.

    Returns:
      Whether this version of JAX supports such a rule.
    """
    found = _names("jax._src.checkify", "error_checks", "check_p", "Error")
    if found is None:
        return False
    rules, check_p, kind = found

    def functionalized(*args: Any, **params: Any) -> tuple[Any, Sequence[Any]]:
        # Newer versions pass a context before the error so far.
        at = next(i for i, x in enumerate(args) if isinstance(x, kind))
        context, (so_far, kinds, *operands) = args[:at], args[at:]
        error, outs = rule(kinds, *operands, **params)
        leaves, tree = jax.tree.flatten(error)
        # Merge the error with earlier ones, as a check does.
        merged, _ = rules[check_p](*context, so_far, kinds, *leaves, err_tree=tree, debug=False)
        return merged, outs

    rules[primitive] = functionalized
    return True


def register_key_reuse(
    primitive: Primitive, parameter: str | None = None, widen: Callable[..., Any] | None = None
) -> bool:
    """Lets `jax.debug_key_reuse` see what a primitive does with random keys.

    Args:
      primitive: the primitive.
      parameter: the parameter that is a jaxpr, or None for a primitive that returns its operand.
      widen: takes an equation, the number of an operand, and which of its keys the jaxpr consumes.
        Returns which of them the equation consumes.

    Returns:
      Whether this version of JAX supports such a rule.
    """
    found = _names(
        "jax.experimental.key_reuse._core",
        *("key_reuse_signatures", "KeyReuseSignature", "Sink", "Source", "Forward"),
        *("dynamic_key_reuse_signature", "jaxpr_type_signature"),
    )
    if found is None:
        return False
    signatures, signature, sink, source, forward, dynamic, of_jaxpr = found

    if parameter is None or widen is None:
        signatures[primitive] = signature(forward(0, 0))
        return True

    def of_equation(name: str, widen: Callable[..., Any], eqn: JaxprEqn) -> Any:
        inner = of_jaxpr(eqn.params[name].jaxpr)
        used = (sink(s.idx, widen(eqn, s.idx, s.mask)) for s in inner.sinks)
        return signature(*used, *(source(s.idx) for s in inner.sources), *inner.forwards)

    signatures[primitive] = dynamic(functools.partial(of_equation, parameter, widen))
    return True


def is_jet(trace: Any) -> bool:
    """Whether the current transformation is `jax.experimental.jet`."""
    return type(trace).__name__ == "JetTrace"


def register_jet(primitive: Primitive, rule: Callable[..., Any]) -> bool:
    """Lets `jax.experimental.jet` differentiate a primitive.

    Args:
      primitive: the primitive.
      rule: takes the operands, the terms of each operand, and the parameters by name. Returns the
        results and the terms of each result.

    Returns:
      Whether this version of JAX supports such a rule.
    """
    found = _names("jax.experimental.jet", "jet_rules")
    if found is None:
        return False
    found[0][primitive] = rule
    return True
