"""Reports of what programs cost, against counts by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec
from meshes import mesh

import fax
from fax.inspect import report

CLIENTS, STEPS, BATCH, WIDTH, HIDDEN = 6, 5, 4, 3, 8


def each(found):
    return [(c.operation, c.axes, c.dtype, c.bytes, c.count) for c in found]


def typed(shape, *spec, dtype=np.float32):
    on = jax.sharding.NamedSharding(jax.sharding.get_mesh(), PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=on)


def network():
    """A network whose hidden layer is split over `model`, and its types."""

    def loss(p, x):
        split = lax.with_sharding_constraint(jnp.tanh(x @ p["in"]), PartitionSpec(None, "model"))
        return jnp.sum((split @ p["out"] - x) ** 2, axis=1)

    types = {"in": typed((WIDTH, HIDDEN), None, "model"), "out": typed((HIDDEN, WIDTH), "model")}
    return loss, types


# Programs


def test_a_round_with_tensor_parallel_clients():
    with jax.set_mesh(mesh(clients=2, model=4)):
        loss, params = network()

        @fax.program(clients=CLIENTS)
        def program(params, batches):
            def client(p, batches):
                def step(p, x):
                    gradient = jax.grad(lambda p: loss(p, x).sum())(p)
                    return jax.tree.map(lambda w, g: w - 0.1 * g, p, gradient), None

                return lax.scan(step, p, batches)[0]

            return fax.mean(fax.map(client, fax.broadcast(params), batches))

        batches = typed((CLIENTS, STEPS, BATCH, WIDTH), "clients")
        found = report(jax.jit(program, donate_argnums=0), params, batches)
    steps = CLIENTS // 2 * STEPS  # of a device
    part = 4 * 2 * WIDTH * HIDDEN // 4  # of the parameters
    assert each(found.over("model")) == [
        ("all-reduce", ("model",), "float32", 4 * BATCH * WIDTH, steps)  # of the second layer
    ]
    assert each(found.over("clients")) == [("all-reduce", ("clients",), "float32", part, 1)]
    # Two products forward, and three backward: none for the gradient of the batch.
    assert found.flops == 5 * steps * 2 * BATCH * WIDTH * HIDDEN // 4
    rows = 4 * steps * BATCH * WIDTH
    assert found.memory.argument_bytes == part + rows
    assert found.memory.aliased_bytes == part
    pointers = 8 * 2  # to the results
    assert found.memory.output_bytes == part + pointers
    assert found.memory.peak_bytes == part + rows + pointers + found.memory.temporary_bytes
    assert (found.device_kind, found.num_devices, found.num_slices) == ("cpu", 8, 1)
    assert dict(found.mesh_shape) == {"clients": 2, "model": 4}
    assert found.cycles is None
    assert found.seconds is None
    assert found.padding is None
    assert not found.unknown_loops
    assert found.between_slices == ()
    lines = str(found).splitlines()
    assert lines[0] == "8 devices (cpu), mesh clients=2 x model=4"
    assert "  model    all-reduce  float32   48 B     15     720 B" in lines
    assert "Matrix products and convolutions: 3.6 kflop" in lines


def test_a_gradient_sends_the_cotangent_of_the_model_back():
    @fax.program(clients=8)
    def program(w, rows):
        return fax.mean(fax.map(lambda w, x: jnp.sin(w * x), fax.broadcast(w), rows))

    with jax.set_mesh(mesh(clients=4)):
        args = typed((7,)), typed((8, 7), "clients")
        found = report(jax.grad(lambda w, x: jnp.sum(program(w, x) ** 2)), *args)
        again = report(lambda w, x: lax.scan(lambda w, _: (program(w, x), 0), w, None, 3)[0], *args)
    one = ("all-reduce", ("clients",), "float32", 4 * 7)
    assert each(found.collectives) == [(*one, 1)] * 2  # the mean, and its cotangent
    assert each(again.collectives) == [(*one, 3)]
    assert again.collectives[0].total_bytes == 3 * 4 * 7


def test_branches_and_padding_of_a_cohort():
    """Four clients with 1, 3, 4 and 4 examples in two batches. Steps without any are skipped."""
    rows = np.ones((4, WIDTH), np.float32)
    data = fax.data.InMemory({f"{n}": {"x": rows[:k]} for n, k in enumerate((1, 3, 4, 4))})
    with jax.set_mesh(mesh(clients=2, model=4)):
        loss, params = network()
        algorithm = fax.algorithms.fedavg(lambda p, batch, key: loss(p, batch["x"]), optax.sgd(0.1))
        state = algorithm.init(jax.tree.map(lambda x: np.ones(x.shape, x.dtype), params))
        cohort = next(fax.data.cohorts(data, 4, batch_size=2, placement="clients"))
        found = report(algorithm.round, state, cohort)
    assert found.padding == fax.inspect.Padding(examples=4 / 16, steps=1 / 8, clients=0)
    assert "Padding: 25% of examples, 12% of steps, 0% of clients" in str(found)
    in_branches = [c for c in found.collectives if c.conditional]
    assert {(c.axes, c.count) for c in in_branches} == {(("model",), 2 * 2)}
    assert "at most 4" in str(found)
    cohort = dataclasses.replace(cohort, mask=cohort.mask.at[0].set(False))
    assert report(lambda cohort: cohort.mask, cohort).padding.clients == 1 / 4


def test_a_loop_of_unknown_length_is_never_one_trip_in_silence():
    def halve(x):
        def body(x):
            return x / 2 @ jnp.ones((4, 4), x.dtype)

        spread = jax.shard_map(
            lambda x: lax.while_loop(lambda x: lax.psum(x.sum(), "clients") > 1, body, x),
            in_specs=PartitionSpec("clients"),
            out_specs=PartitionSpec("clients"),
        )
        return lax.fori_loop(0, 3, lambda _, x: spread(x), x)

    with jax.set_mesh(mesh(clients=2)):
        found = report(halve, typed((2, 4), "clients"))
    (only,) = found.collectives  # in the condition, which is checked once more
    assert (only.count, only.loops, only.unknown_loops) == (3 * 2, 2, 1)
    assert found.flops == 3 * 2 * 4 * 4
    assert found.unknown_loops
    text = str(found)
    assert "at least 6" in text
    assert "at least 96 flop" in text
    assert text.endswith("Loops of unknown length count as one trip.")


def test_a_loop_that_counts_down_without_a_sign():
    """XLA subtracts 1 by adding 2^32 - 1, and takes that for one trip."""

    def fn(x):
        start = jnp.uint32(9), x
        return lax.while_loop(lambda c: c[0] > 2, lambda c: (c[0] - 1, jnp.sin(c[1] @ x)), start)

    found = report(fn, jax.ShapeDtypeStruct((4, 4), "float32"))
    assert (found.flops, found.unknown_loops) == (7 * 2 * 4**3, False)


def test_flops_of_convolutions():
    """Each output is a sum over the part of the window that is in the image."""

    def fn(x, k):
        return lax.conv_general_dilated(
            x,
            k,
            window_strides=(2, 1),
            padding=[(1, 2), (0, 1)],
            lhs_dilation=(1, 2),
            rhs_dilation=(2, 1),
            feature_group_count=2,
        )

    x, k = (jax.ShapeDtypeStruct(s, "float32") for s in ((3, 4, 7, 5), (6, 2, 3, 2)))
    multiplications = fn(np.ones(x.shape), np.ones(k.shape)).sum()  # of ones with ones
    assert report(fn, x, k).flops == 2 * multiplications


def test_what_can_be_passed():
    def fn(x, n):
        return x * n

    x = jax.ShapeDtypeStruct((3,), "float32")
    jitted = jax.jit(fn, static_argnums=1)
    lowered = jitted.lower(x, 2)
    same = [report(jitted, x, n=2), report(lowered), report(lowered.compile()), report(fn, x, 2)]
    assert same[:3] == [same[0]] * 3
    assert same[3].memory.argument_bytes == 12 + 8  # n is traced
    assert str(same[0]).startswith("1 device (cpu)\n")
    assert "Nothing is sent." in str(same[0])
    for wrong, message in (
        ((3,), "fn is 3, expected a function, or one that jax.jit has lowered or compiled"),
        ((lowered, x), "fn is a Lowered function, which already has its arguments. Pass it alone"),
    ):
        with pytest.raises(ValueError, match=f"fax.inspect.report: {message}"):
            report(*wrong)
