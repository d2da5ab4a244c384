"""Small problems to train on, their gradients in NumPy, and the settings in which results agree."""

import contextlib

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax

import fax

CLASSES, FEATURES = 3, 4
SIZES = [3, 7, 1, 12, 5, 9]

# Mesh axes, their types, and how many clients a device works on at once.
SETTINGS = {
    "jitted": (None, "auto", 1),
    "vectorised": (None, "auto", 3),
    "a mesh of 1": ({"clients": 1}, "auto", 2),
    "a mesh of 2": ({"clients": 2}, "explicit", 1),
    "a mesh of 4 x 2": ({"clients": 4, "model": 2}, "auto", 1),
}


def setting(name):
    """A context to run in, and ``clients_at_once``."""
    axes, kind, at_once = SETTINGS[name]
    if axes is None:
        return contextlib.nullcontext(), at_once
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
