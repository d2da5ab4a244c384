"""Compiled programs as XLA prints them: computations, instructions and the types of their results.

Only what this package needs is read. One instruction is on one line::

    %psum.1 = f32[16]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add, backend_config={}
     name      type      opcode    operands        attributes
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_PARENTHESIS = re.compile(r"[()]")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_KINDS = {"pred": "bool", "bf": "bfloat", "f": "float", "s": "int", "u": "uint", "c": "complex"}


class Array(NamedTuple):
    """An array in memory. ``bits`` is what one element takes up."""

    dtype: str
    shape: tuple[int, ...]
    bits: int

    @property
    def nbytes(self) -> int:
        return -(-math.prod(self.shape) * self.bits // 8)


class Instruction(NamedTuple):
    """An instruction, with the text of its type, its operands and its attributes."""

    name: str
    type: str
    opcode: str
    operands: str
    attributes: str
    is_root: bool

    @property
    def inputs(self) -> list[str]:
        """The names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.operands)

    def called(self, attribute: str) -> list[str]:
        """The computations that an attribute names, such as ``body``."""
        found = re.search(rf"(?<!\w){attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return [name.strip(" %") for name in found[1].strip("{}").split(",")] if found else []


Computation = dict[str, Instruction]


class Module(NamedTuple):
    """A compiled program. ``entry`` is the name of the computation that runs first."""

    computations: dict[str, Computation]
    entry: str
    num_partitions: int


def parse(text: str) -> Module:
    """Reads the text of a compiled program, as `jax.stages.Compiled.as_text` returns it."""
    computations: dict[str, Computation] = {}
    entry, own = "", None
    for line in text.splitlines():
        if not line.startswith(" "):
            header = _COMPUTATION.match(line)
            own = computations.setdefault(header[2], {}) if header else None
            if header and header[1]:
                entry = header[2]
        elif own is not None and (found := _INSTRUCTION.match(line)):
            own[found[2]] = _instruction(line, found)
    partitions = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(line: str, found: re.Match[str]) -> Instruction:
    start = found.end()
    end = _closing(line, start) if line[start] == "(" else line.find(" ", start)
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        raise ValueError(f"fax.inspect cannot read this instruction: {line.strip():.200}")
    close = _closing(line, opcode.end() - 1)
    return Instruction(
        name=found[2],
        type=line[start:end],
        opcode=opcode[1],
        operands=line[opcode.end() : close - 1],
        attributes=line[close:],
        is_root=bool(found[1]),
    )


def _closing(line: str, start: int) -> int:
    """The position after the parenthesis that closes the one at ``start``."""
    depth = 0
    for found in _PARENTHESIS.finditer(line, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(line)


@functools.lru_cache(maxsize=4096)
def arrays(text: str) -> tuple[Array, ...]:
    """The arrays in a type, which may be a tuple. Tokens and other handles are left out."""
    found = []
    for kind, sizes, layout in _ARRAY.findall(text):
        parts = re.fullmatch(r"(pred|bf|[fsuc])(\d*)(\w*)", kind)
        if not parts:
            continue
        width = int(parts[2] or 8)
        # Elements of less than a byte are packed if the layout says so.
        packed = re.search(r"E\((\d+)\)", layout)
        bits = int(packed[1]) if packed else width if not layout else max(width, 8)
        variant = f"_{parts[3]}" if parts[3] else ""
        name = _KINDS[parts[1]] + parts[2] + variant
        found.append(Array(name, tuple(int(s.strip("<=")) for s in sizes.split(",") if s), bits))
    return tuple(found)


def operand_arrays(of: Computation, instruction: Instruction) -> tuple[Array, ...]:
    """The arrays that an instruction is passed."""
    return sum((arrays(of[name].type) for name in instruction.inputs if name in of), ())
