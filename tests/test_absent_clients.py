"""What a client of weight zero holds reaches nothing, whatever the aggregator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

import fax
from fax import aggregators as a
from fax.aggregators import Aggregator, PerClient

N, ABSENT = 5, 2
WEIGHTS = np.array([1.0, 3.0, 0.0, 2.0, 1.0])
KEY = jax.random.key(3)
QUICKLY = {"xla_backend_optimization_level": 0}
PARAMS = {"b": np.array([0.5, 2.0]), "w": np.linspace(0.5, 2, 12).reshape(4, 3)}

TRANSFORMATIONS = {
    "none": None,
    "adaptive_clip": a.adaptive_clip(initial_clip_norm=0.5),
    "clip_by_norm": a.clip_by_norm(0.5),
    "drive": a.drive(),
    "e3m0": a.e3m0(),
    "e4m3": a.e4m3(),
    "error_feedback": a.error_feedback(a.chain(a.top_k(3), a.e3m0()), num_clients=N, decay=0.9),
    "hadamard": a.hadamard(a.uniform_quantization(4)),
    "int8": a.int8(),
    "non_finite": a.non_finite(),
    "terngrad": a.terngrad(),
    "top_k": a.top_k(1, per=4, values=a.e3m0()),
    "uniform_quantization": a.uniform_quantization(4, entropy_coded=True),
}
AGGREGATORS = {
    "dp_ftrl": a.dp_ftrl(1.0, 0.5, num_clients=N, separation=2, participations=3),
    "gaussian": a.gaussian(1.0, 0.5, quantile=0.5, count_noise=2.0),
    "geometric_median": a.geometric_median(),
    "krum": a.krum(1),
    "laplace": a.laplace(1.0, 0.5),
    "mean": a.mean(),
    "median": a.median(),
    "multi_krum": a.multi_krum(0, 2),
    "power_sgd": a.power_sgd(1, num_clients=N),
    "secure_sum": a.secure_sum(4.0, 5, bits=20),
    "trimmed_mean": a.trimmed_mean(count=1),
    **{f"{name}, mean": part for name, part in TRANSFORMATIONS.items() if part},
}
FUNCTIONS = {name for name in dir(a) if callable(getattr(a, name)) and name.islower()}


def test_all_aggregators_are_here():
    others = {"calibrate", "chain", "epsilon", "releases", "renewed"}
    names = {name.removesuffix(", mean") for name in AGGREGATORS}
    assert names == {name for name in FUNCTIONS if not name.startswith("_")} - others


def is_rows(x):
    return isinstance(x, PerClient)


def rows_of(states):
    return [x.rows for x in jax.tree.leaves(states, is_leaf=is_rows) if is_rows(x)]


def started(state):
    """A state whose memories hold something, some of it a negative zero."""

    def one(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        values = np.random.default_rng(4).normal(size=x.size)
        values[::3] = -0.0
        return values.reshape(x.shape)

    return jax.tree.map(lambda x: jax.tree.map(one, x) if is_rows(x) else x, state, is_leaf=is_rows)


def local(params, x):
    """A client's training, whose derivative is singular at zero."""
    return jax.tree.map(lambda p, x: p * jnp.log(p * x), params, x)


# What stands behind a transformation: an aggregator of each kind. The mean does in the case "none".
# Some are differentiated, for the others' derivatives are those of a masked sum, as the mean's, or
# zero.
KINDS = ("dp_ftrl", "krum", "power_sgd", "secure_sum")
DIFFERENTIATED = ("krum", "mean", "power_sgd")
# Encodings and a scaling, client by client: before an aggregator other than the mean, what one of
# them does, the others do.
ALIKE = (
    *("drive", "e3m0", "e4m3", "int8", "terngrad", "hadamard", "top_k"),
    *("clip_by_norm", "uniform_quantization"),
)
# The code of these is also that of another one: of `krum`, `gaussian`, or an encoding.
SAME = ("multi_krum", "laplace", *ALIKE[:-2])
FIRST = [
    pytest.param(name, marks=[pytest.mark.long] * (name in ALIKE[:-2])) for name in TRANSFORMATIONS
]


def chains(first, everything):
    if first == "none":
        return {
            name: part if isinstance(part, Aggregator) else a.chain(part)
            for name, part in AGGREGATORS.items()
            if everything or name.removesuffix(", mean") not in SAME
        }
    some = ("power_sgd",) if first in ALIKE else KINDS
    names = tuple(AGGREGATORS) if everything else some
    if first == "adaptive_clip":  # private aggregators refuse its state
        names = [name for name in names if not getattr(AGGREGATORS[name], "private", False)]
    return {name: a.chain(TRANSFORMATIONS[first], AGGREGATORS[name]) for name in names}


@functools.cache
def rounds(first, everything):
    """A round with each of the chains, and the gradient of all that comes out of it."""
    every = chains(first, everything)

    @fax.program(clients=N)
    def round(params, x, weights, states):
        sent = fax.map(jax.checkpoint(local), fax.broadcast(params), x)
        return {
            name: aggregator.aggregate(sent, weights, states[name], KEY)
            for name, aggregator in every.items()
        }

    def value(params, x, weights, states):
        out = round(params, x, weights, states)
        seen = [out[name] for name in out if first == "none" or name in DIFFERENTIATED]
        leaves = [x for x in jax.tree.leaves(seen) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum(jnp.sum(jnp.sin(x)) for x in leaves), out

    states = {name: started(aggregator.init(PARAMS)) for name, aggregator in every.items()}
    step = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True), compiler_options=QUICKLY)
    return step, states


def data(absent):
    rng = np.random.default_rng(0)
    x = jax.tree.map(lambda p: rng.uniform(0.5, 3, (N, *p.shape)), PARAMS)
    for leaf in x.values():
        if absent is not None:
            leaf[ABSENT] = absent
    return x


@pytest.mark.always("none", "clip_by_norm", "non_finite")
@pytest.mark.parametrize("first", FIRST)
def test_what_a_client_of_weight_zero_holds_reaches_nothing(first, pytestconfig):
    """Aggregators and chains of two: some of each kind, or with ``--all`` all of them."""
    step, states = rounds(first, pytestconfig.option.all)
    expected = jax.tree.map(np.asarray, step(PARAMS, data(None), WEIGHTS, states))
    for absent in (np.nan, 0.0):
        found = jax.tree.map(np.asarray, step(PARAMS, data(absent), WEIGHTS, states))
        flat, _ = jax.tree_util.tree_flatten_with_path(found)
        for (path, x), y in zip(flat, jax.tree.leaves(expected), strict=True):
            assert np.isfinite(x).all(), jax.tree_util.keystr(path)
            np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))
    assert not any(x[ABSENT].any() for x in found[0][1].values())
    for name, (_, after, _) in found[1].items():
        for old, new in zip(rows_of(states[name]), rows_of(after), strict=True):
            for x, y in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
                assert np.asarray(x)[ABSENT].tobytes() == y[ABSENT].tobytes(), name
                assert np.asarray(x)[0].tobytes() != y[0].tobytes(), name
    if first == "non_finite":  # as if it had been left out by its weight
        weights = np.where(np.arange(N) == ABSENT, 1, WEIGHTS)
        found = step(PARAMS, data(np.nan), weights, states)
        for name, (update, after, metrics) in found[1].items():
            assert metrics["non_finite"] == (name != "non_finite, mean")  # a second one finds none
            problems.assert_trees_close((update, after), expected[1][name][:2], rtol=0, atol=0)
        problems.assert_trees_close(found[0], expected[0], rtol=0, atol=0)
