"""The loss of a batch: its mean over real examples, its gradient, and its metrics."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fax import _arguments
from fax._notes import called
from fax.algorithms._personal import PersonalLoss, check_seen, put
from fax.data import Client
from fax.metrics import Mean, Statistic

PyTree = Any
Metrics = dict[str, Statistic]


def batch_gradient(
    loss: Callable,
    params: PyTree,
    batch: PyTree,
    mask: jax.Array,
    key: jax.Array,
    model_state: PyTree = None,
    weights: jax.Array | None = None,
) -> tuple[PyTree, tuple[Metrics, PyTree]]:
    """The gradient of `batch_loss` with respect to the parameters, and metrics.

    Args:
      loss, params, batch, mask, key, model_state, weights: see `batch_loss`.

    Returns:
      The gradient, a pytree like the parameters; and a pair of metrics and the model's next state.

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
    seen = check_seen(model_state)  # its personal parameters take a separate step
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
    """The mean loss of a batch's real examples, or 0 if there are none, and metrics.

    Args:
      loss: see `fedavg`.
      params: the model's parameters.
      batch: leaves [batch, ...].
      mask: bool [batch], False for padding.
      key: a random key for the loss.
      model_state: the model's state, if it has one.
      weights: [batch], factors of the examples' losses before the mean over all real examples is
        taken. They do not affect metrics. Default: 1.

    Returns:
      The mean; and a pair of metrics, a dict of `fax.metrics.Statistic` of the real examples, and
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
    """``"loss"`` and the loss function's metrics for each example, and the model's next state."""
    if isinstance(loss, PersonalLoss):
        seen = check_seen(model_state)
        params = put(params, seen.parts.params)
        model_state = put(seen.model_state, seen.parts.model_state)
        named, new = per_example(loss.loss, params, model_state, batch, mask, key)
        return named, seen.after(new)
    loss = told_of_padding(loss, mask)
    if model_state is None:
        out = called("the loss", "loss", loss, params=params, batch=batch, key=key)
        losses, metrics = _parts(out, "losses", "metrics") if isinstance(out, tuple) else (out, {})
    else:
        own = {"params": params, "model_state": model_state, "batch": batch, "key": key}
        out = called("the loss", "loss", loss, **own)
        losses, metrics, model_state = _parts(out, "losses", "metrics", "model_state")
    if not isinstance(metrics, Mapping) or any(map(_taken, metrics)):
        raise ValueError(
            f"loss returned {_arguments.shown(metrics)} for metrics, expected a "
            "mapping from names to arrays, one number for each example. Names must not be 'loss' "
            "or begin with 'clients/' or 'replicas/'."
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
            elif jnp.shape(values)[:1] == mask.shape:
                fix = " Take the mean over the other axes, such as the tokens of a sequence."
            raise ValueError(
                f"loss returned {name!r} of shape {jnp.shape(values)}, expected {mask.shape}: one "
                f"number for each example of the batch. fax takes the mean, without padding.{fix}"
            )
        if name == "loss" and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"loss returned losses of dtype {dtype}, expected real floats, which are "
                "differentiable."
            )
    return named, model_state


def _check_statistic(name: str, values: Statistic, mask: jax.Array) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(values):
        if jnp.shape(leaf)[:1] != mask.shape:
            raise ValueError(
                f"loss returned {name!r} with {jax.tree_util.keystr(path)} of shape "
                f"{jnp.shape(leaf)}, expected ({len(mask)}, ...): a statistic for each example of "
                "the batch. fax sums them, without padding."
            )


def told_of_padding(loss: Callable, mask: jax.Array) -> Callable:
    """The loss, with the batch's mask if it has a parameter ``mask``."""
    try:
        asks = "mask" in inspect.signature(loss).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        asks = False
    return functools.partial(loss, mask=mask) if asks else loss


def _parts(out: Any, *expected: str) -> Any:
    if isinstance(out, tuple) and len(out) == len(expected):
        return out
    found = f"{len(out)} values" if isinstance(out, tuple) else _arguments.of_type(out)
    raise ValueError(
        f"loss returned {found}, expected ({', '.join(expected)}). The model has state if "
        "model_state was passed to init."
    )


def _taken(name: Any) -> bool:
    """Whether fax has a metric of this name."""
    return not isinstance(name, str) or name == "loss" or name.startswith(("clients/", "replicas/"))


def _total(values: jax.Array, mask: jax.Array) -> jax.Array:
    values = jnp.asarray(values)
    dtype = jnp.promote_types(values.dtype, jnp.float32)
    return jnp.sum(jnp.where(mask, values, 0), dtype=dtype)


def examples_of(metrics: Metrics) -> jax.Array:
    """The number of examples that metrics are computed from, a float scalar."""
    loss = metrics["loss"]
    assert isinstance(loss, Mean)
    return loss.weight


def no_metrics(loss: Callable, params: PyTree, data: Client, model_state: PyTree) -> Metrics:
    """The metrics of zero examples."""
    _, (metrics, _) = jax.eval_shape(
        lambda batch, mask, key: batch_loss(loss, params, batch, mask, key, model_state),
        *jax.eval_shape(lambda: (data.batch(0), data.mask[0], data.key)),
    )
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)
