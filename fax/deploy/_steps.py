"""The steps of a plan, and how each of them runs.

OnServer    computes with the server's values
OnClients   has every client run a stage; what it makes stays there, or the server combines it
Take, Set   rename rows by numbers that the server knows: no row moves
Send        gives each client its row of a server's value
Pull        fetches the rows of clients, if the plan may
Branch, While, Scan    choose or repeat other steps, on the server
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.extend.core import JaxprEqn

from fax.deploy._stages import Stage
from fax.deploy._values import Held, Row, Value

Clients = tuple[Hashable, ...]


class Runner(Protocol):
    """What steps need while they run."""

    def on_clients(
        self, stage: Stage, size: int, operands: Sequence[Any], axes: Sequence[int | None]
    ) -> tuple[Clients, list[Any]]:
        """Runs a stage. Returns the clients, and rows for placed results, totals for the others."""

    def send(self, rows: Sequence[Any], like: Held | None) -> tuple[Clients, list[Row | None]]:
        """Gives each client its row, those clients that hold ``like`` if it is not None."""

    def fetch(self, held: Held) -> list[np.ndarray]:
        """The rows."""


@dataclasses.dataclass(eq=False)
class Step:
    """A step. The runner passes it the values of ``operands``; it returns those of ``results``."""

    operands: tuple[Value, ...]
    results: tuple[Value, ...]

    def run(self, runner: Runner, operands: list[Any]) -> Sequence[Any]:
        raise NotImplementedError

    def stages(self) -> Iterator[Stage]:
        """What clients run."""
        return iter(())


@dataclasses.dataclass(eq=False)
class Block:
    """Steps that run one after another.

    Attributes:
      inputs: the values that they are given.
      steps: the steps.
      outputs: the values that they return.
      constants: the values that are known.
    """

    inputs: list[Value]
    steps: list[Step]
    outputs: list[Value]
    constants: dict[Value, Any]

    def stages(self) -> Iterator[Stage]:
        """What clients run, in the order of the steps."""
        for step in self.steps:
            yield from step.stages()

    @functools.cached_property
    def _last(self) -> list[list[Value]]:
        """The values that no step needs after this one, by step."""
        needed = set(self.outputs) | set(self.constants)
        dead: list[list[Value]] = []
        for step in reversed(self.steps):
            over = {*step.operands, *step.results} - needed
            needed |= over
            dead.append(list(over))
        return dead[::-1]

    def run(self, runner: Runner, operands: Iterable[Any]) -> list[Any]:
        env = dict(self.constants)
        env.update(zip(self.inputs, operands, strict=True))
        for step, over in zip(self.steps, self._last, strict=True):
            found = step.run(runner, [env[value] for value in step.operands])
            env.update(zip(step.results, found, strict=True))
            for value in over:  # what clients hold is freed as soon as nothing refers to it
                env.pop(value, None)
        return [env[value] for value in self.outputs]


@dataclasses.dataclass(eq=False)
class Equation:
    """A part of what the server computes.

    Attributes:
      fn: takes a list of operands, and returns the results.
      eqn: the equation of the program.
    """

    fn: Callable[[list[Any]], Sequence[Any]]
    operands: tuple[Value, ...]
    results: tuple[Value, ...]
    eqn: JaxprEqn


@dataclasses.dataclass(eq=False)
class OnServer(Step):
    equations: list[Equation]

    @functools.cached_property
    def _compiled(self) -> Callable[..., list[Any]]:
        def fn(*operands):
            env = dict(zip(self.operands, operands, strict=True))
            for part in self.equations:
                found = part.fn([env[value] for value in part.operands])
                env.update(zip(part.results, found, strict=True))
            return [env[value] for value in self.results]

        return jax.jit(fn)

    def run(self, runner, operands):
        return self._compiled(*operands)


@dataclasses.dataclass(eq=False)
class OnClients(Step):
    """``axes`` are those of the rows of operands, None for what all clients get."""

    stage: Stage
    placement: str
    size: int
    axes: tuple[int | None, ...]

    def stages(self):
        yield self.stage

    def run(self, runner, operands):
        clients, found = runner.on_clients(self.stage, self.size, operands, self.axes)
        return [
            _held(clients, rows, value) if value.held else jnp.asarray(rows, value.aval.dtype)
            for rows, value in zip(found, self.results, strict=True)
        ]


def _held(clients: Clients, rows: Iterable[Row | None], value: Value) -> Held:
    assert value.axis is not None
    shape = tuple(None if export.is_symbolic_dim(n) else n for n in value.aval.shape)
    return Held(tuple(rows), clients, shape, value.aval.dtype, value.axis)


@dataclasses.dataclass(eq=False)
class Take(Step):
    """Rows of the first operand by the numbers in the second. ``clips``: into the range of rows."""

    clips: bool

    def run(self, runner, operands):
        held, numbers = operands
        known = len(held.rows)
        chosen = np.asarray(numbers).reshape(-1)
        if self.clips:
            chosen = np.clip(chosen, 0, known - 1)
        wrong = chosen[(chosen < 0) | (chosen >= known)]
        if wrong.size:
            raise IndexError(f"row {wrong[0]} of a value with {known} rows, one for each client")
        (result,) = self.results
        clients = tuple(held.clients[i] for i in chosen)
        return [_held(clients, [held.rows[i] for i in chosen], result)]


@dataclasses.dataclass(eq=False)
class Set(Step):
    """Replaces rows of the first operand; those out of range are dropped.

    The rows of clients that failed stay as they were.
    """

    def run(self, runner, operands):
        held, numbers, others = operands
        rows = list(held.rows)
        chosen = np.asarray(numbers).reshape(-1)
        for number, row, client in zip(chosen, others.rows, others.clients, strict=True):
            if not 0 <= number < len(rows):
                continue
            if client != held.clients[number]:
                raise ValueError(
                    f"Row {number} is with the client {held.clients[number]!r}, and would be "
                    f"replaced by a row of {client!r}. Rows of the same participant have to be "
                    "with the same client; name those of a cohort by Plan.run(clients=)."
                )
            if row is not None:
                rows[number] = row
        return [dataclasses.replace(held, rows=tuple(rows))]


@dataclasses.dataclass(eq=False)
class Send(Step):
    """Gives each client its row of the first operand: those that hold the second, if given."""

    def run(self, runner, operands):
        value, *like = operands
        (result,) = self.results
        assert result.axis is not None
        rows = rows_of(value, result.axis)
        clients, sent = runner.send(rows, like[0] if like else None)
        return [_held(clients, sent, result)]


@dataclasses.dataclass(eq=False)
class Pull(Step):
    """Fetches rows. ``why`` says what needs them."""

    why: str

    def run(self, runner, operands):
        (held,) = operands
        return [jnp.stack(runner.fetch(held), held.axis)]


@dataclasses.dataclass(eq=False)
class Branch(Step):
    """One of several blocks, by the number in the first operand."""

    branches: tuple[Block, ...]

    def stages(self):
        for block in self.branches:
            yield from block.stages()

    def run(self, runner, operands):
        which, *rest = operands
        number = int(np.clip(int(which), 0, len(self.branches) - 1))
        return self.branches[number].run(runner, rest)


@dataclasses.dataclass(eq=False)
class While(Step):
    """A loop. Operands: what the condition reads, what the body reads, and what is carried."""

    condition: Block
    body: Block
    reads: tuple[int, int]

    def stages(self):
        yield from self.condition.stages()
        yield from self.body.stages()

    def run(self, runner, operands):
        one, other = self.reads
        seen, read, carry = operands[:one], operands[one : one + other], operands[one + other :]
        while bool(self.condition.run(runner, [*seen, *carry])[0]):
            carry = self.body.run(runner, [*read, *carry])
        return carry


@dataclasses.dataclass(eq=False)
class Scan(Step):
    """A loop over the leading axis of values. Operands: what is read, carried, and gone through.

    Attributes:
      at: for each value that is gone through, the stage that takes the rows of an iteration, None
        if the server has the value.
      stack: for each stacked result, the stage that stacks rows, None if the server does.
    """

    body: Block
    length: int
    reverse: bool
    reads: int
    carries: int
    at: tuple[OnClients | None, ...]
    stack: tuple[OnClients | None, ...]

    def stages(self):
        for step in (*self.at, *self.stack):
            if step is not None:
                yield step.stage
        yield from self.body.stages()

    def run(self, runner, operands):
        read = operands[: self.reads]
        carry = operands[self.reads : self.reads + self.carries]
        sequences = operands[self.reads + self.carries :]
        made: list[list[Any]] = []
        numbers = range(self.length)
        for number in reversed(numbers) if self.reverse else numbers:
            now = [
                x[number] if at is None else at.run(runner, [x, jnp.int32(number)])[0]
                for x, at in zip(sequences, self.at, strict=True)
            ]
            found = self.body.run(runner, [*read, *carry, *now])
            carry = found[: self.carries]
            made.append(found[self.carries :])
        if self.reverse:
            made.reverse()
        stacked = map(functools.partial(_stacked, runner), self.stack, zip(*made, strict=True))
        return [*carry, *stacked]


def rows_of(value: Any, axis: int) -> list[Any]:
    """The rows of the server's value."""
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return list(jnp.moveaxis(value, axis, 0))
    return list(np.moveaxis(np.asarray(value), axis, 0))


def _stacked(runner: Runner, stack: OnClients | None, xs: Sequence[Any]) -> Any:
    return jnp.stack(xs) if stack is None else stack.run(runner, list(xs))[0]
