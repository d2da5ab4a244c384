"""How often a compiled program runs each of its instructions, and what all of them cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from fax.inspect._frames import Frame, called, entry
from fax.inspect._hlo import Instruction, Module
from fax.inspect._trips import trips


class Run(NamedTuple):
    """An instruction and how often it runs.

    Attributes:
      times: how often, where each loop of unknown length counts as one trip, and all
        branches are taken.
      loops: how many loops it is in.
      unknown_loops: of how many of these the length is unknown.
      conditional: whether it is in a branch, or in a loop that XLA made of a branch.
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


def runs(module: Module) -> Iterator[Run]:
    """All instructions of a program with how often they run, those in fusions included."""

    def of(frame: Frame, count: int, loops: int, unknown: int, conditional: bool) -> Iterator[Run]:
        for instruction in frame.own.values():
            yield Run(instruction, frame, count, loops, unknown, conditional)
            for inner in called(module, frame, instruction):
                at = count, loops, unknown
                optional = inner.role == "branch"
                if instruction.opcode == "while":
                    found = trips(module, frame, instruction)
                    times = found.times + (inner.role == "condition")
                    at = count * times, loops + 1, unknown + found.unknown
                    optional = found.optional
                yield from of(inner, *at, conditional or optional)

    yield from of(entry(module), 1, 0, 0, False)


def total(module: Module, cost: Callable[[Frame, Instruction], int], *, fusions: bool) -> Total:
    """Adds up a cost of instructions over a program: of branches, the most expensive one.

    With ``fusions``, instructions within fusions count; otherwise fusions are single instructions.
    """
    start = entry(module)
    return total_of(module, start, start.own.values(), cost, fusions=fusions)


def total_of(
    module: Module,
    frame: Frame,
    instructions: Iterable[Instruction],
    cost: Callable[[Frame, Instruction], int],
    *,
    fusions: bool,
) -> Total:
    """The same for some of the instructions of a computation, with all that these call."""
    value, unknown = 0, False
    for instruction in instructions:
        value += cost(frame, instruction)
        if instruction.opcode == "fusion" and not fusions:
            continue
        inner = called(module, frame, instruction)
        found = [total_of(module, each, each.own.values(), cost, fusions=fusions) for each in inner]
        unknown = unknown or any(each.unknown_loops for each in found)
        if instruction.opcode == "while":
            taken = trips(module, frame, instruction)
            unknown = unknown or (taken.unknown and any(each.value for each in found))
            for each, (more, _) in zip(inner, found, strict=True):
                value += more * (taken.times + (each.role == "condition"))
        elif instruction.opcode == "conditional":
            value += max((each.value for each in found), default=0)
        else:
            value += sum(each.value for each in found)
    return Total(value, unknown)
