"""Differences between versions of JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.extend.core import ClosedJaxpr, Primitive
from jax.interpreters import partial_eval as pe


def register_lowering_of_jaxprs(
    primitive: Primitive, bind_with: Callable[..., Any], parameter: str
) -> None:
    """Lets a primitive's jaxpr hold operations of high-level JAX, which come since 0.11.

    Differentiation sees them as they are; before compilation they are replaced.

    Args:
      primitive: the primitive.
      bind_with: binds it: takes the operands, and the parameters by name.
      parameter: the one that is a jaxpr.
    """
    lower: Callable[[Any], ClosedJaxpr] | None = getattr(pe, "lower_jaxpr2", None)
    if lower is None:
        return

    def to_lojax(*operands: Any, **params: Any) -> Any:
        return bind_with(*operands, **dict(params, **{parameter: lower(params[parameter])}))

    vars(primitive)["to_lojax"] = to_lojax
