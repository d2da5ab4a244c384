"""What a client does with its batches: steps of an optimizer on a loss, and metrics on the way."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fax._reductions as reductions
from fax import _arguments
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
    optimizer: PyTree


class Local(NamedTuple):
    """What a client sends.

    Attributes:
      update: to be added to the server's parameters, as far as the client is concerned.
      model_state: None if the model has none.
      tally: of the losses and metrics on the way.
    """

    update: PyTree
    model_state: PyTree
    tally: Tally


def difference(trained: Trained, params: PyTree) -> Local:
    """The way that a client went from the server's parameters."""
    update = jax.tree.map(jnp.subtract, trained.params, params)
    return Local(update, trained.model_state, trained.tally)


def mean_loss(
    loss: Callable,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    mask: jax.Array,
    key: jax.Array,
    factors: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Tally, PyTree]]:
    """The mean loss of a batch's real examples; their tally, and the model's next state.

    Args:
      loss: see `fax.algorithms.fedavg`.
      params: what the loss is differentiated by.
      model_state: None if the model has none.
      batch: leaves [batch, ...].
      mask: bool [batch].
      key: for the loss.
      factors: [batch], what each example's loss counts in the mean, not in the tally. Default: 1.
    """
    values, model_state = per_example(loss, params, model_state, batch, mask, key)
    sums = {name: _total(own, mask) for name, own in values.items()}
    count = jnp.sum(mask, dtype=sums["loss"].dtype)
    objective = sums["loss"] if factors is None else _total(values["loss"] * factors, mask)
    return objective / jnp.maximum(count, 1), (Tally(sums, count), model_state)


def per_example(
    loss: Callable,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    mask: jax.Array,
    key: jax.Array,
) -> tuple[dict[str, jax.Array], PyTree]:
    """``"loss"`` and the loss function's metrics of each example, and the model's next state."""
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


def told_of_padding(loss: Callable, mask: jax.Array) -> Callable:
    """The loss, with the batch's mask if it has a parameter of that name."""
    try:
        asks = "mask" in inspect.signature(loss).parameters
    except (TypeError, ValueError):  # something built in, which has no signature
        asks = False
    return functools.partial(loss, mask=mask) if asks else loss


def mean_gradient(
    loss: Callable,
    params: PyTree,
    model_state: PyTree,
    batch: PyTree,
    mask: jax.Array,
    key: jax.Array,
    factors: jax.Array | None = None,
) -> tuple[PyTree, tuple[Tally, PyTree]]:
    """The gradient of `mean_loss` with respect to the parameters, and what comes with it."""

    def of(params: PyTree) -> tuple[jax.Array, tuple[Tally, PyTree]]:
        return mean_loss(loss, params, model_state, batch, mask, key, factors)

    return jax.grad(of, has_aux=True)(params)


def full_gradient(
    loss: Callable,
    params: PyTree,
    model_state: PyTree,
    client: Client,
) -> tuple[PyTree, Tally]:
    """The gradient of the mean loss over all batches of a client, at the same parameters.

    Without any example it is zero.

    Args:
      loss: see `fax.algorithms.fedavg`.
      params: where.
      model_state: None if the model has none. Each batch sees this one.
      client: its batches.
    """

    def step(carry, batch, mask, key):
        total, tally = carry
        gradient, (new, _) = mean_gradient(loss, params, model_state, batch, mask, key)
        total = jax.tree.map(lambda t, g: t + (new.examples * g).astype(t.dtype), total, gradient)
        return total, jax.tree.map(jnp.add, tally, new)

    def zeros(x):  # half precision is added up in float32
        return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))

    start = jax.tree.map(zeros, params), no_tally(loss, params, model_state, client)
    total, tally = client.scan(step, start)
    count = jnp.maximum(tally.examples, 1)
    return jax.tree.map(lambda t, p: (t / count).astype(p.dtype), total, params), tally


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


def train(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    model_state: PyTree,
    client: Client,
    correct: Callable[[PyTree, PyTree], PyTree] = lambda gradient, params: gradient,
    factors: Callable[[PyTree], jax.Array | None] = lambda batch: None,
    optimizer_state: PyTree = None,
    **scan: Any,
) -> Trained:
    """Runs a client's local steps.

    Args:
      loss: see `fax.algorithms.fedavg`.
      optimizer: the client's.
      params: to start from.
      model_state: None if the model has none.
      client: its batches.
      correct: ``correct(gradient, params)``, the gradient that the optimizer gets at ``params``.
      factors: ``factors(batch)``, [batch]; see `mean_loss`.
      optimizer_state: to start from. Default: a fresh one.
      **scan: arguments of `Client.scan`.
    """

    def step(trained, batch, mask, key):
        params, optimizer_state, model_state, tally = trained
        gradient, (new, model_state) = mean_gradient(
            loss, params, model_state, batch, mask, key, factors(batch)
        )
        gradient = correct(gradient, params)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        params = optax.apply_updates(params, updates)
        return params, optimizer_state, model_state, jax.tree.map(jnp.add, tally, new)

    start = (
        params,
        optimizer.init(params) if optimizer_state is None else optimizer_state,
        model_state,
        no_tally(loss, params, model_state, client),
    )
    params, optimizer_state, model_state, tally = client.scan(step, start, **scan)
    return Trained(params, model_state, tally, optimizer_state)


def no_tally(loss: Callable, params: PyTree, model_state: PyTree, client: Client) -> Tally:
    """The tally of no examples."""
    _, (tally, _) = jax.eval_shape(
        lambda *own: mean_loss(loss, params, model_state, *own),
        *jax.eval_shape(lambda: (client.batch(0), client.mask[0], client.key)),
    )
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tally)


def metrics_of(
    tally: Tally, total: Tally | None = None, each: str = "clients"
) -> dict[str, jax.Array]:
    """Means over all examples, and ``clients/...``, over those of each client.

    Args:
      tally: placed; to be called in a program.
      total: its sum, if that is known.
      each: what participants are called.
    """
    total = reductions.sum(tally) if total is None else total
    metrics = {name: value / jnp.maximum(total.examples, 1) for name, value in total.sums.items()}
    own = {
        f"{each}/{name}": value / jnp.maximum(tally.examples, 1)
        for name, value in tally.sums.items()
    }
    return {**metrics, **own}
