"""What fax knows of JAX beyond exported names, held against the version at hand.

Each test makes JAX show what it does. So where a new version has other names or parameters, it
fails here, and not by a client function that is silently compiled in another way.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.experimental import io_callback
from jax.extend.core import Literal, Primitive, Var, jaxpr_as_fun
from jax.interpreters import mlir
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec, reshard
from jaxprs import equations
from meshes import mesh

from fax import _compat
from fax._compat import Named

X = jnp.arange(4.0)


def trace(fn, *args):
    return list(equations(jax.make_jaxpr(fn)(*args or (X,))))


def only(name, fn, *args):
    """The one equation of a primitive in a function."""
    (eqn,) = (eqn for eqn in trace(fn, *args) if eqn.primitive.name == name)
    return eqn


@jax.custom_jvp
def with_jvp(x):
    return jnp.sin(x)


with_jvp.defjvp(lambda x, t: (with_jvp(*x), *t))


@jax.custom_vjp
def with_vjp(x):
    return jnp.sin(x)


with_vjp.defvjp(lambda x: (with_vjp(x), None), lambda _, ct: (ct,))


@jax.custom_batching.custom_vmap
def with_vmap(x):
    return jnp.sin(x)


with_vmap.def_vmap(lambda size, batched, x: (x, True))


def in_shard_map(fn, *out):
    """The function of a value that is the same on all devices."""
    specs = dict(in_specs=PartitionSpec(), out_specs=PartitionSpec(*out))
    return lambda x: jax.shard_map(fn, **specs)(x)


# Primitives without an exported name


WITHOUT_MESH = {
    Named.CUSTOM_VMAP: with_vmap,
    Named.OPTIMIZATION_BARRIER: lax.optimization_barrier,
    Named.PURE_CALLBACK: lambda x: jax.pure_callback(np.sin, x, x),
    Named.SPLIT: lambda x: jnp.split(x, 2),
    Named.STACK: lambda x: jnp.stack([x, x]),
    Named.UNSTACK: jnp.unstack,
}
ON_A_MESH = {
    Named.RESHARD: lambda x: reshard(x, PartitionSpec("clients")),
    Named.SHARD_MAP: in_shard_map(jnp.sin),
    Named.PVARY: in_shard_map(lambda x: lax.pcast(x, "clients", to="varying"), "clients"),
    Named.PSUM_INVARIANT: in_shard_map(
        lambda x: lax.psum(lax.pcast(x, "clients", to="varying"), "clients")
    ),
}


@pytest.fixture
def explicit():
    on = mesh("explicit", clients=2)
    with jax.set_mesh(on):
        yield on


def test_devices_that_are_there_are_not_described():
    """`test_topology.py` has devices that are."""
    assert not _compat.is_described(jax.devices()[0])


@pytest.mark.parametrize("name", WITHOUT_MESH)
def test_names(name):
    only(name, WITHOUT_MESH[name])


def test_names_on_meshes(explicit):
    for name, fn in ON_A_MESH.items():
        only(name, fn)
    names = {value for name, value in vars(Named).items() if name.isupper()}
    of_any_size = jax.ShapeDtypeStruct(export.symbolic_shape("n"), float)
    (eqn,) = trace(lambda x: jnp.asarray(x.shape[0]), of_any_size)
    assert eqn.primitive.name == Named.DIMENSION
    assert names == {*WITHOUT_MESH, *ON_A_MESH, Named.DIMENSION}  # no name is left out


# Parameters


def test_calls_and_rules():
    for fn, primitive in (jax.jit(jnp.sin), "jit"), (with_jvp, None), (with_vjp, None):
        eqn = trace(fn)[0]
        assert primitive in (None, eqn.primitive.name)
        called = eqn.params[_compat.CALLS[eqn.primitive]]
        np.testing.assert_array_equal(jaxpr_as_fun(called)(X)[0], np.sin(X))
    for fn in with_jvp, with_vjp, with_vmap:
        eqn = trace(fn)[0]
        functions = {name for name, value in eqn.params.items() if is_function(value)}
        rules = functions - {"out_trees"}  # which holds structures only
        assert rules == set(_compat.RULES[eqn.primitive.name])


def is_function(value):
    return callable(value) or hasattr(value, "call_wrapped")


@pytest.mark.parametrize(("consts", "carried", "rows"), [(0, 1, 0), (2, 1, 1), (1, 2, 3)])
def test_scan_sizes(consts, carried, rows):
    """Constants, carried values and rows, where those of the same type are in all three places."""

    def step(carry, xs):
        shift = sum(X[0] * 0 + c for c in closed)
        return [c + shift for c in carry], [x + shift for x in xs] + [carry[0]]

    closed = ()

    def loop(*args):
        nonlocal closed
        closed, start, xs = args[:consts], args[consts:][:carried], args[consts + carried :]
        return lax.scan(step, list(start), list(xs), length=4)

    args = [jnp.ones(()) for _ in range(consts + carried)] + [X] * rows
    eqn = only("scan", loop, *args)
    captured = len(eqn.invars) - carried - rows  # JAX may hoist what is constant out of the body
    assert _compat.scan_sizes(eqn) == (captured, carried)
    assert captured >= consts


@pytest.mark.parametrize("prevent", [True, (True, False)])
def test_checkpoints_of_more_operands(prevent):
    eqn = only("remat2", jax.checkpoint(jnp.add), X, X)
    more = jax.make_jaxpr(lambda x, y, z: [x * y + z])(X, X, X).jaxpr
    params = _compat.checkpoint_params(dict(eqn.params, prevent_cse=prevent), more, 1)
    assert params["prevent_cse"] == (True if prevent is True else (True, False, True))
    values = eqn.primitive.bind(X, X, 3 + X, **dict(params, prevent_cse=True))
    np.testing.assert_array_equal(values[0], X * X + 3 + X)


def test_dead_code():
    """Outputs that nobody uses are taken from a primitive, on the operands that remain."""
    primitive = Primitive("pairs")
    primitive.multiple_results = True
    primitive.def_abstract_eval(lambda *avals, keep: [avals[k] for k in keep])
    rule = lambda *xs, keep: [xs[k] for k in keep]  # noqa: E731
    mlir.register_lowering(primitive, mlir.lower_fun(rule))
    seen = []

    def dead(used, eqn):
        seen.append((used, eqn.primitive))
        keep = tuple(k for k, use in zip(eqn.params["keep"], used, strict=True) if use)
        reduced = eqn.replace(
            outvars=[v for v, use in zip(eqn.outvars, used, strict=True) if use],
            params=dict(keep=keep),
        )
        return [True] * len(eqn.invars), reduced

    _compat.register_dead_code(primitive, dead)
    jaxpr = jax.make_jaxpr(lambda x, y: primitive.bind(x, y, keep=(0, 1)))(X, -X)
    pruned, used = jax.interpreters.partial_eval.dce_jaxpr(jaxpr.jaxpr, [False, True])
    assert seen == [([False, True], primitive)]
    assert used == [True, True]
    assert pruned.eqns[0].params == {"keep": (1,)}


# Shardings and manual axes


def test_shardings_that_are_asked_for(explicit):
    wanted = NamedSharding(explicit.abstract_mesh, PartitionSpec("clients"))
    eqn = only(Named.RESHARD, ON_A_MESH[Named.RESHARD])
    assert _compat.sharding_asked_for(eqn) == wanted
    assert _compat.has_sharding(eqn)
    assert _compat.has_sharding(only(Named.SHARD_MAP, ON_A_MESH[Named.SHARD_MAP]))
    with jax.set_mesh(mesh("auto", clients=2)):
        asked = lambda x: lax.with_sharding_constraint(x, PartitionSpec("clients"))  # noqa: E731
        eqn = only("sharding_constraint", asked)
    assert _compat.sharding_asked_for(eqn).spec == PartitionSpec("clients")
    assert _compat.has_sharding(eqn)
    (eqn,) = trace(jnp.sin)
    assert _compat.sharding_asked_for(eqn) is None
    assert not _compat.has_sharding(eqn)


def test_what_varies_is_forgotten(explicit):
    axes = frozenset(["clients"])
    vary = only(Named.PVARY, ON_A_MESH[Named.PVARY])
    assert _compat.without_varying(vary, axes) is None
    assert _compat.without_varying(vary, frozenset()).params == vary.params
    total = only(Named.PSUM_INVARIANT, ON_A_MESH[Named.PSUM_INVARIANT])
    plain = _compat.without_varying(total, axes)
    assert plain.primitive is lax.psum_p
    unchecked = jax.shard_map(
        lambda x: lax.psum(x, "clients"),
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    assert plain.params == only("psum", unchecked).params
    assert _compat.without_varying(total, frozenset()) is total

    varying = vary.outvars[0].aval
    assert "clients" in varying.manual_axis_type.varying
    for forgotten in (None, ["clients"]):
        aval = _compat.type_without_varying(varying, forgotten)
        assert aval == vary.invars[0].aval
    assert _compat.type_without_varying(varying, ["model"]) == varying


def test_a_shard_map_in_a_manual_one(explicit):
    params = only(Named.SHARD_MAP, ON_A_MESH[Named.SHARD_MAP]).params
    assert _compat.nested_in_manual(params, ["model"]) == params
    nested = _compat.nested_in_manual(params, ["clients"])
    assert [k for k in params if nested[k] != params[k]] == ["newly_manual_axes"]
    assert not nested["newly_manual_axes"]
    (eqn,) = trace(jnp.sin)
    assert _compat.nested_in_manual(eqn.params, ["clients"]) == eqn.params


# Effects and traces


def test_effects():
    def client(x, ordered):
        jax.debug.print("{}", x, ordered=ordered)
        return x

    for ordered in (False, True):
        (effect,) = jax.make_jaxpr(lambda x, o=ordered: client(x, o))(X).effects
        assert _compat.is_ordered(effect) == ordered
        assert not _compat.is_named_axis(effect)
    named = jax.make_jaxpr(lambda x: lax.psum(x, "i"), axis_env=[("i", 2)])(X).effects
    assert named
    assert all(map(_compat.is_named_axis, named))
    assert [_compat.is_named_axis(*named, name) for name in ("i", "j")] == [True, False]


def test_what_varies_is_not_checked():
    seen = []

    def local(x):
        with _compat.unchecked():
            seen.append(jax.typeof(lax.axis_index("data")).manual_axis_type.varying)
        seen.append(jax.typeof(lax.axis_index("data")).manual_axis_type.varying)
        return x

    with jax.set_mesh(mesh(data=2)):
        jax.eval_shape(in_shard_map(local), X)
    assert seen == [frozenset(), frozenset({"data"})]


def test_memories():
    on_host = jax.make_jaxpr(lambda x: jax.device_put(x, jax.memory.Space.Host))(X).out_avals
    assert [_compat.on_device(aval) for aval in (jax.typeof(X), *on_host)] == [True, False]


def test_functions_that_jax_wraps_at_every_trace():
    def look(x):
        return x

    like = jax.ShapeDtypeStruct(X.shape, X.dtype)
    wraps = {
        "pure_callback": lambda x: jax.pure_callback(look, like, x),
        "io_callback": lambda x: io_callback(look, like, x),
        Named.CUSTOM_VMAP: with_vmap,
    }
    for name, fn in wraps.items():
        held = only(name, fn).params["rule" if name == Named.CUSTOM_VMAP else "callback"]
        (function, *_) = _compat.wrapped_function(held) or [None]
        assert callable(function), name
    assert _compat.wrapped_function(look) is None


def test_literals_have_values():
    """As `fax.primitives._jaxpr` reads them."""
    (eqn,) = trace(lambda x: x * 2.0)
    kinds = {type(atom) for atom in eqn.invars}
    assert all(issubclass(kind, Var | Literal) for kind in kinds)
    assert [atom.val for atom in eqn.invars if isinstance(atom, Literal)] == [2.0]


def test_where_an_equation_comes_from():
    def fn(x):
        with jax.named_scope("outer"):
            return jnp.sin(x)

    one, two, other = (only("sin", each) for each in (fn, fn, lambda x: jnp.sin(x)))
    assert _compat.source_of(one) == _compat.source_of(two)
    (traceback, names), (other_traceback, other_names) = map(_compat.source_of, (one, other))
    assert (str(names), str(other_names)) == ("outer", "")
    assert traceback != other_traceback


def test_what_is_remembered_while_a_module_is_lowered():
    seen = []
    noted_p = Primitive("noted")
    noted_p.def_abstract_eval(lambda x, number: x)

    def rule(ctx, x, number):
        seen.append(_compat.cache_of_module(ctx).setdefault(noted_p, number))
        return [x]

    mlir.register_lowering(noted_p, rule)
    for numbers in ((1, 2, 3), (4, 5)):
        jax.jit(lambda x, ns=numbers: [noted_p.bind(x, number=n) for n in ns]).lower(1.0)
    assert seen == [1, 1, 1, 4, 4]


# Devices


def test_the_kind_of_device_that_is_lowered_for():
    probe, found = Primitive("probe"), []
    probe.def_abstract_eval(lambda x: x)

    def rule(platform):
        def lower(ctx, x):
            found.append(_compat.device_kind(ctx, platform))
            return [x]

        return lower

    for platform in ("cpu", "tpu"):
        mlir.register_lowering(probe, rule(platform), platform=platform)

    def lower(platform):
        jax.jit(probe.bind).trace(X).lower(lowering_platforms=(platform,))
        return found.pop()

    assert lower("cpu") == jax.devices()[0].device_kind
    assert lower("tpu") is None  # there is none
    tpu = AbstractDevice(device_kind="TPU v4", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("i",), abstract_device=tpu)):
        assert lower("tpu") == "TPU v4"
        assert lower("cpu") == jax.devices()[0].device_kind
