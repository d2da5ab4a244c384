"""Scope, leaves and dtypes: what a program does with its arguments and around itself."""

import dataclasses
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from subsets import alike

import fax


class Batch(NamedTuple):
    x: jax.Array
    y: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    weight: jax.Array
    bias: jax.Array


@fax.program(clients=3)
def total(x):
    return fax.sum(x)


# Scope


def test_programs_of_different_sizes_run_in_threads_at_once():
    inside = threading.Barrier(4)
    sums: dict[int, set[float]] = {}

    def work(n):
        @fax.program(clients=n)
        def count(x):
            inside.wait(timeout=60)  # all programs are being traced at this point
            assert fax.placements() == {"clients": n}
            return fax.sum(fax.broadcast(x))

        sums[n] = {float(count(1.0)) for _ in range(5)}

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums == {n: {float(n)} for n in range(2, 6)}


def test_a_new_thread_sees_no_placement():
    seen = []

    @fax.program(clients=3)
    def program(x):
        thread = threading.Thread(target=lambda: seen.append(fax.placements()))
        thread.start()
        thread.join()
        return x

    program(1.0)
    assert seen == [{}]


def test_a_program_called_inside_another_shadows_it():
    @fax.program(clients=2)
    def inner(x):
        assert fax.placements() == {"clients": 2}
        return fax.sum(fax.broadcast(x))

    @fax.program(clients=5, regions=3)
    def outer(x):
        before = fax.placements()
        x = inner(x)
        assert fax.placements() == before == {"clients": 5, "regions": 3}
        return fax.sum(fax.broadcast(x, placement="clients"), placement="clients")

    assert outer(1.0) == 10.0


def test_a_program_called_inside_a_map_has_its_own_placements():
    @fax.program(clients=2)
    def inner(x):
        return fax.sum(fax.broadcast(x))

    @fax.program(clients=3)
    def outer(x):
        return fax.sum(fax.map(inner, x))

    assert outer(np.arange(3.0)) == 6.0


def test_a_program_that_raises_leaves_nothing_behind():
    @fax.program(clients=3)
    def fails(x):
        def client(x):
            raise RuntimeError("midway")

        return fax.map(client, x)

    with pytest.raises(RuntimeError, match="midway"):
        fails(np.ones(3))
    assert fax.placements() == {}
    assert total(np.ones(3)) == 3.0

    @fax.program(clients=3)
    def catches(x):
        with pytest.raises(RuntimeError, match="midway"):
            fails(x)
        return fax.sum(x)

    assert catches(np.ones(3)) == 3.0


def test_a_map_takes_its_own_placement_out_of_scope():
    seen = []

    @fax.program(regions=2, clients=3)
    def program(x):
        def region(row):
            seen.append(fax.placements())

            def client(value):
                seen.append(fax.placements())
                return value

            return fax.sum(fax.map(client, row))

        return fax.sum(fax.map(region, x, placement="regions"), placement="regions")

    assert program(np.ones((2, 3))) == 6.0
    assert seen == [{"clients": 3}, {}]


def test_a_jitted_helper_is_traced_anew_for_other_sizes():
    @jax.jit
    def helper(x):
        return fax.sum(fax.broadcast(x))

    sums = [fax.program(clients=n)(helper)(1.0) for n in (3, 5, 3)]
    assert sums == [3.0, 5.0, 3.0]
    regions = fax.program(regions=4)(lambda x: fax.map(fax.program(clients=2)(helper), x))
    np.testing.assert_array_equal(regions(np.ones(4)), 2 * np.ones(4))


# Arguments and results


def test_leaves_that_are_not_arrays_reach_the_body_as_they_are():
    seen = []

    @fax.program(clients=3)
    def program(x, steps, activation, name=None, *, options):
        seen.append((steps, activation, name, options))
        for _ in range(steps):
            x = activation(x)
        return {"y": fax.sum(x), "steps": steps, "name": name, "activation": activation}

    out = program(np.ones(3), 2, jnp.sin, "run", options={"lr": 0.5, "flag": True, "z": None})
    assert seen == [(2, jnp.sin, "run", {"lr": 0.5, "flag": True, "z": None})]
    assert (out["steps"], out["name"], out["activation"]) == (2, "run", jnp.sin)
    np.testing.assert_allclose(out["y"], 3 * np.sin(np.sin(1.0)), rtol=1e-6)


def test_pytrees_keep_their_types():
    @fax.program(clients=3)
    def program(model, batch, empty):
        def client(model, batch):
            assert isinstance(model, Model)
            assert isinstance(batch, Batch)
            assert batch.y is None
            return Model(model.weight * batch.x, model.bias), {}, batch

        update, nothing, batch = fax.map(client, fax.broadcast(model), batch)
        return fax.mean(update), nothing, batch, fax.sum(empty), fax.mean(empty)

    model = Model(jnp.arange(2.0), jnp.asarray(1.0))
    batch = Batch(jnp.arange(3.0), None)
    update, nothing, same, *empties = program(model, batch, {"none": None, "list": []})
    assert isinstance(update, Model)
    np.testing.assert_array_equal(update.weight, [0.0, 1.0])
    assert isinstance(same, Batch)
    assert same.y is None
    assert nothing == {}
    assert empties == [{"none": None, "list": []}] * 2


def test_other_leaves_pass_through_broadcast_and_map():
    def shift(f, x):
        return f(x)

    @fax.program(clients=3)
    def program(x):
        f, sent = fax.broadcast((jnp.cos, x))
        return fax.map(shift, f, sent)

    np.testing.assert_allclose(program(jnp.asarray(0.5)), np.full(3, np.cos(0.5)), rtol=1e-6)


def test_methods_and_keyword_arguments():
    class Trainer:
        rate = 0.5

        @fax.program(clients=3)
        def round(self, *, params):
            """Docstring."""
            return fax.mean(fax.broadcast(params)) * self.rate

    assert Trainer().round(params=4.0) == 2.0
    assert Trainer.round.__doc__ == "Docstring."


def test_numpy_arrays_and_scalars_are_arrays():
    assert total(np.ones(3, np.float32)) == 3.0

    @fax.program(clients=2)
    def send(x):
        return fax.broadcast(x)

    out = send(np.float32(2.0))
    assert isinstance(out, jax.Array)
    np.testing.assert_array_equal(out, [2.0, 2.0])


def test_closed_over_values_are_server_values_whatever_their_shape():
    table = jnp.arange(3.0)  # as many rows as there are clients, and still not placed

    @fax.program(clients=3)
    def program(x):
        return fax.map(lambda row: row + table.sum(), x)

    np.testing.assert_array_equal(program(np.zeros(3)), [3.0, 3.0, 3.0])


def test_a_program_reads_what_it_closes_over_at_every_call():
    scale = [2.0]

    @fax.program(clients=3)
    def program(x):
        return fax.sum(fax.map(lambda row: row * scale[0], x))

    assert program(np.ones(3)) == 6.0
    scale[0] = 3.0
    assert program(np.ones(3)) == 9.0
    gradient = jax.grad(lambda s: scale.__setitem__(0, s) or program(np.ones(3)))(5.0)
    assert gradient == 3.0


def test_one_participant():
    @fax.program(clients=1)
    def program(x, w):
        y = fax.map(jnp.square, x)
        return fax.sum(y), fax.mean(y, weights=w), fax.max(y), fax.index(), fax.collect(y)

    out = program(np.array([3.0]), np.array([2.0]))
    assert [np.asarray(x).tolist() for x in out] == [9.0, 9.0, 9.0, [0], [9.0]]


# Dtypes

DTYPES = ["bool", "int8", "uint8", "int32", "uint32", "int64", "float16", "bfloat16", "float32"]


@pytest.mark.kinds(shape=alike, vectorize=lambda size: size is None)
@pytest.mark.parametrize("dtype", [*DTYPES, "float64", "complex64"])
@pytest.mark.parametrize("shape", [(), (2,), (2, 0), (2, 1, 2)])
@pytest.mark.parametrize("vectorize", [None, 1, 3, 4])  # None: no map
def test_dtypes_and_shapes_are_those_of_jnp(dtype, shape, vectorize):
    x = (np.arange(4 * np.prod(shape)).reshape(4, *shape) % 5).astype(jnp.dtype(dtype))
    real = not jnp.issubdtype(dtype, jnp.complexfloating)

    @fax.program(clients=4)
    def program(x):
        rows = x if vectorize is None else fax.map(lambda row: row, x, vectorize=vectorize)
        return [fax.sum(rows), fax.mean(rows)] + ([fax.max(rows), fax.min(rows)] if real else [])

    @jax.jit
    def both(x):
        of_jnp = (jnp.sum, jnp.mean, jnp.max, jnp.min)[: 4 if real else 2]
        return program(x), [f(x, axis=0) for f in of_jnp]

    found, wanted = both(x)
    for value, reference in zip(found, wanted, strict=True):
        assert (value.dtype, value.shape) == (reference.dtype, reference.shape)
        tolerance = 0 if dtype not in ("float16", "bfloat16") else float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(
            np.asarray(value, np.complex128), np.asarray(reference, np.complex128), rtol=tolerance
        )


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_keys_are_folded_with_the_index(make):
    @fax.program(clients=3)
    def program(key):
        keys = fax.keys(key)
        return keys, fax.map(jax.random.normal, keys), fax.collect(fax.map(lambda k: k, keys))

    keys, draws, again = program(make(7))
    wanted = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))(make(7), np.arange(3))
    for found in (keys, again):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(_bits(found), _bits(wanted))
    np.testing.assert_array_equal(draws, jax.vmap(jax.random.normal)(wanted))


def _bits(keys):
    return jax.random.key_data(keys) if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) else keys


def test_weak_types_are_kept():
    @fax.program(clients=3)
    def program(x):
        return fax.sum(fax.map(lambda row: row, fax.broadcast(x))), fax.mean(fax.broadcast(x))

    assert all(jax.typeof(y).weak_type for y in jax.eval_shape(program, 1.0) or program(1.0))


def test_constants_of_jitted_functions_with_operators():
    inner_table, outer_table = np.arange(4.0), np.ones(4)

    @jax.jit
    def inner(x):
        return fax.sum(fax.map(jnp.sin, x)) * inner_table

    @jax.jit
    def outer(x):
        return inner(x) + outer_table

    x = np.arange(12.0).reshape(3, 4)
    found = jax.jit(fax.program(clients=3)(outer))(x)
    np.testing.assert_allclose(found, np.sin(x).sum(0) * inner_table + outer_table, rtol=1e-12)


def test_constants_that_clients_return():
    @fax.program(clients=5)
    def program(x):
        ones, twos, yes = fax.map(lambda row: (1, 2.0, True), x, vectorize=2)
        return fax.sum(ones), fax.mean(twos), fax.max(yes), ones

    for call in (program, jax.jit(program)):
        total, mean, most, ones = jax.device_get(call(np.arange(5.0)))
        assert (total, mean, most) == (5, 2, True)
        assert ones.tolist() == [1] * 5
    swept = jax.vmap(program)(np.ones((2, 5)))
    assert swept[0].tolist() == [5, 5]


@pytest.mark.parametrize("number", [0xDEADBEEF, 2**80])
def test_large_python_ints_reach_the_body_as_they_came(number):
    @fax.program(clients=3)
    def program(x, number):
        return fax.sum(fax.map(lambda row: row + float(number % 7), x))

    assert program(np.zeros(3), number) == 3 * (number % 7)


def test_a_short_float_without_infinities():
    x = np.array([-1, -2, -3, -4, -5]).astype(jnp.float8_e4m3fn)

    @fax.program(clients=5)
    def program(x):
        rows = fax.map(lambda row: row, x, vectorize=2)
        none = jnp.zeros(5, bool)
        return fax.max(rows), fax.min(rows), fax.max(x, where=none)

    found = [float(y) for y in program(x)]
    assert found == [-1, -5, float(jnp.finfo(jnp.float8_e4m3fn).min)]
    scales = np.array([8, 0.5, 2, 4, 1]).astype(jnp.float8_e8m0fnu)  # has no zero and no sign
    assert [float(y) for y in program(scales)] == [8, 0.5, 2.0**-127]


def test_integers_of_less_than_a_byte():
    @fax.program(clients=5)
    def program(x):
        rows = fax.map(lambda row: row, x, vectorize=2)
        return fax.sum(rows), fax.mean(rows), fax.mean(x, weights=np.arange(5)), fax.max(x)

    for dtype in (jnp.int2, jnp.uint2, jnp.int4, jnp.uint4):
        least, most = int(jnp.iinfo(dtype).min), int(jnp.iinfo(dtype).max)
        x = np.array([most, most, least, most, 0])
        total, *means, largest = program(jnp.asarray(x, dtype))
        assert (total, largest) == (x.sum(), most)
        assert total.dtype == jnp.sum(jnp.zeros(1, jnp.uint8 if least == 0 else jnp.int8)).dtype
        expected = [x.mean(), x @ np.arange(5) / 10]
        np.testing.assert_allclose(means, expected, rtol=1e-6)


def test_a_client_that_finds_a_root():
    def root(row):
        return jax.lax.custom_root(
            lambda y: y**3 - row,
            1.0,
            lambda f, y: jax.lax.fori_loop(0, 40, lambda _, y: y - f(y) / (3 * y**2), y),
            lambda g, y: y / g(1.0),
        )

    @fax.program(clients=3)
    def program(x):
        return fax.sum(fax.map(root, x))

    x = np.array([1.0, 8.0, 27.0])
    np.testing.assert_allclose(program(x), 6.0, rtol=1e-12)
    np.testing.assert_allclose(jax.grad(program)(x), [1 / 3, 1 / 12, 1 / 27], rtol=1e-12)
    np.testing.assert_allclose(jax.jit(jax.vmap(program))(x[None]), [6.0], rtol=1e-12)


def test_clients_see_the_axis_of_a_vmap_around_a_program():
    @fax.program(clients=3)
    def program(s, x):
        def client(x):
            here = jax.lax.axis_index("sweep")
            return x * here, jax.lax.psum(s * x, "sweep"), here > 0

        scaled, total, counts = fax.map(client, x)
        return scaled, fax.sum(total), fax.sum(x, where=counts)

    x, s = np.arange(1.0, 4.0), np.array([1.0, 2.0])
    found = jax.jit(jax.vmap(program, (0, None), axis_name="sweep"))(s, x)
    for value, wanted in zip(found, ([0 * x, x], [18, 18], [0, 6]), strict=True):
        np.testing.assert_array_equal(value, wanted)


def test_without_jit_client_functions_see_concrete_values():
    seen = []

    @fax.program(clients=3)
    def program(x):
        def client(row):
            return jax.jit(lambda r: seen.append(isinstance(r, jax.core.Tracer)) or r * 2)(row)

        return fax.sum(fax.map(client, x))

    with jax.disable_jit():
        assert program(np.ones(3)) == 6.0


def test_the_batch_size_does_not_change_the_result():
    x = np.arange(7.0)
    sums = [
        fax.program(clients=7)(lambda x, b=b: fax.sum(fax.map(jnp.sin, x, vectorize=b)))(x)
        for b in (None, 1, 2, 3, 4, 6, 7, 100)
    ]
    np.testing.assert_allclose(sums, np.full(8, np.sin(np.arange(7.0)).sum()), rtol=1e-12)
