"""Convolutions are rewritten: equal values and gradients, and nothing slow left."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jaxprs import equations, operators
from meshes import mesh, put
from subsets import alike

import fax
from fax.lowering.convolutions._rewrite import rewrite

SETTINGS = ("auto", "matmul")
CHANNELS_LAST = {0: "bf_io->bf", 1: "b0f_0io->b0f", 2: "b01f_01io->b01f", 3: "b012f_012io->b012f"}


def mapped(fn, setting, *args, **how):
    """The function of each row, by `fax.map`."""
    n = len(args[0])
    return fax.program(clients=n)(lambda *args: fax.map(fn, *args, convolutions=setting, **how))(
        *args
    )


def assert_close(one, other, rtol=1e-11):
    def check(x, y):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        y = np.asarray(y, np.complex128)
        scale = np.max(np.abs(y), initial=1)
        np.testing.assert_allclose(np.asarray(x, np.complex128), y, rtol=rtol, atol=rtol * scale)

    jax.tree.map(check, one, other)


def convolutions_in(fn, *args):
    return convolutions_of(jax.jit(fn).lower(*args).compile())


def convolutions_of(compiled):
    """The convolutions that XLA is given, each as its layout and number of groups."""
    found = re.findall(r" convolution\(.*", compiled.as_text())
    groups = [re.search(r"feature_group_count=(\d+)", line) for line in found]
    labels = [re.search(r"dim_labels=(\S+?)[,\s]", line + " ")[1] for line in found]
    return [(label, int(g[1]) if g else 1) for label, g in zip(labels, groups, strict=True)]


# Values and gradients


@st.composite
def convolution(draw, max_dims=3):
    """Operands of a random convolution, and the function."""
    dims = draw(st.integers(0, max_dims))

    def sizes(low, high):
        return draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims))

    def layout(*named):
        order = draw(st.permutations(range(dims + 2)))
        shape = [0] * (dims + 2)
        for size, place in zip(named, order, strict=True):
            shape[place] = size
        return tuple(order), shape

    groups, batch_groups = draw(st.sampled_from([(1, 1)] * 3 + [(2, 1), (3, 1), (1, 2), (1, 3)]))
    space, window = sizes(1, 6), sizes(1, 3)
    channels = draw(st.integers(1, 3))
    outputs = draw(st.integers(1, 3)) * groups * batch_groups
    batch = draw(st.integers(1, 2)) * batch_groups
    padding = [draw(st.tuples(st.integers(-1, 2), st.integers(-1, 2))) for _ in range(dims)]
    strides, lhs_dilation, rhs_dilation = sizes(1, 3), sizes(1, 2), sizes(1, 2)
    for i in range(dims):  # JAX refuses a negative padding of more than there is
        low, high = padding[i]
        room = (space[i] - 1) * lhs_dilation[i] + 1 + low + high
        padding[i] = (low, high) if room >= 0 else (0, 0)
    lhs_spec, lhs_shape = layout(batch, channels * groups, *space)
    rhs_spec, rhs_shape = layout(outputs, channels, *window)
    out_spec, _ = layout(0, 0, *[0] * dims)

    def conv(x, w):
        return lax.conv_general_dilated(
            x,
            w,
            strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            lax.ConvDimensionNumbers(lhs_spec, rhs_spec, out_spec),
            groups,
            batch_groups,
        )

    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return conv, rng.standard_normal((2, *lhs_shape)), rng.standard_normal((2, *rhs_shape))


@settings(max_examples=settings.default.max_examples // 2)
@given(convolution(), st.sampled_from([*SETTINGS, "vectorized"]))
def test_values_and_gradients_of_random_convolutions(case, setting):
    conv, x, w = case

    def everything(x, w):
        y, back = jax.vjp(conv, x, w)
        return y, back(jnp.sin(y) + 1)

    how = dict(vectorize=2 if setting == "vectorized" else 1)
    setting = "auto" if setting == "vectorized" else setting

    @jax.jit
    def both(x, w):
        return mapped(everything, setting, x, w, **how), jax.vmap(everything)(x, w)

    assert_close(*both(x, w))


@pytest.mark.parametrize("setting", SETTINGS)
def test_derivatives_of_the_program(setting):
    """Gradients that are taken outside of the map, of second order and by forward mode."""
    x = np.linspace(-1, 1, 2 * 2 * 5 * 5 * 2).reshape(2, 2, 5, 5, 2)
    w = np.linspace(-1, 1, 3 * 3 * 2 * 3).reshape(3, 3, 2, 3)

    def client(x, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=numbers)
        return jnp.sum(jnp.tanh(y) ** 2)

    @fax.program(clients=2)
    def ours(x, w):
        return fax.mean(fax.map(client, x, fax.broadcast(w), convolutions=setting))

    def plain(x, w):
        return jnp.mean(jax.vmap(client, (0, None))(x, w))

    def derivatives(fn):
        gradient = jax.grad(fn, (0, 1))
        return gradient(x, w), jax.jvp(gradient, (x, w), (x + 1, w - 1))[1]

    compiled = jax.jit(derivatives, static_argnums=0)
    assert_close(compiled(ours), compiled(plain))


@pytest.mark.kinds(dtype=lambda name: name.rstrip("0123456789").removeprefix("b"), setting=alike)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8", "int32", "complex64"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_dtypes(setting, dtype):
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (2, 1, 8, 6, 4)).astype(jnp.dtype(dtype))
    w = rng.integers(-3, 4, (2, 3, 3, 2, 6)).astype(jnp.dtype(dtype))
    numbers = ("NHWC", "HWIO", "NHWC")
    wide = {"int8": jnp.int32, "bfloat16": jnp.float32}.get(dtype)

    def client(x, w):
        def conv(stride, preferred=None):
            return lax.conv_general_dilated(
                x,
                w,
                (stride, stride),
                "SAME",
                dimension_numbers=numbers,
                feature_group_count=2,
                preferred_element_type=preferred,
            )

        return conv(1), conv(2), conv(1, wide)

    # These are small integers, which all of the dtypes hold.
    assert_close(mapped(client, setting, x, w), jax.jit(jax.vmap(client))(x, w), rtol=0)


@pytest.mark.parametrize("setting", SETTINGS)
def test_empty_convolutions(setting):
    def client(x, w):
        return lax.conv(x, w, (1,), "VALID"), lax.conv(x[:, :0], w[:, :0], (1,), "SAME")

    x, w = jnp.ones((2, 1, 3, 4)), jnp.ones((2, 2, 3, 5))
    assert_close(mapped(client, setting, x, w), jax.vmap(client)(x, w))


# A network


class Network(nnx.Module):
    def __init__(self, rngs):
        def conv(*sizes, **how):
            return nnx.Conv(*sizes, rngs=rngs, param_dtype=jnp.float64, **how)

        self.layers = nnx.List(
            [
                conv(2, 4, (3, 3), strides=2),
                conv(4, 4, (3, 3), feature_group_count=4),
                conv(4, 8, (1, 1)),
                conv(8, 3, (3, 3), padding="VALID", kernel_dilation=2),
            ]
        )

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x)) + 0.1
        return x.mean((1, 2))


@functools.cache
def network():
    """Its graph and its parameters."""
    rng = np.random.default_rng(4)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Network(nnx.Rngs(0))))
    return graph, jax.tree.map(lambda p: rng.normal(scale=0.3, size=p.shape), shapes)


X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 2, 12, 12, 2)))


def loss(state, x):
    return jnp.mean(nnx.merge(network()[0], state)(x) ** 2)


def train(state, batches):
    def step(state, x):
        return jax.tree.map(lambda p, g: p - 0.1 * g, state, jax.grad(loss)(state, x)), None

    return lax.scan(step, state, batches)[0]


def averaging(setting, vectorize=None, client=train):
    @fax.program(clients=len(X))
    def one_round(state, x):
        how = dict(vectorize=vectorize, convolutions=setting)
        return fax.mean(fax.map(client, fax.broadcast(state), x, **how))

    return one_round


def plain(state, x):
    return jax.tree.map(lambda p: p.mean(0), jax.vmap(train, (None, 0))(state, x))


@functools.cache
def trained():
    return jax.device_get(jax.jit(plain)(network()[1], X))


@pytest.mark.always("auto-1")
@pytest.mark.kinds(setting=alike, vectorize=alike)
@pytest.mark.parametrize("vectorize", [1, 3])
@pytest.mark.parametrize("setting", [*SETTINGS, "xla"])
def test_a_stock_network(setting, vectorize):
    ours = jax.jit(averaging(setting, vectorize))(network()[1], X)
    assert_close(ours, trained())


@pytest.mark.long
def test_the_gradient_of_training_a_stock_network():
    def energy(fn):
        return jax.grad(lambda s: sum(jnp.sum(p**2) for p in jax.tree.leaves(fn(s, X))))

    ours = averaging("auto", client=jax.checkpoint(train))
    assert_close(jax.jit(energy(ours))(network()[1]), jax.jit(energy(plain))(network()[1]))


@pytest.mark.long
def test_what_is_left_of_convolutions():
    assert not convolutions_in(averaging("matmul"), network()[1], X)
    left = convolutions_in(averaging("auto"), network()[1], X)
    assert left
    assert {label for label, _ in left} == {CHANNELS_LAST[2]}
    assert {groups for _, groups in left} == {1}
    stock = convolutions_in(averaging("xla"), network()[1], X)
    assert {label for label, _ in stock} > {CHANNELS_LAST[2]}


def test_vectorized_participants_with_kernels_of_their_own_have_no_convolutions():
    assert not convolutions_in(averaging("auto", vectorize=len(X)), network()[1], X)

    @fax.program(clients=len(X))
    def same_kernel(state, x):
        def client(state, x):
            return loss(state, x[0])

        return fax.map(client, fax.broadcast(state), x, vectorize=len(X))

    assert {groups for _, groups in convolutions_in(same_kernel, network()[1], X)} == {1}


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_what_is_rewritten_for_a_platform(platform):
    """Where nothing has been measured, only what vectorization would make grouped."""
    jaxpr = jax.make_jaxpr(conv)(IMAGES[0], KERNELS[0])

    def rewritten(vectorized, **how):
        how = dict(platform=platform, vectorized=vectorized, sharded=False) | how
        return jaxpr_as_fun(rewrite(jaxpr, "auto", **how))

    gradient = jax.make_jaxpr(jax.grad(lambda w: jnp.sum(conv(IMAGES[0], w) ** 2)))(KERNELS[0])
    left = rewrite(gradient, "auto", platform, vectorized=False, sharded=False)
    assert (left is gradient) == (platform != "cpu")
    assert rewrite(gradient, "auto", "tpu", vectorized=True, sharded=False) is gradient

    several = jax.jit(jax.vmap(rewritten(vectorized=True)))
    assert_close(several(IMAGES, KERNELS)[0], jax.vmap(conv)(IMAGES, KERNELS))
    assert not convolutions_in(several, IMAGES, KERNELS)
    assert len(convolutions_in(jax.vmap(rewritten(True), (0, None)), IMAGES, KERNELS[0])) == 1
    assert len(convolutions_in(jax.vmap(rewritten(True, sharded=True)), IMAGES, KERNELS)) == 1


# Where a convolution can stand


def conv(x, w):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)


@jax.custom_jvp
def with_jvp(x, w):
    return conv(x, w)


with_jvp.defjvp(lambda primals, tangents: jax.jvp(conv, primals, tangents))


@jax.custom_vjp
def with_vjp(x, w):
    return conv(x, w)


with_vjp.defvjp(lambda x, w: jax.vjp(conv, x, w), lambda back, y: back(y))


def in_scan(x, w):
    return lax.scan(lambda x, _: (jnp.tanh(conv(x, w)), None), x, length=2)[0]


def in_while(x, w):
    def body(state):
        return state[0] + 1, jnp.tanh(conv(state[1], w))

    return lax.while_loop(lambda state: state[0] < 2, body, (0, x))[1]


def in_cond(x, w):
    return lax.cond(x[0, 0, 0, 0] > 0, conv, lambda x, w: conv(2 * x, w), x, w)


def under_vmap(x, w):
    return jax.vmap(conv)(jnp.stack([x, 2 * x]), jnp.stack([w, w + 1])).sum(0)


@jax.jit
def with_constants(x, w):
    return conv(x, w) * np.arange(3.0)


PLACES = {
    "constants": with_constants,
    "scan": in_scan,
    "cond": in_cond,
    "jit": jax.jit(conv),
    "checkpoint": jax.checkpoint(in_scan),
    "custom_jvp": with_jvp,
    "custom_vjp": with_vjp,
    "vmap": under_vmap,
    "while": in_while,
}
IMAGES = jnp.asarray(np.random.default_rng(1).standard_normal((2, 1, 5, 5, 3)))
KERNELS = jnp.asarray(np.random.default_rng(2).standard_normal((2, 3, 3, 3, 3)))


def client_of(place):
    def energy(x, w):
        return jnp.sum(PLACES[place](x, w) ** 2)

    # JAX does not differentiate a while loop backwards.
    return energy if place == "while" else jax.grad(energy, (0, 1))


EQUAL = {"checkpoint": "scan", "custom_jvp": "jit", "custom_vjp": "jit"}  # the same functions


@functools.cache
def expected_inside(place):
    return jax.device_get(jax.jit(jax.vmap(client_of(place)))(IMAGES, KERNELS))


@pytest.mark.parametrize("place", PLACES)
def test_convolutions_inside(place):
    def ours(x, w):
        return mapped(client_of(place), "matmul", x, w)

    compiled = jax.jit(ours).lower(IMAGES, KERNELS).compile()
    assert_close(compiled(IMAGES, KERNELS), expected_inside(EQUAL.get(place, place)))
    assert not convolutions_of(compiled)


def test_nested_maps_have_settings_of_their_own():
    def program(outer, inner):
        @fax.program(regions=2, clients=2)
        def nested(x, w):
            def region(x, w):
                rows = jnp.stack([x, 2 * x])
                both = fax.map(conv, rows, fax.broadcast(w), convolutions=inner)
                return fax.sum(both) + conv(x, w)

            return fax.map(region, x, w, placement="regions", convolutions=outer)

        return nested

    reference = jax.vmap(lambda x, w: 4 * conv(x, w))(IMAGES, KERNELS)
    for outer, inner, left in (("matmul", "xla", 1), ("xla", "matmul", 1), ("matmul", "matmul", 0)):
        compiled = jax.jit(program(outer, inner)).lower(IMAGES, KERNELS).compile()
        assert len(convolutions_of(compiled)) == left
        assert_close(compiled(IMAGES, KERNELS), reference)


def test_without_jit():
    with jax.disable_jit():
        ours = mapped(conv, "matmul", IMAGES, KERNELS)
    assert_close(ours, jax.vmap(conv)(IMAGES, KERNELS))


# Meshes


@pytest.mark.always("axes1-auto-matmul")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("axes", [dict(clients=2), dict(clients=2, model=2)])
def test_on_a_mesh(setting, kind, axes):
    with jax.set_mesh(mesh(kind, **axes)):
        ours = jax.jit(averaging(setting))(network()[1], put(X, "clients"))
    assert_close(jax.device_get(ours), trained())


@pytest.mark.parametrize("setting", SETTINGS)
def test_sharded_along_a_convolved_dimension(setting):
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 1, 8, 8, 3)))
    reference = jax.vmap(conv)(x, KERNELS)
    with jax.set_mesh(mesh("auto", clients=2, model=2)):
        ours = jax.jit(lambda x, w: mapped(conv, setting, x, w))
        assert_close(jax.device_get(ours(put(x, "clients", None, "model"), KERNELS)), reference)


# The setting


def test_it_is_printed_where_it_is_not_the_default():
    def printed(setting):
        text = str(jax.make_jaxpr(averaging(setting))(network()[1], X))
        return text.split("federated_map[")[1].split("jaxpr=")[0]

    assert "convolutions" not in printed("auto")
    assert "convolutions=matmul" in printed("matmul")


def test_only_maps_of_the_same_setting_fuse():
    def program(first, second, last=jnp.tanh):
        @fax.program(clients=2)
        def twice(x, w):
            y = fax.map(conv, x, w, convolutions=first)
            return fax.sum(fax.map(last, y, convolutions=second))

        return twice

    def again(y):
        return conv(y, jnp.ones((3, 3, 3, 3)))

    def settings_of(*args):
        eqns = equations(jax.make_jaxpr(program(*args))(IMAGES, KERNELS), inside_maps=False)
        return [e.params.get("convolutions") for e in eqns if e.primitive.name == "federated_map"]

    assert settings_of("xla", "auto") == ["xla"]
    assert settings_of("auto", "xla") == [None]
    assert settings_of("xla", "xla", again) == ["xla"]
    assert settings_of("xla", "matmul", again) == ["xla", "matmul"]


def test_gradients_keep_it():
    def energy(state):
        return sum(jnp.sum(p**2) for p in jax.tree.leaves(averaging("matmul")(state, X)))

    jaxpr = jax.make_jaxpr(jax.grad(energy))(network()[1])
    maps = [e for e in equations(jaxpr, inside_maps=False) if e.primitive.name == "federated_map"]
    assert len(maps) == len(operators(jax.grad(energy), network()[1])) == 2
    assert {eqn.params["convolutions"] for eqn in maps} == {"matmul"}


@pytest.mark.parametrize("value", ["fast", None, True, 1])
def test_a_setting_that_does_not_exist(value):
    message = rf"fax\.map: convolutions is {value!r}, expected 'auto', 'xla' or 'matmul'"
    with pytest.raises(fax.PlacementError, match=message):
        mapped(conv, value, IMAGES, KERNELS)


# Memory


def test_large_patches_are_not_stored():
    """Their slices are multiplied one by one, in the layer and in both of its derivatives."""
    x, w = jnp.ones((1, 4, 256, 256, 8), jnp.float32), jnp.ones((1, 5, 5, 8, 8), jnp.float32)

    def client(x, w):
        y, back = jax.vjp(conv, x, w)
        return back(y)

    lowered = jax.jit(lambda x, w: mapped(client, "matmul", x, w)).lower(x, w)
    memory = lowered.compile().memory_analysis().temp_size_in_bytes
    assert memory < 6 * x.nbytes  # all patches would be 25 of them


# Pools


@pytest.mark.kinds(window=alike, strides=alike, padding=alike)
@pytest.mark.parametrize("window", [(2, 2), (3, 2), (1, 3)])
@pytest.mark.parametrize("strides", [(2, 2), (1, 1), (2, 4)])
@pytest.mark.parametrize("padding", ["VALID", "SAME", ((1, 0), (0, 1))])
def test_derivatives_of_max_pools(window, strides, padding):
    """With ties, of which the first wins, infinities, and one NaN."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 5, (2, 3, 7, 8, 2)).astype(float)
    x[0, 0, 2, 3, 0], x[0, 1, 4, 4, 1], x[1, 2, 1, 1, 0] = np.inf, -np.inf, np.nan

    def client(x):
        y, pull = jax.vjp(lambda x: nnx.max_pool(x, window, strides, padding), x)
        return pull(jnp.arange(1.0, y.size + 1).reshape(y.shape))[0]

    @jax.jit
    def everything(x):
        ours = [mapped(client, "auto", x, vectorize=vectorize) for vectorize in (1, 2)]
        return ours, jax.vmap(client)(x)

    ours, expected = everything(x)
    for found in ours:
        np.testing.assert_array_equal(found, expected)
    for setting, left in (("auto", False), ("xla", True)):
        text = jax.jit(lambda x, s=setting: mapped(client, s, x)).lower(x).as_text()
        assert ("select_and_scatter" in text) == left


def test_large_windows_are_left():
    x = np.ones((2, 1, 20, 20, 1))
    client = jax.grad(lambda x: jnp.sum(nnx.max_pool(x, (9, 9), (9, 9)) ** 2))
    text = jax.jit(lambda x: mapped(client, "auto", x)).lower(x).as_text()
    assert "select_and_scatter" in text
