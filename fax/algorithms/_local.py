"""What a client does with its batches: steps of an optimizer on a loss, and metrics on the way."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fax import _arguments
from fax.algorithms._personal import PersonalLoss, check_seen, put
from fax.data import Client
from fax.metrics import Mean, Statistic

PyTree = Any
Metrics = dict[str, Statistic]


class Trained(NamedTuple):
    """What a client has after its local steps.

    Attributes:
      params: its parameters.
      model_state: what the model has besides parameters, or None.
      metrics: ``"loss"`` and the loss function's metrics by name, `fax.metrics.Statistic` of all
        examples that it has seen, each before the step that its batch is used in.
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

    To be called in the function that `fax.map` runs for each client, as that of `federated`.

    Args:
      loss: see `fedavg`.
      optimizer: from optax.
      params: to start from.
      data: the client, of which all batches are used in order; steps without examples are no steps.
      model_state: to start from, if the model has one.
      correct: ``correct(gradient, y, batch, mask, key)``, what the optimizer gets in place of a
        batch's gradient at y. Default: the gradient.
      example_weights: ``example_weights(batch)``, [batch], what each example's loss is multiplied
        by before the mean is taken. Metrics do not see them. Default: 1.
      optimizer_state: to start from. Default: a fresh one.
      first: the number of the first step, from which steps get their keys.
      branch: see `fax.data.Client.scan`.

    Returns:
      What the client has after the last step.

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
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        params = optax.apply_updates(params, updates)
        return Trained(params, model_state, optax.tree.add(metrics, new), optimizer_state)

    optimizer_state = optimizer.init(params) if optimizer_state is None else optimizer_state
    start = Trained(
        params, model_state, no_metrics(loss, params, data, model_state), optimizer_state
    )
    return data.scan(step, start, first=first, branch=branch)


def proximal(x: PyTree, mu: Any) -> Callable[..., PyTree]:
    """What `local_steps` takes for ``correct`` so that mu/2 ‖y - x‖^2 is added to the loss at y."""

    def correct(gradient: PyTree, y: PyTree, *step: Any) -> PyTree:
        return jax.tree.map(lambda g, y, x: g + (mu * (y - x)).astype(g.dtype), gradient, y, x)

    return correct


def local_gradient(
    loss: Callable, params: PyTree, data: Client, model_state: PyTree = None
) -> tuple[PyTree, Metrics]:
    """The gradient of the mean loss over all batches of a client, at the same parameters.

    Args:
      loss: see `fedavg`.
      params: where.
      data: the client.
      model_state: if the model has one. Each batch sees this one.

    Returns:
      The gradient, zero without any example, and metrics as of `local_steps`.

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

    def zeros(x):  # half precision is added up in float32
        return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))

    start = jax.tree.map(zeros, params), no_metrics(loss, params, data, model_state)
    total, metrics = data.scan(step, start)
    count = jnp.maximum(examples_of(metrics), 1)
    return jax.tree.map(lambda t, p: (t / count).astype(p.dtype), total, params), metrics


def batch_gradient(
    loss: Callable,
    params: PyTree,
    batch: PyTree,
    mask: jax.Array,
    key: jax.Array,
    model_state: PyTree = None,
    weights: jax.Array | None = None,
) -> tuple[PyTree, tuple[Metrics, PyTree]]:
    """The gradient of `batch_loss` with respect to the parameters, and what comes with it.

    Args:
      loss, params, batch, mask, key, model_state, weights: see `batch_loss`.

    Returns:
      The gradient, like the parameters; and the pair of metrics and the model's next state.

    Raises:
      ValueError: as `batch_loss`.

    Example:

      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2 / 2
      >>> batch, mask = {"x": jnp.array([1.0, 2.0, 0.0])}, jnp.array([True, True, False])
      >>> gradient, _ = fax.algorithms.batch_gradient(
      ...     loss, jnp.zeros(()), batch, mask, jax.random.key(0)
      ... )
      >>> print(gradient)
      -1.5
    """

    def of(params: PyTree, state: PyTree) -> tuple[jax.Array, tuple[Metrics, PyTree]]:
        return batch_loss(loss, params, batch, mask, key, state, weights)

    if not isinstance(loss, PersonalLoss):
        return jax.grad(of, has_aux=True)(params, model_state)
    seen = check_seen(model_state)  # whose personal parameters take a step of their own
    (gradient, own), (metrics, seen) = jax.grad(
        lambda params, own: of(params, seen.with_params(own)), (0, 1), has_aux=True
    )(params, seen.parts.params)
    return gradient, (metrics, seen.step(loss.optimizer, own))


def batch_loss(
    loss: Callable,
    params: PyTree,
    batch: PyTree,
    mask: jax.Array,
    key: jax.Array,
    model_state: PyTree = None,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Metrics, PyTree]]:
    """The mean loss of a batch's real examples, 0 if there is none.

    Args:
      loss: see `fedavg`.
      params: the model's parameters.
      batch: leaves [batch, ...].
      mask: bool [batch], False for padding.
      key: for the loss.
      model_state: if the model has one.
      weights: [batch], what each example's loss is multiplied by before the mean is taken, over
        all real examples; metrics do not see them. Default: 1.

    Returns:
      The mean; and a pair of metrics, by name `fax.metrics.Statistic` of the real examples, and of
      the model's next state.

    Raises:
      ValueError: if the loss does not return one number for each example.

    Example:

      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2 / 2
      >>> batch, mask = {"x": jnp.array([1.0, 2.0, 0.0])}, jnp.array([True, True, False])
      >>> mean, (metrics, _) = fax.algorithms.batch_loss(
      ...     loss, jnp.zeros(()), batch, mask, jax.random.key(0)
      ... )
      >>> print(mean, metrics["loss"].result())
      1.25 1.25
    """
    values, model_state = per_example(loss, params, model_state, batch, mask, key)
    total = _total(values["loss"], mask)
    count = jnp.sum(mask, dtype=total.dtype)

    def pooled(name: str, own: Any) -> Statistic:
        if isinstance(own, Statistic):
            return own.sum(where=mask)
        return Mean(total if name == "loss" else _total(own, mask), count)

    metrics = {name: pooled(name, own) for name, own in values.items()}
    objective = total if weights is None else _total(values["loss"] * weights, mask)
    return objective / jnp.maximum(count, 1), (metrics, model_state)


def per_example(
    loss: Callable,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    mask: jax.Array,
    key: jax.Array,
) -> tuple[dict[str, Any], PyTree]:
    """``"loss"`` and the loss function's metrics of each example, and the model's next state."""
    if isinstance(loss, PersonalLoss):
        seen = check_seen(model_state)
        params = put(params, seen.parts.params)
        model_state = put(seen.model_state, seen.parts.model_state)
        named, new = per_example(loss.loss, params, model_state, batch, mask, key)
        return named, seen.after(new)
    loss = told_of_padding(loss, mask)
    if model_state is None:
        out = loss(params, batch, key)
        losses, metrics = _parts(out, "losses", "metrics") if isinstance(out, tuple) else (out, {})
    else:
        out = loss(params, model_state, batch, key)
        losses, metrics, model_state = _parts(out, "losses", "metrics", "model_state")
    if not isinstance(metrics, Mapping) or any(map(_taken, metrics)):
        raise ValueError(
            f"loss returned {type(metrics).__name__} {metrics!r:.80} for metrics, expected a "
            "mapping to arrays, one number for each example, from names other than 'loss' that do "
            "not begin with 'clients/' or 'replicas/'."
        )
    named = {"loss": losses, **metrics}
    for name, values in named.items():
        if isinstance(values, Statistic) and name != "loss":
            _check_statistic(name, values, mask)
            continue
        dtype = _arguments.dtype_of(values)
        if dtype is None:
            raise ValueError(
                f"loss returned {_arguments.shown(values)} for {name!r}, expected an array "
                f"{list(mask.shape)}, one number for each example of the batch."
            )
        if jnp.shape(values) != mask.shape:
            fix = ""
            if name == "loss" and jnp.ndim(values) == 0:
                fix = " Leave out the mean over the batch, such as .mean() or jnp.mean."
            raise ValueError(
                f"loss returned {name!r} of shape {jnp.shape(values)}, expected {mask.shape}: one "
                f"number for each example of the batch. fax takes the mean, without padding.{fix}"
            )
        if name == "loss" and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"loss returned losses of dtype {dtype}, expected real floats, which have "
                "gradients."
            )
    return named, model_state


def _check_statistic(name: str, values: Statistic, mask: jax.Array) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(values):
        if jnp.shape(leaf)[:1] != mask.shape:
            raise ValueError(
                f"loss returned {name!r} with {jax.tree_util.keystr(path)} of shape "
                f"{jnp.shape(leaf)}, expected ({len(mask)}, ...): a statistic of each example of "
                "the batch. fax adds them up, without padding."
            )


def told_of_padding(loss: Callable, mask: jax.Array) -> Callable:
    """The loss, with the batch's mask if it has a parameter of that name."""
    try:
        asks = "mask" in inspect.signature(loss).parameters
    except (TypeError, ValueError):  # something built in, which has no signature
        asks = False
    return functools.partial(loss, mask=mask) if asks else loss


def _parts(out: Any, *expected: str) -> Any:
    if isinstance(out, tuple) and len(out) == len(expected):
        return out
    found = f"{len(out)} values" if isinstance(out, tuple) else f"a {type(out).__name__}"
    raise ValueError(
        f"loss returned {found}, expected ({', '.join(expected)}). The model has state if init was "
        "given a model_state."
    )


def _taken(name: Any) -> bool:
    """Whether fax has a metric of this name."""
    return not isinstance(name, str) or name == "loss" or name.startswith(("clients/", "replicas/"))


def _total(values: jax.Array, mask: jax.Array) -> jax.Array:
    values = jnp.asarray(values)
    dtype = jnp.promote_types(values.dtype, jnp.float32)
    return jnp.sum(jnp.where(mask, values, 0), dtype=dtype)


def examples_of(metrics: Metrics) -> jax.Array:
    """How many examples metrics are of, a float scalar."""
    loss = metrics["loss"]
    assert isinstance(loss, Mean)
    return loss.weight


def no_metrics(loss: Callable, params: PyTree, data: Client, model_state: PyTree) -> Metrics:
    """The metrics of no examples."""
    _, (metrics, _) = jax.eval_shape(
        lambda batch, mask, key: batch_loss(loss, params, batch, mask, key, model_state),
        *jax.eval_shape(lambda: (data.batch(0), data.mask[0], data.key)),
    )
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)
