"""DrJAX's names: every function against DrJAX where it is installed, and against plain JAX."""

import collections
import functools
import importlib
import importlib.util
import inspect
import re
import threading
import types

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jaxprs import operators
from numpy.testing import assert_allclose

import fax
import fax.drjax

N = 3
OPERATORS = ("broadcast", "map_fn", "reduce_sum", "reduce_mean", "reduce_weighted_mean")
# DrJAX looks for a mesh where JAX no longer wants anyone to look.
pytestmark = pytest.mark.filterwarnings("ignore:jax.interpreters.pxla:DeprecationWarning")


def plain():
    """The same functions, of every participant at once."""

    def map_fn(fn, arg):
        return jax.vmap(fn)(*(arg if isinstance(arg, tuple) else (arg,)))

    def weighted_mean(x, w):
        return jax.tree.map(lambda x, w: jax.vmap(jnp.multiply)(x, w).sum(0) / w.sum(0), x, w)

    return types.SimpleNamespace(
        program=lambda **_: lambda fn: fn,
        broadcast=lambda x: jax.tree.map(lambda x: jnp.stack([x] * N), x),
        map_fn=map_fn,
        reduce_sum=lambda x: jax.tree.map(lambda x: jnp.sum(x, 0), x),
        reduce_mean=lambda x: jax.tree.map(lambda x: jnp.mean(x, 0), x),
        reduce_weighted_mean=weighted_mean,
    )


def peers():
    """What results are compared with: by hand, and DrJAX if it is installed."""
    return [plain(), *installed()]


def installed():
    """DrJAX, if it is installed."""
    found = importlib.util.find_spec("drjax") is not None
    return [importlib.import_module("drjax")] if found else []


def assert_same(found, expected):
    """Equal trees of equal arrays, NaN included, and of equal dtypes."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    flat, _ = jax.tree.flatten_with_path(expected)
    for (path, y), x in zip(flat, jax.tree.leaves(found), strict=True):
        where = jax.tree_util.keystr(path)
        assert (jnp.shape(x), x.dtype) == (jnp.shape(y), y.dtype), where
        x, y = (np.asarray(leaf, np.complex128) for leaf in (x, y))
        assert_allclose(x, y, rtol=1e-12, atol=1e-12, err_msg=where)


Pair = collections.namedtuple("Pair", "left right")


def everything(d):
    """Every function of a module, in every form that DrJAX takes arguments in."""

    @d.program(placements={"clients": N})
    def run(params, data, weights, counts):
        sent = d.broadcast(params)
        rows = d.map_fn(lambda p, x: {"u": p["a"] * x, "l": jnp.sum(x * p["b"])}, (sent, data))
        ones = d.map_fn(lambda x: 1, data)
        listed = d.map_fn(lambda pair: pair[0] + pair[1], [data, ones])
        unpacked = d.map_fn(lambda left, right: (left - right, None), Pair(data, weights))
        outside = jax.tree.map(lambda row, p: jnp.sin(row) - p[:1], rows["u"], sent["a"])
        each_its_own = {"u": counts, "l": weights}
        return {
            "scalars": (d.broadcast(2.0), d.broadcast(3), d.broadcast(True)),
            "rows": (rows, ones, listed, unpacked, outside, data[0] + rows["u"][1]),
            "sums": d.reduce_sum((rows, ones, outside)),
            "means": d.reduce_mean({"rows": rows, "outside": outside}),
            "weighted": d.reduce_weighted_mean(rows, each_its_own),
            "elementwise": d.reduce_weighted_mean(data, jnp.abs(rows["u"])),
            "counted": d.reduce_weighted_mean(counts, counts),
            "of zero weight": d.reduce_weighted_mean(weights, 0 * weights),
        }

    return run


ARGUMENTS = (
    {"a": jnp.array([1.0, -2.0]), "b": jnp.float64(0.5)},
    jnp.arange(2.0 * N).reshape(N, 2) / 3 - 1,
    jnp.array([0.25, 2.0, 1.0]),
    jnp.array([1, 5, 2], jnp.int32),
)


def test_results_are_those_of_drjax():
    run = everything(fax.drjax)
    found = run(*ARGUMENTS), jax.jit(run)(*ARGUMENTS)
    by_hand = jax.jit(everything(plain()))(*ARGUMENTS)
    for expected in [by_hand, *(everything(drjax)(*ARGUMENTS) for drjax in installed())]:
        for own in found:
            assert_same(own, expected)


def training(d):
    """Two local steps, averaged by weights: a function of everything that can be learned."""

    @d.program(clients=N)
    def run(params, data, weights):
        def client(p, x):
            gradient = jax.grad(lambda p: jnp.sum(jnp.cos(p * x)))
            return p - 0.1 * gradient(p) - 0.1 * gradient(p - 0.1)

        trained = d.map_fn(client, (d.broadcast(params), data))
        moved = d.reduce_mean(trained) + d.reduce_weighted_mean(trained, weights)
        return jnp.sum(moved**2) + d.reduce_sum(trained)[0]

    return run


def test_derivatives_and_batches_are_those_of_drjax():
    arguments = (jnp.array([1.0, -2.0]), ARGUMENTS[1], ARGUMENTS[2])
    batch = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), arguments)

    def all_of(run):
        return {
            "gradient": jax.grad(run, (0, 1, 2))(*arguments),
            "tangent": jax.jvp(run, arguments, arguments),
            "second": jax.jacfwd(jax.grad(run))(*arguments),
            "batch": jax.vmap(run)(*batch),
            "batch of gradients": jax.vmap(jax.grad(run, 1), (0, None, 0))(
                batch[0], arguments[1], batch[2]
            ),
        }

    found = jax.jit(lambda: all_of(training(fax.drjax)))()
    alone = jax.grad(training(fax.drjax))(*arguments)  # without jax.jit
    for peer in peers():
        expected = jax.jit(functools.partial(all_of, training(peer)))()
        assert_same(found, expected)
        assert_same(alone, expected["gradient"][0])


@pytest.mark.parametrize("compiled", [False, True])
def test_sums_and_means_have_the_dtypes_of_jnp(compiled):
    dtypes = ["bool", "int8", "uint32", "int64", "bfloat16", "float32", "complex64"]
    rows = {dtype: jnp.array([[1, 0], [1, 1], [0, 1]], dtype) for dtype in dtypes}

    def both(d):
        return d.program(clients=N)(lambda x: (d.reduce_sum(x), d.reduce_mean(x)))

    run = both(fax.drjax)
    with jax.enable_x64(False):
        narrow = {dtype: x for dtype, x in rows.items() if "64" not in dtype}
        assert jax.eval_shape(run, narrow) == jax.eval_shape(both(plain()), narrow)
    expected = both(plain())(rows)
    found = (jax.jit(run) if compiled else run)(rows)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        assert_allclose(np.asarray(x, complex), np.asarray(y, complex), rtol=1e-2)


def test_names_and_signatures_are_those_of_drjax():
    drjax = pytest.importorskip("drjax")
    names = [name for name in dir(drjax) if not name.startswith("_")]
    assert set(names) == {"program", *OPERATORS}
    for name in OPERATORS:
        of_fax, theirs = (inspect.signature(getattr(d, name)) for d in (fax.drjax, drjax))
        assert [(p.name, p.kind, p.default) for p in of_fax.parameters.values()] == [
            (p.name, p.kind, p.default) for p in theirs.parameters.values()
        ]


def test_every_form_of_program():
    forms = dict(clients=N), dict(placements={"clients": N}), dict(placements={"a b": np.int64(N)})
    for form in (*forms, forms[0] | dict(use_abstract_mesh=False)):
        run = fax.drjax.program(**form)(fax.drjax.reduce_sum)
        assert run(jnp.arange(N)) == 3, form


def test_it_runs_as_python_outside_of_transformations():
    calls = []

    @fax.drjax.program(clients=N)
    def run(x, wanted):
        calls.append(isinstance(x, jax.core.Tracer))
        total = fax.drjax.reduce_sum(fax.drjax.map_fn(jnp.square, x))
        return (total.sharding if wanted else None), total + 1 if calls[-1] or total > 4 else total

    assert run(jnp.arange(N), True)[1] == 6
    assert run(jnp.ones(N), True)[1] == 3
    assert jax.jit(lambda x: run(x, False)[1])(jnp.ones(N)) == 4
    assert jax.grad(lambda x: run(x, False)[1])(jnp.ones(N)).tolist() == [2, 2, 2]
    assert calls == [False, False, True, True]


def round_of(n, *, client=jnp.multiply):
    @fax.drjax.program(clients=n)
    def run(params, data, weights):
        updates = fax.drjax.map_fn(client, (fax.drjax.broadcast(params), data))
        return fax.drjax.reduce_weighted_mean(updates, weights), fax.drjax.reduce_mean(updates)

    return run


def test_a_round_is_one_map():
    x = jnp.ones(N)
    (one,) = operators(round_of(N), jnp.ones(()), x, x)
    assert one == "federated_map (server, placed, placed) (sum, sum, sum)"
    backward = jax.grad(lambda p: sum(round_of(N)(p, x, x)))
    assert [name.split()[0] for name in operators(backward, jnp.ones(()))] == ["federated_map"] * 2


def test_memory_does_not_grow_with_participants():
    units = 128

    def client(params, x):
        return jax.grad(lambda p: jnp.mean(jnp.tanh(x @ p) ** 2))(params)

    def temporary(n):
        run = round_of(n, client=jax.checkpoint(client))

        def loss(params, data, weights):
            return sum(jnp.sum(mean**2) for mean in run(params, data, weights))

        shapes = (units, units), (n, 4, units), (n,)
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        compiled = jax.jit(jax.value_and_grad(loss)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * units**2)

    few, many = temporary(8), temporary(512)
    assert few < 8
    assert abs(many - few) < 0.1


def test_on_a_mesh():
    mesh = meshes.mesh(clients=4, model=2)
    params, x, w = jnp.ones(8), jnp.arange(64.0).reshape(8, 8), jnp.arange(8.0)

    @fax.drjax.program(clients=8)
    def run(params, x, w):
        sent = fax.drjax.broadcast(params, mesh=mesh)
        rows = fax.drjax.map_fn(jnp.multiply, (sent, x), mesh=mesh.abstract_mesh)
        return fax.drjax.reduce_weighted_mean(rows, w), rows

    expected = w @ x / w.sum(), x
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("clients", "model")))
        compiled = jax.jit(run).lower(params, rows, w).compile()
        assert len(re.findall(r" all-reduce(?:-start)?\(", compiled.as_text())) == 1
        for found in (compiled(params, rows, w), run(params, rows, w)):
            assert_same(found, expected)
            assert found[1].sharding.spec[0] == "clients"
    # Nothing is spread over these meshes, so nothing is lost without them.
    for other in (meshes.mesh(model=2), meshes.mesh(clients=1)):
        sent = fax.drjax.program(clients=8)(functools.partial(fax.drjax.broadcast, mesh=other))
        assert_same(sent(params), jnp.ones((8, 8)))


def test_programs_nest_and_mix():
    d = fax.drjax

    @d.program(clients=N)
    def inner(x):
        return d.reduce_sum(d.map_fn(jnp.square, x))

    @d.program(clients=2)
    def outer(x):
        def group(rows):
            return inner(rows)

        totals = d.map_fn(group, x)
        return d.reduce_mean(totals), inner(jnp.arange(N)), fax.mean(totals), d.reduce_sum(totals)

    @fax.program(clients=2)
    def of_fax(x):
        return d.reduce_sum(d.map_fn(jnp.sum, x))

    x = jnp.arange(6.0).reshape(2, 3)
    for run in (outer, jax.jit(outer)):
        assert [float(y) for y in run(x)] == [27.5, 5, 27.5, 55]
    assert of_fax(x) == 15


def test_programs_of_two_sizes_run_side_by_side():
    meet, found = threading.Barrier(2, timeout=60), {}

    def work(n):
        @fax.drjax.program(clients=n)
        def run():
            meet.wait()
            sent = fax.drjax.broadcast(1.0)
            meet.wait()
            return sent.shape

        found[n] = run()

    threads = [threading.Thread(target=work, args=(n,)) for n in (2, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {2: (2,), 5: (5,)}


def test_a_name_that_is_imported_works():
    """DrJAX's own names, imported one by one, never work, because programs replace them."""
    module = importlib.import_module("fax.drjax")
    assert module is fax.drjax
    broadcast = module.broadcast
    assert module.program(clients=2)(lambda: broadcast(1).shape)() == (2,)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_outside_a_program(name):
    operator, arguments = getattr(fax.drjax, name), [jnp.ones(N)] * 2
    parameters = inspect.signature(operator).parameters.values()
    required = [p for p in parameters if p.default is p.empty]
    with pytest.raises(fax.drjax.OperatorUndefinedError, match=rf"fax\.drjax\.{name} was called"):
        operator(*arguments[: len(required)])
    with pytest.raises(TypeError, match=rf"{name}\(\) takes . positional argument"):
        fax.drjax.program(clients=N)(operator)(*[jnp.ones(N)] * 3)


def called(fn, *args):
    return lambda: fax.drjax.program(clients=N)(fn)(*args)


MISTAKES = {
    "no placement": (fax.drjax.program, "got 0 placements, {}, expected one"),
    "two placements": (
        lambda: fax.drjax.program(clients=N, regions=2),
        r"got 2 placements, \{'clients': 3, 'regions': 2\}, expected one.*use fax.program",
    ),
    "two in a mapping": (
        lambda: fax.drjax.program(placements={"a": 1, "b": 2}),
        "got 2 placements",
    ),
    "no mapping": (
        lambda: fax.drjax.program(placements=3),
        "placements is 3, expected a mapping from the name of the placement to its size",
    ),
    "no size": (lambda: fax.drjax.program(clients=0), "clients is 0"),
    "no function": (lambda: fax.drjax.program(clients=N)(3), "expected a function"),
    "rows": (
        called(fax.drjax.reduce_mean, {"a": jnp.ones(N + 1)}),
        r"x\['a'\] has 4 rows.* leading axis of size 3",
    ),
    "rows of a map": (
        called(lambda x: fax.drjax.map_fn(jnp.sin, x), jnp.ones(2)),
        r"args\[0\] has 2 rows",
    ),
    "rows of weights": (
        called(fax.drjax.reduce_weighted_mean, jnp.ones(N), jnp.ones(())),
        r"reduce_weighted_mean: w is a scalar",
    ),
    "weights of another structure": (
        called(fax.drjax.reduce_weighted_mean, {"a": jnp.ones(N)}, jnp.ones(N)),
        r"w has the structure PyTreeDef\(\*\), expected that of x, PyTreeDef\(\{'a': \*\}\)",
    ),
    "an operator in a mapped function": (
        called(lambda x: fax.drjax.map_fn(fax.drjax.broadcast, x), jnp.ones(N)),
        "no placement is in scope: inside a fax.map",
    ),
    "an axis name": (
        called(lambda x: fax.drjax.map_fn(lambda x: jax.lax.psum(x, "clients"), x), jnp.ones(N)),
        "uses clients as an axis name",
    ),
    "no mesh": (
        called(lambda: fax.drjax.broadcast(1, mesh="clients")),
        r"broadcast: mesh is 'clients', expected a mesh or None",
    ),
    "a mesh that is not in scope": (
        called(lambda: fax.drjax.broadcast(1, mesh=meshes.mesh(clients=2))),
        r"broadcast: mesh is \{'clients': 2\}, but none is in scope.*under jax.set_mesh\(mesh\)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    make, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        make()


def test_another_mesh_than_the_one_in_scope():
    with (
        jax.set_mesh(meshes.mesh(clients=2)),
        pytest.raises(fax.PlacementError, match=r"is \{'clients': 4\}, but the mesh in scope is"),
    ):
        called(lambda x: fax.drjax.map_fn(jnp.sin, x, mesh=meshes.mesh(clients=4)), jnp.ones(N))()
