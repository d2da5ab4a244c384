"""How convolutions are written, and which ones are rewritten on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jaxprs import equations

from fax.lowering.convolutions._convolution import Way
from fax.lowering.convolutions._matmul import convolve
from fax.lowering.convolutions._rewrite import rewrite

NHWC = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize("sizes", [(2, 3, 4), (1, 1, 1)], ids=["matrices", "thin"])
def test_each_way_at_once_and_in_a_loop(sizes):
    """Loops are for large convolutions, so no other test computes values by them."""
    batch, channels, outputs = sizes
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, 5, 6, channels))
    w = rng.standard_normal((3, 2, channels, outputs))

    def conv(x, w, strides):
        padding, dilation = ((1, 0), (2, 1)), ((2, 1), (1, 2))
        return lax.conv_general_dilated(x, w, strides, padding, *dilation, NHWC)

    @jax.jit
    def everything(x, w):
        found, expected = {}, {}
        for form, strides in ("gather", (2, 1)), ("positions", (2, 1)), ("scatter", (1, 1)):
            (eqn,) = jax.make_jaxpr(lambda x, w, s=strides: conv(x, w, s))(x, w).eqns
            out = eqn.outvars[0].aval
            ways = [Way(form, at_once) for at_once in (True, False)]
            found[form] = [convolve(way, eqn.params, out, x, w) for way in ways]
            expected[form] = conv(x, w, strides)
        return found, expected

    found, expected = everything(x, w)
    for form, ours in found.items():
        for y in ours:
            np.testing.assert_allclose(y, expected[form], rtol=1e-11, atol=1e-11)


# What makes a convolution of 4 channels, and whether it is written as matrix products.
KINDS = {
    "plain": (dict(), False),
    "groups": (dict(groups=2), True),
    "one tap": (dict(window=(1, 1)), True),
    "one position": (dict(window=(4, 5)), True),
    "a window larger than the input": (dict(window=(5, 5), padding=3), True),
    "three dimensions": (dict(space=(4, 5, 3), window=(2, 2, 2)), True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_which_are_matrix_products_on_cpu(kind):
    """For the others XLA has a fast kernel, in loops too."""

    def traced(space=(4, 5), window=(2, 3), groups=1, padding=0):
        x, w = jnp.ones((1, 4, *space)), jnp.ones((2, 4 // groups, *window))
        pads, ones = [(padding, padding)] * len(space), [1] * len(space)
        return jax.make_jaxpr(
            lambda x, w: lax.conv_general_dilated(x, w, ones, pads, feature_group_count=groups)
        )(x, w)

    how, written = KINDS[kind]
    for sharded in False, True:
        found = rewrite(traced(**how), "auto", "cpu", vectorized=False, sharded=sharded)
        names = [eqn.primitive.name for eqn in equations(found)]
        assert ("conv_general_dilated" in names) == (sharded or not written)


@pytest.mark.parametrize("how", [dict(batch_group_count=2), dict(feature_group_count=2)])
def test_groups_of_sharded_convolutions_are_not_sliced(how):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 4, 5, 3)), rng.standard_normal((6, 4, 2, 3))
    w = w[:, : 4 // how.get("feature_group_count", 1)]

    def conv(x, w):
        return lax.conv_general_dilated(x, w, (2, 1), "SAME", **how)

    found = rewrite(jax.make_jaxpr(conv)(x, w), "auto", "cpu", vectorized=False, sharded=True)
    both = jax.jit(lambda x, w: (jaxpr_as_fun(found)(x, w)[0], conv(x, w)))
    ours, expected = both(x, w)
    np.testing.assert_allclose(ours, expected, rtol=1e-11, atol=1e-11)
    (eqn,) = (e for e in found.jaxpr.eqns if e.primitive.name == "conv_general_dilated")
    layout = eqn.params["dimension_numbers"]
    assert layout.lhs_spec == layout.out_spec == (0, 3, 1, 2)  # channels last
