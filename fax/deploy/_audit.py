"""What a plan's steps prove: what clients receive and send, and how their data reach the server.

Clients' data leave them in two ways: in what a stage sends, and where rows are fetched. So for each
client's input it is enough to follow which values that clients hold depend on their own row of it.
What the server has received, and makes of it, has left already.

This follows which values depend on which, not how. So "never" and "only through sums" hold
whatever the numbers are. But a sum is a row if all other clients contribute zero. The server
decides that if it chooses a row for each client, such as a mask. So the audit names the rows that
the server chooses for each sum.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.core import ShapedArray

from fax.deploy._stages import Stage
from fax.deploy._steps import Block, Branch, OnClients, Pull, Scan, Send, Set, Step, Take, While
from fax.deploy._values import Value, differs, row_of
from fax.inspect._table import aligned, in_bytes
from fax.primitives import _jaxpr


@dataclasses.dataclass(frozen=True)
class Message:
    """A value that one client receives, keeps or sends, each time that a stage runs.

    Attributes:
      type: its dtype and shape, such as ``float32[5]``.
      bytes: its size, None if it differs between clients.
      mode: ``down`` for a value that all clients receive, ``row`` for one that the server sends to
        this client alone, ``stays`` for a client's own; ``sum``, ``max`` or ``min`` for what it
        sends, and ``fetched`` for a row that the server fetches.
      depends_on: the clients' inputs whose own row it may depend on.
      chosen: the rows that the server chooses for each client, and that it may depend on.
    """

    type: str
    bytes: int | None
    mode: str
    depends_on: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What each of the clients receives and sends when a stage runs, or rows are fetched.

    Attributes:
      stage: the stage's name, or why rows are fetched.
      clients: how many clients take part.
      times: how often, None if a loop has an unknown number of iterations or a branch may be taken.
      messages: what moves, and what stays.
    """

    stage: str
    clients: int
    times: int | None
    messages: tuple[Message, ...]

    def bytes(self, *modes: str) -> int:
        """The bytes of the messages of some modes, for one client and time.

        Raises:
          ValueError: if they differ between clients, as what stays with them may.
        """
        sizes = [m.bytes for m in self.messages if m.mode in modes]
        if None in sizes:
            raise ValueError(f"Exchange.bytes: what is {modes} differs in size between clients.")
        return sum(size for size in sizes if size is not None)


@dataclasses.dataclass(frozen=True)
class Audit:
    """What clients receive and send, and what that proves about their data. Prints as a table.

    Attributes:
      exchanges: what clients receive and send, in the order of the plan.
      inputs: what clients hold at the start, by the path of the argument.
    """

    exchanges: tuple[Exchange, ...]
    inputs: tuple[str, ...]

    @property
    def statements(self) -> dict[str, str]:
        """For each input, how it can reach the server.

        ``never``, ``only through sums over n``, ``through sums, maxima or minima over n``, or
        ``as rows``. The first two are proven for all values. ``n`` counts
        rows: if `chosen` has rows chosen by number, several of them may be of one client.
        """
        return {name: self._statement(name) for name in self.inputs}

    @property
    def chosen(self) -> dict[str, tuple[str, ...]]:
        """For each input that is sent, the choices of the server that it is combined with."""
        found = {
            name: dict.fromkeys(row for _, m in self._leaving(name) for row in m.chosen)
            for name in self.inputs
        }
        return {name: tuple(rows) for name, rows in found.items() if rows}

    def _leaving(self, name: str) -> list[tuple[Exchange, Message]]:
        return [
            (exchange, message)
            for exchange in self.exchanges
            for message in exchange.messages
            if message.mode in _LEAVING and name in message.depends_on
        ]

    def _statement(self, name: str) -> str:
        leaving = self._leaving(name)
        if not leaving:
            return "never"
        if any(m.mode == "fetched" or exchange.clients == 1 for exchange, m in leaving):
            return "as rows"
        number = min(exchange.clients for exchange, _ in leaving)
        if all(m.mode == "sum" for _, m in leaving):
            return f"only through sums over {number}"
        return f"through sums, maxima or minima over {number}"

    def __str__(self) -> str:
        return "\n".join(_lines(self))


_LEAVING = ("sum", "max", "min", "fetched")
_DOWN = ("down", "row")


class _Taint(NamedTuple):
    """The clients' inputs, and the server's rows, that a held value may depend on."""

    inputs: frozenset[str] = frozenset()
    chosen: frozenset[str] = frozenset()


_NONE = _Taint()


def _join(taints: Iterable[_Taint]) -> _Taint:
    found = list(taints)
    return _Taint(
        frozenset().union(*(t.inputs for t in found)), frozenset().union(*(t.chosen for t in found))
    )


def audit(block: Block, names: Sequence[str]) -> Audit:
    """The audit of a plan. ``names`` are the paths of its arguments."""
    taints = [
        _Taint(frozenset({name})) if value.held else _NONE
        for name, value in zip(names, block.inputs, strict=True)
    ]
    auditor = _Auditor()
    auditor.block(block, taints, 1)
    held = [name for name, value in zip(names, block.inputs, strict=True) if value.held]
    return Audit(tuple(auditor.exchanges), tuple(held))


class _Auditor:
    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []

    def block(self, block: Block, taints: Sequence[_Taint], times: int | None) -> list[_Taint]:
        """The taints of a block's results. The server's values have none."""
        env: dict[Value, _Taint] = dict.fromkeys(block.constants, _NONE)
        env.update(zip(block.inputs, taints, strict=True))
        for step in block.steps:
            found = self._step(step, [env[value] for value in step.operands], times)
            for value, taint in zip(step.results, found, strict=True):
                env[value] = taint if value.held else _NONE
        return [env[value] for value in block.outputs]

    def _step(self, step: Step, taints: list[_Taint], times: int | None) -> Sequence[_Taint]:
        match step:
            case OnClients():
                return self._stage(step, taints, times)
            case Take():
                return [_join([taints[0], _chosen("rows chosen by number")])]
            case Set():
                return [_join([taints[0], taints[2], _chosen("rows chosen by number")])]
            case Send():
                value, axis = step.operands[0], step.results[0].axis
                assert axis is not None
                sent = _message(row_of(value.aval, axis), "row")
                self._add("send", value.aval.shape[axis], times, [sent])
                return [_chosen(sent.type)]
            case Pull():
                (value,) = step.operands
                assert value.axis is not None
                row = _message(row_of(value.aval, value.axis), "fetched", taints[0])
                self._add(step.why, value.aval.shape[value.axis], times, [row])
            case Branch():
                found = [self.block(b, taints[1:], None) for b in step.branches]
                return [_join(each) for each in zip(*found, strict=True)]
            case While():
                return self._while(step, taints)
            case Scan():
                return self._scan(step, taints, times)
        return [_NONE] * len(step.results)

    def _stage(self, step: OnClients, taints: list[_Taint], times: int | None) -> list[_Taint]:
        messages, seen = [], []
        for value, axis, taint in zip(step.operands, step.axes, taints, strict=True):
            if axis is None:
                messages.append(_message(value.aval, "down"))
            elif value.held:
                messages.append(_message(row_of(value.aval, axis), "stays", taint))
            else:
                messages.append(_message(row_of(value.aval, axis), "row"))
                taint = _chosen(messages[-1].type)
            seen.append(taint)
        found = []
        for number, mode in enumerate(step.stage.outputs):
            found.append(_join(seen[i] for i in _needs(step.stage, number)))
            if mode != "placed":
                aval = step.stage.jaxpr.out_avals[number]
                messages.append(_message(aval, mode, found[-1]))
        self._add(step.stage.name, step.size, times, messages)
        return found

    def _while(self, step: While, taints: list[_Taint]) -> list[_Taint]:
        one, other = step.reads
        seen, read, carry = taints[:one], taints[one : one + other], taints[one + other :]
        carry = self._until_stable(carry, lambda now: self.block(step.body, [*read, *now], None))
        self.block(step.condition, [*seen, *carry], None)
        return carry

    def _scan(self, step: Scan, taints: list[_Taint], times: int | None) -> list[_Taint]:
        inner = None if times is None else times * step.length
        read = taints[: step.reads]
        carry = taints[step.reads : step.reads + step.carries]
        now = taints[step.reads + step.carries :]
        for at, taint in zip(step.at, now, strict=True):
            if at is not None:
                self._stage(at, [taint, _NONE], inner)
        stacked: list[_Taint] = []

        def once(carried: list[_Taint]) -> list[_Taint]:
            found = self.block(step.body, [*read, *carried, *now], inner)
            stacked[:] = found[step.carries :]
            return found[: step.carries]

        carry = self._until_stable(carry, once)
        for stack, taint in zip(step.stack, stacked, strict=True):
            if stack is not None:
                self._stage(stack, [taint] * len(stack.operands), times)
        return [*carry, *stacked]

    def _until_stable(self, carry: list[_Taint], once: Any) -> list[_Taint]:
        """What a loop carries may depend on, after any number of iterations."""
        before = len(self.exchanges)
        while True:
            del self.exchanges[before:]
            found = [_join(pair) for pair in zip(carry, once(carry), strict=True)]
            if found == carry:
                return carry
            carry = found

    def _add(self, stage: str, size: int, times: int | None, messages: list[Message]) -> None:
        self.exchanges.append(Exchange(stage, size, times, tuple(messages)))


def _chosen(what: str) -> _Taint:
    return _Taint(frozenset(), frozenset({what}))


def _needs(stage: Stage, output: int) -> list[int]:
    """The operands that an output of a stage depends on."""
    wanted = [number == output for number in range(len(stage.outputs))]
    used = _jaxpr.prune(stage.jaxpr, wanted)[1]
    return [number for number, need in enumerate(used) if need]


def _message(aval: ShapedArray, mode: str, taint: _Taint = _NONE) -> Message:
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        key = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), aval.dtype))
        each = math.prod(key.shape) * key.dtype.itemsize
    else:
        each = aval.dtype.itemsize
    size = None if differs(aval) else math.prod(aval.shape) * each
    shape = ",".join(map(str, aval.shape))
    inputs, chosen = sorted(taint.inputs), sorted(taint.chosen)
    return Message(f"{aval.dtype}[{shape}]", size, mode, tuple(inputs), tuple(chosen))


# As text


def _lines(audit: Audit) -> list[str]:
    lines = ["What each client receives and sends:"]
    header = ("stage", "clients", "times", "receives", "sends", "as")
    rows = [
        (
            exchange.stage,
            str(exchange.clients),
            "?" if exchange.times is None else str(exchange.times),
            in_bytes(exchange.bytes(*_DOWN)),
            in_bytes(exchange.bytes(*_LEAVING)),
            ", ".join(_kinds(exchange)),
        )
        for exchange in audit.exchanges
    ]
    lines += [f"  {line}" for line in aligned([header, *rows], right=[1, 2, 3, 4])]
    lines += ["", "How clients' data can reach the server:"]
    lines += [f"  {line}" for line in aligned(list(audit.statements.items()), right=[])]
    for name, chosen in audit.chosen.items():
        which = ", ".join(chosen)
        lines.append(f"  What is sent of {name} also depends on choices of the server: {which}.")
    return [*lines, "", *_LIMITS]


def _kinds(exchange: Exchange) -> Mapping[str, None]:
    return dict.fromkeys(f"{m.mode} of {m.type}" for m in exchange.messages if m.mode in _LEAVING)


_LIMITS = (
    "Not proven: that a sum hides a client's row. It does not if all others contribute zero, if",
    "rows chosen by number are all of one client, if the server compares sums over different",
    "clients, or if it reads what each client sends before it adds. With quorum=, sums are over",
    "the clients that are left. Norms that clipping promises, noise and epsilon are not proven.",
)
