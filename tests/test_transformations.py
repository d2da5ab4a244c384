"""Every program of the case table under every transformation of JAX, at several batch sizes.

What a transformed program must give follows from the values and the derivatives of the plain
reference, taken in forward mode alone, and from the chain rule in NumPy. So no rule of fax's,
and no reverse mode, is on both sides of a comparison.

`make test` runs a part in which every transformation meets programs of every kind, and every
program transformations of every kind, and each meets every batch size; `make test-all` runs the
full product. Users compute in float32 mostly, so every case also goes
through a few transformations without float64.
"""

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BATCH_SIZES, CASES, Case
from jax import lax
from jax.flatten_util import ravel_pytree

# Of the largest element. Each leaves some digits for sums in another order.
RTOL = {"float64": 1e-10, "complex128": 1e-10, "float32": 1e-5}


# What is expected


class Derivatives:
    """The reference's value and its first two derivatives, as a flat function, anywhere.

    The flat function maps the differentiable arguments, as one vector, to all float outputs.
    """

    def __init__(self, case: Case):
        theta, unravel = ravel_pytree(case.differentiable)
        self.theta = np.asarray(theta)

        def floats_at(theta):
            return flat_floats(case.reference(*case.merge(unravel(theta))))

        def remembered(function):
            """Of a point, in bytes."""
            fast = jax.jit(function)
            return functools.cache(
                lambda key: jax.device_get(fast(np.frombuffer(key, self.theta.dtype)))
            )

        first = jax.jacfwd(floats_at)
        self._outputs_at = jax.jit(lambda theta: case.reference(*case.merge(unravel(theta))))
        self._at = remembered(lambda theta: (floats_at(theta), first(theta)))
        self._curvature_at = remembered(jax.jacfwd(first))  # which few transformations ask for
        self.shapes = jax.eval_shape(case.reference, *case.args)

    def outputs(self, theta: np.ndarray) -> Any:
        return jax.device_get(self._outputs_at(theta))

    def values(self, theta: np.ndarray) -> np.ndarray:
        return self._at(theta.tobytes())[0]

    def jacobian(self, theta: np.ndarray) -> np.ndarray:
        return self._at(theta.tobytes())[1]

    def loss(self, theta: np.ndarray) -> np.ndarray:
        y = self.values(theta)
        return np.sum(importance(len(y)) * y**2) / 2

    def gradient(self, theta: np.ndarray) -> np.ndarray:
        y, jacobian = self._at(theta.tobytes())
        return (importance(len(y)) * y) @ jacobian

    def hessian(self, theta: np.ndarray) -> np.ndarray:
        (y, jacobian), curvature = self._at(theta.tobytes()), self._curvature_at(theta.tobytes())
        of = importance(len(y))
        return jacobian.T @ (of[:, None] * jacobian) + np.tensordot(of * y, curvature, 1)

    def recurrence(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """`Subject.step` repeated from zero: the last state and its gradient."""
        theta, state, slope = self.theta, np.float64(0), np.zeros_like(self.theta)
        for _ in range(steps):
            shift, change = 0.1 * np.tanh(state), 0.1 / np.cosh(state) ** 2
            gradient = self.gradient(theta + shift)
            slope = gradient + np.sum(gradient) * change * slope
            state = self.loss(theta + shift)
        return state, slope


derivatives = functools.cache(Derivatives)


def importance(count: int) -> np.ndarray:
    """How much each output weighs in the loss."""
    return 1 + np.cos(np.arange(count)) / 2


@jax.jit  # what is not the program's is one operation, also where a program runs without jit
def flat_floats(outputs: Any) -> jax.Array:
    leaves = [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])


@jax.jit
def loss_of(outputs: Any) -> jax.Array:
    y = flat_floats(outputs)
    return jnp.sum(importance(y.size) * y**2) / 2


# What is transformed


@dataclasses.dataclass(frozen=True)
class Subject:
    """A program at a batch size, in the shapes that transformations ask for."""

    case: Case
    vectorize: int
    program: Callable

    @property
    def expected(self) -> Derivatives:
        return derivatives(self.case)

    @property
    def at(self) -> tuple:
        return self.case.differentiable

    @property
    def theta(self) -> np.ndarray:
        return self.expected.theta

    @property
    def tangents(self) -> tuple:
        return self.like(np.sin(1.0 + np.arange(self.theta.size)))

    def like(self, theta: np.ndarray) -> tuple:
        """A flat vector in the shapes of the differentiable arguments."""
        leaves, treedef = jax.tree.flatten(self.at)
        ends = np.cumsum([np.size(leaf) for leaf in leaves])
        parts = np.split(theta, ends[:-1])
        shaped = [part.reshape(np.shape(leaf)) for part, leaf in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(treedef, shaped)

    def outputs(self, *differentiable: Any) -> Any:
        return self.program(*self.case.merge(differentiable))

    def floats(self, *differentiable: Any) -> jax.Array:
        return flat_floats(self.outputs(*differentiable))

    def loss(self, *differentiable: Any) -> jax.Array:
        return loss_of(self.outputs(*differentiable))

    def flat(self, function: Callable) -> Callable:
        """A function of the differentiable arguments, as a function of one vector."""
        unravel = ravel_pytree(self.at)[1]
        return lambda theta: function(*unravel(theta))

    def gradient(self, function: Callable) -> Callable:
        return jax.grad(function, tuple(range(len(self.at))))

    def step(self, state: jax.Array, *differentiable: Any) -> jax.Array:
        """A step of a recurrence that goes through the program."""
        shift = 0.1 * jnp.tanh(state)
        return self.loss(*jax.tree.map(lambda x: x + shift, differentiable))


SCALES = (0.9, 1.05)  # points to be vectorized over, near enough to meet no tie


def stacked(tree: Any, axis: int = 0) -> Any:
    return jax.tree.map(lambda x: np.stack([scale * x for scale in SCALES], axis), tree)


def join(tree: Any) -> np.ndarray:
    """The leaves in one vector."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def join_rows(tree: Any) -> np.ndarray:
    """The leaves, each with the same leading axis, in one matrix."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def assert_close(got: Any, expected: Any) -> None:
    """Same structure, shapes and dtypes, and the same numbers up to rounding.

    What NumPy computes for the float32 leg is in float64.
    """
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        dtype = jax.dtypes.canonicalize_dtype(y.dtype)
        assert (jnp.shape(x), jnp.result_type(x)) == (np.shape(y), dtype)
        size = np.max(np.abs(y), initial=0, where=np.isfinite(y))
        rtol = RTOL.get(dtype.name, 0)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * size)


# The transformations

Check = Callable[[Subject], None]
TRANSFORMATIONS: list[tuple[str, str | None, Check]] = []


def transformation(mode: str | None = None) -> Callable[[Check], Check]:
    """Enters a check into the table, with the mode of differentiation that it needs."""

    def enter(check):
        TRANSFORMATIONS.append((check.__name__, mode, check))
        return check

    return enter


@transformation()
def eager(s: Subject) -> None:
    assert_close(s.program(*s.case.args), s.expected.outputs(s.theta))


@transformation()
def jit(s: Subject) -> None:
    assert_close(jax.jit(s.program)(*s.case.args), s.expected.outputs(s.theta))


@transformation()
def eval_shape(s: Subject) -> None:
    shapes = jax.eval_shape(s.program, *s.case.args)
    assert shapes == s.expected.shapes  # structure, shapes, dtypes and weak types
    assert jax.tree.map(type, shapes) == jax.tree.map(type, s.expected.shapes)


@transformation("reverse")
def grad(s: Subject) -> None:
    assert_close(join(s.gradient(s.loss)(*s.at)), s.expected.gradient(s.theta))


@transformation("reverse")
def value_and_grad(s: Subject) -> None:
    both = jax.jit(jax.value_and_grad(s.loss, tuple(range(len(s.at)))))
    value, gradient = both(*s.at)
    assert_close(value, s.expected.loss(s.theta))
    assert_close(join(gradient), s.expected.gradient(s.theta))


@transformation("forward")
def jvp(s: Subject) -> None:
    values, moved = jax.jvp(s.floats, s.at, s.tangents)
    assert_close(values, s.expected.values(s.theta))
    assert_close(moved, s.expected.jacobian(s.theta) @ join(s.tangents))


@transformation("reverse")
def vjp(s: Subject) -> None:
    values, pull = jax.vjp(s.floats, *s.at)
    assert_close(values, s.expected.values(s.theta))
    cotangent = np.cos(np.arange(values.size))
    assert_close(join(pull(cotangent)), cotangent @ s.expected.jacobian(s.theta))


@transformation("forward")
def linearize(s: Subject) -> None:
    values, push = jax.linearize(s.floats, *s.at)
    assert_close(values, s.expected.values(s.theta))
    for tangents in s.tangents, s.at:
        tangents = jax.tree.map(np.nan_to_num, tangents)
        assert_close(push(*tangents), s.expected.jacobian(s.theta) @ join(tangents))


@transformation("forward")
def jacfwd(s: Subject) -> None:
    jacobian = jax.jit(jax.jacfwd(s.flat(s.floats)))(s.theta)
    assert_close(jacobian, s.expected.jacobian(s.theta))


@transformation("reverse")
def jacrev(s: Subject) -> None:
    jacobian = jax.jit(jax.jacrev(s.flat(s.floats)))(s.theta)
    assert_close(jacobian, s.expected.jacobian(s.theta))


@transformation("reverse")
def hessian(s: Subject) -> None:
    curvature = jax.jit(jax.hessian(s.flat(s.loss)))(s.theta)
    assert_close(curvature, s.expected.hessian(s.theta))


@transformation("reverse")
def reverse_over_reverse(s: Subject) -> None:
    curvature = jax.jit(jax.jacrev(jax.grad(s.flat(s.loss))))(s.theta)
    assert_close(curvature, s.expected.hessian(s.theta))


@transformation()
def vmap(s: Subject) -> None:
    expected = [s.expected.outputs(scale * s.theta) for scale in SCALES]
    expected = jax.tree.map(lambda *rows: np.stack(rows), *expected)
    assert_close(jax.vmap(s.outputs)(*stacked(s.at)), expected)


@transformation()
def vmap_of_vmap(s: Subject) -> None:
    """The inner one over the first argument, the outer one over the others."""
    first, others = s.at[0], s.at[1:]
    inner = jax.vmap(s.outputs, (0, *[None] * len(others)))
    outer = jax.vmap(inner, (None, *[0] * len(others)))
    got = jax.jit(outer)(stacked(first), *stacked(others))
    for i, j in itertools.product(range(2), range(2)):
        point = join([np.multiply(SCALES[j], x) for x in jax.tree.leaves(first)])
        point = np.concatenate([point, SCALES[i] * join(others)])
        assert_close(jax.tree.map(lambda x, i=i, j=j: x[i, j], got), s.expected.outputs(point))


@transformation("reverse")
def vmap_of_grad(s: Subject) -> None:
    """The points along the last axis, behind that of the participants."""
    gradients = jax.jit(jax.vmap(s.gradient(s.loss), in_axes=-1))(*stacked(s.at, axis=-1))
    expected = [s.expected.gradient(scale * s.theta) for scale in SCALES]
    assert_close(join_rows(gradients), np.stack(expected))


@transformation("reverse")
def grad_of_vmap(s: Subject) -> None:
    gradient = s.gradient(lambda *at: jnp.sum(jax.vmap(s.loss)(*at)))
    gradients = jax.jit(gradient)(*stacked(s.at))
    expected = [s.expected.gradient(scale * s.theta) for scale in SCALES]
    assert_close(join_rows(gradients), np.stack(expected))


@transformation("reverse")
def checkpoint_outside(s: Subject) -> None:
    gradient = jax.jit(s.gradient(jax.checkpoint(s.loss)))(*s.at)
    assert_close(join(gradient), s.expected.gradient(s.theta))


@transformation("reverse")
def checkpoint_inside(s: Subject) -> None:
    program = s.case.program(s.vectorize, client=jax.checkpoint)
    inside = dataclasses.replace(s, program=program)
    gradient = jax.jit(inside.gradient(inside.loss))(*s.at)
    assert_close(join(gradient), s.expected.gradient(s.theta))


@transformation("reverse")
def scan(s: Subject) -> None:
    def last(*at):
        start = jnp.zeros(())
        return lax.scan(lambda state, _: (s.step(state, *at), None), start, length=2)[0]

    value, gradient = s.expected.recurrence(2)
    got = jax.value_and_grad(last, tuple(range(len(s.at))))(*s.at)
    assert_close(got[0], value)
    assert_close(join(got[1]), gradient)


@transformation("forward")
def while_loop(s: Subject) -> None:
    def last(*at):
        def body(carry):
            return carry[0] + 1, s.step(carry[1], *at)

        return lax.while_loop(lambda carry: carry[0] < 2, body, (0, jnp.zeros(())))[1]

    value, gradient = s.expected.recurrence(2)
    got = jax.jvp(last, s.at, s.tangents)
    assert_close(got[0], value)
    assert_close(got[1], gradient @ join(s.tangents))


@transformation("reverse")
def cond(s: Subject) -> None:
    def either(run, *at):
        return lax.cond(run, s.loss, lambda *_: jnp.zeros(()), *at)

    both = jax.jit(jax.value_and_grad(either, tuple(range(1, 1 + len(s.at)))))
    for run in True, False:
        value, gradient = both(run, *s.at)
        assert_close(value, run * s.expected.loss(s.theta))
        assert_close(join(gradient), run * s.expected.gradient(s.theta))


@transformation("forward")
def custom_jvp(s: Subject) -> None:
    """Inside a function with a forward rule of its own, here twice the program's."""
    doubled = jax.custom_jvp(s.loss)

    @doubled.defjvp
    def _(primals, tangents):
        value, moved = jax.jvp(s.loss, primals, tangents)
        return value, 2 * moved

    value, moved = jax.jit(functools.partial(jax.jvp, doubled))(s.at, s.tangents)
    assert_close(value, s.expected.loss(s.theta))
    assert_close(moved, 2 * s.expected.gradient(s.theta) @ join(s.tangents))


@transformation("reverse")
def custom_vjp(s: Subject) -> None:
    """Inside a function with a reverse rule of its own, here twice the program's."""
    doubled = jax.custom_vjp(s.loss)
    doubled.defvjp(
        lambda *at: jax.vjp(s.loss, *at),
        lambda pull, cotangent: pull(2 * cotangent),
    )
    gradient = jax.jit(s.gradient(doubled))(*s.at)
    assert_close(join(gradient), 2 * s.expected.gradient(s.theta))


@transformation()
def donation(s: Subject) -> None:
    args = s.case.merge(jax.tree.map(lambda x: jnp.array(x, copy=True), s.at))
    with warnings.catch_warnings():
        # An argument that has no output's shape cannot be made use of, and JAX says so.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable", UserWarning)
        got = jax.jit(s.program, donate_argnums=s.case.argnums)(*args)
    assert_close(got, s.expected.outputs(s.theta))


@transformation()
def export(s: Subject) -> None:
    """There and back through bytes, as a function of leaves, for these need no registration."""
    leaves, treedef = jax.tree.flatten(s.case.args)

    def flat(*leaves):
        return jax.tree.leaves(s.program(*jax.tree.unflatten(treedef, leaves)))

    exported = jax.export.export(jax.jit(flat))(*leaves)
    again = jax.export.deserialize(exported.serialize())
    assert_close(again.call(*leaves), jax.tree.leaves(s.expected.outputs(s.theta)))


# The product

KINDS = {
    "as it is": ("eager", "jit", "eval_shape", "donation", "export"),
    "once": (
        *("jvp", "linearize", "jacfwd", "custom_jvp"),
        *("grad", "value_and_grad", "vjp", "jacrev", "custom_vjp"),
    ),
    "further": (
        *("hessian", "reverse_over_reverse", "checkpoint_outside", "checkpoint_inside"),
        *("vmap", "vmap_of_vmap", "vmap_of_grad", "grad_of_vmap"),
        *("scan", "while_loop", "cond"),
    ),
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}
COVERING = pytest.mark.kinds(case=lambda c: c.kind, check=lambda f: KIND_OF[f.__name__])

IN_CASES = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
IN_BATCHES = pytest.mark.parametrize("vectorize", BATCH_SIZES)


def transformed(names: Sequence[str]) -> pytest.MarkDecorator:
    checks = [pytest.param(*checks, id=name) for name, *checks in TRANSFORMATIONS if name in names]
    return pytest.mark.parametrize(("mode", "check"), checks)


@COVERING
@IN_BATCHES
@transformed([name for name, *_ in TRANSFORMATIONS])
@IN_CASES
def test_transformation(case, mode, check, vectorize):
    """A transformed program gives what the transformed reference means, or JAX's refusal."""
    subject = Subject(case, vectorize, case.program(vectorize))
    if mode in case.refuses:
        error, message = case.refuses[mode]
        with pytest.raises(error, match=message):
            check(subject)
    else:
        check(subject)


@functools.cache
def in_float32(case: Case) -> Case:
    # JAX remembers what it has made of an array of 64 bits, also where they are not enabled.
    types = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32}

    def short(x):
        dtype = getattr(x, "dtype", None)
        return np.asarray(x).astype(types[dtype])[()] if dtype in types else x

    return dataclasses.replace(case, args=jax.tree.map(short, case.args))


# Programs of every kind, and every batch size: what differs from float64 are dtypes alone.
@pytest.mark.always(
    *("scalars-vmap-1", "masks-grad-3", "extremes-jvp-7", "rows-eager-3"),
    *("convolutions-grad-1", "rounds_inside-grad-3", "noise-vmap-7"),
)
@IN_BATCHES
@transformed(["eager", "grad", "jvp", "vmap"])
@IN_CASES
def test_in_float32(case, mode, check, vectorize):
    with jax.enable_x64(False):
        test_transformation(in_float32(case), mode, check, vectorize)
