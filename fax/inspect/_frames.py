"""The computations of a compiled program, where they are called."""

from __future__ import annotations

from typing import NamedTuple

from fax.inspect._hlo import Computation, Instruction, Module


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

    @property
    def root(self) -> Instruction:
        """The instruction whose result is that of the computation."""
        return next(each for each in self.own.values() if each.is_root)


def entry(module: Module) -> Frame:
    return Frame(module.entry, module.computations[module.entry], "entry")


def called(module: Module, frame: Frame, instruction: Instruction) -> list[Frame]:
    """The computations that an instruction calls, except those on single elements, as of a sum."""

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
