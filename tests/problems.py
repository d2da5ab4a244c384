"""Small problems to train on, their gradients in NumPy, and the settings in which results agree."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest

import fax

CLASSES, FEATURES = 3, 4
SIZES = [3, 7, 1, 12, 5, 9]

# Mesh axes, their types, and how many clients a device works on at once.
SETTINGS = {
    "jitted": (None, "auto", 1),
    "vectorized": (None, "auto", 3),
    "a mesh of 1": ({"clients": 1}, "auto", 2),
    "a mesh of 2": ({"clients": 2}, "explicit", 1),
    "a mesh of 4 x 2": ({"clients": 4, "model": 2}, "auto", 1),
}


def case(*values):
    """A case of a test of code that does the same on a mesh of 1 as on one of 2."""
    return pytest.param(*values, marks=[pytest.mark.long] * ("a mesh of 1" in values))


EACH_SETTING = [case(name) for name in SETTINGS]


def setting(name, placement="clients"):
    """A context to run in, and ``vectorize``."""
    axes, kind, at_once = SETTINGS[name]
    if axes is None:
        return contextlib.nullcontext(), at_once
    axes = {placement if axis == "clients" else axis: size for axis, size in axes.items()}
    return jax.set_mesh(meshes.mesh(kind, **axes)), at_once


def data(seed=0):
    """Clients of a classification that differ in what they have and how much."""
    rng = np.random.default_rng(seed)
    return fax.data.InMemory(
        {
            f"client {i}": {
                "x": rng.normal(size=(n, FEATURES)) + i / 3,
                "y": rng.integers(0, CLASSES, n),
            }
            for i, n in enumerate(SIZES)
        }
    )


def numpy_batches(cohort):
    """Each client's batches (x, y) without padding, in the order of the cohort."""
    x, y, mask = (np.asarray(a) for a in (cohort.batches["x"], cohort.batches["y"], cohort.mask))
    return [
        [(x[i][s][m], y[i][s][m]) for s, m in enumerate(mask[i]) if m.any()] for i in range(len(x))
    ]


def one_missing(rounds):
    """Cohorts, in every other of which the second client has nothing, as if it was not there."""
    for number, cohort in enumerate(rounds):
        if number % 2:
            here = np.arange(cohort.size) != 1
            mask, sizes = cohort.mask & here[:, None, None], cohort.num_examples * here
            cohort = dataclasses.replace(cohort, mask=mask, num_examples=sizes)
        yield cohort


class Logistic:
    """Cross-entropy of a linear model with parameters w and b."""

    @staticmethod
    def start():
        rng = np.random.default_rng(1)
        return {"w": rng.normal(size=(FEATURES, CLASSES)), "b": rng.normal(size=CLASSES)}

    @staticmethod
    def loss(params, batch, key):
        logits = batch["x"] @ params["w"] + params["b"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return losses, {"accuracy": logits.argmax(1) == batch["y"]}

    @staticmethod
    def losses_and_gradient(params, x, y):
        """In NumPy: the loss of each example, and the gradient of their mean."""
        logits = x @ params["w"] + params["b"]
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        losses = -np.log(p[np.arange(len(y)), y])
        error = (p - np.eye(CLASSES)[y]) / len(y)
        return losses, {"w": x.T @ error, "b": error.sum(0)}


class Quadratic:
    """Half the squared distance of a linear model with parameters w from the class' number."""

    @staticmethod
    def start():
        return {"w": np.random.default_rng(2).normal(size=FEATURES)}

    @staticmethod
    def loss(params, batch, key):
        return (batch["x"] @ params["w"] - batch["y"]) ** 2 / 2, {}

    @staticmethod
    def losses_and_gradient(params, x, y):
        error = x @ params["w"] - y
        return error**2 / 2, {"w": x.T @ error / len(y)}


PROBLEMS = [Logistic, Quadratic]


class AdamW:
    """optax.adamw(rate) in NumPy, for dicts of arrays."""

    def __init__(self, rate, decay=1e-4):
        self.rate, self.decay, self.m, self.v, self.t = rate, decay, {}, {}, 0

    def __call__(self, params, gradient):
        self.t += 1
        new = {}
        for name, g in gradient.items():
            self.m[name] = 0.9 * self.m.get(name, 0) + 0.1 * g
            self.v[name] = 0.999 * self.v.get(name, 0) + 0.001 * g**2
            m, v = self.m[name] / (1 - 0.9**self.t), self.v[name] / (1 - 0.999**self.t)
            move = m / (np.sqrt(v) + 1e-8) + self.decay * params[name]
            new[name] = params[name] - self.rate * move
        return new


class Nesterov:
    """As DiLoCo has it: v = D + momentum v, and a step of D + momentum v. For dicts of arrays."""

    def __init__(self, rate, momentum):
        self.rate, self.momentum, self.v = rate, momentum, {}

    def __call__(self, params, delta):
        new = {}
        for name, d in delta.items():
            self.v[name] = d + self.momentum * self.v.get(name, 0)
            new[name] = params[name] - self.rate * (d + self.momentum * self.v[name])
        return new


def combine(fn, *trees):
    """``fn`` on each entry of dicts of arrays, in NumPy."""
    return {name: fn(*(tree[name] for tree in trees)) for name in trees[0]}


def assert_trees_close(found, expected, rtol=1e-10, atol=1e-12):
    """That two pytrees have the same structure and about the same numbers."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(jnp.asarray(a), b, rtol=rtol, atol=atol),
        found,
        expected,
    )


def expand(cohorts):
    """Rounds whose examples are arrays, so that they can be scanned over as they are."""
    batches = {name: cohorts.batches[name] for name in cohorts.batches}
    return dataclasses.replace(cohorts, batches=batches)


def check_sweep(final_loss, sweep):
    """That a function of two numbers has derivatives in both modes, and a vmap over both.

    The derivatives at the first point are those of central differences. Two programs are compiled:
    one for a point, and one for all.
    """

    def everything(point):
        return jax.value_and_grad(final_loss)(point), jax.jacfwd(final_loss)(point)

    step, each = 1e-5, jax.jit(everything)
    moved = sweep[0] + step * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])
    swept = np.asarray(jax.jit(jax.vmap(final_loss))(np.concatenate([sweep, moved])))
    singly = [each(point) for point in sweep]
    np.testing.assert_allclose(swept[: len(sweep)], [x[0][0] for x in singly], rtol=1e-10)
    (_, gradient), forward = singly[0]
    np.testing.assert_allclose(gradient, forward, rtol=1e-10)
    up, down = swept[len(sweep) :].reshape(2, 2).T
    np.testing.assert_allclose(gradient, (up - down) / (2 * step), rtol=1e-6, atol=1e-7)
