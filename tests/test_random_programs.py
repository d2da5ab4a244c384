"""Random programs over random pytrees, against NumPy and a plain `jax.vmap`."""

import functools
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, given, settings

import fax

Tree = Any

few_examples = settings(suppress_health_check=[HealthCheck.too_slow])  # most is compilation
# Of what takes longest, `make test` has fewer than of the others.
USUAL = settings.default.max_examples
fewer_examples = settings(few_examples, max_examples=4 if USUAL == 10 else USUAL)

# What a client does to each leaf. Nothing amplifies much, so that tolerances can be tight, and
# different rows stay different, so that it is clear which of them is the largest.
STEPS: dict[str, dict[str, Callable]] = {
    "param": {
        "f": lambda x, p: x * p + 0.5,
        "i": lambda x, p: x + p,
        "b": lambda x, p: x ^ p,
    },
    "bend": {
        "f": lambda x, p: jnp.sin(2 * x),
        "i": lambda x, p: 2 * x - 1,
        "b": lambda x, p: ~x,
    },
    "center": {
        "f": lambda x, p: x - jnp.mean(x) / 2,
        "i": lambda x, p: x - jnp.sum(x).astype(x.dtype),
        "b": lambda x, p: x & jnp.any(p),
    },
    "scale": {
        "f": lambda x, p: x / (1 + jnp.sum(jnp.square(x))),
        "i": lambda x, p: -x,
        "b": lambda x, p: x | jnp.all(x),
    },
}


class Plan(NamedTuple):
    """A random program: ``operator`` of a map of ``steps``, or of the raw rows without any."""

    n: int
    vectorize: int | None
    shapes: Tree
    steps: tuple[str, ...]
    operator: str
    mask: np.ndarray | None
    weights: np.ndarray | None
    seed: int

    @property
    def counted(self) -> np.ndarray:
        """The numbers of the participants that take part."""
        return np.arange(self.n) if self.mask is None else np.flatnonzero(self.mask)

    def data(self) -> tuple[Tree, Tree]:
        """A server tree and a placed one; who does not take part holds NaN where possible."""
        rng = np.random.default_rng(self.seed)
        missing = np.setdiff1d(np.arange(self.n), self.counted)

        def numbers(leaf, rows=()):
            shape = (*rows, *leaf.shape)
            if leaf.dtype == np.bool_:
                return rng.random(shape) < 0.5
            if kind(leaf) == "i":
                return rng.integers(-4, 5, shape).astype(leaf.dtype)
            x = rng.uniform(-1, 1, shape).astype(leaf.dtype)
            if rows:
                x[missing] = np.nan
            return x

        placed = functools.partial(numbers, rows=(self.n,))
        return jax.tree.map(numbers, self.shapes), jax.tree.map(placed, self.shapes)

    def client(self, params: Tree, row: Tree) -> Tree:
        def work(x, p):
            for step in self.steps:
                x = STEPS[step][kind(x)](x, p)
            return x

        return jax.tree.map(work, row, params)

    def reduced(self, rows: Tree, weights: Any) -> Tree:
        """The program's reduction."""
        kwargs = {} if self.operator == "collect" else {"where": self.mask}
        if self.weights is not None:
            kwargs["weights"] = weights
        return getattr(fax, self.operator)(rows, **kwargs)

    def round(self, params: Tree, rows: Tree, weights: Any) -> Tree:
        """One round, in a program."""
        if self.steps:
            sent = fax.broadcast(params)
            rows = fax.map(self.client, sent, rows, vectorize=self.vectorize)
        return self.reduced(rows, weights)

    def plain_round(self, params: Tree, rows: Tree, weights: Any) -> Tree:
        """The same without fax."""
        rows, weights = self.chosen(rows, weights)
        return self.plain_reduced(self.plain_map(self.client, params, rows), weights)

    def chosen(self, rows: Tree, weights: Any) -> tuple[Tree, jax.Array]:
        """The rows and weights of those that count: the others come into nothing plain."""
        weights = jnp.ones(self.n) if self.weights is None else weights
        return jax.tree.map(lambda x: jnp.asarray(x)[self.counted], (rows, weights))

    def plain_map(self, fn: Callable, shared: Tree, rows: Tree) -> Tree:
        return jax.vmap(fn, (None, 0), axis_size=len(self.counted))(shared, rows)

    def plain_reduced(self, rows: Tree, weights: jax.Array) -> Tree:
        return jax.tree.map(lambda y: self._plain(y, weights), rows)

    def _plain(self, y: Any, weights: Any) -> Any:
        if self.operator == "collect":
            return y
        if self.operator in ("max", "min"):
            if not len(self.counted):
                return jnp.full(y.shape[1:], identity(self.operator, y.dtype))
            return getattr(jnp, self.operator)(y, axis=0)
        if self.operator == "sum":
            wide = jnp.float64 if kind(y) == "f" else jnp.int64
            return jnp.sum(y.astype(wide), axis=0).astype(y.dtype if kind(y) == "f" else wide)
        dtype = y.dtype if kind(y) == "f" else jnp.mean(y).dtype
        if not self.total:
            return jnp.zeros(y.shape[1:], dtype)
        mean = jnp.tensordot(weights, y.astype(jnp.float64), 1) / jnp.sum(weights)
        return mean.astype(dtype)

    @property
    def total(self) -> float:
        return float(np.sum(self._weights))

    @property
    def _weights(self) -> np.ndarray:
        weights = np.ones(self.n) if self.weights is None else self.weights
        return weights[self.counted].astype(float)

    @property
    def amplification(self) -> float:
        """By how much more than one row a result can be off."""
        if self.operator == "mean" and self.total:
            return float(np.sum(np.abs(self._weights)) / min(abs(self.total), 1))
        return float(self.n)


def kind(x: Any) -> str:
    return "b" if x.dtype == np.bool_ else "i" if jnp.issubdtype(x.dtype, jnp.integer) else "f"


def identity(operator: str, dtype: Any) -> Any:
    low = operator == "max"
    if dtype == np.bool_:
        return not low
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).min if low else jnp.iinfo(dtype).max
    return jnp.asarray(-np.inf if low else np.inf, dtype)


DTYPES = [np.float32, np.float64, ml_dtypes.bfloat16, np.int32, np.bool_]
TEMPLATES: list[Callable[..., Tree]] = [
    lambda a, b, c: a,
    lambda a, b, c: {"a": a, "b": (b, None), "c": {"c": c}},
    lambda a, b, c: (a, {"x": {}, "y": {"z": (b, (c, ()))}}),
    lambda a, b, c: [None, {"one": [a, {"two": b}]}, (c,)],
    lambda a, b, c: {"nothing": (None, [])},
]


OPERATORS = ("sum", "mean", "max", "min", "collect")


def random_plan(seed: int, operators: Sequence[str]) -> Plan:
    random = Random(seed)
    shapes = ([random.randint(1, 3) for _ in range(random.randint(0, 3))] for _ in range(3))
    leaves = [jax.ShapeDtypeStruct(s, np.dtype(random.choice(DTYPES))) for s in shapes]
    (template,) = random.choices(TEMPLATES, [3, 3, 3, 3, 1])
    operator = random.choice(operators)
    n = random.randint(1, 8)
    chance = random.choice([0.6, 0.6, 0.6, 0])
    mask = np.array([random.random() < chance for _ in range(n)])
    # Quarters add up exactly, to zero or to something that is far from it.
    weights = np.array([random.randint(-2, 6) / 4 for _ in range(n)])
    weights[-1] -= weights.sum() if random.random() < 0.2 else 0
    return Plan(
        n=n,
        vectorize=random.choice([None, *range(1, n + 2)]),
        shapes=template(*leaves),
        steps=tuple(random.choices(sorted(STEPS), k=random.randint(0, 3))),
        operator=operator,
        mask=mask if operator != "collect" and random.random() < 0.7 else None,
        weights=weights if operator == "mean" and random.random() < 0.7 else None,
        seed=seed,
    )


def plans(operators: Sequence[str] = OPERATORS) -> st.SearchStrategy[Plan]:
    """Plans made from a seed, not by a strategy for each part.

    With those hypothesis repeats itself and mostly stays with the simplest trees, and there is
    little to shrink.
    """
    return st.integers(0, 2**32 - 1).map(lambda seed: random_plan(seed, operators))


def assert_close(got: Any, expected: Any, of: Any, amplification: float) -> None:
    """Equal but for the rounding of a dozen operations in a leaf's dtype; integers are exact."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    if kind(expected) != "f":
        np.testing.assert_array_equal(got, expected)
        return
    expected = np.asarray(expected, np.float64)
    size = 1 + np.max(np.abs(expected), initial=0, where=np.isfinite(expected))
    atol = 16 * float(jnp.finfo(of).eps) * amplification * size
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=atol)


def assert_trees_close(got: Tree, expected: Tree, plan: Plan) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y, leaf in zip(*map(jax.tree.leaves, (got, expected, plan.shapes)), strict=True):
        of = leaf.dtype if kind(leaf) == "f" else np.float32
        assert_close(x, y, of, plan.amplification)


def loss_of(function: Callable, plan: Plan) -> Callable:
    """A scalar that depends on all float leaves whose derivative is certain.

    The winner among rows in bfloat16 is not: XLA may keep more digits than the dtype has.
    """

    def loss(*args):
        total = jnp.zeros(())
        for x, leaf in zip(jax.tree.leaves(function(*args)), jax.tree.leaves(plan.shapes)):
            uncertain = plan.operator in ("max", "min") and leaf.dtype == ml_dtypes.bfloat16
            if kind(leaf) == "f" and not uncertain:
                total += jnp.sum(jnp.cos(jnp.arange(x.size)) * jnp.ravel(x).astype(jnp.float64))
        return total

    return loss


def gradients(functions: Sequence[Callable], plan: Plan, *args: Any) -> list:
    """With respect to server values, placed values, and weights."""
    losses = [loss_of(function, plan) for function in functions]
    return [jax.grad(loss, (0, 1, 2), allow_int=True)(*args) for loss in losses]


def with_weights(plan: Plan) -> tuple:
    return *plan.data(), np.ones(plan.n) if plan.weights is None else plan.weights


def assert_gradients_close(got: Sequence[Tree], expected: Sequence[Tree], plan: Plan) -> None:
    shapes = jax.tree.leaves(plan.shapes)
    for tree, plain_tree in zip(got[:2], expected[:2], strict=True):
        assert jax.tree.structure(tree) == jax.tree.structure(plain_tree)
        for x, y, leaf in zip(*map(jax.tree.leaves, (tree, plain_tree)), shapes, strict=True):
            if kind(leaf) == "f":
                assert_close(x, y, leaf.dtype, plan.amplification)
            else:
                assert (x.dtype, x.shape) == (jax.dtypes.float0, y.shape)
    floats = [leaf.dtype for leaf in shapes if kind(leaf) == "f"]
    coarsest = max(floats, key=lambda dtype: jnp.finfo(dtype).eps, default=np.float64)
    assert_close(got[2], expected[2], coarsest, plan.amplification)


@few_examples
@given(plans())
def test_values_are_those_of_plain_code(plan):
    """A round, called eagerly, whatever the tree, the batch size, the mask and the weights."""
    args = (*plan.data(), plan.weights)
    got = fax.program(clients=plan.n)(plan.round)(*args)
    assert_trees_close(got, jax.jit(plan.plain_round)(*args), plan)


@fewer_examples
@given(plans())
def test_gradients_are_those_of_plain_code(plan):
    """A round's gradient, jitted; those masked hold NaN and have a gradient of zero."""
    both = fax.program(clients=plan.n)(plan.round), plan.plain_round
    found = jax.jit(lambda *args: gradients(both, plan, *args))(*with_weights(plan))
    assert_gradients_close(*found, plan)


def mix(result: Tree, row: Tree) -> Tree:
    """A client's second task: its row, together with what came out of the first round."""

    def leaf(x, y):
        if kind(x) == "f":
            return jnp.cos(x + 0.5 * y.astype(x.dtype))
        return x ^ y.astype(x.dtype)

    return jax.tree.map(leaf, row, result)


@fewer_examples
@given(plans(operators=("sum", "mean")))
def test_two_rounds_are_those_of_plain_code(plan):
    """The result of one round is broadcast for the next one, which averages or adds as well."""

    @fax.program(clients=plan.n)
    def program(params, rows, weights):
        first = fax.broadcast(plan.round(params, rows, weights))
        mixed = fax.map(mix, first, rows, vectorize=plan.vectorize)
        return plan.reduced(mixed, weights)

    def plain(params, rows, weights):
        first = plan.plain_round(params, rows, weights)
        rows, weights = plan.chosen(rows, weights)
        return plan.plain_reduced(plan.plain_map(mix, first, rows), weights)

    @jax.jit
    def everything(*args):
        return (program(*args), plain(*args)), gradients((program, plain), plan, *args)

    values, derivatives = everything(*with_weights(plan))
    assert_trees_close(*values, plan)
    assert_gradients_close(*derivatives, plan)
