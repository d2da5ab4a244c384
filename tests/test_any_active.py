"""A branch on whether anyone is active stays a branch if participants are vectorized."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxprs import equations

from fax.primitives._any_active import any_active


def step(active, x):
    someone, mine = any_active(active)
    return lax.cond(someone, lambda x: jnp.where(mine, 2 * x, x), lambda x: x, x)


def test_vectorized_it_stays_a_branch():
    """Nested, too, and with the flags along any axis."""
    active = np.array([[True, False, False], [False, False, False]])
    x = np.arange(1.0, 7).reshape(2, 3)
    several = jax.jit(jax.vmap(jax.vmap(step), (1, 1), 1))
    np.testing.assert_array_equal(several(active, x), np.where(active, 2 * x, x))
    (branch,) = (
        e for e in equations(jax.make_jaxpr(several)(active, x)) if e.primitive.name == "cond"
    )
    assert branch.invars[0].aval.shape == ()


def test_alone_the_one_in_the_branch_is_active():
    flags = np.array([True, False])
    compiled = jax.jit(any_active)
    for flag in flags:
        for someone, mine in (any_active(flag), compiled(flag)):
            assert someone == flag
            assert mine
