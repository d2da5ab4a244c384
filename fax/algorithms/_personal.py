"""Parameters and statistics that stay with each client, in any algorithm that averages the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_flatten_with_path, tree_map_with_path

from fax import _arguments
from fax.aggregators import PerClient
from fax.algorithms._fragments import name_of

PyTree = Any
Leaves = dict[str, jax.Array]
WHERE = "fax.algorithms.personal_parts"


class Parts(NamedTuple):
    """Leaves that stay with a client, by their paths, such as ``"head/kernel"``.

    Attributes:
      params: of the parameters.
      model_state: of what the model has besides parameters.
    """

    params: Leaves
    model_state: Leaves


class PersonalParts(NamedTuple):
    """What stays with clients.

    Attributes:
      start: the `Parts` of a client that has not taken part yet.
      clients: those of all clients, leaves [num_clients, ...].
    """

    start: Parts
    clients: PerClient


class Seen(NamedTuple):
    """A model's state on a client, with its personal parts, which are trained along the way.

    Attributes:
      model_state: what is everyone's.
      parts: the client's own.
      optimizer: the state of their optimizer.
    """

    model_state: PyTree
    parts: Parts
    optimizer: PyTree

    def after(self, model_state: PyTree) -> Seen:
        """With the next state of the whole model."""
        rest, own = take(model_state, self.parts.model_state)
        return self._replace(model_state=rest, parts=self.parts._replace(model_state=own))

    def with_params(self, params: Leaves) -> Seen:
        """With other personal parameters."""
        return self._replace(parts=self.parts._replace(params=params))

    def step(self, optimizer: optax.GradientTransformation, gradient: Leaves) -> Seen:
        """After a step of the optimizer of personal parameters."""
        before = self.parts.params
        moves, state = optimizer.update(gradient, self.optimizer, before)
        return self.with_params(optax.apply_updates(before, moves))._replace(optimizer=state)


@dataclasses.dataclass(frozen=True)
class PersonalLoss:
    """A loss, and which parts of its model are personal; see `personal_parts`."""

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
    """A loss some of whose parameters and statistics stay with each client.

    To be passed to any algorithm that averages what its clients make of one model, such as `fedavg`
    or `scaffold`. The algorithm then sees the other parameters u alone: it sends, corrects,
    aggregates and averages these. With each of its gradients a client i also takes a step of
    ``optimizer`` for its own v_i, on the same batch and from where both were:

        with the gradients of f_i(u, v_i) by both:
        u <- the algorithm's step        v_i <- optimizer's step

    and keeps v_i for the next time that it takes part. Statistics, in the model's state, stay as
    the client's last batch left them. This is federated learning with partial model
    personalization, by simultaneous steps (FedSim). `fedper` and `fedbn` are recipes of it.

    Args:
      loss: see `fedavg`.
      parts: which leaves of the parameters and of the model's state are a client's own: their path,
        such as ``"head/kernel"``, that of a folder of them, such as ``"head"``, a pattern, such as
        ``"*/norm_?"``, where ``*`` is any text and ``?`` any letter, or several of these. Or a
        function from a path to whether it is. None: the layers that have statistics, which are the
        model's state and parameters in the same folder, such as ``"norm/scale"`` with
        ``"norm/mean"``.
      optimizer: from optax, of the v_i; its state starts anew in each round.
      num_clients: how many clients the data have, ``len(data)``.

    Returns:
      The loss. In an algorithm's state ``params`` and ``model_state`` have None in place of what is
      personal, which is in ``personal``, a `PersonalParts`. ``params(state)`` is whole, with the
      personal parts of a client that has not taken part yet, and ``models(state)`` are the clients'
      models, leaves [num_clients, ...], to be evaluated by `fax.metrics.evaluate_clients` with
      ``personal=True``; `personal_state` has their statistics. What is personal is neither sent nor
      seen by an aggregator. What a private one promises is about everything else.

    Raises:
      ValueError: if an argument is something else; in ``init``, if ``parts`` has something that
        there is not, chooses nothing, or leaves no parameter to be averaged.

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
    _arguments.function(WHERE, "loss", loss, forms, keywords=["mask"])
    _arguments.optimizer(WHERE, "optimizer", optimizer)
    if callable(parts):
        _arguments.function(WHERE, "parts", parts, {1: "parts(path)"})
    elif parts is not None:
        for part in [parts] if isinstance(parts, str) else parts:
            _arguments.text(WHERE, "parts", part, "the path of a leaf or a pattern")
    num_clients = _arguments.count(WHERE, "num_clients", num_clients)
    return PersonalLoss(loss, parts, optimizer, num_clients)


def personal_state(state: Any) -> PyTree:
    """The model's state of each client, leaves [num_clients, ...]; see `personal_parts`.

    Args:
      state: of an algorithm whose loss has personal parts.
    """
    if getattr(state, "personal", None) is None:
        raise ValueError(
            f"fax.algorithms.personal_state: state is {_arguments.shown(state)}, expected that of "
            "an algorithm whose loss has personal parts."
        )
    rows = state.personal.clients.rows
    return put(everyones(state.model_state, rows), rows.model_state)


def split(
    loss: Any, params: PyTree, model_state: PyTree
) -> tuple[PyTree, PyTree, PersonalParts | None]:
    """Parameters and a model's state without what is personal, and that, for all clients."""
    if not isinstance(loss, PersonalLoss):
        return params, model_state, None
    names = chosen(loss, params, model_state)
    (params, own), (model_state, statistics) = map(take, (params, model_state), names)
    start = Parts(own, statistics)
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (loss.num_clients, *x.shape)), start)
    return params, model_state, PersonalParts(start, PerClient(rows))


def opened(loss: Any, model_state: PyTree, parts: Parts | None) -> PyTree:
    """A model's state as algorithms see it on a client, at the start of a round."""
    if not isinstance(loss, PersonalLoss):
        return model_state
    assert parts is not None
    return Seen(model_state, parts, loss.optimizer.init(parts.params))


def closed(loss: Any, seen: PyTree) -> tuple[PyTree, Parts | None]:
    """The inverse of `opened`, at the end of a round."""
    if not isinstance(loss, PersonalLoss):
        return seen, None
    return check_seen(seen).model_state, seen.parts


def check_seen(model_state: PyTree) -> Seen:
    """Checks that an algorithm hands on the model's state that its clients were given."""
    if not isinstance(model_state, Seen):
        raise ValueError(
            f"{WHERE}: model_state is {_arguments.shown(model_state)}, expected the "
            "server.model_state that a client function of fax.algorithms.federated gets, or what "
            "local_steps made of it. Personal parts are in there."
        )
    return model_state


def bare(loss: Any) -> Any:
    """The user's function."""
    return loss.loss if isinstance(loss, PersonalLoss) else loss


def take(tree: PyTree, names: Collection[str]) -> tuple[PyTree, Leaves]:
    """A tree with None in place of some leaves, and these by their paths."""
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
    """A tree of the server's with a row for each of the clients that have ``rows``."""
    clients = len(jax.tree.leaves(rows)[0])
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (clients, *x.shape)), tree)


def chosen(loss: PersonalLoss, params: PyTree, model_state: PyTree) -> list[list[str]]:
    """The paths of what is personal in the parameters, and in the model's state."""
    every = [
        [name_of(path) for path, _ in tree_flatten_with_path(x)[0]] for x in (params, model_state)
    ]
    known = f"params has {', '.join(every[0])}"
    known += f", and model_state {', '.join(every[1])}." if every[1] else "."
    for names in every:
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(
                f"{WHERE}: two leaves have the path {twice!r}. Leave '/' out of names."
            )
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
            own = [[name for name in names if _matches(name, part)] for names in every]
            if not any(own):
                raise ValueError(f"{WHERE}: parts has {part!r}, but {known}")
            found = [[*old, *new] for old, new in zip(found, own)]
    if not any(found):
        raise ValueError(
            f"{WHERE}: parts is {loss.parts!r:.80}, which chooses nothing to be personal: {known}"
        )
    if set(found[0]) == set(every[0]):
        raise ValueError(
            f"{WHERE}: parts is {loss.parts!r:.80}, which leaves no parameter to be averaged: "
            f"{known}"
        )
    return found


def _matches(name: str, part: str) -> bool:
    return fnmatchcase(name, part) or fnmatchcase(name, f"{part}/*")
