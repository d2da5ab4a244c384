"""Every error message: it names the argument, what came, what was expected and how to fix it."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fax


def clients(body, n=3):
    return fax.program(clients=n)(body)


X = jnp.ones((3, 2))

OPERATORS = {
    "broadcast": lambda: fax.broadcast(1.0),
    "distribute": lambda: fax.distribute(X),
    "collect": lambda: fax.collect(X),
    "map": lambda: fax.map(jnp.sin, X),
    "sum": lambda: fax.sum(X),
    "mean": lambda: fax.mean(X),
    "max": lambda: fax.max(X),
    "min": lambda: fax.min(X),
    "index": lambda: fax.index(),
    "keys": lambda: fax.keys(jax.random.key(0)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_outside_a_program(name):
    message = rf"fax\.{name} was called outside a program\. .*@fax\.program\(clients=64\)"
    with pytest.raises(fax.PlacementError, match=message):
        OPERATORS[name]()


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_need_placement_where_there_are_several(name):
    message = rf"fax\.{name} needs placement=, .* in scope: regions=2, clients=3"
    with pytest.raises(fax.PlacementError, match=message):
        fax.program(regions=2, clients=3)(OPERATORS[name])()


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_where_a_map_has_taken_the_placement_away(name):
    message = rf"fax\.{name} was called where no placement is in scope: inside a fax\.map"
    with pytest.raises(fax.PlacementError, match=message):
        clients(lambda: fax.map(lambda x: OPERATORS[name](), X))()


def test_an_unknown_placement():
    message = r"placement is 'server', which is not in scope\. In scope here: clients=3\."
    with pytest.raises(fax.PlacementError, match=message):
        clients(lambda: fax.broadcast(1.0, placement="server"))()
    with pytest.raises(fax.PlacementError, match=r"In scope here: none"):
        clients(lambda: fax.map(lambda x: fax.sum(x, placement="clients"), X))()


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "3", None, [3]])
def test_sizes_that_are_not_positive_ints(size):
    with pytest.raises(fax.PlacementError, match=r"program: clients is .* an int of at least 1"):
        fax.program(clients=size)


def test_sizes_that_are_traced():
    with pytest.raises(fax.PlacementError, match="of participants, known before tracing"):
        jax.jit(lambda n: fax.program(clients=n)(lambda: 1.0)())(3)


def test_sizes_may_be_numpy_ints():
    assert clients(fax.placements, np.int64(5))() == {"clients": 5}


def test_no_placement_at_all():
    with pytest.raises(fax.PlacementError, match=r"needs at least one placement.*clients=64"):
        fax.program()


def test_a_decorator_without_brackets():
    with pytest.raises(fax.PlacementError, match=r"write @fax\.program\(clients=64\), with"):
        fax.program(lambda x: x)


@pytest.mark.parametrize("name", ["distribute", "collect", "sum", "mean", "max", "min"])
def test_a_leading_axis_that_is_not_n(name):
    message = (
        rf"fax\.{name}: x\['w'\]\[1\] has 5 rows, in an array of shape \(5, 2\), but a value "
        r"placed at clients has one row for each of its 3 participants, .* use fax\.broadcast"
    )
    with pytest.raises(fax.PlacementError, match=message):
        clients(lambda: getattr(fax, name)({"w": [X, jnp.ones((5, 2))]}))()


@pytest.mark.parametrize("name", ["distribute", "collect", "sum", "mean", "max", "min"])
@pytest.mark.parametrize("scalar", [1.0, np.float32(1.0), jnp.ones(())])
def test_a_scalar_where_a_placed_value_is_due(name, scalar):
    message = rf"fax\.{name}: x\['b'\] is a scalar, .* leading axis of size 3"
    with pytest.raises(fax.PlacementError, match=message):
        clients(lambda: getattr(fax, name)({"a": X, "b": scalar}))()


def test_differing_sizes_among_the_arguments_of_a_map():
    message = r"fax\.map: args\[1\]\['y'\] has 4 rows"
    with pytest.raises(fax.PlacementError, match=message):
        clients(lambda: fax.map(lambda a, b: a, X, {"x": X, "y": jnp.ones(4)}))()
    with pytest.raises(fax.PlacementError, match=r"fax\.map: args\[1\] is a scalar"):
        clients(lambda: fax.map(lambda a, b: a, X, 2.0))()


@pytest.mark.parametrize("result", ["text", len, object()])
def test_a_mapped_function_that_returns_something_other_than_arrays(result):
    message = r"the mapped function returned .* at result\['a'\]\[0\], expected arrays"
    with pytest.raises(fax.PlacementError, match=message):
        clients(lambda: fax.map(lambda x: {"a": [result], "b": x}, X))()


@pytest.mark.parametrize("name", ["distribute", "collect", "sum", "mean", "max", "min"])
def test_reductions_of_leaves_that_are_not_arrays(name):
    message = rf"fax\.{name}: x\['f'\] is str 'relu', expected an array with 3 rows"
    with pytest.raises(fax.PlacementError, match=message):
        clients(lambda: getattr(fax, name)({"f": "relu", "x": X}))()


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min"])
def test_reductions_of_keys(name):
    message = rf"fax\.{name}: x is an array of key<fry>, expected .*numbers\. .* fax\.collect"
    with pytest.raises(fax.PlacementError, match=message):
        clients(lambda: getattr(fax, name)(jax.random.split(jax.random.key(0), 3)))()


@pytest.mark.parametrize("name", ["max", "min"])
def test_extrema_of_complex_numbers(name):
    with pytest.raises(fax.PlacementError, match=r"x is an array of complex\d+, expected real"):
        clients(lambda: getattr(fax, name)(X[:, 0] + 1j))()


BAD_VECTORS = {
    "of a wrong shape": jnp.ones(4, bool),
    "with more axes": jnp.ones((3, 1), bool),
    "a scalar": True,
    "a pytree": {"a": jnp.ones(3, bool)},
}


@pytest.mark.parametrize("value", BAD_VECTORS.values(), ids=BAD_VECTORS)
@pytest.mark.parametrize("argument", ["where", "weights"])
def test_weights_and_masks_of_a_wrong_shape(argument, value):
    message = rf"fax\.mean: {argument} is .* expected one placed (bool|real) array of shape \[3\]"
    with pytest.raises(fax.PlacementError, match=message):
        clients(lambda: fax.mean(X, **{argument: value}))()


def test_weights_that_are_a_mask():
    message = r"weights is bool\[3\], expected numbers. To leave .* pass where= .* weights.astype"
    with pytest.raises(fax.PlacementError, match=message):
        clients(lambda: fax.mean(X, weights=X[:, 0] > 0))()


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min"])
def test_where_that_is_not_boolean(name):
    message = rf"fax\.{name}: where is float\d+\[3\], expected one placed bool array of shape \[3\]"
    with pytest.raises(fax.PlacementError, match=message):
        clients(lambda: getattr(fax, name)(X, where=jnp.ones(3)))()


def test_weights_that_are_complex():
    with pytest.raises(fax.PlacementError, match=r"weights is complex.* one placed real array"):
        clients(lambda: fax.mean(X, weights=jnp.ones(3) * 1j))()


@pytest.mark.parametrize("initial", [jnp.ones(2), 0.5, 1j, "zero"])
def test_initial_values_that_do_not_fit(initial):
    with pytest.raises(fax.PlacementError, match=r"fax\.max: initial is .* expected a scalar that"):
        clients(lambda: fax.max(jnp.arange(3), initial=initial))()


@pytest.mark.parametrize("size", [0, -2, 1.5, True, "all"])
def test_batch_sizes_that_are_not_positive_ints(size):
    with pytest.raises(fax.PlacementError, match=r"fax\.map: vectorize is .* an int of at least 1"):
        clients(lambda: fax.map(jnp.sin, X, vectorize=size))()


@pytest.mark.parametrize("key", [1, jnp.ones(2), None])
def test_keys_that_are_none(key):
    with pytest.raises(fax.PlacementError, match=r"fax\.keys: key is .* expected a random key"):
        clients(lambda: fax.keys(key))()
    with pytest.raises(fax.PlacementError, match=r"key is key<fry>\[2\], expected a random"):
        clients(lambda: fax.keys(jax.random.split(jax.random.key(0))))()


def test_a_tracer_leaked_out_of_a_program():
    leaked = []
    clients(lambda x: fax.map(leaked.append, x) or fax.map(lambda r: leaked.append(r) or r, x))(X)
    with pytest.raises(jax.errors.UnexpectedTracerError):
        leaked[0] + 1


def test_mutable_arrays_in_a_mapped_function():
    ref = jax.new_ref(jnp.zeros(2))

    def shares(x):
        ref[...] = x
        return x

    with pytest.raises(fax.PlacementError, match=r"closes over Ref.* share no memory: return"):
        clients(lambda: fax.map(shares, X))()

    def makes(x):
        own = jax.new_ref(x)
        return own[...]

    with pytest.raises(fax.PlacementError, match=r"uses jax\.new_ref.* as jax\.lax\.scan does"):
        clients(lambda: fax.map(makes, X))()


@pytest.mark.parametrize("explicit", [False, True])
def test_data_on_a_mesh_that_is_not_in_scope(explicit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((3,), ("clients",), axis_types=(kind,), devices=jax.devices()[:3])
    spread = jax.device_put(X, jax.NamedSharding(mesh, jax.P("clients")))
    program = clients(lambda x: fax.sum(fax.map(jnp.sin, x)))
    with pytest.warns(UserWarning, match=r"sharded over a mesh axis 'clients', but no mesh"):
        assert program(spread).shape == (2,)
    elsewhere = fax.program(regions=3)(lambda x: fax.sum(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        elsewhere(jax.device_put(X, jax.NamedSharding(mesh, jax.P())))


def test_an_error_of_a_mapped_function_names_it():
    def absolute(x):
        return x if x > 0 else -x

    program = fax.program(clients=2)(lambda x: fax.map(absolute, x))
    with pytest.raises(jax.errors.TracerBoolConversionError, match="tracing the function absolute"):
        program(jnp.ones(2))


@pytest.mark.parametrize("operator", [fax.sum, lambda x: fax.map(jnp.sum, {"x": x})])
def test_lists_with_an_entry_for_each_participant(operator):
    program = fax.program(clients=2)(operator)
    with pytest.raises(fax.PlacementError, match="has 3 rows, in an array of shape") as caught:
        program([jnp.ones(3)] * 2)
    assert caught.value.__notes__ == [
        "To place a list with an entry for each participant of clients, stack its entries: "
        "jax.tree.map(lambda *rows: jnp.stack(rows), *entries)."
    ]


def test_a_mapped_function_of_other_arguments():
    program = fax.program(clients=2)(lambda x: fax.map(lambda a, b: a * b, (x, x)))
    with pytest.raises(TypeError) as caught:
        program(jnp.ones(2))
    assert (
        "The function mapped over clients is a lambda, which takes (a, b). It was called with 1 "
        "argument. Write fax.map(fn, a, b), not fax.map(fn, (a, b))."
    ) in caught.value.__notes__
