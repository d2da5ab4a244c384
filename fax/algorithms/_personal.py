"""Parameters and statistics that stay with each client, while the rest is averaged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import optax
from jax.tree_util import tree_flatten_with_path, tree_map_with_path

from fax import _arguments, _functions
from fax.aggregators import PerClient
from fax.algorithms._clients import repeated
from fax.algorithms._layers import name_of

PyTree = Any
Leaves = dict[str, jax.Array]
WHERE = "fax.algorithms.personal_parts"


class Parts(NamedTuple):
    """The leaves that `personal_parts` keeps with a client, by paths such as ``"head/kernel"``.

    Attributes:
      params: leaves of the parameters.
      model_state: leaves of what the model has besides parameters.
    """

    params: Leaves
    model_state: Leaves


class PersonalParts(NamedTuple):
    """The part of a `State` that `personal_parts` keeps with the clients.

    Attributes:
      start: the initial `Parts`, those of a client that has not taken part yet.
      clients: the `Parts` of all clients, leaves [num_clients, ...].
    """

    start: Parts
    clients: PerClient


class Seen(NamedTuple):
    """Takes the place of a model's state on a client while it trains.

    Attributes:
      model_state: the part of the model's state that all clients share.
      parts: the client's personal parts. Each gradient also updates them.
      optimizer: the state of their optimizer.
    """

    model_state: PyTree
    parts: Parts
    optimizer: PyTree

    def after(self, model_state: PyTree) -> Seen:
        """Returns it with the next state of the complete model."""
        rest, own = take(model_state, self.parts.model_state)
        return self._replace(model_state=rest, parts=self.parts._replace(model_state=own))

    def with_params(self, params: Leaves) -> Seen:
        """Returns it with other personal parameters."""
        return self._replace(parts=self.parts._replace(params=params))

    def step(self, optimizer: optax.GradientTransformation, gradient: Leaves) -> Seen:
        """Takes a step of the optimizer of personal parameters."""
        before = self.parts.params
        moves, state = optimizer.update(gradient, self.optimizer, before)
        return self.with_params(optax.apply_updates(before, moves))._replace(optimizer=state)


@dataclasses.dataclass(frozen=True)
class PersonalLoss:
    """A loss and what is personal in its model; see `personal_parts`."""

    loss: Callable
    parts: str | Sequence[str] | Callable[[str], bool] | None
    optimizer: optax.GradientTransformation
    num_clients: int

    def __repr__(self) -> str:
        return f"personal_parts({_arguments.shown(self.loss)}, {self.parts!r:.80})"


def personal_parts(
    loss: Callable,
    parts: str | Sequence[str] | Callable[[str], bool] | None,
    optimizer: optax.GradientTransformation,
    *,
    num_clients: int,
) -> Any:
    """Makes a loss for a model of which some parts stay with each client.

    Pass the result as the loss of any algorithm that trains one model for all clients, such as
    `fedavg` or `scaffold`. The algorithm then works with the shared parameters u only. It sends,
    corrects, aggregates and averages nothing else. In every local step of the algorithm, client i
    also takes a step of ``optimizer`` on its own parameters v_i:

        gradients of the batch's loss f_i(u, v_i) with respect to u and v_i
        u <- u + the algorithm's step        v_i <- v_i + optimizer(gradient with respect to v_i)

    Between rounds a client keeps v_i, and also its statistics in the model's state. This is partial
    model personalization with simultaneous steps (FedSim). `fedper` and `fedbn` are special cases.

    Args:
      loss: see `fedavg`.
      parts: which leaves of the parameters and of the model's state stay with clients: the path of
        a leaf such as ``"head/kernel"``, or of a subtree such as ``"head"``, or a pattern such as
        ``"*/norm_?"``, in which ``*`` stands for any text and ``?`` for any character. Or a
        sequence of these, or a function that takes a path and returns a bool. None: all layers with
        statistics, that is, all of the model's state, and the parameters in the same subtrees, such
        as ``"norm/scale"`` if the state has ``"norm/mean"``.
      optimizer: from optax, for the v_i; its state is reset in each round.
      num_clients: the number of clients in the data, ``len(data)``.

    Returns:
      The loss. In the `State` of an algorithm, ``params`` and ``model_state`` have None in place of
      personal leaves, and ``personal`` has these, as `PersonalParts`. ``params(state)`` is a
      complete model, with the personal parts that were passed to ``init``. ``models(state)`` are
      the models of all clients, leaves [num_clients, ...], for `fax.metrics.evaluate_clients` with
      ``personal=True``, and `personal_state` returns their statistics. Clients do not send personal
      parts. A private aggregator protects the shared part only.

    Raises:
      ValueError: if an argument is invalid; in ``init``, if ``parts`` names something that the
        model does not have, or matches no leaf, or matches all parameters.

    References:
      Pillutla et al., Federated learning with partial model personalization, arXiv:2204.03809.

    Example:

      >>> import optax
      >>> def loss(params, batch, key):
      ...     return (batch["x"] - params["slope"] * batch["t"] - params["offset"]) ** 2 / 2
      >>> t = jnp.arange(4.0)
      >>> data = fax.data.InMemory({n: {"t": t, "x": t + n} for n in (2, 5)})
      >>> loss = fax.algorithms.personal_parts(loss, "offset", optax.sgd(0.1), num_clients=2)
      >>> algorithm = fax.algorithms.fedopt(loss, optax.sgd(0.1), optax.sgd(1.0, momentum=0.5))
      >>> state = algorithm.init({"slope": jnp.zeros(()), "offset": jnp.zeros(())})
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=4)
      >>> state, _ = fax.algorithms.many_rounds(algorithm, state, rounds, 200)
      >>> print(state.params["slope"].round(2), algorithm.models(state)["offset"].round(2))
      1.0 [2. 5.]
    """
    forms = {3: "loss(params, batch, key)", 4: "loss(params, model_state, batch, key)"}
    _functions.function(WHERE, "loss", loss, forms, keywords=["mask"])
    _functions.optimizer(WHERE, "optimizer", optimizer)
    if callable(parts):
        _functions.function(WHERE, "parts", parts, {1: "parts(path)"})
    elif parts is not None and not isinstance(parts, str):
        if not isinstance(parts, Iterable):
            raise ValueError(
                f"{WHERE}: parts is {_arguments.shown(parts)}, expected the path of a leaf or a "
                "pattern, a sequence of these, a function parts(path), or None."
            )
        parts = list(parts)
        for part in parts:
            _arguments.text(WHERE, "parts", part, "the path of a leaf or a pattern")
    num_clients = _arguments.count(WHERE, "num_clients", num_clients)
    return PersonalLoss(loss, parts, optimizer, num_clients)


def personal_state(state: Any) -> PyTree:
    """Returns the model's state of each client, if `personal_parts` keeps parts of it with them.

    Args:
      state: the state of an algorithm whose loss is from `personal_parts`.

    Returns:
      The clients' model states, leaves [num_clients, ...].

    Raises:
      ValueError: if ``state`` is that of another algorithm.

    Example:

      >>> import optax
      >>> def loss(params, model_state, batch, key):
      ...     return (batch["x"] - params) ** 2, {}, {"steps": model_state["steps"] + 1}
      >>> loss = fax.algorithms.personal_parts(loss, "steps", optax.sgd(0.1), num_clients=3)
      >>> algorithm = fax.algorithms.fedavg(loss, optax.sgd(0.1))
      >>> data = fax.data.InMemory({n: {"x": jnp.ones(n + 1)} for n in range(3)})
      >>> cohort = next(fax.data.cohorts(data, clients=3, batch_size=1))
      >>> state, _ = algorithm.round(algorithm.init(jnp.zeros(()), {"steps": 0}), cohort)
      >>> print(fax.algorithms.personal_state(state))
      {'steps': Array([1, 2, 3], dtype=int32)}
    """
    if getattr(state, "personal", None) is None:
        raise ValueError(
            f"fax.algorithms.personal_state: state is {_arguments.shown(state)}, expected the "
            "state of an algorithm whose loss is from personal_parts."
        )
    rows = state.personal.clients.rows
    return put(everyones(state.model_state, rows), rows.model_state)


def split(
    loss: Any, params: PyTree, model_state: PyTree
) -> tuple[PyTree, PyTree, PersonalParts | None]:
    """Takes personal parts out of parameters and a model's state, and repeats them for clients."""
    if not isinstance(loss, PersonalLoss):
        return params, model_state, None
    names = chosen(loss, params, model_state)
    (params, own), (model_state, statistics) = map(take, (params, model_state), names)
    start = Parts(own, statistics)
    rows = PerClient(repeated(start, loss.num_clients))
    return params, model_state, PersonalParts(start, rows)


def with_parts(loss: Any, model_state: PyTree, parts: Parts | None) -> PyTree:
    """What an algorithm gets as the model's state on a client at the start of a round."""
    if not isinstance(loss, PersonalLoss):
        return model_state
    assert parts is not None
    return Seen(model_state, parts, loss.optimizer.init(parts.params))


def without_parts(loss: Any, seen: PyTree) -> tuple[PyTree, Parts | None]:
    """The inverse of `with_parts`, at the end of a round."""
    if not isinstance(loss, PersonalLoss):
        return seen, None
    return check_seen(seen).model_state, seen.parts


def check_seen(model_state: PyTree) -> Seen:
    """Checks that an algorithm passes on the model's state that its client function gets."""
    if not isinstance(model_state, Seen):
        raise ValueError(
            f"{WHERE}: model_state is {_arguments.shown(model_state)}, expected the "
            "server.model_state that a client function of fax.algorithms.federated gets, or the "
            "model_state that local_steps returns. They contain the client's personal parts."
        )
    return model_state


def bare(loss: Any) -> Any:
    """The loss without its personal parts."""
    return loss.loss if isinstance(loss, PersonalLoss) else loss


def take(tree: PyTree, names: Collection[str]) -> tuple[PyTree, Leaves]:
    """Replaces leaves by None, and returns the tree and these leaves by their paths."""
    taken: Leaves = {}

    def one(path: Any, leaf: jax.Array) -> jax.Array | None:
        name = name_of(path)
        if name not in names:
            return leaf
        taken[name] = leaf
        return None

    return tree_map_with_path(one, tree), taken


def put(tree: PyTree, leaves: Leaves) -> PyTree:
    """The inverse of `take`."""

    def one(path: Any, leaf: Any) -> Any:
        return leaves.get(name_of(path)) if leaf is None else leaf

    return tree_map_with_path(one, tree, is_leaf=lambda x: x is None)


def everyones(tree: PyTree, rows: Parts) -> PyTree:
    """Repeats what all clients share, once for each of the clients that have ``rows``."""
    return repeated(tree, len(jax.tree.leaves(rows)[0]))


def chosen(loss: PersonalLoss, params: PyTree, model_state: PyTree) -> list[list[str]]:
    """The paths of personal leaves, in the parameters and in the model's state."""
    every = [
        [name_of(path) for path, _ in tree_flatten_with_path(x)[0]] for x in (params, model_state)
    ]
    known = f"params has {', '.join(every[0])}"
    known += f", and model_state {', '.join(every[1])}." if every[1] else "."
    for names in every:
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{WHERE}: two leaves have the path {twice!r}. Use names without '/'.")
    if loss.parts is None:
        layers = {name.rpartition("/")[0] for name in every[1]}
        found = [[name for name in every[0] if name.rpartition("/")[0] in layers], every[1]]
    elif callable(loss.parts):
        found = [
            [name for name in names if _arguments.flag(WHERE, f"parts({name!r})", loss.parts(name))]
            for names in every
        ]
    else:
        found = [[], []]
        for part in [loss.parts] if isinstance(loss.parts, str) else loss.parts:
            own = [[name for name in names if _is_in(name, part)] for names in every]
            if not any(own):  # names can have brackets, so what is a path is no pattern
                own = [[name for name in names if _matches(name, part)] for names in every]
            if not any(own):
                raise ValueError(f"{WHERE}: parts has {part!r}, which matches nothing: {known}")
            found = [[*old, *new] for old, new in zip(found, own)]
    if not any(found):
        raise ValueError(f"{WHERE}: parts is {loss.parts!r:.80}, which matches nothing: {known}")
    if set(found[0]) == set(every[0]):
        raise ValueError(
            f"{WHERE}: parts is {loss.parts!r:.80}, which matches all parameters, so nothing is "
            f"left to average: {known}"
        )
    return found


def _is_in(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}/")


def _matches(name: str, part: str) -> bool:
    return fnmatchcase(name, part) or fnmatchcase(name, f"{part}/*")
