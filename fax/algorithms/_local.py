"""Local training: what a client does with its batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fax import _functions
from fax._notes import called
from fax.algorithms._loss import Metrics, batch_gradient, examples_of, no_metrics
from fax.data import Client

PyTree = Any


class Trained(NamedTuple):
    """The result of `local_steps`: a client's trained model and its metrics.

    Attributes:
      params: its parameters.
      model_state: what the model has besides parameters, or None.
      metrics: ``"loss"`` and the loss function's metrics by name, each a `fax.metrics.Statistic` of
        all examples that were used, computed before the step on their batch.
      optimizer: the state of its optimizer.
    """

    params: PyTree
    model_state: PyTree
    metrics: Metrics
    optimizer: PyTree


def local_steps(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    data: Client,
    model_state: PyTree = None,
    *,
    correct: Callable[..., PyTree] | None = None,
    example_weights: Callable[[PyTree], jax.Array] | None = None,
    optimizer_state: PyTree = None,
    first: Any = 0,
    branch: bool = True,
) -> Trained:
    """Local training: one step of an optimizer on each of a client's batches.

        y <- y + optimizer(gradient of the mean loss of a batch's real examples at y)

    Call it in the function that `fax.map` runs for each client, such as the one of `federated`.

    Args:
      loss: see `fedavg`.
      optimizer: from optax.
      params: the initial parameters.
      data: the client. All of its batches are used in order; batches without examples are skipped.
      model_state: the initial state of the model, if it has one.
      correct: ``correct(gradient, y, batch, mask, key)``, what the optimizer gets in place of a
        batch's gradient at y. Default: the gradient.
      example_weights: ``example_weights(batch)``, [batch]: factors of the examples' losses before
        the mean is taken. They do not affect metrics. Default: 1.
      optimizer_state: the initial state of the optimizer. Default: ``optimizer.init(params)``.
      first: the number of the first step, from which the keys of the steps are derived.
      branch: see `fax.data.Client.scan`.

    Returns:
      The client's model after the last step, and its metrics.

    Raises:
      ValueError: if the loss does not return one number for each example.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2 / 2
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(4)}, "bob": {"x": jnp.zeros(2)}})
      >>> cohort = next(fax.data.cohorts(data, clients=2, batch_size=2))
      >>> @fax.program(clients=2)
      ... def train(params, cohort):
      ...     def client(params, data):
      ...         return fax.algorithms.local_steps(loss, optax.sgd(0.5), params, data).params
      ...     return fax.map(client, fax.broadcast(params), cohort.clients())
      >>> print(train(jnp.zeros(()), cohort).sort())  # after one step and two
      [0.   0.75]
    """

    def step(trained, batch, mask, key):
        params, model_state, metrics, optimizer_state = trained
        weights = None if example_weights is None else example_weights(batch)
        gradient, (new, model_state) = batch_gradient(
            loss, params, batch, mask, key, model_state, weights
        )
        if correct is not None:
            gradient = correct(gradient, params, batch, mask, key)
        updates, optimizer_state = called(
            "the optimizer",
            "update",
            optimizer.update,
            gradient=gradient,
            state=optimizer_state,
            params=params,
        )
        params = optax.apply_updates(params, updates)
        return Trained(params, model_state, optax.tree.add(metrics, new), optimizer_state)

    _functions.optimizer("fax.algorithms.local_steps", "optimizer", optimizer)
    optimizer_state = optimizer.init(params) if optimizer_state is None else optimizer_state
    start = Trained(
        params, model_state, no_metrics(loss, params, data, model_state), optimizer_state
    )
    return data.scan(step, start, first=first, branch=branch)


def proximal(x: PyTree, mu: Any) -> Callable[..., PyTree]:
    """A ``correct`` for `local_steps` that adds mu/2 ‖y - x‖^2 to the loss at y."""

    def correct(gradient: PyTree, y: PyTree, *step: Any) -> PyTree:
        return jax.tree.map(lambda g, y, x: g + (mu * (y - x)).astype(g.dtype), gradient, y, x)

    return correct


def local_gradient(
    loss: Callable, params: PyTree, data: Client, model_state: PyTree = None
) -> tuple[PyTree, Metrics]:
    """The gradient of the mean loss over all batches of a client, at the same parameters.

    Args:
      loss: see `fedavg`.
      params: the parameters at which to take it.
      data: the client.
      model_state: the model's state, if it has one. It is the same for all batches.

    Returns:
      The gradient, zero if there are no examples, and metrics as in `local_steps`.

    Raises:
      ValueError: if the loss does not return one number for each example.

    Example:

      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2 / 2
      >>> data = fax.data.InMemory({"ann": {"x": jnp.arange(3.0)}})
      >>> cohort = next(fax.data.cohorts(data, clients=1, batch_size=2))
      >>> @fax.program(clients=1)
      ... def gradients(params, cohort):
      ...     def client(params, data):
      ...         return fax.algorithms.local_gradient(loss, params, data)[0]
      ...     return fax.map(client, fax.broadcast(params), cohort.clients())
      >>> print(gradients(jnp.zeros(()), cohort))
      [-1.]
    """

    def step(carry, batch, mask, key):
        total, metrics = carry
        gradient, (new, _) = batch_gradient(loss, params, batch, mask, key, model_state)
        count = examples_of(new)
        total = jax.tree.map(lambda t, g: t + (count * g).astype(t.dtype), total, gradient)
        return total, optax.tree.add(metrics, new)

    def zeros(x):  # half precision is summed in float32
        return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))

    start = jax.tree.map(zeros, params), no_metrics(loss, params, data, model_state)
    total, metrics = data.scan(step, start)
    count = jnp.maximum(examples_of(metrics), 1)
    return jax.tree.map(lambda t, p: (t / count).astype(p.dtype), total, params), metrics
