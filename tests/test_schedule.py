"""How many participants a device works on at once, if nobody says."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh
from jaxprs import equations

import fax
from fax.lowering import _vectorize
from fax.lowering._client_cost import ClientCost
from fax.lowering._vectorize import Chip, Device
from fax.primitives._round import AtMost, Round, Vectorize

N, STEPS, BATCH = 12, 3, 5
MIB = 2**20
V5E = Chip(state=64 * MIB, operation=64 * MIB, main=16 * 2**30, start=1_500_000)


def training(model, params, client=lambda fn: fn, **how):
    """A round of local training, and the shapes of its arguments."""

    def train(params, x):
        def step(state, x):
            y, momentum = state
            gradient = jax.grad(lambda y: jnp.mean(model(y, x) ** 2))(y)
            momentum = jax.tree.map(jnp.add, momentum, gradient)
            return (jax.tree.map(jnp.subtract, y, momentum), momentum), None

        start = params, jax.tree.map(jnp.zeros_like, params)
        return lax.scan(step, start, x)[0][0]

    @fax.program(clients=N)
    def program(params, x):
        return fax.mean(fax.map(client(train), fax.broadcast(params), x, **how))

    return program, params


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, "float32")


def dense(width, **how):
    def model(w, x):
        return jnp.tanh(x @ w[0]) @ w[1]

    program, params = training(model, [shape(width, width)] * 2, **how)
    return program, (params, shape(N, STEPS, BATCH, width))


def convolved(w, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)


def convolution(image=8, channels=4, **how):
    program, params = training(convolved, shape(3, 3, channels, channels), **how)
    return program, (params, shape(N, STEPS, BATCH, image, image, channels))


def rounds(program, args):
    found = (e for e in equations(jax.make_jaxpr(program)(*args)))
    return [Round.of(e.params) for e in found if e.primitive.name == "federated_map"]


def cost(program, args):
    return ClientCost.of(rounds(program, args)[0])


# What a client function is


def test_the_state_is_what_the_largest_loop_carries():
    width = 16
    found = cost(*dense(width))
    assert found.numbers == 4 * width**2  # two matrices and their momentum
    assert found.state == 4 * found.numbers + 4 * BATCH * width  # and a batch
    assert found.products == 5  # two forward, two by the weights, one by the hidden layer
    assert found.images == 0
    assert found.temporary >= found.state
    assert found.largest == 3 * 4 * width**2  # two matrices are added, or subtracted


def test_a_client_function_without_a_loop_has_its_results_for_state():
    @fax.program(clients=N)
    def program(w, x):
        return fax.mean(fax.map(lambda w, x: jax.grad(lambda w: jnp.sum((x @ w) ** 2))(w), w, x))

    args = shape(N, 6, 7), shape(N, BATCH, 6)
    found = cost(program, args)
    assert (found.state, found.numbers, found.products) == (4 * 42, 42, 2)


def test_products_of_inner_loops_count_as_often_as_they_run():
    def model(w, x):
        return lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, length=7)[0]

    program, params = training(model, shape(8, 8))
    found = cost(program, (params, shape(N, STEPS, BATCH, 8)))
    assert found.numbers == 2 * 8**2
    assert found.products == 7 + 2 * 7


def test_of_a_loop_of_unknown_length_one_step_counts():
    @fax.program(clients=N)
    def program(w, x):
        def client(w, x):
            return lax.while_loop(lambda h: jnp.max(h) < 9, lambda h: jnp.tanh(h @ w) @ w.T, x)

        return fax.mean(fax.map(client, fax.broadcast(w), x))

    found = cost(program, (shape(6, 6), shape(N, BATCH, 6)))
    assert (found.state, found.numbers, found.products) == (4 * BATCH * 6, BATCH * 6, 2)


def test_images_are_the_results_of_convolutions_with_kernels_of_their_own():
    found = cost(*convolution(image=8, channels=4))
    forward, by_kernel = 4 * BATCH * 8 * 8 * 4, 4 * 3 * 3 * 4 * 4
    assert found.images == forward + by_kernel

    @fax.program(clients=N)
    def shared(w, x):
        both = [fax.map(client, fax.broadcast(w), x) for client in (convolved, jax.jit(convolved))]
        return fax.sum(both)

    both = rounds(shared, (shape(3, 3, 4, 4), shape(N, BATCH, 8, 8, 4)))
    assert [ClientCost.of(this).images for this in both] == [0, 0]


def test_a_gradient_of_a_round_has_the_state_of_the_round():
    program, (params, x) = dense(16, client=jax.checkpoint)

    def loss(params, x):
        return sum(jnp.sum(y**2) for y in program(params, x))

    forward, backward = map(ClientCost.of, rounds(jax.grad(loss), (params, x)))
    assert forward.state == cost(program, (params, x)).state
    assert forward.state <= backward.state <= 2 * forward.state


# The rule


@pytest.mark.parametrize(
    ("state", "products", "expected"),
    [
        (MIB // 8, 8, 64),  # no more than is useful
        (4 * MIB, 8, 16),  # what fits into half of the fast memory
        # A doubling saves 18.75 MB, the next one 9.4, and costs 12.6.
        (4 * MIB, 400, 32),
        (4 * MIB, 1000, 64),
        (15 * MIB, 8, 4),
        (0, 0, 64),
    ],
)
def test_what_fits_into_fast_memory_is_vectorized(state, products, expected):
    found = ClientCost(state, state // 4, products, temporary=4 * state)
    assert _vectorize.default(V5E, found) == expected


def test_a_large_model_trains_one_at_a_time():
    assert _vectorize.default(V5E, ClientCost(16_000_004, 4_000_001, 10_000)) == 1
    # Half as many bytes, but as many numbers.
    assert _vectorize.default(V5E, ClientCost(8_000_002, 4_000_001, 10_000)) == 1


def test_intermediate_results_have_to_fit_into_main_memory():
    assert _vectorize.default(V5E, ClientCost(MIB, MIB // 4, 8, temporary=2**30)) == 4
    assert _vectorize.default(V5E, ClientCost(MIB, MIB // 4, 8, temporary=2**36)) == 1


def test_results_of_convolutions_have_to_fit_into_fast_memory():
    assert _vectorize.default(V5E, ClientCost(4 * MIB, MIB, 8, images=12 * MIB)) == 4
    gpu = Chip(32 * MIB, 32 * MIB, 16 * 2**30, 1_600_000, most=16, grouped=False)
    assert _vectorize.default(gpu, ClientCost(MIB, MIB // 4, 8)) == 16
    assert _vectorize.default(gpu, ClientCost(MIB, MIB // 4, 8, images=1)) == 1


def at_once(device, size=N, width=8, **how):
    (this,) = rounds(*dense(width))
    return _vectorize.vectorized(Device(*device), this.replace(**how))(size)


def test_the_largest_operation_has_to_fit_into_fast_memory():
    found = ClientCost(MIB, MIB // 4, 2, largest=16 * MIB)
    assert _vectorize.default(V5E, found) == 4
    assert _vectorize.default(V5E._replace(operation=128 * MIB), found) == 8


def test_who_decides():
    tpu, cpu = ("tpu", "TPU v5 lite"), ("cpu",)
    assert [at_once(tpu), at_once(cpu), at_once(("gpu", "NVIDIA H100"))] == [N, 1, N]
    for device in (tpu, cpu):
        assert at_once(device, vectorize=5) == 5
        assert at_once(device, vectorize=100) == N
        assert at_once(device, vectorize=Vectorize.ALL) == N
    assert at_once(tpu, vectorize=AtMost(4)) == 4
    assert at_once(tpu, vectorize=AtMost(1)) == 1
    assert at_once(cpu, vectorize=AtMost(4)) == 1
    assert at_once(tpu, vectorize=Vectorize.INHERITED) == N
    assert at_once(tpu, width=1500) == at_once(tpu, width=1500, vectorize=AtMost(4)) == 1


def test_a_bound_joins_what_fax_adds_to_a_map():
    """A cohort's bound is that of the whole round, its reductions included."""
    program, args = dense(8, vectorize=AtMost(4))
    (this,) = rounds(program, args)
    assert this.vectorize == AtMost(4)
    assert "vectorize=at most 4" in str(jax.make_jaxpr(program)(*args))


def test_an_operation_on_rows_joins_a_map_with_its_number():
    @fax.program(clients=N)
    def program(x):
        return fax.sum(2 * fax.map(jnp.sin, x, vectorize=4))

    (this,) = rounds(program, (shape(N),))
    assert this.vectorize == 4


@pytest.mark.parametrize(("size", "expected"), [(64, 16), (20, 20), (50, 10), (47, 16), (3, 3)])
def test_batches_are_equal_if_possible(size, expected):
    assert _vectorize._even(size, 20) == expected


# What is lowered


def lowered(make, *args, kind=None, **how):
    """A program as it is lowered for a TPU, whose kind only the mesh in scope says."""
    program, shapes = make(*args, **how)
    device = kind and AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    mesh = AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(program).trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()


def test_a_tpu_runs_small_models_together_and_large_ones_one_by_one():
    small, large = lowered(dense, 8), lowered(dense, 1500)
    assert small == lowered(dense, 8, vectorize=N) != lowered(dense, 8, vectorize=1)
    assert large == lowered(dense, 1500, vectorize=1)


def test_a_tpu_leaves_convolutions_to_its_compiler():
    assert lowered(convolution) == lowered(convolution, vectorize=N, convolutions="xla")


def test_the_kind_of_tpu_matters():
    width = 700  # two matrices and their momentum are 8 MB
    assert lowered(dense, width, kind="TPU v5 lite") == lowered(dense, width, vectorize=6)
    assert lowered(dense, width, kind="TPU v2") == lowered(dense, width, vectorize=1)
