"""A loss that looks at several examples together can leave out padding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fax

X = np.array([0.0, 0.0, 9.0])  # in batches of two the last one is padded


def cohort(epochs=1):
    data = fax.data.InMemory({"ann": {"x": X}, "bob": {"x": X[:2] + 4}})
    return next(fax.data.cohorts(data, 2, 2, epochs=epochs, shuffle=False))


def contrastive(params, batch, key, mask):
    """How far each example is from the others."""
    distance = jnp.abs(params * (batch["x"][:, None] - batch["x"]))
    return jnp.sum(distance, axis=1, where=mask) + 1


def statistics(params, model_state, batch, key, *, mask=None):
    mean = jnp.mean(batch["x"], where=mask)
    return (batch["x"] - mean) ** 2 * params, {"mean": jnp.full(2, mean)}, mean


@pytest.mark.parametrize("at_once", [1, 2])
def test_statistics_of_a_batch_are_those_of_its_real_examples(at_once):
    algorithm = fax.algorithms.fedavg(statistics, optax.sgd(0.1), vectorize=at_once)
    own = cohort()
    state, metrics = jax.jit(algorithm.round)(algorithm.init(1.0, 0.0), own)
    ann, bob = np.argsort(own.positions)
    np.testing.assert_allclose(state.model_state, (3 * 9 + 2 * 4) / 5)  # not 4.5 of 9 and padding
    np.testing.assert_allclose(metrics["clients/mean"][ann], (0 + 0 + 9) / 3)
    np.testing.assert_allclose(metrics["clients/mean"][bob], 4)
    np.testing.assert_allclose(metrics["clients/loss"], 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda loss: fax.algorithms.fedavg(loss, optax.sgd(0.1)),
        lambda loss: fax.algorithms.mime_lite(loss, optax.sgd(0.1)),
        lambda loss: fax.algorithms.diloco(loss, optax.sgd(0.1), replicas=2),
    ],
    ids=["fedavg", "mime_lite", "diloco"],
)
def test_padding_is_not_a_neighbor(make):
    algorithm = make(contrastive)
    _, metrics = jax.jit(algorithm.round)(algorithm.init(jnp.array(1.0)), cohort())
    assert metrics["loss"] == 1  # each batch has examples at one place
