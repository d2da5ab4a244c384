"""Checks of what users pass to algorithms, and to the functions that these return."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_leaves_with_path

from fax import _arguments, _functions
from fax.aggregators import Aggregator
from fax.aggregators._chain import aggregator_of
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._personal import PersonalLoss, bare
from fax.data import Cohort, Cohorts
from fax.primitives._halves import depends

PyTree = Any
LOSS, LOSS_OF_STATE = "loss(params, batch, key)", "loss(params, model_state, batch, key)"


def arguments(
    caller: str,
    loss: Any,
    aggregator: Any = None,
    vectorize: Any = None,
    **optimizers: Any,
) -> Aggregator | None:
    """Checks the arguments that all algorithms have, and returns the aggregator."""
    forms = {3: LOSS, 4: f"{LOSS_OF_STATE} for a model with state"}
    _functions.function(caller, "loss", bare(loss), forms, keywords=["mask"])
    for name, value in optimizers.items():
        _functions.optimizer(caller, name, value)
    if vectorize is not None:
        _arguments.count(caller, "vectorize", vectorize)
    return aggregator_of(caller, aggregator)


def guarded(
    caller: str,
    loss: Callable,
    kind: type,
    init: Callable,
    round: Callable,
    params: Callable,
    models: Callable | None = None,
) -> Algorithm:
    """Makes an algorithm of these functions, and checks their arguments.

    Args:
      caller: the algorithm, for messages.
      loss: the user's.
      kind: the type of the state.
      init: the algorithm's. Its arguments are copied and its result is put onto the mesh: a jitted
        round may donate the state, and does not compile again for params made without the mesh.
      round: the algorithm's.
      params: the algorithm's.
      models: the algorithm's, or None.
    """

    @functools.wraps(init)
    def checked_init(params: PyTree, model_state: PyTree = None) -> Any:
        check_trained(f"{caller}: init: params", params)
        _arguments.arrays(f"{caller}: init: model_state", model_state, keys=False)
        _check_model_state(caller, loss, model_state)
        params, model_state = jax.tree.map(_copy, (params, model_state))
        return _settled(init(params, model_state))

    @functools.wraps(round)
    def checked_round(state: Any, cohort: Cohort) -> tuple[Any, dict[str, jax.Array]]:
        if isinstance(state, Cohort) and isinstance(cohort, kind):
            raise ValueError(
                f"{caller}: round got the cohort first and the state second. Write "
                "round(state, cohort)."
            )
        check_state(caller, "round", kind, state)
        check_cohort(f"{caller}: round", cohort)
        return round(state, cohort)

    def of_state(name: str, fn: Callable) -> Callable:
        @functools.wraps(fn)
        def checked(state: Any) -> PyTree:
            check_state(caller, name, kind, state)
            return fn(state)

        return checked

    check_whole(caller, loss)
    checked_round.__qualname__ = f"{caller.rpartition('.')[2]}.round"
    one, every = of_state("params", params), models and of_state("models", models)
    return Algorithm(checked_init, checked_round, one, every)


def check_whole(caller: str, loss: Any) -> None:
    """Refuses a loss with personal parts, for algorithms without a single model for all clients."""
    if isinstance(loss, PersonalLoss):
        raise ValueError(
            f"{caller}: loss is {loss!r}, which only works with an algorithm that trains one model "
            "for all clients, such as fax.algorithms.fedavg. Pass the loss without personal_parts."
        )


def check_scalar_optimizer(
    caller: str, optimizer: Any, problem: str, dtype: Any = jnp.float32
) -> None:
    """Checks that an optimizer works on a scalar; one made for certain leaves may not."""
    try:
        jax.eval_shape(optimizer.init, jax.ShapeDtypeStruct((), dtype))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{caller}: {problem}") from error


def warn_of_copies(caller: str, optimizer: optax.GradientTransformation, params: PyTree) -> None:
    """Warns if the state of the replicas' optimizer begins as a copy of their parameters.

    What replicas receive changes their parameters, but not the copy. If the next step starts from
    the copy, as with float32 copies of bfloat16 parameters, what was received is lost.
    """
    jaxpr, state = jax.make_jaxpr(optimizer.init, return_shape=True)(params)
    copied = depends(jaxpr, [True] * len(jaxpr.in_avals))
    for (path, leaf), copy in zip(tree_leaves_with_path(state), copied, strict=True):
        if copy:
            warnings.warn(
                f"{caller}: the state of inner_optimizer has a copy of the parameters, in "
                f"state{keystr(path)} {_arguments.shown(leaf)}. Averages change the parameters of "
                "a replica, but not this copy. If steps start from it, averages have no effect. "
                "Instead of float32 copies of short parameters, keep the parameters in float32 "
                "and convert them in the loss.",
                UserWarning,
                stacklevel=4,
            )
            return


def check_state(caller: str, function: str, kind: type, state: Any) -> None:
    """Checks that a state comes from the algorithm."""
    if not isinstance(state, kind):
        raise ValueError(
            f"{caller}: {function} got {_arguments.shown(state)} for the state, expected the "
            f"{kind.__name__} that init(params) or the last round returned."
        )


def check_like(what: str, new: PyTree, like: PyTree) -> None:
    """Checks that a pytree has the structure, shapes and dtypes of another."""
    structures: Any = [jax.tree.structure(x) for x in (new, like)]
    if structures[0] != structures[1]:
        raise ValueError(f"{what} is {shown_types(new)}, expected {shown_types(like)}.")
    _arguments.arrays(what, new, keys=True)
    for (path, x), y in zip(tree_leaves_with_path(new), jax.tree.leaves(like)):
        found, expected = (jax.typeof(jnp.asarray(own)) for own in (x, y))
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise ValueError(
                f"{what}{keystr(path)} is {found.str_short()}, expected {expected.str_short()}."
            )


class _Shown:
    """A leaf that prints as its type, or as the number that it is."""

    def __init__(self, leaf: Any):
        self._text = _arguments.shown(leaf)

    def __repr__(self) -> str:
        return self._text


def shown_types(tree: PyTree) -> str:
    """A pytree with its types, in a message: ``{'w': float32[3], 'b': float32[]}``."""
    return f"{jax.tree.map(_Shown, tree)!r:.200}"


def check_private(
    caller: str,
    aggregator: Any,
    sent: str,
    instead: str = "another algorithm, such as fax.algorithms.fedavg",
) -> None:
    """Refuses a private aggregator if clients send the server more than their updates."""
    if getattr(aggregator, "private", False):
        raise ValueError(
            f"{caller}: aggregator is private, but {sent} without it, so its epsilon would "
            f"not hold. Use an aggregator that is not private, or {instead}."
        )


def check_averaged_state(caller: str, aggregator: Any, model_state: PyTree) -> None:
    """Refuses a private aggregator for a model with state, which is averaged without noise."""
    for path, leaf in tree_leaves_with_path(model_state):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            name = f"model_state{keystr(path)}"
            instead = "a model without such state, such as one with GroupNorm instead of BatchNorm"
            check_private(caller, aggregator, f"{name} is averaged over clients", instead)


def check_cohort(where: str, cohort: Any) -> None:
    """Checks that a cohort is that of a single round."""
    if isinstance(cohort, Cohorts):
        raise ValueError(
            f"{where} got the iterator over all cohorts, expected the cohort of one round. Pass "
            "next(cohorts)."
        )
    if not isinstance(cohort, Cohort):
        raise ValueError(
            f"{where} got {_arguments.shown(cohort)} for the cohort, expected a fax.data.Cohort, "
            "from the iterator that fax.data.cohorts returns."
        )
    if cohort.mask.ndim != 3:
        raise ValueError(
            f"{where} got a cohort whose mask has shape {cohort.mask.shape}, expected [clients, "
            "steps, batch], for a single round. To run several rounds in one call, use "
            "fax.algorithms.many_rounds."
        )


def check_trained(name: str, params: PyTree) -> None:
    """Checks that there are leaves, and that a step against the gradient of each leads downhill."""
    flat = tree_leaves_with_path(params)
    if not flat:
        raise ValueError(f"{name} has no leaves, expected a pytree of arrays of floats.")
    for path, leaf in flat:
        dtype = _arguments.dtype_of(leaf)
        if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
            continue
        found = _arguments.shown(leaf)
        if dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(
                f"{name}{keystr(path)} is {found}, expected an array of real floats. Make its real "
                "and its imaginary part leaves of their own: a step against the gradient that JAX "
                "returns for a complex number leads uphill in the imaginary part."
            )
        if dtype is not None and not hasattr(leaf, "dtype"):
            fix = f" Write {leaf}.0 for a number to be trained." if type(leaf) is int else ""
        else:
            fix = (
                " Pass only the trained leaves as params, and add the others in the loss: use "
                "equinox.partition(model, equinox.is_inexact_array) and equinox.combine, or "
                "flax.nnx.split(model, flax.nnx.Param, ...) and flax.nnx.merge(..., copy=True). "
                "Counts and statistics can go into model_state."
            )
        raise ValueError(f"{name}{keystr(path)} is {found}, expected an array of floats.{fix}")


def _check_model_state(caller: str, loss: Callable, model_state: PyTree) -> None:
    """Checks that the loss takes a model's state if there is one, and only then."""
    positional = 3 if model_state is None else 4
    if _functions.takes(loss, positional, ["mask"]):
        return
    if model_state is None:
        raise ValueError(
            f"{caller}: init got no model_state, but the loss has the form {LOSS_OF_STATE}. Call "
            "init(params, model_state)."
        )
    raise ValueError(
        f"{caller}: init got a model_state, but the loss has the form {LOSS}. It must have the "
        f"form {LOSS_OF_STATE}, and return (losses, metrics, model_state)."
    )


def _copy(x: Any) -> jax.Array:
    """A copy that shares no memory with the caller's array, which donation would delete."""
    return jnp.array(x, copy=True)


def _settled(state: PyTree) -> PyTree:
    """A state on all devices of the mesh in scope, in which no array occurs twice.

    An array that occurs twice cannot be donated. If the state were on other devices than it is
    after a round, a jitted round would be compiled twice.
    """
    if not _arguments.concrete(state):
        return state
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:  # inside a traced function, where nothing is donated
        return state
    devices = set(mesh.devices.flat) if not mesh.empty and jax.process_count() == 1 else None
    seen: dict[int, jax.Array] = {}

    def own(x: jax.Array) -> jax.Array:
        if not isinstance(x, jax.Array):
            return x
        if id(x) in seen:
            x = _copy(x)
        seen[id(x)] = x
        if devices is not None and x.sharding.device_set != devices:
            x = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
        return x

    return jax.tree.map(own, state)
