"""A learner: inner steps on devices of its own, and an exchange of fragments with the server.

Like `fax.deploy.Elastic`, a learner has no connections. It gets messages and returns messages:

    settings ->                         prepare: everything is compiled
    welcome ->                          it starts from all outer parameters
    advance -> updates to be sent       one inner step
    land ->                             the outer parameters of a fragment that it has sent
    call ->                             it should send the update for a merge after its next step

While `waiting`, it cannot advance until it gets another message.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import tree_flatten_with_path

import fax
from fax import _arguments, _functions
from fax.algorithms._checks import arguments, check_cohort
from fax.algorithms._crossing import check_specs, specs_of
from fax.algorithms._fragments import pick
from fax.algorithms._layers import name_of
from fax.data import Cohort
from fax.deploy import _learner_steps, _merges

PyTree = Any
_WHERE = "fax.deploy.Learner"


class _Work:
    """What was done since a fragment was last sent."""

    def __init__(self) -> None:
        self.tokens = self.steps = 0
        self.seconds = 0.0


class Learner:
    """A learner of `Elastic`: inner steps on a mesh of its own.

    A learner function, which `Learners` calls in each process, returns one. It can first choose
    devices, with environment variables or `fax.sharding.use_cpu_devices`, and set a mesh of them,
    with `jax.set_mesh`. The steps are those of a replica of `fax.algorithms.diloco` on this mesh,
    whose axes are all for this learner. It has to be in one process.

    The optimizer's state stays with the learner. If it starts again, the optimizer does, too, but
    schedules of its learning rate (`optax.scale_by_schedule`) continue after the inner steps that a
    learner takes in all merges so far.

    Args:
      loss: see `fax.algorithms.fedavg`. The model may not have a state.
      inner_optimizer: from optax.
      data: ``data(step)`` returns an iterator over cohorts of one client, from which the inner
        steps after ``step`` take their batches, one each. It may be an endless stream, such as
        ``fax.data.cohorts(own, 1, batch_size, sampler="stream", max_steps=steps,
        placement="replicas", start=step // steps)``. If it ends, it is made again.
      params: a pytree like the parameters, of arrays or of `jax.ShapeDtypeStruct`.
      sharding: a pytree like the parameters of `jax.sharding.PartitionSpec`, which says how they
        are sharded over the mesh in scope. Default: they are the same on all devices.
      tokens: how many tokens an example has. Only ratios between learners matter.

    Raises:
      ValueError: if an argument is of the wrong kind; when it is prepared, if the server has other
        parameters, or a cohort has more than one client.

    Example::

      def learner(number):
          jax.set_mesh(fax.sharding.make_mesh(data=2, model=4))
          return fax.deploy.Learner(loss, optax.adamw(3e-4), batches_of(number), shapes)
    """

    def __init__(
        self,
        loss: Callable,
        inner_optimizer: optax.GradientTransformation,
        data: Callable[[int], Iterator[Cohort]],
        params: PyTree,
        *,
        sharding: PyTree = None,
        tokens: int = 1,
    ):
        arguments(_WHERE, loss, inner_optimizer=inner_optimizer)
        _functions.function(_WHERE, "data", data, {1: "data(step)"})
        self._per_example = _arguments.count(_WHERE, "tokens", tokens)
        self._specs = specs_of(_WHERE, sharding)
        self._params = jax.eval_shape(lambda params: params, params)
        check_specs(_WHERE, self._specs, self._params)
        self._optimizer = inner_optimizer
        self._data = data
        self._loss = loss
        self._compiled: dict[str, Any] | None = None  # for which settings
        self._started = False
        self._called = -1  # for which merge it should send an update soon

    # Messages

    def prepare(self, settings: dict[str, Any]) -> None:
        """Compiles everything, so that a learner that has joined is not slow at first."""
        self._parts = [_merges.fragment_of(part) for part in settings["fragments"]]
        self._tau = settings["tau"]
        self._sequence = _merges.Sequence(settings["steps"], len(self._parts), self._tau)
        compiled = {name: settings[name] for name in ("fragments", "types", "alpha")}
        if compiled != self._compiled:
            self._compile(settings["types"], settings["alpha"])
            self._compiled = compiled
        self._rows = self._outer = None
        self._started = False

    def receive(self, message: dict[str, Any]) -> None:
        """Takes note of a message of the server."""
        if message["do"] == "welcome":
            self._start(message["values"], message["next"], message["step"])
        elif message["do"] == "land":
            self._answers[message["number"]] = message["values"]
            self._skip_to(message["next"])
        else:
            self._skip_to(message["number"])
            self._called = max(self._called, message["number"])

    @property
    def waiting(self) -> bool:
        """Whether it cannot advance before it gets a message."""
        return not self._started or any(
            land_at <= self._steps and number not in self._answers
            for number, land_at in self._in_flight.items()
        )

    def advance(self) -> list[dict[str, Any]]:
        """Takes a step, and returns the updates to be sent then."""
        for number, land_at in [*self._in_flight.items()]:
            if land_at <= self._steps:
                self._receive_fragment(number)
        began = time.perf_counter()
        tokens, loss = self._train()
        self._steps += 1
        if self._wants_to_send:
            jax.block_until_ready(loss)
        seconds = time.perf_counter() - began
        self._losses.append(loss)
        for work in self._work:
            work.tokens += tokens
            work.steps += 1
            work.seconds += seconds
        sent = []
        while self._wants_to_send:
            if not self._can_send(self._sequence.fragment(self._next)):
                break
            sent.append(self._send())
        return sent

    # What they mean

    def _compile(self, types: list[list[list[Any]]], alpha: float) -> None:
        self._check_types(types)
        self._computations = _learner_steps.compile(
            self._loss, self._optimizer, self._params, self._specs, self._parts, alpha
        )
        zeros = [[np.zeros(shape, jnp.dtype(dtype)) for _, dtype, shape in part] for part in types]
        self._start(zeros, next_merge=0, step=0)
        self._train()
        for p, values in enumerate(zeros):
            self._update(p)
            self._land(p, values)

    def _start(self, values: list[list[np.ndarray]], next_merge: int, step: int) -> None:
        self._outer, self._rows = self._computations.begin(values, step)
        self._work = [_Work() for _ in self._parts]
        self._losses: list[Any] = []
        self._in_flight: dict[int, int] = {}  # the merge, and when its result lands
        self._answers: dict[int, Any] = {}
        self._steps = 0  # since this start
        self._next, self._called = next_merge, -1
        self._due = self._sequence.gap(next_merge)
        self._stream = self._batches(step)
        self._previous: Any = None
        self._started = True

    def _skip_to(self, number: int) -> None:
        """The merges before have taken place, or others wait for this one."""
        if number > self._next:
            self._next = number
            self._due = self._steps + self._sequence.gap(number)

    @property
    def _wants_to_send(self) -> bool:
        return self._steps >= self._due or self._called >= self._next

    def _can_send(self, p: int) -> bool:
        """Whether a fragment is not in flight any more. A result that is there lands early."""
        for number in [n for n in self._in_flight if self._sequence.fragment(n) == p]:
            if number not in self._answers:
                return False
            self._receive_fragment(number)
        return self._work[p].steps > 0

    def _send(self) -> dict[str, Any]:
        number, p = self._next, self._sequence.fragment(self._next)
        work, self._work[p] = self._work[p], _Work()
        values = [np.asarray(x) for x in self._update(p)]
        losses, self._losses = np.sum(np.asarray(self._losses, np.float64), 0), []
        self._in_flight[number] = self._steps + self._tau
        self._next += 1
        self._due = self._steps + self._sequence.gap(self._next)
        return {
            "number": number,
            "values": values,
            "tokens": work.tokens,
            "steps": work.steps,
            "seconds": work.seconds,
            "loss": [*map(float, losses)] if np.ndim(losses) else [0.0, 0.0],
        }

    def _receive_fragment(self, number: int) -> None:
        del self._in_flight[number]
        self._land(self._sequence.fragment(number), self._answers.pop(number))

    # Steps

    def _train(self) -> tuple[int, jax.Array]:
        """Takes a step; the tokens in it, and the sum of losses with the number of examples."""
        cohort, number, examples = next(self._stream)
        # Only one step ahead of the devices, so that calls are answered soon.
        jax.block_until_ready(self._previous)
        with fax.sharding.layout(replicas=()):  # all axes of the mesh are for this learner
            self._rows, loss = self._computations.train(self._rows, cohort, np.int32(number))
        self._previous = loss
        return examples * self._per_example, loss

    def _update(self, p: int) -> list[jax.Array]:
        return self._computations.update(p, self._rows, self._outer)

    def _land(self, p: int, values: list[Any]) -> None:
        self._outer, self._rows = self._computations.land(p, self._rows, self._outer, values)

    def _batches(self, step: int) -> Iterator[tuple[Cohort, int, int]]:
        """Cohorts, the steps in them, and how many examples each has."""
        while True:
            found = False
            for cohort in self._data(step):
                check_cohort(_WHERE, cohort)
                if cohort.size != 1:
                    raise ValueError(
                        f"{_WHERE}: data returned a cohort of {cohort.size} clients, expected one."
                    )
                for number, mask in enumerate(np.asarray(cohort.mask)[0]):
                    yield cohort, number, int(mask.sum())
                    found = True
                    step += 1
            if not found:
                raise ValueError(f"{_WHERE}: data({step}) has no batches.")

    def _check_types(self, expected: list[list[list[Any]]]) -> None:
        """Checks that the server has the same parameters."""
        leaves = tree_flatten_with_path(self._params)[0]
        names = {name_of(path) for path, _ in leaves}
        covered = {name for part in self._parts for name in part}
        for name in sorted(names ^ covered):
            who = "the learner" if name in names else "the server"
            raise ValueError(f"{_WHERE}: only {who} has params with a leaf {name!r}.")
        for part, own in zip(self._parts, expected, strict=True):
            found = jax.eval_shape(functools.partial(pick, fragment=part), self._params)
            others = {name: other for name, *other in own}
            for name, *mine in _merges.types(found):
                if mine != others[name]:
                    raise ValueError(
                        f"{_WHERE}: params has {mine[0]}{mine[1]} for {name!r} in a fragment where "
                        f"the server has {others[name][0]}{others[name][1]}."
                    )
