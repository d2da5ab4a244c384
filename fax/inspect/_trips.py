"""How many trips a loop of a compiled program takes.

This evaluates the integers that a loop's condition depends on. They grow by a constant in each
trip, so it is enough to look at the first trips and to search for the first one at which the
condition fails. Where the program does not show enough, there is what XLA notes on CPU and GPU. It
comes second because it is wrong for unsigned integers that count down: XLA adds 2^32 - 1 in place
of subtracting 1, and notes a single trip.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from fax.inspect._frames import Frame, called
from fax.inspect._hlo import Instruction, Module, arrays

Value = tuple[Frame, Instruction]

_SAME = ("copy", "bitcast", "reshape", "optimization-barrier", "copy-start", "copy-done")
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "and": operator.and_,
    "or": operator.or_,
    "not": operator.invert,
    "select": lambda condition, yes, no: yes if condition else no,
    "convert": lambda x: x,
    "bitcast-convert": lambda x: x,  # of integers of the same size
}
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_KNOWN = r'"known_trip_count":\{"n":"(\d+)"\}'
_MOST = 2**62  # trips
_FIRST = 100  # trips that are looked at one by one


class Trips(NamedTuple):
    """How many trips a loop takes.

    Attributes:
      times: the number, or 1 if the program does not show it.
      unknown: whether it does not, and there may be more.
      optional: whether it does not, and there is at most one: XLA writes some branches as loops.
    """

    times: int
    unknown: bool
    optional: bool


def trips(module: Module, frame: Frame, loop: Instruction) -> Trips:
    """The number of trips of a loop."""
    own = _Loop(module, frame, loop)
    count = own.trips()
    if count is None and (noted := re.search(_KNOWN, loop.attributes)):
        count = int(noted[1])
    if count is not None:
        return Trips(count, unknown=False, optional=False)
    optional = own.ends_after_one_trip()
    return Trips(1, unknown=not optional, optional=optional)


class _Loop:
    """A loop, and the integers in its state before each trip."""

    def __init__(self, module: Module, frame: Frame, loop: Instruction):
        self._module = module
        self._frame, self._start = frame, frame.own[loop.inputs[0]]
        self._condition, self._body = called(module, frame, loop)
        # By element, its value before trips 0 and 1.
        self._first: dict[int, tuple[int | None, int | None]] = {}

    def trips(self) -> int | None:
        least, most = -1, 0  # it goes on before trip `least`
        # A condition such as `i != 2 and i < 5` holds again later.
        while most < _FIRST and self._goes_on(most):
            least, most = most, most + 1
        while self._goes_on(most):
            least, most = most, 2 * most + 1
            if most > _MOST:
                return None
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if self._goes_on(middle) else (least, middle)
        understood = self._goes_on(most) is False and self._is_even(0) and self._is_even(most - 1)
        return most if understood else None

    def ends_after_one_trip(self) -> bool:
        """Whether its condition is an element of the state that the body sets to false."""
        root = source(self._module, self._condition, self._condition.root)
        index = element(*root)
        return index is not None and self._after(index, 0) == 0

    def _goes_on(self, trip: int) -> bool | None:
        """Whether the condition holds before a trip, or None if that is unknown."""
        found = self._value(self._condition, self._condition.root, trip)
        return None if found is None else bool(found)

    def _is_even(self, trip: int) -> bool:
        """Whether the state before a trip becomes the expected one after it."""
        return trip < 0 or all(
            self._after(index, trip) == self._before(index, trip + 1) for index in [*self._first]
        )

    def _before(self, index: int, trip: int) -> int | None:
        """An element of the state before a trip, if it grows by a constant."""
        if index not in self._first:
            start = source_of_element(self._module, self._frame, self._start, index)
            first = None if start is None else self._value(*start)
            self._first[index] = first, None
            self._first[index] = first, self._after(index, 0)
        first, second = self._first[index]
        if first is None or trip == 0:
            return first
        return None if second is None else first + trip * (second - first)

    def _after(self, index: int, trip: int) -> int | None:
        """An element of the state after a trip, as the body computes it."""
        found = source_of_element(self._module, self._body, self._body.root, index)
        return None if found is None else self._value(*found, trip)

    def _value(self, frame: Frame, instruction: Instruction, trip: int = 0) -> int | None:
        """An integer that the program computes in a trip, or None if it cannot be known."""
        frame, instruction = source(self._module, frame, instruction)
        index = element(frame, instruction)
        if index is not None:  # of the state of this loop, or of one around it
            own = frame is self._condition or frame is self._body
            return self._before(index, trip) if own else None
        types = arrays(instruction.type)
        if len(types) != 1 or types[0].shape or not re.match("bool|u?int", types[0].dtype):
            return None
        if instruction.opcode == "constant":
            return _constant(instruction.operands)
        direction = re.search(r"direction=(\w+)", instruction.attributes)
        operation = _COMPARISONS[direction[1]] if direction else _OPERATIONS.get(instruction.opcode)
        if operation is None:
            return None
        inputs: list[Any] = [
            self._value(frame, frame.own[name], trip) for name in instruction.inputs
        ]
        return None if None in inputs else _wrapped(operation(*inputs), types[0].dtype)


def _constant(text: str) -> int | None:
    if text in ("true", "false"):
        return int(text == "true")
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _wrapped(value: int, dtype: str) -> int:
    """An integer as a dtype holds it."""
    if dtype == "bool":
        return value & 1
    bits = int(dtype.lstrip("uint"))
    value %= 2**bits
    return value - 2**bits if dtype[0] == "i" and value >= 2 ** (bits - 1) else value


# Where values come from


def source(module: Module, frame: Frame, instruction: Instruction) -> Value:
    """Follows a value through copies, tuples and fusions to where it is computed."""
    while True:
        if instruction.opcode in _SAME:
            instruction = frame.own[instruction.inputs[0]]
        elif instruction.opcode in ("fusion", "call"):
            (frame,) = called(module, frame, instruction)
            instruction = frame.root
        elif instruction.opcode == "parameter" and (outside := _argument(frame, instruction)):
            frame, instruction = outside
        elif instruction.opcode == "get-tuple-element":
            whole = frame.own[instruction.inputs[0]]
            found = source_of_element(module, frame, whole, _index(instruction))
            return (frame, instruction) if found is None else found
        else:
            return frame, instruction


def source_of_element(
    module: Module, frame: Frame, instruction: Instruction, index: int
) -> Value | None:
    """Where an element of a tuple is computed, or None if a loop changes it."""
    while True:
        if instruction.opcode in _SAME:
            instruction = frame.own[instruction.inputs[0]]
        elif instruction.opcode in ("fusion", "call"):
            (frame,) = called(module, frame, instruction)
            instruction = frame.root
        elif instruction.opcode == "tuple":
            return source(module, frame, frame.own[instruction.inputs[index]])
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


def element(frame: Frame, instruction: Instruction) -> int | None:
    """The number of an element of a loop's state, if this is one."""
    if instruction.opcode != "get-tuple-element" or frame.role not in ("body", "condition"):
        return None
    state = frame.own[instruction.inputs[0]].opcode == "parameter"
    return _index(instruction) if state else None


def _index(instruction: Instruction) -> int:
    found = re.search(r"index=(\d+)", instruction.attributes)
    return int(found[1]) if found else 0


def _argument(frame: Frame, parameter: Instruction) -> Value | None:
    """What a parameter of a computation that is not a loop is called with."""
    if frame.parent is None or frame.caller is None or frame.role in ("body", "condition"):
        return None
    number = frame.branch + 1 if frame.role == "branch" else int(parameter.operands)
    return frame.parent, frame.parent.own[frame.caller.inputs[number]]


def _is_kept(module: Module, frame: Frame, loop: Instruction, index: int) -> bool:
    """Whether a loop leaves an element of its state as it is."""
    body = called(module, frame, loop)[1]
    if body.root.opcode != "tuple":
        return False
    after = body.own[body.root.inputs[index]]
    while after.opcode in _SAME:
        after = body.own[after.inputs[0]]
    return element(body, after) == index
