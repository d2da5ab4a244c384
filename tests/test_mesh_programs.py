"""What programs can do on meshes: inside `jax.shard_map`, nested, laid out, with any client."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import points
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from meshes import KINDS, mesh, mixed, put
from subsets import alike
from test_transformations import assert_close

import fax

P = PartitionSpec
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
UNIFORM = pytest.mark.parametrize("kind", ["auto", "explicit"])
CHECKED = pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])


def squares(fn):
    def loss(*args):
        leaves = jax.tree.leaves(fn(*args))
        return sum(jnp.sum(x**2) for x in leaves if jnp.issubdtype(x.dtype, jnp.floating))

    return loss


def both(fn):
    """The values of a function of floats, and its gradient with respect to two arguments."""
    return jax.jit(lambda *args: (fn(*args), jax.grad(squares(fn), (0, 1))(*args)))


# One round, and what it means


def client(p, x):
    return jnp.tanh(p * x) @ jnp.flip(p), jnp.sum(x**2)


def program_of(n, vectorize=None, work=client):
    @fax.program(clients=n)
    def program(p, d):
        y, z = fax.map(work, fax.broadcast(p), d, vectorize=vectorize)
        return fax.mean(y), fax.max(y), z

    return program


def reference(p, d):
    y, z = jax.vmap(client, (None, 0))(p, d)
    return y.mean(), y.max(), z


def data(n):
    return points(4, seed=1), points(n, 4, seed=n)


def test_constants_of_jitted_client_functions():
    """Types change on a mesh, and with them every jaxpr; constants have to stay in theirs."""
    scale = np.arange(1.0, 5)
    work = jax.jit(lambda p, x: client(p, x * scale))
    p, d = data(8)
    with jax.set_mesh(mesh("auto", clients=4, model=2)):
        ours = jax.jit(program_of(8, work=work))(p, d)
    assert_close(jax.device_get(ours), jax.device_get(jax.jit(reference)(p, d * scale)))


@functools.cache
def expected(n):
    return jax.device_get(both(reference)(*data(n)))


# Inside the user's `jax.shard_map`


@functools.cache
def in_parts(parts, n):
    """What is expected of a program on each of several parts of the data."""

    def whole(p, d):
        mean, _, z = reference(p, d)
        return mean, jnp.stack([reference(p, rows)[1] for rows in jnp.split(d, parts)]), z

    return jax.device_get(both(whole)(*data(n)))


@pytest.mark.kinds(kind=mixed, check_vma=alike, axes=alike, axis=alike, n=alike)
@EVERY_KIND
@CHECKED
@pytest.mark.parametrize(
    ("axes", "axis", "n"),
    [
        (dict(clients=4, model=2), "clients", 2),  # the rows of the program are those of a device
        (dict(data=2, clients=4), "data", 4),  # and here those of four, which share the work
        (dict(data=2, clients=4), "data", 3),
    ],
    ids=["over-placement", "over-other", "over-other-uneven"],
)
def test_programs_in_a_shard_map(kind, check_vma, axes, axis, n):
    size = n * axes[axis]
    p, d = data(size)

    def local(p, d):
        mean, best, z = program_of(n)(p, d)
        return lax.pmean(mean, axis), best[None], z

    want = in_parts(axes[axis], size)
    with jax.set_mesh(mesh(kind, **axes)):
        spread = jax.shard_map(
            local,
            in_specs=(P(), P(axis)),
            out_specs=(P(), P(axis), P(axis)),
            axis_names={axis},
            check_vma=check_vma,
        )
        assert_close(both(spread)(p, put(d, axis)), want)


def test_clients_see_an_axis_of_the_shard_map_around_a_program():
    """All axes are manual, so nothing is left to divide, and JAX checks what varies over them."""

    @fax.program(clients=3)
    def program(p, d):
        def client(p, d):
            return p * d + lax.psum(p, "data") * d + lax.axis_index("data")

        return fax.mean(fax.map(client, fax.broadcast(p), d))

    d = np.arange(1.0, 4.0)
    with jax.set_mesh(mesh(data=2, clients=2)):
        spread = jax.shard_map(
            lambda p: program(p[0], d)[None], in_specs=P("data"), out_specs=P("data")
        )
        np.testing.assert_allclose(jax.jit(spread)(np.array([1.0, 2.0])), [8.0, 11.0], rtol=1e-12)


# Nested placements, and layouts


def tree_mean(p, d):
    def region(rows):
        y = jnp.sin(rows @ p)
        return y.mean() * p, y.max()

    means, peaks = jax.vmap(region)(d)
    return means.mean(0), peaks


@functools.cache
def expected_tree_mean(shape):
    p, d = points(3, seed=2), points(*shape, 3, seed=3)
    return p, d, jax.device_get(both(tree_mean)(p, d))


@pytest.mark.always("(4, 4)-auto", "(3, 5)-first-explicit")
@pytest.mark.kinds(kind=mixed, shape=alike)
@EVERY_KIND
@pytest.mark.parametrize("shape", [(2, 8), (4, 4), (3, 5)], ids=str)
def test_placements_nested_on_two_axes(kind, shape):
    regions, clients = shape

    @fax.program(regions=regions, clients=clients)
    def program(p, d):
        def region(p, rows):
            y = fax.map(
                lambda p, x: jnp.sin(x @ p), fax.broadcast(p, placement="clients"), rows,
                placement="clients",
            )  # fmt: skip
            mean = fax.mean(y, placement="clients")
            return mean * p, fax.max(y, placement="clients")

        everywhere = fax.broadcast(p, placement="regions")
        means, peaks = fax.map(region, everywhere, d, placement="regions")
        return fax.mean(means, placement="regions"), peaks

    p, d, want = expected_tree_mean(shape)
    with jax.set_mesh(mesh(kind, regions=2, clients=4)):
        assert_close(both(program)(p, d), want)


@pytest.mark.always("8-explicit", "13-first-auto")
@EVERY_KIND
@pytest.mark.parametrize("n", [8, 13])
def test_a_placement_over_two_axes(kind, n):
    with jax.set_mesh(mesh(kind, pod=2, clients=4)):
        with fax.sharding.layout(clients=("pod", "clients")):
            got = both(program_of(n))(*data(n))
        assert_close(got, expected(n))
        if n == 8 and kind in ("auto", "explicit"):  # no type tells of axes of two types
            assert got[0][2].sharding.is_equivalent_to(sharding(("pod", "clients")), 1)


def test_a_jitted_program_follows_the_layout():
    program = jax.jit(program_of(8))
    with jax.set_mesh(mesh(clients=4, model=2)):
        for axes in ["clients", ("clients", "model"), "model", ()]:
            with fax.sharding.layout(clients=axes):
                assert program(*data(8))[2].sharding.is_equivalent_to(sharding(axes or None), 1)
        assert program(*data(8))[2].sharding.is_equivalent_to(sharding("clients"), 1)


def test_a_placement_is_spread_over_an_axis_that_has_the_name_of_another():
    @fax.program(regions=2, clients=3)
    def total(x):
        rows = fax.map(lambda row: fax.sum(row, placement="clients"), x, placement="regions")
        return fax.sum(rows, placement="regions")

    with jax.set_mesh(mesh(clients=2)), fax.sharding.layout(clients=(), regions="clients"):
        assert total(np.arange(6.0).reshape(2, 3)) == 15


@pytest.mark.always("3-{'clients': 8}-explicit", "8-{'model': 8}-auto")
@UNIFORM
@pytest.mark.filterwarnings("ignore:A program over clients runs under a mesh of model=8")
@pytest.mark.parametrize("axes", [dict(model=8), dict(clients=8)], ids=str)
@pytest.mark.parametrize("n", [3, 8])
def test_a_mesh_without_the_axis_and_fewer_participants_than_devices(kind, axes, n):
    with jax.set_mesh(mesh(kind, **axes)):
        assert_close(both(program_of(n))(*data(n)), expected(n))
        assert_close(program_of(n)(*data(n)), expected(n)[0])


# Results


def sharding(*spec):
    return NamedSharding(jax.sharding.get_mesh(), P(*spec))


@pytest.mark.always("8-first-explicit", "13-explicit")
@pytest.mark.kinds(kind=mixed, n=alike)
@EVERY_KIND
@pytest.mark.parametrize("n", [8, 13])
def test_shardings_of_results(kind, n):
    """Rows come out spread where they can be, totals on all devices, `model` as it went in."""

    @fax.program(clients=n)
    def program(p, d):
        updates = fax.map(lambda p, x: p * x.sum(), fax.broadcast(p), d)
        return updates, fax.mean(updates), fax.max(d), fax.index(), fax.broadcast(p)

    p, d = points(6, 4, seed=4), points(n, 3, seed=5)
    with jax.set_mesh(mesh(kind, clients=4, model=2)):
        d = put(d, "clients") if n == 8 else d
        rows = "clients" if n == 8 else None
        wanted = [(rows, None, "model"), (None, "model"), (), (rows,), (rows, None, "model")]
        for fn in program, jax.jit(program):
            outs = fn(put(p, None, "model"), d)
            for out, spec in zip(outs, wanted, strict=True):
                assert out.sharding.is_equivalent_to(sharding(*spec), out.ndim), (
                    out.sharding,
                    spec,
                )
        gradient = jax.jit(jax.grad(squares(program), (0, 1)))(put(p, None, "model"), d)
        assert gradient[0].sharding.is_equivalent_to(sharding(None, "model"), 2)
        assert gradient[1].sharding.is_equivalent_to(sharding(rows), 2)


# Client functions that are sharded themselves


def constrained(p, x):
    hidden = lax.with_sharding_constraint(jnp.tanh(x @ p), P("model"))
    return jnp.sum(hidden @ p.T * x), x.sum()


def explicit(p, x):
    hidden = jnp.tanh(jnp.dot(x, p, out_sharding=P("model")))
    return jnp.sum(jnp.dot(hidden, p.T, out_sharding=P()) * x), jax.sharding.reshard(x, P()).sum()


def mapped(p, x):
    def half(p, x):
        return lax.psum(jnp.tanh(x @ p) @ p.T, "model")

    inner = jax.shard_map(
        half, in_specs=(P(None, "model"), P()), out_specs=P(), axis_names={"model"}
    )
    return jnp.sum(inner(p, x) * x), x.sum()


def plain(p, d):
    y = jnp.sum(jnp.tanh(d @ p) @ p.T * d, axis=1)
    return y.mean(), y.max(), d.sum(1)


@functools.cache
def expected_plain(n):
    p, d = points(3, 4, seed=6), points(n, 3, seed=7)
    return p, d, jax.device_get(both(plain)(p, d))


@pytest.mark.always(
    "8-1-constrained-auto",
    "8-2-mapped-first-auto",
    "7-1-mapped-first-explicit",
    "7-3-explicit-explicit",
)
@pytest.mark.kinds(kind=alike, n=alike, vectorize=alike)
@pytest.mark.parametrize(
    ("work", "kind"),
    [
        (constrained, "auto"),
        (constrained, "first-explicit"),
        (explicit, "explicit"),
        (explicit, "first-auto"),
        *((mapped, kind) for kind in KINDS),
    ],
)
@pytest.mark.parametrize(("n", "vectorize"), [(8, 1), (8, 2), (7, 1), (7, 3)])
def test_clients_that_are_sharded_over_model(work, kind, n, vectorize):
    p, d, want = expected_plain(n)
    with jax.set_mesh(mesh(kind, clients=4, model=2)):
        assert_close(both(program_of(n, vectorize, work))(put(p, None, "model"), d), want)
        checkpointed = program_of(n, vectorize, jax.checkpoint(work))
        assert_close(both(checkpointed)(put(p, None, "model"), d), want)


@pytest.mark.always("8-explicit", "7-first-auto")
@EVERY_KIND
@pytest.mark.parametrize("n", [7, 8])
def test_the_gradient_of_what_came_from_outside_of_the_mesh(kind, n):
    """Without jit, the argument's type says nothing of the mesh, and its cotangent's does."""

    @fax.program(clients=n)
    def total(x):
        return fax.sum(fax.map(lambda x: x**2, fax.distribute(x)))

    x = jnp.asarray(np.arange(1.0, n + 1))
    with jax.set_mesh(mesh(kind, clients=4, model=2)):
        gradient = jax.grad(total)(x)
    assert_close(jax.device_get(gradient), 2 * np.asarray(x))
