"""What the sharded transformer keeps on which device, and what its devices send to each other."""

import bisect
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fax

EXAMPLES = Path(__file__).parents[1] / "examples"
CLIENTS, STEPS, BATCH = 4, 2, 4
WIDTH, HEADS, BLOCKS = 16, 2, 1
FLOAT = 4  # bytes


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import sharded_transformer

        with jax.enable_x64(False):
            yield sharded_transformer
    finally:
        sys.path.remove(str(EXAMPLES))


def prepare(example, mesh):
    """A tiny transformer, its round and a cohort of random text, on a mesh in scope."""
    graph, params = nnx.split(example.Transformer(WIDTH, HEADS, BLOCKS, nnx.Rngs(0)))
    federated_round, evaluate = example.make_round(graph, CLIENTS)

    def text(spec, *shape):
        shape = (*shape, BATCH, example.CONTEXT + 1)
        text = np.random.default_rng(0).integers(example.CHARACTERS, size=shape)
        return jax.device_put(text.astype(np.uint8), NamedSharding(mesh, spec))

    arguments = params, example.SERVER_OPTIMIZER.init(params)
    arguments += (text(P("clients", None, "data"), CLIENTS, STEPS),)
    return SimpleNamespace(
        round=federated_round.lower(*arguments).compile(),
        arguments=arguments,
        evaluate=evaluate,
        held_out=text(P("clients", "data"), example.HELD_OUT),
    )


@pytest.fixture(scope="module")
def mesh():
    return fax.sharding.make_mesh(clients=2, data=2, model=2)


@pytest.fixture(scope="module")
def case(example, mesh):
    with jax.set_mesh(mesh):
        yield prepare(example, mesh)


def test_devices_send_each_other_the_least_that_there_is_to_send(example, mesh, case):
    found = fax.inspect.report(case.round)
    assert {c.operation for c in found.collectives} == {"all-reduce"}
    assert all(len(c.axes) == 1 for c in found.collectives)

    # Updates along `clients`, gradients along `data`: a device's part of the model, and a loss.
    params = jax.tree.leaves(case.arguments[0])
    part = sum(x.addressable_shards[0].data.nbytes for x in params)
    for axis in ("clients", "data"):
        assert sum(c.bytes for c in found.over(axis)) == part + FLOAT

    # Along `model` activations, for the part of the batch that belongs to a device.
    activations = BATCH // 2 * example.CONTEXT * WIDTH * FLOAT
    over_model = [(c.operation, c.bytes) for c in found.over("model")]
    # Two forward and two backward.
    assert over_model == [("all-reduce", activations)] * 4 * BLOCKS


def test_evaluation_sends_activations_and_losses(mesh, case):
    compiled = case.evaluate.lower(case.arguments[0], case.held_out).compile()
    found = fax.inspect.report(compiled)
    assert {c.operation for c in found.collectives} == {"all-reduce"}
    for axis in ("clients", "data"):
        assert [c.bytes for c in found.over(axis)] == [FLOAT]
    assert len(found.over("model")) == 2 * BLOCKS


def test_the_model_stays_split_over_model_and_the_batch_over_data(case):
    *before, batches = case.arguments
    after = case.round(*case.arguments)[:2]
    parts = {  # what a device holds of the matrices that are split
        "attend": (WIDTH, 3, HEADS // 2, WIDTH // HEADS),
        "hide": (WIDTH, 4 * WIDTH // 2),
        "mix": (HEADS // 2, WIDTH // HEADS, WIDTH),
        "show": (4 * WIDTH // 2, WIDTH),
    }
    for tree in (*before, *after):
        found = [
            (name, x.addressable_shards[0].data.shape)
            for path, x in jax.tree.leaves_with_path(tree)
            for name in parts
            if name in jax.tree_util.keystr(path)
        ]
        assert sorted(found) == sorted([*parts.items()] * BLOCKS)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert old.sharding.is_equivalent_to(new.sharding, old.ndim)

    taken = jax.tree.leaves(case.round.input_shardings)[-1]
    assert taken.shard_shape(batches.shape)[:3] == (CLIENTS // 2, STEPS, BATCH // 2)


def test_one_device_computes_the_same(example, case):
    def results(case):
        params, _, loss = case.round(*case.arguments)
        return [*jax.tree.leaves(params), loss, case.evaluate(params, case.held_out)]

    found = results(case)
    one = fax.sharding.make_mesh(devices=jax.devices()[:1], clients=1, data=1, model=1)
    with jax.set_mesh(one):
        expected = results(prepare(example, one))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-3, atol=1e-4)


def test_modules_are_read_as_characters(example):
    modules = example.read_modules()
    assert len(modules) > 150
    assert "math" not in modules  # is not written in Python
    symbols = example.ALPHABET + b"?"
    text = bytes(symbols[number] for number in modules["bisect"])
    assert text == Path(bisect.__file__).read_bytes()
    files = sorted(Path(json.__file__).parent.glob("*.py"))
    assert modules["json"].size == sum(file.stat().st_size for file in files)


def test_windows_reach_from_the_first_character_to_the_last(example):
    text = np.arange(200)
    length = example.CONTEXT + 1
    even = example.even_windows(text)
    np.testing.assert_array_equal(even[0], text[:length])
    np.testing.assert_array_equal(even[-1], text[-length:])
    random = example.random_windows(text[: length + 2], np.random.default_rng(0))
    assert random.shape == (example.LOCAL_STEPS, example.BATCH_SIZE, length)
    assert (np.diff(random) == 1).all()
    assert (random.min(), random.max()) == (0, length + 1)


def test_entropy(example):
    assert example.entropy(np.arange(8).reshape(2, 4)) == pytest.approx(np.log(8))
    assert example.entropy(np.array([0, 0, 1, 2])) == pytest.approx(1.5 * np.log(2))
