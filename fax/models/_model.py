"""A flax.nnx module as pure functions of its parameters, for algorithms and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fax import _arguments, _functions
from fax.models._losses import cross_entropy

PyTree = Any
Batch = Mapping[str, jax.Array]


class Model(NamedTuple):
    """A model as pure functions.

    Attributes:
      init: ``init(key) -> params``, nested dicts of arrays.
      apply: ``apply(params, batch, key=None) -> scores`` of the feature ``"x"`` of a batch. With a
        key, the module is in training mode, with dropout.
      loss: ``loss(params, batch, key) -> (losses, metrics)``: the losses of the examples, [batch],
        and a dict of metrics of the same shape, as in `fax.algorithms.fedavg`.

    Example:

      >>> model = fax.models.create("dense", sizes=(4, 3))
      >>> params = model.init(jax.random.key(0))
      >>> batch = {"x": jnp.ones((2, 4)), "y": jnp.array([0, 2])}
      >>> losses, metrics = model.loss(params, batch, jax.random.key(1))
      >>> model.apply(params, batch).shape, losses.shape, list(metrics)
      ((2, 3), (2,), ['accuracy'])
    """

    init: Callable[[jax.Array], PyTree]
    apply: Callable[..., jax.Array]
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]

    def __repr__(self) -> str:
        name = getattr(self.apply, "__qualname__", type(self.apply).__name__)
        return f"Model(init, apply and loss of {name.partition('.<locals>')[0]})"


def functional(
    build: Callable[..., nnx.Module],
    loss: Callable[[jax.Array, Batch], Any] = cross_entropy,
) -> Model:
    """Makes pure functions of a flax.nnx module.

    Args:
      build: ``build(rngs=rngs) -> module``, such as the module's class. The module is called with
        the feature ``"x"`` of a batch and returns scores, one for each class.
      loss: ``loss(scores, batch)``, which returns losses [batch], or a pair of them and a dict of
        metrics [batch]. For sequences of tokens, it is `sequence_cross_entropy`.

    Returns:
      The model. Its functions are pure and have no state besides the parameters.

    Raises:
      ValueError: if an argument is not such a function, or the module has state besides its
        parameters, such as the statistics of a batch norm, or constant arrays. For a module with
        state write a loss with ``model_state``; see `fax.algorithms.fedavg`.

    Example:

      >>> from flax import nnx
      >>> model = fax.models.functional(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
      >>> params = model.init(jax.random.key(0))
      >>> jax.tree.map(jnp.shape, params)
      {'bias': (3,), 'kernel': (4, 3)}
      >>> model.apply(params, {"x": jnp.ones((2, 4))}).shape
      (2, 3)
    """
    where = "fax.models.functional"
    if (
        isinstance(build, nnx.Module)
        or not callable(build)
        or not _functions.takes(build, 0, always=["rngs"])
    ):
        kind = build if isinstance(build, type) else type(build)
        linen = any(base.__module__.startswith("flax.linen") for base in kind.__mro__)
        fix = " For a module of flax.linen, write the loss: see docs/how_to/model.md."
        raise ValueError(
            f"{where}: build is {_arguments.shown(build)}, expected a function build(rngs=rngs) "
            "that makes a module, such as lambda rngs: nnx.Linear(4, 3, rngs=rngs)."
            f"{fix if linen else ''}"
        )
    _functions.function(where, "loss", loss, {2: "loss(scores, batch)"})

    def built() -> nnx.Module:
        module = build(rngs=nnx.Rngs(0))
        for path, leaf in nnx.iter_graph(module):
            if isinstance(leaf, jax.Array | np.ndarray):
                raise ValueError(
                    f"{where}: build returned {_arguments.of_type(module)} with an array that is "
                    f"not trained, {_arguments.shown(leaf)} at {'.'.join(map(str, path))}. Make it "
                    "an nnx.Param to train it. Make a constant in __call__, or outside the module."
                )
        return module

    module = nnx.eval_shape(built)
    parts: Any = nnx.split(module, nnx.Param, ...)
    graph, _, rest = parts
    others, structure = jax.tree.flatten(rest)
    for path, variable in nnx.to_flat_state(rest):
        if not isinstance(variable, nnx.RngState):
            raise ValueError(
                f"{where}: build returned {_arguments.of_type(module)} with state that is not "
                f"trained, {type(variable).__name__} at {'.'.join(map(str, path))}. Use a layer "
                "without state, such as GroupNorm instead of BatchNorm, or write a loss with "
                "model_state; see fax.algorithms.fedavg."
            )

    def init(key: jax.Array) -> PyTree:
        _arguments.key(f"{where}: init", "key", key)
        return nnx.to_pure_dict(nnx.state(build(rngs=nnx.Rngs(key)), nnx.Param))

    def apply(params: PyTree, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        source = jax.random.key(0) if key is None else key
        drawn = [_rng_state(source, number, like) for number, like in enumerate(others)]
        module = nnx.merge(graph, params, jax.tree.unflatten(structure, drawn))
        if key is None:
            module.eval()
        else:
            module.train()
        if "x" not in batch:
            raise ValueError(
                f"fax.models.functional: batch has the features {sorted(batch)}, expected the "
                "inputs as 'x'. Rename a feature with fax.data.map."
            )
        return module(batch["x"])

    def loss_of_batch(params: PyTree, batch: Batch, key: jax.Array | None) -> Any:
        return loss(apply(params, batch, key), batch)

    return Model(jax.jit(init), apply, loss_of_batch)


def _rng_state(key: jax.Array, number: int, like: Any) -> jax.Array:
    """The state of a stream of random numbers: its key, or its count of draws."""
    if not jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jnp.zeros(like.shape, like.dtype)
    own = jax.random.fold_in(key, number)
    return own if jnp.issubdtype(own.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(own)
