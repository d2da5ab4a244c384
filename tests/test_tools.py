"""JAX's debugging tools and rule tables inside client functions, compared with `jax.vmap`."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.experimental import checkify, io_callback
from jax.experimental.jet import jet
from jax.experimental.ode import odeint
from jax.experimental.sparse import BCOO, sparsify
from meshes import KINDS, mesh
from test_transformations import assert_close

import fax
from fax import _compat

X = np.array([1.0, -2.0, 3.0, 0.5])  # the second one is the bad one

ON_MESHES = pytest.mark.parametrize("kind", [None, "explicit"])


def averaged(client, n=4, **kwargs):
    @fax.program(clients=n)
    def program(*args):
        return fax.mean(fax.map(client, *args, **kwargs))

    return program


def vectorized(client):
    return lambda *args: jnp.mean(jax.vmap(client)(*args), 0)


# NaN and infinities


@jax.custom_vjp
def custom_log(x):
    return jax.jit(jnp.log)(x)


custom_log.defvjp(lambda x: (custom_log(x), x), lambda x, ct: (ct / x,))

CLIENTS = {
    "log": (jnp.log, "log"),
    "jit": (jax.jit(lambda x: 2 * jax.jit(jnp.sqrt)(x)), "sqrt"),
    "custom_jvp": (lambda x: jax.nn.relu(jnp.log(x)) + jnp.log(x), "log"),
    "custom_vjp": (lambda x: 1 + custom_log(x), "log"),
    "scan": (lambda x: lax.scan(lambda c, _: (jnp.log(c), None), x, length=1)[0], "scan"),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_debug_nans_names_the_primitive(name):
    client, primitive = CLIENTS[name]
    program, by_hand = averaged(client), vectorized(client)
    for transform in (lambda f: f, jax.jit, jax.grad):
        errors = []
        for fn in program, by_hand:
            with jax.debug_nans(True), pytest.raises(FloatingPointError) as error:
                transform(fn)(X)
            errors.append(str(error.value))
        assert errors == [f"invalid value (nan) encountered in {primitive}"] * 2
    assert np.isnan(program(X))  # only if asked for


def test_debug_nans_looks_into_checkpoints():
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="in log"):
        averaged(jax.checkpoint(lambda x: jax.jit(jnp.log)(x)))(X)


@fax.program(regions=2, clients=2)
def nested(x):
    def region(rows):
        return fax.mean(fax.map(jnp.log, rows, placement="clients"), placement="clients")

    return fax.mean(fax.map(region, x, placement="regions"), placement="regions")


def test_debug_nans_says_who():
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="in log") as error:
        nested(X.reshape(2, 2))
    notes = "".join(error.value.__notes__)
    assert "mapped over clients, for row 1" in notes
    assert "mapped over regions, for row 0" in notes


@pytest.mark.always("explicit")
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_debug_nans_says_who_of_an_array_that_is_not_on_the_mesh(kind):
    x, found = jnp.asarray(X), pytest.raises(FloatingPointError, match="in log")
    with jax.set_mesh(mesh(kind, clients=2)), jax.debug_nans(True), found as error:
        averaged(jnp.log)(x)
    assert "mapped over clients, for row 1" in "".join(error.value.__notes__)


@fax.program(clients=4)
def masked(x):
    y = fax.map(jnp.log, x)
    later = jax.nn.relu(y) * fax.map(jnp.sqrt, x, vectorize=2)  # rows of NaN between two maps
    return fax.mean(y, where=x > 0) + fax.mean(later, where=x > 1), fax.sum(x > 0)


def masked_by_hand(x):
    y = jnp.log(jnp.where(x > 0, x, 1))
    later = jax.nn.relu(y) * jnp.sqrt(jnp.where(x > 0, x, 1))
    return jnp.sum(y) / jnp.sum(x > 0) + jnp.sum(jnp.where(x > 1, later, 0)) / jnp.sum(x > 1)


@functools.cache
def expected_of_masked():
    """The value and the gradient."""
    return jax.device_get(jax.jit(jax.value_and_grad(masked_by_hand))(X))


@pytest.mark.always("None")
@ON_MESHES
def test_debug_nans_passes_over_who_is_left_out(kind):
    on = contextlib.nullcontext() if kind is None else jax.set_mesh(mesh(kind, clients=4, model=2))
    want, slope = expected_of_masked()
    with on, jax.debug_nans(True), jax.debug_infs(True):
        for transform in (lambda f: f, jax.jit):
            assert_close(transform(masked)(X), (want, np.int64(3)))
            assert_close(transform(jax.grad(lambda x: masked(x)[0]))(X), slope)
            with pytest.raises(FloatingPointError, match="in log"):
                transform(averaged(jnp.log))(X)


def test_debug_nans_without_jit_passes_over_who_is_left_out():
    with jax.debug_nans(True), jax.disable_jit():
        value = masked(X)[0]
    assert_close(value, expected_of_masked()[0])


def test_debug_nans_and_vmap():
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="in log"):
        jax.vmap(averaged(jnp.log))(np.stack([X, X]))


def test_debug_infs():
    @fax.program(clients=4)
    def nobody(x):
        return fax.max(fax.map(jnp.exp, x), where=x > 9)

    total = averaged(jnp.sqrt)
    with jax.debug_infs(True):
        assert total(0 * X) == 0
        for transform in (lambda f: f, jax.jit):  # the derivative of a square root at zero
            with pytest.raises(FloatingPointError, match=r"\(inf\) encountered in (div|mul)"):
                transform(jax.grad(total))(0 * X)
        with pytest.raises(
            FloatingPointError, match=r"\(inf\) encountered in the sum over clients"
        ):
            averaged(lambda x: x)(np.full(4, 1e308))
        with pytest.raises(FloatingPointError, match=r"\(-?inf\) encountered in the max over"):
            nobody(X)
        with pytest.raises(
            FloatingPointError, match=r"result for row 2 of clients\..* the arguments"
        ):
            averaged(lambda x: x)(np.array([1, 2, np.inf, 3]))


# checkify


def positive(x):
    checkify.check(x > 0, "{x} is not positive, nor is {twice}", x=x, twice=2 * x)
    return x


CHECKED = {
    "check": positive,
    "jit": jax.jit(positive),
    "branch": lambda x: lax.cond(x < 0, positive, lambda x: x, x),
    "loop": lambda x: lax.scan(lambda c, _: (jnp.sqrt(c), None), x, length=2)[0],
    "nan": lambda x: jnp.log(x),
    "derivative": jax.grad(jnp.sqrt),
    "index": lambda x: jnp.arange(4.0)[jnp.where(x < 0, 7, 0)],
    "division": lambda x: 1 / (x + 2),
}


@pytest.mark.always("check", "branch", "loop", "derivative")
@pytest.mark.parametrize("name", CHECKED)
def test_checkify_sees_errors_in_client_functions(name):
    client, x = CHECKED[name], jnp.asarray(X)
    errors = checkify.user_checks if name in ("check", "jit") else checkify.all_checks
    check = functools.partial(checkify.checkify, errors=errors)
    wanted, value = jax.jit(check(vectorized(client)))(x)
    want = wanted.get()
    assert want is not None
    for vectorize in (1, 3) if name in ("check", "nan", "loop") else (3,):
        program = jax.jit(check(averaged(client, vectorize=vectorize)))
        error, result = program(x)
        assert error.get() == want
        assert_close(result, np.asarray(value))
        assert program(jnp.ones(4))[0].get() is None
    if name == "check":
        assert check(jax.grad(averaged(client)))(x)[0].get() == want
        gradient = jax.grad(lambda x: check(averaged(client))(x)[::-1], has_aux=True)
        assert jax.jit(gradient)(x)[1].get() == want


def test_checkify_reports_the_first_participant_and_the_first_map():
    @fax.program(clients=4)
    def program(x):
        def small(x):
            checkify.check(x < 3, "{x} is too large", x=x)
            return x

        total = fax.sum(fax.map(positive, fax.map(small, x)))
        checkify.check(total > 0, "the server's")
        return total

    check = checkify.checkify(program)
    assert check(np.array([1.0, -1.0, 2.0, -2.0]))[0].get().startswith("-1.0 is not positive")
    assert check(np.array([1.0, -1.0, 5.0, 4.0]))[0].get().startswith("5.0 is too large")
    assert check(np.array([1.0, 1.0, 1.0, 1.0]))[0].get() is None
    with pytest.raises(checkify.JaxRuntimeError, match="not positive"):
        check(-X)[0].throw()


def test_checkify_passes_over_who_is_left_out():
    @fax.program(clients=4)
    def program(x, where):
        return fax.mean(fax.map(lambda x: jnp.log(positive(x)), x), where=where)

    check = jax.jit(checkify.checkify(program, errors=checkify.all_checks))
    assert check(X, X > 0)[0].get() is None
    assert "-2.0 is not positive" in check(X, X < 0)[0].get()
    both = jax.jit(jax.vmap(check, in_axes=(None, 0)))(X, np.stack([X > 0, X < 0]))[0]
    assert "at mapped index 1" in both.get()
    assert "at mapped index 0" not in both.get()


def test_checkify_of_nested_maps_and_loops_over_rounds():
    def rounds(x):
        def step(x, _):
            return x - averaged(positive)(x), None

        return lax.scan(step, x, length=2)[0]

    check = functools.partial(checkify.checkify, errors=checkify.all_checks)
    assert check(nested)(X.reshape(2, 2))[0].get() == "nan generated by primitive: log."
    error, _ = jax.jit(check(rounds))(np.array([1.0, 2.0, 3.0, 4.0]))
    assert error.get().startswith("-1.5 is not positive")


@pytest.mark.always("first-auto-4")
@pytest.mark.parametrize(("kind", "n"), [("auto", 3), ("explicit", 4), ("first-auto", 4)])
def test_checkify_on_meshes(kind, n):
    check = checkify.checkify(averaged(lambda x: jnp.log(positive(x)), n), checkify.all_checks)
    with jax.set_mesh(mesh(kind, clients=4, model=2)):
        assert "-2.0 is not positive" in jax.jit(check)(X[:n])[0].get()
        assert check(np.ones(n))[0].get() is None


def test_a_check_without_checkify_says_what_to_do():
    with pytest.raises(ValueError, match=r"through `checkify\.checkify`"):
        averaged(positive)(X)


# Reuse of random keys


def with_keys(work):
    """A program, and by hand, of a key for each client."""

    def by_hand(keys):
        return work(lambda f, *xs: jax.vmap(f)(*xs), keys, jnp.sum)

    @fax.program(clients=4)
    def program(keys):
        return work(fax.map, keys, fax.sum)

    return program, by_hand


def twice(key):
    return jax.random.normal(key) + jax.random.uniform(key)


def split(key):
    one, other = jax.random.split(key)
    return jax.random.normal(one) + jax.random.uniform(other)


def in_a_loop(key):
    return lax.scan(lambda c, _: (c + jax.random.normal(key), None), 0.0, length=2)[0]


def dropout(key):
    return jax.grad(lambda p: jax.random.normal(key) * p**2)(2.0)


KEYS = {
    "once": (lambda m, k, s: s(m(jax.random.normal, k)), False),
    "split": (lambda m, k, s: s(m(split, k)), False),
    "gradient": (lambda m, k, s: s(m(jax.checkpoint(dropout), k)), False),
    "twice": (lambda m, k, s: s(m(twice, k)), True),
    "loop": (lambda m, k, s: s(m(in_a_loop, k)), True),
    "outside": (lambda m, k, s: s(m(jax.random.normal, k)) + jax.random.normal(k[0]), True),
    "two maps": (lambda m, k, s: s(m(jax.random.normal, k)) + s(m(jax.random.uniform, k)), True),
    "made inside": (lambda m, k, s: s(m(twice, m(lambda k: jax.random.fold_in(k, 1), k))), True),
}


@pytest.mark.parametrize("name", KEYS)
def test_key_reuse_is_reported_as_under_vmap(name):
    work, reused = KEYS[name]
    for fn in with_keys(work):
        for transform in (lambda f: f, jax.jit):
            keys = jax.random.split(jax.random.key(0), 4)
            expected = (
                pytest.raises(jax.errors.KeyReuseError) if reused else contextlib.nullcontext()
            )
            with jax.debug_key_reuse(True), expected:
                transform(fn)(keys)


def test_key_reuse_of_the_servers_key():
    @fax.program(clients=4)
    def shared(key, again):
        drawn = fax.map(jax.random.normal, fax.broadcast(key))
        return fax.sum(drawn) + (jax.random.normal(key) if again else 0)

    @fax.program(clients=4)
    def collected(keys):
        return fax.sum(fax.map(jax.random.normal, keys)) + twice(fax.collect(keys)[0])

    @fax.program(clients=4)
    def own(key):
        return fax.sum(fax.map(split, fax.keys(key)))

    with jax.debug_key_reuse(True):
        shared(jax.random.key(0), False)
        jax.jit(own)(jax.random.key(0))
        with pytest.raises(jax.errors.KeyReuseError):
            shared(jax.random.key(0), True)
        with pytest.raises(jax.errors.KeyReuseError):
            collected(jax.random.split(jax.random.key(0), 4))


# Taylor series


def polynomial(p, x):
    return jnp.sin(x) * p + jax.nn.relu(x), jnp.exp(x * p[0])


@fax.program(clients=4)
def series(p, x, w):
    a, b = fax.map(polynomial, fax.broadcast(p), x)
    extremes = fax.max(b), fax.min(b, where=x > -1), fax.max(x)
    sums = fax.mean(a, weights=w), fax.sum(a, where=x > 0), fax.mean(x), fax.sum(fax.index())
    signs = fax.map(lambda a: jnp.sum(a > 0), a, vectorize=1)
    count = fax.max(fax.map(lambda i: i + 1, signs, vectorize=2))  # of integers alone
    return extremes, sums, count, b, fax.collect(b), fax.distribute(w) * x


def series_by_hand(p, x, w):
    a, b = jax.vmap(
        lambda p, x: (jnp.sin(x) * p + jnp.maximum(x, 0), jnp.exp(x * p[0])), (None, 0)
    )(p, x)
    extremes = jnp.max(b), jnp.min(jnp.where(x > -1, b, jnp.inf)), jnp.max(x)
    kept = jnp.where((x > 0)[:, None], a, 0)
    sums = w @ a / jnp.sum(w), jnp.sum(kept, 0), jnp.mean(x), jnp.sum(jnp.arange(4))
    return extremes, sums, jnp.max(jnp.sum(a > 0, 1) + 1), b, b, w * x


@pytest.mark.always("None")
@ON_MESHES
def test_jet(kind):
    values = np.array([0.5, 0.25]), X, np.arange(1.0, 5)
    terms = tuple((0.3 * v, np.cos(v)) for v in values)
    on = contextlib.nullcontext() if kind is None else jax.set_mesh(mesh(kind, clients=4, model=2))
    want = jax.jit(lambda *ins: jet(series_by_hand, *ins))(values, terms)
    with on:
        assert_close(jax.jit(lambda *ins: jet(series, *ins))(values, terms), want)


def test_jet_and_masked_nan():
    @fax.program(clients=4)
    def program(x):
        return fax.mean(fax.map(jnp.log, x), where=x > 0)

    def slope(x):
        return jet(program, (x,), ((np.ones(4),),))[1][0]

    @jax.jit
    def everything(x):
        return jet(program, (x,), ((np.ones(4), np.zeros(4)),)), jax.grad(slope)(x)

    (value, (first, second)), curvature = everything(X)
    kept = X[X > 0]
    assert_close(
        (value, first, second), (np.log(kept).mean(), (1 / kept).mean(), (-1 / kept**2).mean())
    )
    assert_close(curvature, np.where(X > 0, -1 / X**2, 0) / 3)


# Effects and callbacks


def noted(seen, ordered=True):
    def client(x):
        def note(x):
            seen.append(float(x))
            return np.asarray(2 * x)

        return io_callback(note, jax.ShapeDtypeStruct((), x.dtype), x, ordered=ordered)

    return client


@pytest.mark.parametrize("vectorize", [None, 1])
def test_ordered_effects_keep_their_order(vectorize):
    seen = []
    client = noted(seen)
    program = averaged(lambda x: client(client(x)), vectorize=vectorize)
    want = [y for x in X for y in (x, 2 * x)]
    for run in program, jax.jit(program):
        assert_close(run(X), 4 * X.mean())
        assert seen == want
        seen.clear()
    two_rounds = jax.jit(lambda x: lax.scan(lambda c, _: (c + program(x), None), 0.0, length=2)[0])
    assert_close(two_rounds(X), 8 * X.mean())
    assert seen == 2 * want


def test_ordered_effects_on_a_mesh_of_one_device(capfd):
    def client(x):
        jax.debug.print("{}", x, ordered=True)
        return x

    for kind in KINDS:
        with jax.set_mesh(mesh(kind, clients=1, model=1)):
            jax.jit(jax.grad(averaged(client)))(X)
            jax.effects_barrier()
        assert capfd.readouterr().out.split() == list(map(str, X))


@pytest.mark.parametrize(
    ("axes", "vectorize", "message"),
    [
        ({}, 2, "ordered effects.*vectorize=2 participants.*Use vectorize=1, or ordered=False"),
        (dict(clients=4), 1, "ordered effects.*has 4 devices.*Use ordered=False, or a mesh of one"),
        (dict(model=4), 1, "ordered effects.*has 4 devices.*Use ordered=False, or a mesh of one"),
    ],
)
def test_ordered_effects_that_have_no_order_are_refused(axes, vectorize, message):
    on = jax.set_mesh(mesh("auto", **axes)) if axes else contextlib.nullcontext()
    with on, pytest.raises(fax.PlacementError, match=message):
        jax.jit(averaged(noted([]), vectorize=vectorize))(X)


CALLBACKS = {
    "pure_callback": lambda x: jax.pure_callback(lambda x: 2 * np.asarray(x), x, x),
    "within": lambda x: lax.cond(
        x > 0,
        jax.jit(lambda x: jax.pure_callback(lambda x: 2 * np.asarray(x), x, x)),
        lambda x: x,
        x,
    ),
    "io_callback": noted([], ordered=False),
}


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_callbacks_on_meshes(kind, name):
    program = averaged(CALLBACKS[name])
    with jax.set_mesh(mesh(kind, clients=4)):
        assert_close(jax.jit(program)(np.abs(X)), 2 * np.abs(X).mean())
    with (
        jax.set_mesh(mesh(kind, clients=4, model=2)),
        pytest.raises(fax.PlacementError, match=r"calls back into Python.*\(model\)\. Return"),
    ):
        jax.jit(program)(X)


# Other tools


@pytest.mark.always("context1", "context3")
@pytest.mark.parametrize(
    "context",
    [
        functools.partial(jax.enable_checks, True),
        jax.checking_leaks,
        functools.partial(jax.numpy_rank_promotion, "raise"),
        functools.partial(jax.numpy_dtype_promotion, "strict"),
        functools.partial(jax.transfer_guard, "disallow"),
        jax.disable_jit,
    ],
)
def test_strict_settings(context):
    @fax.program(clients=4)
    def program(x, w):
        y = fax.map(lambda x: jnp.sin(x) * x, x, vectorize=3)
        return fax.mean(y, weights=w, where=x > 0) + fax.max(y, where=x < 1)

    x, w = map(jnp.asarray, (X, np.ones(4)))
    both = jax.jit(jax.value_and_grad(program))
    want = both(x, w)
    with context():
        assert_close(both(x, w), want)
        assert_close(program(x, w), want[0])


def test_names_of_scopes_survive():
    def client(x):
        with jax.named_scope("at_the_client"):
            return jnp.sin(x) * x

    program = averaged(client)
    for fn in program, jax.grad(program):
        assert "at_the_client" in jax.jit(fn).lower(X).compile().as_text()


def test_export_and_differential_equations():
    def decay(x):
        return odeint(lambda y, t: -y * x, 1.0, jnp.array([0.0, 1.0]))[1]

    program = averaged(decay)
    again = export.deserialize(export.export(jax.jit(program))(X).serialize(vjp_order=1))
    np.testing.assert_allclose(jax.jit(again.call)(X), np.exp(-X).mean(), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(again.call)(X), -np.exp(-X) / 4, rtol=1e-5)


@pytest.mark.parametrize("vectorize", [None, 2])
def test_export_for_any_batch_size(vectorize):
    """Nothing depends on a size that is not known: schedules, sums or forms of convolutions."""

    def client(w, x):
        y = lax.conv_general_dilated(x[:, None], w, (1,), "SAME")
        return jnp.sum(y**2), jnp.mean(y, (1, 2))

    @fax.program(clients=17)
    def program(w, x):
        rows = fax.map(jax.grad(client, has_aux=True), fax.broadcast(w), x, vectorize=vectorize)
        return fax.mean(rows)

    sizes = export.symbolic_shape("batch, 5")
    operands = jnp.ones((2, 1, 3)), jax.ShapeDtypeStruct((17, *sizes), float)
    exported = export.export(jax.jit(program), platforms=("cpu", "tpu"))(*operands)
    x = np.random.default_rng(0).normal(size=(17, 2, 5))
    for found, expected in zip(exported.call(operands[0], x), program(operands[0], x)):
        assert_close(found, expected)


def test_custom_vmap_is_for_vectorized_participants():
    @jax.custom_batching.custom_vmap
    def client(x):
        return x

    client.def_vmap(lambda size, batched, x: (x + 1, True))
    assert_close(averaged(client, vectorize=1)(X), X.mean())
    assert_close(averaged(client, vectorize=2)(X), X.mean() + 1)


def test_what_jax_has_no_rules_for():
    """As `docs/debugging.md` says."""
    loop = averaged(lambda x: lax.scan(lambda c, _: (jnp.sin(c), None), x, length=2)[0])
    with pytest.raises(KeyError, match="scan"):
        jet(loop, (X,), ((X,),))
    rows = BCOO((np.ones(4), np.stack([np.arange(4)] * 2, 1)), shape=(4, 4))  # the identity
    with pytest.raises(NotImplementedError, match="sparse rule for federated_map"):
        sparsify(averaged(jnp.sum))(rows)
    assert_close(averaged(lambda x: (rows @ jnp.ones(4)).sum() * x)(X), 4 * X.mean())


# What JAX does not export


def test_rules_are_registered_where_jax_has_a_place_for_them(monkeypatch):
    assert _compat._names("jax._src.checkify", "no_such_name") is None
    assert _compat._names("jax._src.no_such_module", "name") is None
    primitive = jax.extend.core.Primitive("nothing")
    register = (
        lambda: _compat.register_error_check(primitive, lambda *args: None),
        lambda: _compat.register_key_reuse(primitive),
        lambda: _compat.register_jet(primitive, lambda *args: None),
    )
    assert [call() for call in register] == [True] * 3
    monkeypatch.setattr(_compat, "_names", lambda *names: None)
    assert [call() for call in register] == [False] * 3
    assert not _compat.is_ordered(object())


def test_internal_errors_are_told_apart():
    with jax.debug_nans(True), pytest.raises(Exception, match="nan") as error:
        jax.core.eval_jaxpr(jax.make_jaxpr(jax.jit(jnp.log))(1.0).jaxpr, [], -1.0)
    assert _compat.is_invalid_result_of_jit(error.value)
    assert not _compat.is_invalid_result_of_jit(FloatingPointError("invalid value (nan)"))
