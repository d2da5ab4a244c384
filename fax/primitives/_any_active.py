"""The primitive `any_active`: whether any of the participants in a vectorized batch is active.

Vectorized clients take their local steps together, and `vmap` turns a `lax.cond` on a client's
own flag into a select: all clients compute for the capacity of the longest one, whether or not any
of them needs it. `any_active` returns a flag that is not batched by `vmap`, so that a `lax.cond` on
it stays a branch::

    someone, mine = any_active(active)
    carry = lax.cond(someone, lambda c: select(mine, step(c), c), lambda c: c, carry)

Without vectorization, a client in the branch is active: ``mine`` is the constant True, and the
compiler removes the select.
"""

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

any_active_p = Primitive("any_active")
any_active_p.multiple_results = True


def any_active(active: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether a bool is true for anyone in the batch, and if so, whether for this one."""
    someone, mine = any_active_p.bind(active)
    return someone, mine


def _alone(active):
    return [active, jnp.ones_like(active)]


def _batch(operands, dims):
    (active,), (dim,) = operands, dims
    someone, _ = any_active_p.bind(jnp.any(active, axis=dim))
    return [someone, active], [None, dim]


any_active_p.def_impl(_alone)
any_active_p.def_abstract_eval(lambda active: [active, active])
mlir.register_lowering(any_active_p, mlir.lower_fun(_alone, multiple_results=True))
batching.primitive_batchers[any_active_p] = _batch
