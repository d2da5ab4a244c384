"""What the sharded transformer keeps on which device, and what its devices send to each other."""

import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import fax

EXAMPLES = Path(__file__).parents[1] / "examples"
CLIENTS, STEPS, BATCH = 4, 2, 4
LENGTH, WIDTH, HEADS, BLOCKS = 64, 16, 2, 1
CHARACTERS = 97
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
    model, _ = example.make_model(CHARACTERS, LENGTH, WIDTH, BLOCKS)
    params = model.init(jax.random.key(0))
    federated_round, evaluate = example.make_round(model, CLIENTS)

    def text(spec, *shape):
        rng = np.random.default_rng(0)
        clients = [
            {name: rng.integers(1, CHARACTERS, (*shape[1:], BATCH, LENGTH)) for name in "xy"}
            for _ in range(shape[0])
        ]
        return example.stack(clients, mesh, spec)

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


def test_devices_send_each_other_the_least_that_there_is_to_send(case):
    found = fax.inspect.report(case.round)
    assert {c.operation for c in found.collectives} == {"all-reduce"}
    assert all(len(c.axes) == 1 for c in found.collectives)

    # Updates along `clients`, gradients along `data`: a device's part of the model, and a loss.
    params = jax.tree.leaves(case.arguments[0])
    part = sum(x.addressable_shards[0].data.nbytes for x in params)
    for axis in ("clients", "data"):
        assert sum(c.bytes for c in found.over(axis)) == part + FLOAT

    # Along `model` activations, for the part of the batch that belongs to a device.
    activations = BATCH // 2 * LENGTH * WIDTH * FLOAT
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
    assert taken.shard_shape(batches["x"].shape)[:3] == (CLIENTS // 2, STEPS, BATCH // 2)


@pytest.mark.long
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


def test_sequences_are_drawn_from_all_of_a_module(example):
    x = np.arange(200)[:, None] + np.zeros(LENGTH, int)
    module = {"x": x, "y": -x}
    even = example.even_sequences(module)
    assert even["x"].shape == (example.BATCH_SIZE, LENGTH)
    assert (even["x"][[0, -1], 0] == [0, 199]).all()
    short = {name: rows[:2] for name, rows in module.items()}
    drawn = example.random_sequences(short, np.random.default_rng(0))
    assert drawn["x"].shape == (example.LOCAL_STEPS, example.BATCH_SIZE, LENGTH)
    assert (drawn["x"].min(), drawn["x"].max()) == (0, 1)
    for batch in (even, drawn):
        np.testing.assert_array_equal(batch["y"], -batch["x"])


def test_entropy(example):
    assert example.entropy(np.arange(8).reshape(2, 4)) == pytest.approx(np.log(8))
    assert example.entropy(np.array([0, 0, 1, 2])) == pytest.approx(1.5 * np.log(2))
