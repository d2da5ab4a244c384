"""What a client does with its batches: steps of an optimizer on a loss, and metrics on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fax._reductions as reductions
from fax.data import Client

PyTree = Any


class Tally(NamedTuple):
    """Sums over examples.

    Attributes:
      sums: by the name of the metric, float scalars; ``"loss"`` is one of them.
      examples: how many examples these are, a float scalar, so that it is summed up over devices
        together with the rest.
    """

    sums: dict[str, jax.Array]
    examples: jax.Array


class Trained(NamedTuple):
    """What a client has after its local steps."""

    params: PyTree
    model_state: PyTree
    tally: Tally


def mean_loss(
    loss: Callable,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    mask: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, tuple[Tally, PyTree]]:
    """The mean loss of a batch's real examples; their tally, and the model's next state.

    Args:
      loss: see `fax.algorithms.fedavg`.
      params: what the loss is differentiated by.
      model_state: None if the model has none.
      batch: leaves [batch, ...].
      mask: bool [batch].
      key: for the loss.
    """
    if model_state is None:
        out = loss(params, batch, key)
        losses, metrics = out if isinstance(out, tuple) else (out, {})
    else:
        losses, metrics, model_state = loss(params, model_state, batch, key)
    if not isinstance(metrics, Mapping) or "loss" in metrics:
        raise ValueError(
            f"loss returned {type(metrics).__name__} {metrics!r:.80} for metrics, expected a "
            "mapping from names other than 'loss' to arrays, one number for each example."
        )
    per_example = {"loss": losses, **metrics}
    for name, values in per_example.items():
        if jnp.shape(values) != mask.shape:
            raise ValueError(
                f"loss returned {name!r} of shape {jnp.shape(values)}, expected {mask.shape}: one "
                "number for each example of the batch. fax takes the mean, without padding."
            )
    sums = {name: _total(values, mask) for name, values in per_example.items()}
    count = jnp.sum(mask, dtype=sums["loss"].dtype)
    mean = sums["loss"] / jnp.maximum(count, 1)
    return mean, (Tally(sums, count), model_state)


def _total(values: jax.Array, mask: jax.Array) -> jax.Array:
    values = jnp.asarray(values)
    dtype = jnp.promote_types(values.dtype, jnp.float32)
    return jnp.sum(jnp.where(mask, values, 0), dtype=dtype)


def train(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    model_state: PyTree,
    client: Client,
) -> Trained:
    """Runs a client's local steps, from a fresh state of the optimizer."""

    def step(trained, batch, mask, key):
        params, optimizer_state, model_state, tally = trained
        gradient, (new, model_state) = jax.grad(
            lambda p: mean_loss(loss, p, model_state, batch, mask, key), has_aux=True
        )(params)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        params = optax.apply_updates(params, updates)
        return params, optimizer_state, model_state, jax.tree.map(jnp.add, tally, new)

    start = (
        params,
        optimizer.init(params),
        model_state,
        no_tally(loss, params, model_state, client),
    )
    params, _, model_state, tally = client.scan(step, start)
    return Trained(params, model_state, tally)


def no_tally(loss: Callable, params: PyTree, model_state: PyTree, client: Client) -> Tally:
    """The tally of no examples."""
    _, (tally, _) = jax.eval_shape(
        lambda *own: mean_loss(loss, params, model_state, *own),
        *jax.eval_shape(lambda: (client.batch(0), client.mask[0], client.key)),
    )
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tally)


def metrics_of(tally: Tally) -> dict[str, jax.Array]:
    """Means over all examples, and ``clients/...``, over those of each client.

    Args:
      tally: placed; to be called in a program.
    """
    total = reductions.sum(tally)
    metrics = {name: value / jnp.maximum(total.examples, 1) for name, value in total.sums.items()}
    own = {
        f"clients/{name}": value / jnp.maximum(tally.examples, 1)
        for name, value in tally.sums.items()
    }
    return {**metrics, **own}
