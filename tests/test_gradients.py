"""Derivatives of every operator: against finite differences, at ties, and around masked rows."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import subsets
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.flatten_util import ravel_pytree
from jaxprs import equations
from meshes import mesh

import fax
from fax import _compat

N = 7
X = np.random.default_rng(0).uniform(0.5, 1.5, (N, 2))
WEIGHTS = np.array([1.0, -0.5, 2.0, 0.25, 1.5, -0.75, 3.0])
MASK = np.array([True, False, True, True, False, True, False])
BOTH = pytest.mark.parametrize("fused", [False, True], ids=["direct", "fused"])
BATCH_SIZES = pytest.mark.parametrize("vectorize", [1, 3, N])


def assert_close(got: Any, expected: Any) -> None:
    """Equal up to rounding in float64."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12, strict=True)


# Finite differences


def client(x: jax.Array) -> jax.Array:
    return jnp.sin(2 * x) * x


def fed(x: jax.Array, vectorize: int | None) -> jax.Array:
    """Placed rows as they are, or made by a map, so many at once."""
    return fax.map(client, x, vectorize=vectorize) if vectorize else x


OPERATORS: dict[str, tuple[Callable, tuple]] = {
    "broadcast": (lambda many, x: fed(fax.broadcast(x), many), (X[0],)),
    "distribute": (lambda many, x: fed(fax.distribute(x), many), (X,)),
    "collect": (lambda many, x: fax.collect(fed(x, many)), (X,)),
    "map": (lambda many, x: fax.map(jnp.exp, fed(x, many), vectorize=many), (X,)),
    "map of broadcast": (
        lambda many, p, x: fax.map(jnp.dot, fax.broadcast(p), fed(x, many)),
        (X[0], X),
    ),
    "sum": (lambda many, x: fax.sum(fed(x, many)), (X,)),
    "sum where": (lambda many, x: fax.sum(fed(x, many), where=MASK), (X,)),
    "mean": (lambda many, x: fax.mean(fed(x, many)), (X,)),
    "mean where": (lambda many, x: fax.mean(fed(x, many), where=MASK), (X,)),
    "mean weights": (lambda many, x, w: fax.mean(fed(x, many), weights=w), (X, WEIGHTS)),
    "mean weights where": (
        lambda many, x, w: fax.mean(fed(x, many), weights=w, where=MASK),
        (X, WEIGHTS),
    ),
    "max": (lambda many, x: fax.max(fed(x, many)), (X,)),
    "max where": (lambda many, x: fax.max(fed(x, many), where=MASK), (X,)),
    "max initial": (lambda many, x, least: fax.max(fed(x, many), initial=least), (X, 0.3)),
    "max of initial": (lambda many, x, least: fax.max(fed(x, many), initial=least), (X, 2.0)),
    "min": (lambda many, x: fax.min(fed(x, many)), (X,)),
    "min where": (lambda many, x: fax.min(fed(x, many), where=MASK), (X,)),
    "min where initial": (
        lambda many, x, most: fax.min(fed(x, many), where=MASK, initial=most),
        (X, 9.0),
    ),
}


# Every operator in some form, and a mean, a sum, an extremum and rows in each way. The other cases
# use masks and initial values as some of these do, and as tests below do.
@pytest.mark.always(
    *("broadcast-direct", "map-direct", "sum where-direct", "mean weights-direct"),
    *("max where-direct", "min-direct", "distribute-at_once", "map of broadcast-at_once"),
    *("mean-at_once", "mean weights where-at_once", "max of initial-at_once"),
    *("min where initial-at_once", "collect-one_by_one", "sum-one_by_one", "max-one_by_one"),
)
@pytest.mark.parametrize("vectorize", [None, 1, N], ids=["direct", "one_by_one", "at_once"])
@pytest.mark.parametrize("name", OPERATORS)
def test_derivatives_are_those_of_finite_differences(name, vectorize):
    """First and second derivatives of every operator, in both modes, away from ties."""
    operator, args = OPERATORS[name]
    program = fax.program(clients=N)(lambda *args: operator(vectorize, *args))
    point, unravel = ravel_pytree(args)

    def flat(point):
        return jnp.ravel(program(*unravel(point)))

    modes = jax.jacfwd, jax.jacrev
    first = [mode(flat) for mode in modes]
    second = [mode(one) for mode in modes for one in first]
    values = jax.jit(
        lambda point: [[flat(point)], *([fn(point) for fn in fns] for fns in (first, second))]
    )
    _, slopes, curvatures = values(point)
    # A central difference of step 1e-4 is wrong by 1e-8 times the third derivative.
    step = 1e-4
    moves = [[values(point + sign * step * e)[:2] for sign in (1, -1)] for e in np.eye(point.size)]
    for order, found in enumerate((slopes, curvatures)):
        differences = [(up[order][0] - down[order][0]) / (2 * step) for up, down in moves]
        for derivative in found:
            expected = np.stack(differences, -1)
            np.testing.assert_allclose(derivative, expected, rtol=1e-6, atol=1e-6)


# Ties

TIED = np.array(
    [[2.0, 1.0], [5.0, 0.5], [5.0, 3.0], [1.0, 3.0], [5.0, 3.0], [0.0, 3.0], [4.0, 2.0]]
)
SHARES = np.array([[0, 0], [1 / 3, 0], [1 / 3, 0.25], [0, 0.25], [1 / 3, 0.25], [0, 0.25], [0, 0]])


def extremum(sign: int, x: Any, **kwargs: Any) -> Any:
    """The maximum by either operator."""
    return fax.max(x, **kwargs) if sign > 0 else -fax.min(-x, **kwargs)


@pytest.mark.kinds(sign=subsets.alike, vectorize=subsets.alike, fused=subsets.alike)
@BOTH
@BATCH_SIZES
@pytest.mark.parametrize("sign", [1, -1], ids=["max", "min"])
def test_ties_share_the_gradient_equally(sign, vectorize, fused):
    @fax.program(clients=N)
    def best(x, mask):
        if fused:
            x = fax.map(lambda row: 2 * row, x, vectorize=vectorize)
        return extremum(sign, x), extremum(sign, x, where=mask)

    factor = 2.0 if fused else 1.0
    mask = np.array([True, False, True, True, False, True, True])
    alone = SHARES * 0
    alone[2, 0] = 1
    alone[[2, 3, 5], 1] = 1 / 3
    gradients = jax.jit(jax.jacrev(lambda x: [jnp.sum(y) for y in best(x, mask)]))(TIED)
    moved = jax.jit(lambda x, t: jax.jvp(lambda x: best(x, mask), (x,), (t,))[1])(TIED, X)
    for k, shares in enumerate([SHARES, alone]):
        assert_close(gradients[k], factor * shares)
        assert_close(moved[k], factor * np.sum(shares * X, axis=0))


# Masked participants

BAD = np.array([0.0, np.nan, np.inf, -1.0])  # the logarithm is singular or not a number


def with_bad_rows(x: np.ndarray, mask: np.ndarray, bad: np.ndarray) -> np.ndarray:
    return np.where(mask, x, np.resize(bad, len(x)))


SOME = np.array([True, False, True, False, False, True, False])
FEWER = np.array([True, False, False, False, False, True, False])
DATA = with_bad_rows(X[:, 0], SOME, BAD)
LOADS = with_bad_rows(WEIGHTS, SOME, np.array([np.nan, np.inf, 1.0, 0.0]))
POINT = np.concatenate([[0.7], DATA, LOADS])

MASKED_REDUCTIONS: dict[str, Callable] = {
    "sum": lambda y, weights, mask: fax.sum(y, where=mask),
    "mean": lambda y, weights, mask: fax.mean(y, where=mask),
    "weighted mean": lambda y, weights, mask: fax.mean(y, weights=weights, where=mask),
    "max": lambda y, weights, mask: fax.max(y, where=mask),
    "min": lambda y, weights, mask: fax.min(y, where=mask),
}


def log(w, x):
    return w * jnp.log(x)


def of_raw_rows(reduce, w, x, weights, mask, vectorize):
    return w * reduce(x, weights, mask)


def of_a_map(reduce, w, x, weights, mask, vectorize):
    return reduce(fax.map(log, fax.broadcast(w), x, vectorize=vectorize), weights, mask)


def of_a_checkpointed_map(reduce, w, x, weights, mask, vectorize):
    y = fax.map(jax.checkpoint(log), fax.broadcast(w), x, vectorize=vectorize)
    return reduce(y, weights, mask)


def of_two_maps(reduce, w, x, weights, mask, vectorize):
    y = fax.map(log, fax.broadcast(w), x, vectorize=vectorize)
    return reduce(fax.map(jnp.square, y, vectorize=vectorize), weights, mask)


def with_own_mask(reduce, w, x, weights, mask, vectorize):
    """Every participant decides by its data whether it takes part."""
    y, fit = fax.map(
        lambda w, x, asked: (log(w, x), asked & jnp.isfinite(x) & (x > 0)),
        fax.broadcast(w),
        x,
        mask,
        vectorize=vectorize,
    )
    return reduce(y, weights, fit)


# What is expected, in NumPy: a value, its gradient, and its Hessian, each by the chain rule.
Jet = tuple[Any, np.ndarray, np.ndarray]


def plain_reduction(name: str, y: np.ndarray, weights: np.ndarray) -> Jet:
    """A reduction of rows, as a function of these and of the weights after them."""
    count = len(y)
    gradient, hessian = np.zeros(2 * count), np.zeros((2 * count, 2 * count))
    if name == "sum":
        gradient[:count] = 1
        return y.sum(), gradient, hessian
    if name == "mean":
        gradient[:count] = 1 / count
        return y.mean(), gradient, hessian
    if name == "weighted mean":
        total = weights.sum()
        mean = weights @ y / total
        off = (y - mean) / total
        gradient[:] = np.concatenate([weights / total, off])
        hessian[:count, count:] = (np.eye(count) - weights[:, None] / total) / total
        hessian[count:, :count] = hessian[:count, count:].T
        hessian[count:, count:] = -(off[:, None] + off) / total
        return mean, gradient, hessian
    best = np.argmax(y) if name == "max" else np.argmin(y)
    gradient[best] = 1
    return y[best], gradient, hessian


def then(value: Any, first: Any, second: Any, inner: Jet) -> Jet:
    """A function of a number, with these derivatives, of a function of the point."""
    _, gradient, hessian = inner
    return value, first * gradient, first * hessian + second * np.outer(gradient, gradient)


def plain(kind: Callable, name: str, mask: np.ndarray, point: np.ndarray) -> Jet:
    """The reduction of those selected alone: the others do not come into it."""
    chosen = np.flatnonzero(mask)
    count = len(chosen)
    w, x, weights = point[0], point[1 + chosen], point[1 + N + chosen]
    # The rows and the weights as functions of the point, with their first and second derivatives.
    y = x if kind is of_raw_rows else w * np.log(x)
    first = np.zeros((2 * count, point.size))
    second = np.zeros((2 * count, point.size, point.size))
    first[np.arange(count, 2 * count), 1 + N + chosen] = 1
    if kind is of_raw_rows:
        first[np.arange(count), 1 + chosen] = 1
    for k, i in enumerate(1 + chosen):
        if kind is not of_raw_rows:
            first[k, [0, i]] = np.log(x[k]), w / x[k]
            second[k, [0, i], [i, 0]] = 1 / x[k]
            second[k, i, i] = -w / x[k] ** 2
        if kind is of_two_maps:
            _, first[k], second[k] = then(y[k] ** 2, 2 * y[k], 2, (y[k], first[k], second[k]))
    if kind is of_two_maps:
        y = y**2
    value, gradient, hessian = plain_reduction(name, y, weights)
    hessian = first.T @ hessian @ first + np.tensordot(gradient, second, 1)
    gradient = gradient @ first
    if kind is of_raw_rows:  # times the parameter
        e = np.eye(point.size)[0]
        hessian = w * hessian + np.outer(e, gradient) + np.outer(gradient, e)
        value, gradient = w * value, w * gradient + value * e
    return then(np.sin(value), np.cos(value), -np.sin(value), (value, gradient, hessian))


def plain_twice(kind: Callable, name: str, mask: np.ndarray, point: np.ndarray) -> Jet:
    """What `twice` makes of it."""
    value, gradient, hessian = plain(kind, name, mask, point)
    t = np.tanh(value)
    _, slope, curvature = then(t, 1 - t**2, -2 * t * (1 - t**2), (value, gradient, hessian))
    e = np.eye(point.size)[0]
    value, gradient, hessian = plain(kind, name, mask, point + t * e)
    jacobian = np.eye(point.size) + np.outer(e, slope)
    return (
        value,
        gradient @ jacobian,
        jacobian.T @ hessian @ jacobian + gradient[0] * curvature,
    )


def twice(function: Callable) -> Callable:
    """A function applied two times in a scan, the second time to a shifted server input."""

    def repeated(point):
        def step(state, _):
            return function(point.at[0].add(jnp.tanh(state))), None

        return lax.scan(step, jnp.zeros(()), length=2)[0]

    return repeated


TANGENT = np.cos(np.arange(POINT.size))

WAYS: dict[str, Callable[[Callable], Callable]] = {
    "grad": jax.grad,
    "jit": lambda f: jax.jit(jax.value_and_grad(f)),
    "jvp": lambda f: lambda point: jax.jvp(f, (point,), (TANGENT,)),
    "hessian": lambda f: jax.jit(jax.hessian(f)),
    "reverse over reverse": lambda f: jax.jit(jax.jacrev(jax.grad(f))),
    "hessian of scan": lambda f: jax.jit(jax.hessian(twice(f))),
}


def expected_of(name: str, kind: Callable, way: str, mask: np.ndarray, point: np.ndarray) -> Any:
    """What a way of `WAYS` gives for the reference."""
    if way == "hessian of scan":
        return plain_twice(kind, name, mask, point)[2]
    value, gradient, hessian = plain(kind, name, mask, point)
    if way == "grad":
        return gradient
    if way == "jit":
        return value, gradient
    return (value, gradient @ TANGENT) if way == "jvp" else hessian


AFTER_VMAP = pytest.mark.parametrize("way", ["jit", "hessian", "reverse over reverse"])
KINDS = [
    (of_raw_rows, 3),
    (of_a_map, 3),
    (of_a_checkpointed_map, 1),
    (of_two_maps, N),
    (with_own_mask, N),
]
KIND_NAMES = [kind.__name__ for kind, _ in KINDS]


FIRST_DERIVATIVES = {"grad": "reverse", "jit": "reverse", "jvp": "forward"}
# Of each kind of map all ways, and of each reduction those of a mean and those of an extremum. Each
# map and each reduction is differentiated once, in every mode, and twice, in one of the ways.
COVERING = pytest.mark.kinds(
    name=lambda name: name in ("max", "min"),
    kind=lambda kind: "map" if kind in (of_a_checkpointed_map, of_two_maps) else kind,
    way=lambda way: FIRST_DERIVATIVES.get(way, "twice"),
    vectorize=subsets.alike,
)


@jax.jit
def parts_of(point):
    """Parameter, data and weights."""
    return point[0], point[1 : 1 + N], point[1 + N :]


def masked_program(kind: Callable, name: str, vectorize: int) -> Callable:
    """A function of the point, that is of parameter, data and weights, and of the mask."""

    @fax.program(clients=N)
    def program(w, x, weights, mask):
        # Not linear in the result, so that cotangents have derivatives too.
        return jnp.sin(kind(MASKED_REDUCTIONS[name], w, x, weights, mask, vectorize))

    return lambda point, mask: program(*parts_of(point), mask)


@COVERING
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "vectorize"), KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("name", MASKED_REDUCTIONS)
def test_masked_participants_touch_nothing(name, kind, way, vectorize):
    """Whatever they hold, values and derivatives are those of the others, and zero for them."""
    program = masked_program(kind, name, vectorize)
    got = WAYS[way](lambda point: program(point, SOME))(jnp.asarray(POINT))
    assert_close(got, expected_of(name, kind, way, SOME, POINT))


MASKS = np.stack([SOME, FEWER])
# Above, each combination comes up; under `vmap`, each value with means and with extremes.
EACH = pytest.mark.kinds(
    name=lambda name: name in ("max", "min"), kind=subsets.alike, way=subsets.alike
)


@EACH
@AFTER_VMAP
@pytest.mark.parametrize(("kind", "vectorize"), KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("name", MASKED_REDUCTIONS)
def test_masked_participants_touch_nothing_under_vmap_over_masks(name, kind, way, vectorize):
    """The program is vectorized over its mask first, and differentiated then."""
    program = masked_program(kind, name, vectorize)

    def total(point):
        return jnp.sum(jax.vmap(program, (None, 0))(point, MASKS))

    got = WAYS[way](total)(jnp.asarray(POINT))
    of_masks = [expected_of(name, kind, way, mask, POINT) for mask in MASKS]
    assert_close(got, jax.tree.map(np.add, *of_masks))


@EACH
@AFTER_VMAP
@pytest.mark.parametrize(("kind", "vectorize"), KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("name", MASKED_REDUCTIONS)
def test_masked_participants_touch_nothing_under_vmap_over_data(name, kind, way, vectorize):
    """The program is vectorized over all it differentiates in, and differentiated then."""
    program = masked_program(kind, name, vectorize)
    points = [POINT, POINT * 1.25]

    def total(points):
        return jnp.sum(jax.vmap(program, (0, None))(points.reshape(2, -1), SOME))

    got = WAYS[way](total)(jnp.concatenate(points))
    one, other = (expected_of(name, kind, way, SOME, point) for point in points)
    if way == "jit":
        expected = one[0] + other[0], np.concatenate([one[1], other[1]])
    else:  # one point does not depend on the other
        expected = np.block([[one, 0 * one], [0 * one, other]])
    assert_close(got, expected)


# Nobody left

NOBODY = np.zeros(N, bool)
NO_WEIGHTS = {
    "zero": (np.zeros(N), ~NOBODY),
    "canceling": (np.array([1.0, -1.0, 2.0, -2.0, 0.5, 0.25, -0.75]), ~NOBODY),
    "masked": (WEIGHTS, NOBODY),
}


@functools.cache
def average_and_derivatives(vectorize: int, fused: bool) -> Callable:
    """A weighted mean, its gradient, its derivative along the arguments, and its Hessian."""

    @fax.program(clients=N)
    def average(p, x, weights, mask):
        rows = fax.map(jnp.multiply, fax.broadcast(p), x, vectorize=vectorize) if fused else x
        return p * fax.mean(rows, weights=weights, where=mask)

    @jax.jit
    def everything(args, mask):
        def of(*args):
            return average(*args, mask)

        def total(*args):
            return jnp.sum(of(*args))

        gradients, curvature = jax.grad(total, (0, 1, 2)), jax.hessian(total, (0, 1, 2))
        return of(*args), gradients(*args), jax.jvp(of, args, args)[1], curvature(*args)

    return everything


DIFFERENT = ("1-direct", "1-fused", f"{N}-fused")  # each compiled once, for all weights


@pytest.mark.always(*(f"{name}-{how}" for name in NO_WEIGHTS for how in DIFFERENT))
@BOTH
@BATCH_SIZES
@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_zero_total_weight_gives_zeros_and_zero_gradients(name, vectorize, fused):
    weights, mask = NO_WEIGHTS[name]
    everything = average_and_derivatives(vectorize, fused)
    found = jax.device_get(everything((np.float64(0.8), X, weights), mask))
    value, gradients, moved, curvature = found
    assert_close(value, np.zeros(2))
    assert_close(gradients, (np.zeros(()), np.zeros((N, 2)), np.zeros(N)))
    assert_close(moved, np.zeros(2))
    assert all(np.all(block == 0) for block in jax.tree.leaves(curvature))


@BOTH
@pytest.mark.parametrize("initial", [None, 3], ids=["identity", "initial"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16, np.int8, np.bool_])
@pytest.mark.parametrize("operator", [fax.max, fax.min], ids=["max", "min"])
def test_extremum_of_nobody_is_initial_or_the_identity(operator, dtype, initial, fused):
    dtype = np.dtype(dtype)
    if initial is not None:
        initial = np.asarray(initial).astype(dtype)

    @fax.program(clients=N)
    def best(x):
        x = fax.map(lambda row: row[::-1], x) if fused else x
        return operator(x, where=NOBODY, initial=initial)

    x = X.astype(dtype)
    highest = operator is fax.min
    if initial is not None:
        expected = initial
    elif dtype.kind == "b":
        expected = highest
    elif dtype == np.int8:
        expected = 127 if highest else -128
    else:
        expected = np.inf if highest else -np.inf
    differentiable = jnp.issubdtype(dtype, jnp.floating)
    got, pull = jax.vjp(best, x) if differentiable else (best(x), None)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, np.full(2, expected, dtype))
    if differentiable:
        (gradient,) = pull(np.ones(2, dtype))
        assert gradient.dtype == dtype
        np.testing.assert_array_equal(gradient, np.zeros((N, 2), dtype))


# Integers

COUNTS = np.arange(N, dtype=np.int32)

WITH_INTEGERS: dict[str, Callable] = {
    "sum": lambda p, k, b: p * (fax.sum(k) + fax.sum(b)),
    "mean": lambda p, k, b: p * (fax.mean(k) + fax.mean(b)),
    "weights": lambda p, k, b: p * fax.mean(fax.map(jnp.sin, 1.0 * k), weights=k, where=b),
    "extremes": lambda p, k, b: p * (fax.max(k, where=b) + fax.min(k) + fax.max(b)),
    "distribute": lambda p, k, b: p * fax.sum(fax.distribute((k, b))[0]),
    "collect": lambda p, k, b: p * jnp.sum(fax.collect((k, b))[0]),
    "map": lambda p, k, b: fax.sum(
        fax.map(lambda p, k, b: jnp.where(b, p * k, p), fax.broadcast(p), k, b)
    ),
    "broadcast": lambda p, k, b: p * fax.sum(fax.broadcast((k, b))[0])[3],
}


@pytest.mark.parametrize("name", WITH_INTEGERS)
def test_integers_and_bools_have_float0_derivatives(name):
    program = fax.program(clients=N)(WITH_INTEGERS[name])
    args = (np.float64(1.5), COUNTS, MASK)
    gradients = jax.grad(program, (0, 1, 2), allow_int=True)(*args)
    # The mean of int32 is float32, so its digits end there.
    expected = program(np.float64(1), COUNTS, MASK)
    np.testing.assert_allclose(gradients[0], expected, rtol=1e-6)
    assert [g.dtype for g in gradients[1:]] == [jax.dtypes.float0] * 2
    assert [g.shape for g in gradients[1:]] == [(N,), (N,)]
    zeros = [np.zeros(N, jax.dtypes.float0)] * 2
    moved = jax.jvp(program, args, (np.float64(1), *zeros))[1]
    np.testing.assert_allclose(moved, expected, rtol=1e-6)


@pytest.mark.parametrize("operator", [fax.sum, fax.max, fax.min, fax.collect])
def test_integer_outputs_have_float0_tangents(operator):
    @fax.program(clients=N)
    def program(x):
        steps = fax.map(lambda x: (x * 4).astype(np.int32), x)
        return operator(steps), fax.sum(x)

    (steps, _), (moved, total) = jax.jvp(program, (X,), (X,))
    assert jnp.issubdtype(steps.dtype, jnp.integer)
    assert (moved.dtype, moved.shape) == (jax.dtypes.float0, steps.shape)
    assert_close(total, X.sum(0))
    _, pull = jax.vjp(program, X)
    (gradient,) = pull((np.zeros(steps.shape, jax.dtypes.float0), np.ones(2)))
    assert_close(gradient, np.ones((N, 2)))


# The host's memory


def test_residuals_that_a_policy_offloads():
    """They are masked, and made in a loop, or on devices of which one has a participant more."""
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["kept"],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def client(p, x):
        return jnp.sum(jnp.sin(checkpoint_name(jnp.sin(p * x), "kept")))

    @fax.program(clients=N)
    def average(p, x):
        return fax.mean(
            fax.map(jax.checkpoint(client, policy=policy), fax.broadcast(p), x), where=MASK
        )

    slope = jax.grad(average)
    kept = [v for e in equations(jax.make_jaxpr(slope)(0.7, X)) for v in e.outvars]
    assert (N, 2) in [v.aval.shape for v in kept if not _compat.on_device(v.aval)]
    expected = np.mean(np.sum(np.cos(np.sin(0.7 * X)) * np.cos(0.7 * X) * X, axis=1)[MASK])
    for devices in 1, 2:
        with jax.set_mesh(mesh(clients=devices)):
            assert_close(jax.jit(slope)(0.7, X), expected)


# Half precision

MANY = 4096
# Of eight bits each, and so few that any order of adding them in float32 is exact.
SHORT = np.random.default_rng(1).integers(128, 256, (MANY, 8)).astype(ml_dtypes.bfloat16) / 128


@BOTH
@pytest.mark.parametrize("vectorize", [1, 64, MANY])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_bfloat16_mean_is_that_of_float32(weighted, vectorize, fused):
    """Rows are added and divided in float32, so that the mean is off by its one last rounding."""

    @fax.program(clients=MANY)
    def average(x, weights, mask):
        x = fax.map(lambda row: row[::-1] / 2, x, vectorize=vectorize) if fused else x
        return fax.mean(x, weights=weights, where=mask) if weighted else fax.mean(x)

    mask = np.arange(MANY) % 2 == 0 if weighted else np.ones(MANY, bool)
    rows = SHORT[:, ::-1] / 2 if fused else SHORT
    expected = rows[mask].astype(np.float32).mean(0).astype(ml_dtypes.bfloat16)
    got, pull = jax.vjp(lambda x: average(x, np.ones(MANY, np.float32), mask), SHORT)
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(np.asarray(got), expected)
    (gradient,) = pull(np.ones(8, ml_dtypes.bfloat16))
    share = (mask / mask.sum() / (2 if fused else 1)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(gradient), np.stack([share] * 8, axis=1))
