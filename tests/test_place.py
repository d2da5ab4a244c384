"""Data on the meshes of one process; tests/test_distributed.py has several."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType

import fax
from fax.sharding import layout, local_rows, make_mesh, place

X = np.arange(24.0).reshape(8, 3)


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit])
def mesh(request):
    with jax.set_mesh(make_mesh(clients=4, model=2, axis_types=request.param)):
        yield jax.sharding.get_mesh()


def rows_of(shard):
    return list(range(8)[shard.index[0]])


def test_rows_are_spread_over_the_axis_of_the_placement_and_copied_along_the_others(mesh):
    placed = place(X, "clients")
    np.testing.assert_array_equal(placed, X)
    assert placed.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, jax.P("clients")), 2)
    for shard in placed.addressable_shards:
        (first,), *_ = np.argwhere(mesh.devices == shard.device)[:, :1]
        assert rows_of(shard) == [2 * first, 2 * first + 1]


def test_a_layout_says_which_axes_and_which_placement(mesh):
    with layout(clients=("clients", "model")):
        placed = place(X)
    assert sorted(map(rows_of, placed.addressable_shards)) == [[i] for i in range(8)]
    with layout(clients="model"):
        placed = place(X)
    assert sorted(map(rows_of, placed.addressable_shards)) == 4 * [[0, 1, 2, 3]] + 4 * [
        [4, 5, 6, 7]
    ]


def test_a_mesh_of_one_axis_says_which_placement():
    with jax.set_mesh(make_mesh(clients=8)):
        assert len(place(X).addressable_shards[0].data) == 1
        assert len(place(X, "sensors").addressable_shards[0].data) == 8  # it has no such axis


def test_rows_that_cannot_be_divided_evenly_are_everywhere(mesh):
    placed = place(X[:7], "clients")
    assert placed.is_fully_replicated
    np.testing.assert_array_equal(placed, X[:7])
    assert len(placed.sharding.device_set) == 8


def test_without_a_mesh_they_are_on_the_default_device():
    (device,) = place(X).sharding.device_set
    assert device == jax.devices()[0]
    with jax.default_device(jax.devices()[3]):
        (device,) = place(X).sharding.device_set
    assert device == jax.devices()[3]


def test_a_single_process_loads_all_rows(mesh):
    for n in (7, 8):
        rows = local_rows(n, "clients")
        assert rows.tolist() == list(range(n))
        assert np.issubdtype(rows.dtype, np.integer)
    np.testing.assert_array_equal(place(X[rows], "clients", rows=rows), X)
    assert local_rows(np.int64(3), "clients").tolist() == [0, 1, 2]


def test_trees_keep_their_structure_dtypes_and_keys(mesh):
    tree = {
        "float": X.astype(np.float32),
        "bfloat16": X.astype(ml_dtypes.bfloat16),
        "bool": X[:, 0] > 3,
        "device": jnp.arange(8),
        "key": jax.random.split(jax.random.key(0), 8),
        "none": None,
    }
    placed = place(tree, "clients")
    assert jax.tree.structure(placed) == jax.tree.structure(tree)
    for name, leaf in tree.items():
        if leaf is not None:
            assert placed[name].dtype == leaf.dtype
            assert len(placed[name].addressable_shards[0].data) == 2
    np.testing.assert_array_equal(
        jax.random.key_data(placed["key"]), jax.random.key_data(tree["key"])
    )
    assert place({}, "clients") == {}


def test_programs_take_placed_data_without_moving_it(mesh):
    @fax.program(clients=8)
    def double(x):
        return fax.map(lambda x: 2 * x, x)

    placed = place(X, "clients")
    doubled = jax.jit(double)(placed)
    np.testing.assert_array_equal(doubled, 2 * X)
    assert doubled.sharding.is_equivalent_to(placed.sharding, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: place(X), r"place needs placement=, because it could be any of clients, model\."),
        (lambda: local_rows(8), "local_rows needs placement=, because it could be any of clients"),
        (lambda: place(X, "clients", n=9), r"tree has 8 rows for n=9, expected 9\."),
        (lambda: place(X, "clients", n=0), "n is 0, expected an int of at least 1"),
        (lambda: local_rows(2.5, "clients"), "local_rows: n is 2.5, expected an int of at least 1"),
        (lambda: local_rows(True, "clients"), "n is True, expected an int of at least 1"),
        (lambda: place(X[:0], "clients"), "n is 0, expected an int of at least 1"),
        (
            lambda: place({"x": X, "y": X[:5]}, "clients"),
            r"tree\['x'\] has 8 rows, but tree\['y'\], of shape \(5, 3\), has 5",
        ),
        (lambda: place([X, 1.0], "clients"), r"tree\[1\] is a scalar, expected an array"),
        (lambda: place("words", "clients"), "tree is str 'words', expected an array with a row"),
        (lambda: place(np.array(["a"]), "clients"), "tree is ndarray array.*expected an array"),
        (
            lambda: place(X, "clients", rows=np.arange(8)[::-1]),
            r"rows are 7, 6, 5, 4, 3, 2, \.\.\., but for n=8 process 0 .* 0-7, in this order",
        ),
        (lambda: place(X, "clients", rows=np.ones(8)), r"rows are array\(\[1\., 1\."),
        (
            lambda: jax.jit(lambda x: place(x, "clients"))(X),
            "place was called in a function that JAX traces. Load and place data outside",
        ),
    ],
)
def test_what_cannot_be_placed_is_refused(call, message):
    with (
        jax.set_mesh(make_mesh(clients=4, model=2)),
        pytest.raises(fax.PlacementError, match=f"^fax.sharding.*{message}"),
    ):
        call()
