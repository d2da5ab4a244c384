"""The work of tracing: linear in leaves, and not done again for an eager call alike."""

import collections
import functools
import gc
import os
import sys
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fax
from fax.primitives._round import Round

N = 3
X = jnp.arange(1.0, N + 1)  # a sum of 6


# Leaves


def client(p, d):
    return jax.tree.map(lambda x: jnp.sin(x) * d, p)


def map_leaves(fn, *trees):
    return jax.tree.map(fn, *trees)


def between(p, d):
    y = map_leaves(jnp.subtract, fax.map(client, fax.broadcast(p), d), fax.broadcast(p))
    return fax.mean(y)


def two_rounds(p, d):
    return between(map_leaves(jnp.add, p, between(p, d)), d)


def interleaved(p, d):
    y = fax.map(client, fax.broadcast(p), d)
    return map_leaves(lambda y, p: fax.mean(y - fax.broadcast(p)), y, p)


def centered(p, d):
    y = fax.map(client, fax.broadcast(p), d)
    m = fax.mean(y)
    norm = sum(jnp.sum(x) for x in jax.tree.leaves(m))
    return map_leaves(lambda y, m: fax.mean((y - fax.broadcast(m * norm)) ** 2), y, m)


def checkpointed(p, d):
    y = fax.map(jax.checkpoint(client), fax.broadcast(p), d)
    return fax.mean(map_leaves(jnp.subtract, y, fax.broadcast(p)), weights=d)


def largest(p, d):
    return fax.max(map_leaves(jnp.negative, fax.map(client, fax.broadcast(p), d)))


def masked_each(p, d):
    y = fax.map(client, fax.broadcast(p), d)
    return map_leaves(lambda y, p: fax.sum(y, where=fax.broadcast(p) > 0), y, p)


PROGRAMS = [between, two_rounds, interleaved, centered, checkpointed, largest, masked_each]


def total(fn):
    return lambda p, d: sum(jnp.sum(x) for x in jax.tree.leaves(fn(p, d)))


def trace(body, transform, leaves):
    p = {f"p{i}": jnp.ones(()) for i in range(leaves)}
    return jax.jit(transform(fax.program(clients=N)(lambda p, d: body(p, d)))).trace(p, X)


def calls_in_fax(fn):
    """How many functions and generators of fax are entered while ``fn`` runs."""
    count = 0

    def look(frame, event, argument):
        nonlocal count
        count += event == "call" and frame.f_globals.get("__name__", "").startswith("fax.")

    sys.setprofile(look)
    try:
        fn()
    finally:
        sys.setprofile(None)
    return count


# The program is traced for its gradient, too.
@pytest.mark.always("centered-gradient", "masked_each-gradient")
@pytest.mark.parametrize("transform", [pytest.param("program", marks=pytest.mark.long), "gradient"])
@pytest.mark.parametrize("body", PROGRAMS)
def test_the_work_of_tracing_is_linear_in_leaves(body, transform):
    transform = {"program": lambda fn: fn, "gradient": lambda fn: jax.grad(total(fn))}[transform]
    trace(body, transform, 10)  # what is remembered after one trace is remembered in all below
    some, twice, thrice = (
        calls_in_fax(lambda k=k: trace(body, transform, k)) for k in (10, 20, 30)
    )
    assert thrice - twice <= 1.02 * (twice - some)


@pytest.mark.parametrize("body", PROGRAMS[:-2])
def test_a_map_is_put_together_once_whatever_its_leaves(body, monkeypatch):
    made = collections.Counter()
    assemble = Round.assemble

    def counted(self, *args):
        made[leaves] += 1
        return assemble(self, *args)

    monkeypatch.setattr(Round, "assemble", counted)
    for leaves in (2, 8):
        trace(body, lambda fn: fn, leaves)
    assert 0 < made[2] == made[8]


def test_a_client_function_traced_once_and_mapped_twice():
    @jax.jit
    def helper(x):
        return fax.map(lambda row: jnp.sin(row * 2) + fax.program(clients=2)(inner)(row), x)

    def inner(row):
        return fax.sum(fax.map(jnp.cos, fax.broadcast(row)))

    @fax.program(clients=N)
    def program(x):
        return fax.collect(helper(helper(x) * 3) + helper(x))

    def reference(x):
        def f(x):
            return jnp.sin(x * 2) + 2 * jnp.cos(x)

        return f(f(x) * 3) + f(x)

    np.testing.assert_allclose(program(X), reference(X), rtol=1e-12)


# Eager calls


def test_an_eager_call_alike_traces_nothing():
    traces = []

    @fax.program(clients=N)
    def program(p, x, scale, *, name):
        def client(p, row):
            traces.append(name)
            return {"y": p * row * scale}

        return fax.sum(fax.map(client, fax.broadcast(p), x)), name, scale

    for _ in range(3):
        out, name, scale = program(2.0, X, 3, name="a")
        assert (out["y"], name, scale) == (36.0, "a", 3)
    assert traces == ["a"]
    assert program(2.0, X + 1, 3, name="a")[0]["y"] == 54.0
    assert traces == ["a"]

    # Other types, constants and structures are other calls; all of them are remembered.
    calls = [
        (lambda: program(2.0, X, 3.0, name="a"), 36.0),  # a float, not an int
        (lambda: program(2.0, X, 4, name="a"), 48.0),
        (lambda: program(2.0, X, 3, name="b"), 36.0),
        (lambda: program(np.float32(2.0), X, 3, name="a"), 36.0),
        (lambda: program(2.0, X.astype(jnp.float16), 3, name="a"), 36.0),
    ]
    for number, (call, wanted) in enumerate(calls, start=2):
        first = call()
        assert len(traces) == number
        assert call()[0]["y"] == wanted
        assert first[0]["y"].dtype == call()[0]["y"].dtype
        assert type(first[2]) is type(call()[2])
        assert len(traces) == number
    before = len(traces)
    assert program(2.0, X, 3, name="a")[2] == 3
    assert len(traces) == before


def test_a_context_is_part_of_what_is_remembered():
    traces = []

    @fax.program(clients=N)
    def program(x):
        traces.append(jax.config.jax_default_matmul_precision)
        return fax.sum(fax.map(lambda row: row * jnp.asarray(1.5).astype(float), x))

    with jax.enable_x64(False):
        short = X.astype(jnp.float32)
        assert program(short).dtype == jnp.float32
    assert program(short).dtype == jnp.float64
    with jax.enable_x64(False):
        assert program(short).dtype == jnp.float32
    assert len(traces) == 2
    with jax.default_matmul_precision("highest"):
        program(short)
    assert traces[2:] == ["highest"]
    with jax.disable_jit():  # JAX runs functions at every call then
        assert program(short) == program(short) == 9.0
    assert len(traces) == 5


FACTOR = 2.0
TABLE = np.array([2.0])


def by_global(row):
    return row * FACTOR


def by_table(row):
    return row * TABLE[0]


def set_global(value):
    globals()["FACTOR"] = value


def set_module(value):
    SETTINGS.factor = value


# A module of the user's in a file beside fax, whose name begins like that of fax's folder.
SETTINGS = types.ModuleType("users_settings")
SETTINGS.__file__ = f"{os.path.dirname(fax.__file__)}_settings.py"


class Settings:
    factor = 2.0

    @staticmethod
    def set(value):
        Settings.factor = value


def _readers():
    """Functions of a row that multiply it by 2, and what makes them multiply it by another one."""
    yield "global", by_global, set_global
    yield "NumPy's elements", by_table, lambda value: TABLE.__setitem__(0, value)
    yield "class", lambda row: row * Settings.factor, Settings.set

    numbers = {"a": [1.0, 2.0]}
    yield "container", lambda row: row * numbers["a"][1], lambda v: numbers["a"].__setitem__(1, v)

    get = numbers.get
    yield "method", lambda row: row * get("a")[1], lambda v: numbers.update(a=[1.0, v])

    def change(value):
        nonlocal factor
        factor = value

    factor = 2.0
    yield "variable", lambda row: row * factor, change

    array = jnp.array(2.0)

    def change_array(value):
        nonlocal array
        array = jnp.array(value)

    yield "array", lambda row: row * array, change_array

    def with_default(row, factor=2.0):
        return row * factor

    def change_default(value):
        with_default.__defaults__ = (value,)

    yield "default", with_default, change_default

    def with_attribute(row):
        return row * with_attribute.factor

    with_attribute.factor = 2.0
    yield "attribute", with_attribute, lambda value: setattr(with_attribute, "factor", value)

    partial = functools.partial(jax.tree.map, lambda row: by_global(row) * 1.0)
    yield "partial", partial, set_global

    thing = types.SimpleNamespace(factor=2.0)
    yield "object", lambda row: row * thing.factor, lambda value: setattr(thing, "factor", value)

    yield "module", lambda row: row * SETTINGS.factor, set_module

    def importing(row):
        from users_settings import factor

        return row * factor

    yield "import", importing, set_module

    @functools.wraps(jax.nn.standardize)
    def wrapper(row):
        return row * FACTOR

    yield "wraps", wrapper, set_global

    # When cProfile runs a script, the module __main__ is cProfile's, as it is pytest's here.
    kind = type("Kind", (), {"__module__": "__main__"})
    yield "__main__", lambda row: row * kind.factor, lambda value: setattr(kind, "factor", value)

    names = {"__name__": "json", "factor": 2.0}
    exec("def read(row):\n    return row * factor", names)
    yield "__name__", names["read"], lambda value: names.update(factor=value)

    @jax.custom_jvp
    def ruled(row):
        return row * numbers["b"]

    ruled.defjvp(lambda primals, tangents: (ruled(*primals), tangents[0]))
    numbers["b"] = 2.0
    yield "custom_jvp", ruled, lambda value: numbers.__setitem__("b", value)

    inner = fax.program(clients=2)(lambda row: row * numbers["c"])
    numbers["c"] = 2.0
    yield "inner program", inner, lambda value: numbers.__setitem__("c", value)


@pytest.mark.parametrize(
    ("read", "change"), [pytest.param(*rest, id=name) for name, *rest in _readers()]
)
def test_what_a_program_reads_is_read_again_when_it_has_changed(read, change, monkeypatch):
    monkeypatch.setitem(sys.modules, SETTINGS.__name__, SETTINGS)
    program = fax.program(clients=N)(lambda x: fax.map(read, x))
    for value in (2.0, 5.0, -0.0, 0.0, 2.0):
        change(value)
        for _ in range(2):
            found = program(X)
            np.testing.assert_array_equal(found, X * value)
            assert (np.signbit(found) == np.signbit(value)).all()


def test_closures_of_functions_arrays_and_containers_are_traced_once():
    traces = []
    weights = {"a": (jnp.ones(2), [np.arange(2.0), None, "relu"])}

    def helper(row):
        traces.append(1)
        return jax.nn.relu(row * weights["a"][0] + weights["a"][1][0])

    loss = functools.partial(lambda scale, row: jnp.sum(helper(row)) * scale, 2.0)

    @fax.program(clients=N)
    def program(x):
        return fax.mean(fax.map(jax.checkpoint(jax.grad(loss)), x))

    assert program(X) == program(X + 1) == 4.0
    assert len(traces) == 1


def test_results_that_are_not_constants_are_those_of_the_call():
    @fax.program(clients=N)
    def with_set(x):
        return fax.sum(x), set()

    assert with_set(X)[1] is not with_set(X)[1]

    @fax.program(clients=N)
    def with_function(x, fn):
        return fax.sum(x), fn

    for fn in (lambda: 2.0 for _ in range(2)):  # alike, but each may get attributes later
        assert with_function(X, fn)[1] is fn


def test_a_program_and_what_it_closes_over_can_be_forgotten():
    def make():
        array = jnp.ones(N)

        @fax.program(clients=N)
        def program(x):
            assert program is not None  # it refers to itself
            return fax.sum(x * array)

        program(X)
        return weakref.ref(program), weakref.ref(array)

    references = make()
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_only_the_last_of_what_is_closed_over_is_kept():
    held = []

    @fax.program(clients=N)
    def program(x):
        return fax.sum(x * held[0])

    kept = []
    for value in range(4):
        held[:] = [jnp.full(N, float(value))]
        kept.append(weakref.ref(held[0]))
        assert program(X) == 6.0 * value
    gc.collect()
    assert [reference() is not None for reference in kept] == [False, False, False, True]
