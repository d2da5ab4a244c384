"""How often a compiled program runs each of its instructions.

A `Frame` is a computation where it is called: the body of a loop in the body of another one, and so
on. Costs are added up over frames: a loop counts its body once for each of its trips.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fax.inspect._hlo import Computation, Instruction, Module

_SAME = ("copy", "bitcast", "convert", "reshape", "optimization-barrier", "copy-done", "copy-start")


class Frame(NamedTuple):
    """A computation, the instruction that calls it, and where that is.

    ``role`` is "entry", "body" or "condition" of a loop, "branch", "call" or "fusion".
    """

    name: str
    own: Computation
    role: str
    branch: int = 0
    caller: Instruction | None = None
    parent: Frame | None = None


class Run(NamedTuple):
    """An instruction and how often it runs.

    Attributes:
      times: how often, where each loop of unknown length counts as one trip, and all
        branches are taken.
      loops: how many loops it is in.
      unknown_loops: of how many of these the length is unknown.
      conditional: whether it is in a branch.
    """

    instruction: Instruction
    frame: Frame
    times: int
    loops: int
    unknown_loops: int
    conditional: bool


class Total(NamedTuple):
    """A cost, and whether loops of unknown length were counted as one trip."""

    value: int
    unknown_loops: bool


def entry(module: Module) -> Frame:
    return Frame(module.entry, module.computations[module.entry], "entry")


def called(module: Module, frame: Frame, instruction: Instruction) -> list[Frame]:
    """The computations that an instruction calls, without those of single elements."""

    def at(role: str, *attributes: str) -> list[Frame]:
        names = [name for a in attributes for name in instruction.called(a)]
        return [
            Frame(name, module.computations[name], role, number, instruction, frame)
            for number, name in enumerate(names)
            if name in module.computations
        ]

    match instruction.opcode:
        case "while":
            return at("condition", "condition") + at("body", "body")
        case "conditional":
            return at("branch", "branch_computations", "true_computation", "false_computation")
        case "call" | "custom-call" | "async-start":
            return at("call", "to_apply", "calls", "called_computations")
        case "fusion":
            return at("fusion", "calls")
    return []


def runs(module: Module) -> Iterator[Run]:
    """All instructions of a program with how often they run, those in fusions included."""

    def of(frame: Frame, count: int, loops: int, unknown: int, conditional: bool) -> Iterator[Run]:
        for instruction in frame.own.values():
            yield Run(instruction, frame, count, loops, unknown, conditional)
            for inner in called(module, frame, instruction):
                at = count, loops, unknown
                if instruction.opcode == "while":
                    known = trips(module, frame, instruction)
                    times = (1 if known is None else known) + (inner.role == "condition")
                    at = count * times, loops + 1, unknown + (known is None)
                yield from of(inner, *at, conditional or inner.role == "branch")

    yield from of(entry(module), 1, 0, 0, False)


def total(module: Module, cost: Callable[[Frame, Instruction], int], *, fusions: bool) -> Total:
    """Adds up a cost of instructions over a program: of branches, the most expensive one.

    With ``fusions``, instructions within fusions count; otherwise fusions are single instructions.
    """

    def of(frame: Frame) -> Total:
        value, unknown = 0, False
        for instruction in frame.own.values():
            value += cost(frame, instruction)
            if instruction.opcode == "fusion" and not fusions:
                continue
            inner = called(module, frame, instruction)
            found = [of(each) for each in inner]
            unknown = unknown or any(each.unknown_loops for each in found)
            if instruction.opcode == "while":
                known = trips(module, frame, instruction)
                unknown = unknown or (known is None and any(each.value for each in found))
                for each, (more, _) in zip(inner, found, strict=True):
                    times = 1 if known is None else known
                    value += more * (times + (each.role == "condition"))
            elif instruction.opcode == "conditional":
                value += max((each.value for each in found), default=0)
            else:
                value += sum(each.value for each in found)
        return Total(value, unknown)

    return of(entry(module))


# Trips

Value = tuple[Frame, Instruction]


def trips(module: Module, frame: Frame, loop: Instruction) -> int | None:
    """The number of trips of a loop, or None if the program does not show it.

    XLA notes it for some platforms. For others this looks for a counter that starts at a constant,
    grows by a constant, and is compared with a constant.
    """
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(noted[1])
    condition, body = called(module, frame, loop)
    at, test = _source(module, condition, _root(condition))
    sense = re.search(r"direction=(\w+)", test.attributes)
    if test.opcode != "compare" or sense is None or sense[1] == "EQ":
        return None
    counter, bound = (_source(module, at, at.own[name]) for name in test.inputs)
    index, limit = _element(*counter), _constant(*bound)
    if index is None or limit is None:
        return None
    first = _source_of_element(module, frame, frame.own[loop.inputs[0]], index)
    start = _constant(*first) if first else None
    step = _step(module, body, index)
    if start is None or not step:
        return None
    span = limit - start + {"LE": 1, "GE": -1}.get(sense[1], 0)
    if sense[1] == "NE":
        return span // step if span % step == 0 and span // step >= 0 else None
    if (step > 0) != (sense[1][0] == "L"):
        return None  # it moves away from the bound
    return max(0, -(-span // step))


def _root(frame: Frame) -> Instruction:
    return next(each for each in frame.own.values() if each.is_root)


def _constant(frame: Frame, instruction: Instruction) -> int | None:
    found = re.fullmatch(r"-?\d+", instruction.operands)
    return int(found[0]) if instruction.opcode == "constant" and found else None


def _element(frame: Frame, instruction: Instruction) -> int | None:
    """The number of an element of a loop's state, if this is one."""
    if instruction.opcode != "get-tuple-element" or frame.role not in ("body", "condition"):
        return None
    state = frame.own[instruction.inputs[0]].opcode == "parameter"
    return _index(instruction) if state else None


def _index(instruction: Instruction) -> int:
    found = re.search(r"index=(\d+)", instruction.attributes)
    return int(found[1]) if found else 0


def _step(module: Module, body: Frame, index: int) -> int | None:
    """The constant that a loop adds to an element of its state in each trip."""
    found = _source_of_element(module, body, _root(body), index)
    if found is None or found[1].opcode not in ("add", "subtract"):
        return None
    at, change = found
    before, by = (_source(module, at, at.own[name]) for name in change.inputs)
    step = _constant(*by)
    if before[0] != body or _element(*before) != index or step is None:
        return None
    return step if change.opcode == "add" else -step


def _source(module: Module, frame: Frame, instruction: Instruction) -> Value:
    """Follows a value through copies, tuples and fusions to where it is computed."""
    while True:
        if instruction.opcode in _SAME:
            frame, instruction = frame, frame.own[instruction.inputs[0]]
        elif instruction.opcode in ("fusion", "call"):
            (frame,) = called(module, frame, instruction)
            instruction = _root(frame)
        elif instruction.opcode == "parameter" and (outside := _argument(frame, instruction)):
            frame, instruction = outside
        elif instruction.opcode == "get-tuple-element":
            whole = frame.own[instruction.inputs[0]]
            found = _source_of_element(module, frame, whole, _index(instruction))
            if found is None:
                return frame, instruction
            return found
        else:
            return frame, instruction


def _source_of_element(
    module: Module, frame: Frame, instruction: Instruction, index: int
) -> Value | None:
    """Where an element of a tuple is computed, or None if a loop changes it."""
    while True:
        if instruction.opcode in _SAME:
            instruction = frame.own[instruction.inputs[0]]
        elif instruction.opcode in ("fusion", "call"):
            (frame,) = called(module, frame, instruction)
            instruction = _root(frame)
        elif instruction.opcode == "tuple":
            return _source(module, frame, frame.own[instruction.inputs[index]])
        elif instruction.opcode == "while" and _is_kept(module, frame, instruction, index):
            instruction = frame.own[instruction.inputs[0]]
        elif instruction.opcode != "parameter":
            return None
        elif outside := _argument(frame, instruction):
            frame, instruction = outside
        else:
            parent, loop = frame.parent, frame.caller
            if parent is None or loop is None or not _is_kept(module, parent, loop, index):
                return None
            frame, instruction = parent, parent.own[loop.inputs[0]]


def _argument(frame: Frame, parameter: Instruction) -> Value | None:
    """What a parameter of a computation that is not a loop is called with."""
    if frame.parent is None or frame.caller is None or frame.role in ("body", "condition"):
        return None
    number = frame.branch + 1 if frame.role == "branch" else int(parameter.operands)
    return frame.parent, frame.parent.own[frame.caller.inputs[number]]


def _is_kept(module: Module, frame: Frame, loop: Instruction, index: int) -> bool:
    """Whether a loop leaves an element of its state as it is."""
    body = called(module, frame, loop)[1]
    root = _root(body)
    if root.opcode != "tuple":
        return False
    after = body.own[root.inputs[index]]
    while after.opcode in _SAME:
        after = body.own[after.inputs[0]]
    return _element(body, after) == index
