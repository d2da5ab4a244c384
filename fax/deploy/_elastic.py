"""Training on learners that come and go: what the server does when something happens.

A learner is a program on devices of its own, which takes inner steps at its own pace. The server
has the outer parameters, and an outer optimizer for each fragment of them. What they do together is
Streaming DiLoCo, or DiLoCo with a single fragment, as long as all learners keep up:

- A learner sends its update of a fragment, which is how its parameters differ from the outer ones
  that it last received. It continues, and τ steps later it needs the new outer parameters of the
  fragment, and waits for them if they are not there.
- The server merges the updates of one fragment after the other, in the same order for all. The mean
  is weighted by the tokens behind each update, and the outer optimizer gets it as its gradient.

Merges do not wait for everybody:

- As soon as the updates of a quorum of learners are there, the others are called: they send what
  they have after their current step, so with fewer tokens. This opens a grace window. The merge
  takes place when all have answered, or when the window ends.
- A learner that does not answer within the window is not waited for again until it sends something.
  Its update is late. If the next merge of the same fragment has not taken place, it counts there,
  and the learner continues at once from the outer parameters as they are. Otherwise the update is
  discarded, and the learner starts again from all outer parameters.
- A learner that leaves is not waited for. What it had sent still counts. One that joins gets all
  outer parameters and starts with the next merge.
- With fewer learners than the quorum, merges wait until others join.

`Elastic` has no clock and no connections. It is told what happened, and returns what to do: whom to
send what, and when a grace window opens. So it behaves the same in every run with the same events.
`fax.deploy.Learners` tells it what happens in processes. A repeated event changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fax import _arguments, _functions
from fax.algorithms._averaging import strong
from fax.algorithms._checks import check_trained
from fax.algorithms._fragments import cut, paste, pick
from fax.algorithms._layers import Piece
from fax.deploy import _merges, _updates
from fax.deploy._backend import ClientError
from fax.deploy._updates import Merge, Update

PyTree = Any
_WHERE = "fax.deploy.Elastic"


class ElasticState(NamedTuple):
    """The state of `Elastic`. A checkpoint needs all of it.

    Attributes:
      params: the outer parameters.
      optimizers: for each fragment, the state of the outer optimizer.
      merges: how many merges there were, an int.
    """

    params: PyTree
    optimizers: tuple[PyTree, ...]
    merges: int


class Send(NamedTuple):
    """An action of `Elastic`: send a message to some learners, for `Learner.receive`.

    Attributes:
      to: the learners.
      message: made of numbers, strings, lists and arrays.
    """

    to: tuple[Hashable, ...]
    message: dict[str, Any]


class Grace(NamedTuple):
    """An action of `Elastic`: a grace window opens. Call `Elastic.grace_over` when it ends.

    Attributes:
      number: of the merge.
    """

    number: int


Action = Send | Grace | Merge


class Elastic:
    """The server of DiLoCo, or Streaming DiLoCo, for learners that come and go.

    Learners take steps at their own pace, each as a program on its own devices. Their updates of
    fragment p are merged as soon as a quorum of them is there, and a grace window has passed for
    the others. With updates u_i of the learners i that are there, made from c_i tokens,

        Δ_p = - sum_i c_i u_i / sum_i c_i        θ_p' = outer_optimizer(θ_p, gradient = Δ_p)

    A merge without any tokens changes nothing. As long as all learners are there and as fast as
    each other, these are the outer steps of `fax.algorithms.diloco`, or with several fragments of
    `fax.algorithms.streaming_diloco`, up to rounding. Only, with τ = ceil(H / P), nothing is sent
    before the first step. Updates are sent in the dtype of the parameters, without an aggregator.

    `Learners` runs it with learners in processes. With other connections, call `joined`,
    `received`, `left` and `grace_over` when that happens. They return a list of actions: messages
    to `Send`, a `Grace` window that opens, and each `Merge` that took place.

    Args:
      params: the initial outer parameters, a pytree of real floats.
      outer_optimizer: from optax, with a state for each fragment; its schedules count the outer
        steps of the fragment. Default: ``optax.sgd(0.7, momentum=0.9, nesterov=True)``.
      steps: H, the inner steps between two updates of the same fragment.
      fragments: their number, or which they are; see `fax.algorithms.streaming_diloco`.
      tau: τ, the steps that a learner takes between sending an update and needing the result, less
        than ``steps``.
      alpha: α, the share of its own parameters that a learner keeps when it receives a result, from
        0 to 1.
      quorum: the number of learners whose updates a merge needs.

    Attributes:
      settings: what `Learner.prepare` needs, a message.
      discarded: how many updates were too late to count.

    Raises:
      ValueError: if an argument is out of range, or the fragments do not fit the parameters.

    References:
      Douillard et al., Decoupled DiLoCo for resilient distributed pre-training, arXiv:2604.21428,
      where quorums, grace windows and the weighting by tokens come from. Calls, and what happens to
      late updates, may differ from there.

    Example:

      >>> import optax
      >>> server = fax.deploy.Elastic(jnp.zeros(2), optax.sgd(1.0), steps=10)
      >>> for learner in "ann", "bob":
      ...     _ = server.joined(learner)
      >>> for learner, tokens in [("ann", 30), ("bob", 10)]:
      ...     update = {"number": 0, "values": [jnp.ones(2) * tokens], "tokens": tokens}
      ...     actions = server.received(learner, update)
      >>> print(server.params)  # (30 * 30 + 10 * 10) / (30 + 10)
      [25. 25.]
    """

    def __init__(
        self,
        params: PyTree,
        outer_optimizer: optax.GradientTransformation | None = None,
        *,
        steps: int,
        fragments: int | Callable[[str], int] | Sequence[Sequence[Piece]] = 1,
        tau: int = 0,
        alpha: float = 0.0,
        quorum: int = 1,
    ):
        if outer_optimizer is None:
            outer_optimizer = optax.sgd(0.7, momentum=0.9, nesterov=True)
        _functions.optimizer(_WHERE, "outer_optimizer", outer_optimizer)
        check_trained(f"{_WHERE}: params", params)
        _arguments.floats(f"{_WHERE}: params", params)
        steps = _arguments.count(_WHERE, "steps", steps)
        expected = f"an int from 0 to {steps - 1}, below steps={steps}"
        tau = _arguments.count(_WHERE, "tau", tau, least=0, most=steps - 1, expected=expected)
        _arguments.number(_WHERE, "alpha", alpha, least=0, most=1)
        self._quorum = _arguments.count(_WHERE, "quorum", quorum)
        params = jax.tree.map(strong, params)
        self._fragments = cut(_WHERE, fragments, params)
        parts = [pick(params, part) for part in self._fragments]
        self._sequence = _merges.Sequence(steps, len(parts), tau)
        self.settings: dict[str, Any] = {
            "steps": steps,
            "tau": tau,
            "alpha": float(alpha),
            "quorum": self._quorum,
            "fragments": [_merges.described(part) for part in self._fragments],
            "types": [_merges.types(part) for part in parts],
        }
        optimizers = tuple(jax.tree.map(strong, outer_optimizer.init(part)) for part in parts)
        self._state = ElasticState(params, optimizers, 0)
        self._step = jax.jit(_outer_step(outer_optimizer))
        self.discarded: int = 0
        self._present: set[Hashable] = set()
        self._away: set[Hashable] = set()  # did not answer a call
        self._last: dict[Hashable, int] = {}  # the merge of the last update of each learner
        self._updates: dict[int, list[Update]] = defaultdict(list)  # for each merge
        self._window = "closed"

    @property
    def params(self) -> PyTree:
        """The outer parameters, the model to evaluate."""
        return self._state.params

    @property
    def state(self) -> ElasticState:
        """What a checkpoint needs. Set it before learners join to continue from one."""
        return self._state

    @state.setter
    def state(self, state: ElasticState) -> None:
        new, old = (jax.tree.map(_type, x[:2]) for x in (state, self._state))
        if new != old or self._present:
            raise ValueError(
                f"{_WHERE}: state is not that of a server with the same parameters, fragments and "
                "outer optimizer, or learners have already joined. Set it first."
            )
        self._state = ElasticState(*state[:2], int(state.merges))
        self._updates.clear()  # of learners that have left, and for other parameters

    @property
    def learners(self) -> frozenset[Hashable]:
        """The learners that have joined and not left."""
        return frozenset(self._present)

    # Events

    def joined(self, learner: Hashable) -> list[Action]:
        """A learner has joined."""
        self._present.add(learner)
        self._last.setdefault(learner, self._state.merges - 1)
        actions: list[Action] = [Send((learner,), self._welcome())]
        if self._window == "open":
            actions.append(self._call([learner]))
        return actions

    def left(self, learner: Hashable) -> list[Action]:
        """A learner has left, or has died."""
        self._present.discard(learner)
        self._away.discard(learner)
        self._last.pop(learner, None)
        return self._merge_if_due()

    def received(self, learner: Hashable, update: dict[str, Any]) -> list[Action]:
        """A learner has sent an update.

        Args:
          learner: which one.
          update: ``number``, that of the merge; ``values``, how the learner's parts of the leaves
            of the fragment differ from the outer ones, in the order of their paths; ``tokens``, how
            many it used for that; and optionally ``steps``, ``seconds`` and ``loss``, a sum and the
            number of its terms.

        Raises:
          ClientError: if the update is not one of that fragment.
        """
        if learner not in self._present:
            return []
        merges, number = self._state.merges, update.get("number")
        most = merges + len(self._sequence)
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < most:
            text = f"an update for merge {number!r:.80}, but {merges} is the next one."
            raise ClientError(f"Learner {learner!r} sent {text}", [learner])
        expected = self.settings["types"][self._sequence.fragment(number)]
        own = _updates.checked(learner, update, expected)
        self._away.discard(learner)
        if number <= self._last[learner]:  # it was sent twice
            return [] if number >= merges else [self._answer([learner], number)]
        self._last[learner] = number
        if number >= merges:
            self._updates[number].append(own)
            return self._merge_if_due()
        later = number + len(self._sequence)
        if later < merges:
            self.discarded += 1
            return [Send((learner,), self._welcome())]
        self._updates[later].append(own)
        actions: list[Action] = [self._answer([learner], number)]
        if self._window == "open":
            actions.append(self._call([learner]))
        return actions

    def grace_over(self, number: int) -> list[Action]:
        """The grace window of a merge has ended."""
        if number == self._state.merges and self._window == "open":
            self._window = "over"
            self._away |= self._missing()
        return self._merge_if_due()

    # What follows from them

    def _arrived(self) -> set[Hashable]:
        """The learners whose updates for the next merge are there in time."""
        number = self._state.merges
        return {own.learner for own in self._updates[number] if own.number == number}

    def _missing(self) -> set[Hashable]:
        """The learners that the next merge waits for."""
        return self._present - self._arrived() - self._away

    def _merge_if_due(self) -> list[Action]:
        actions: list[Action] = []
        while len(self._arrived()) >= self._quorum:
            if self._window != "over" and (missing := self._missing()):
                if self._window == "closed":
                    self._window = "open"
                    actions += [self._call(missing), Grace(self._state.merges)]
                break
            actions += self._merge()
        return actions

    def _merge(self) -> list[Action]:
        number, p = self._state.merges, self._sequence.fragment(self._state.merges)
        arrived = self._arrived() & self._present
        updates = self._updates.pop(number)
        part, (params, optimizers, _) = self._fragments[p], self._state
        if any(own.tokens for own in updates):
            mean = dict(zip(part, _updates.weighted_mean(updates), strict=True))
            new, own = self._step(mean, optimizers[p], pick(params, part))
            params = paste(params, part, new)
            optimizers = (*optimizers[:p], own, *optimizers[p + 1 :])
        self._state = ElasticState(params, optimizers, number + 1)
        self._window = "closed"
        return [self._answer(arrived, number), _updates.record(number, p, updates)]

    # Messages

    def _values(self, p: int) -> list[np.ndarray]:
        return [np.asarray(x) for x in pick(self._state.params, self._fragments[p]).values()]

    def _answer(self, learners: Any, number: int) -> Send:
        """The outer parameters of the fragment, to those who sent an update for a merge."""
        message = {"number": number, "values": self._values(self._sequence.fragment(number))}
        return _send(learners, {"do": "land", **message, "next": self._state.merges})

    def _call(self, learners: Any) -> Send:
        return _send(learners, {"do": "call", "number": self._state.merges})

    def _welcome(self) -> dict[str, Any]:
        merges = self._state.merges
        values = [self._values(p) for p in range(len(self._fragments))]
        step = self._sequence.step(merges - 1)
        return {"do": "welcome", "values": values, "next": merges, "step": step}


def _outer_step(optimizer: optax.GradientTransformation) -> Callable:
    def step(mean: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        moves, state = optimizer.update(optax.tree.scale(-1, mean), state, params)
        return optax.apply_updates(params, moves), state

    return step


def _send(learners: Any, message: dict[str, Any]) -> Send:
    return Send(tuple(sorted(learners, key=str)), message)


def _type(x: Any) -> Any:
    return jnp.shape(x), jnp.result_type(x)
