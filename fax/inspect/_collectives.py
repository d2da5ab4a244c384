"""The collectives of a compiled program: what devices send to each other, and how often."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from fax.inspect._cycles import cycles_in_flight
from fax.inspect._groups import Devices, groups_between_slices, groups_of
from fax.inspect._hlo import Instruction, Module, operand_arrays
from fax.inspect._loops import Run, runs

_COLLECTIVE = re.compile(
    "(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
    "|collective-broadcast)(-start)?"
)
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_PAIRS = "_xla_send_recv_source_target_pairs"


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a compiled program.

    Attributes:
      operation: "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute" or
        "collective-broadcast".
      axes: the mesh axes along which devices that take part together differ.
      dtype: the dtype of what is sent. If there are several, all of them: "float32+int32".
      bytes: how many bytes each device passes in, in one execution: of a sum the size of the sum,
        of a gather a device's own part.
      count: how often it runs in a call. A loop of unknown length counts as one trip, and a branch
        as if it is always taken.
      group_size: how many devices take part together.
      between_slices: whether it crosses TPU slices, over the data center's network.
      loops: how many loops it is in.
      unknown_loops: of how many of these the number of trips is unknown.
      conditional: whether it is in a branch, which may not be taken.
      cycles_in_flight: if it crosses slices, the cycles of what a device computes between sending
        and receiving it, by the compiler's estimate, in one execution. Otherwise None, and also if
        the program does not show where it is received.
    """

    operation: str
    axes: tuple[str, ...]
    dtype: str
    bytes: int
    count: int
    group_size: int
    between_slices: bool
    loops: int
    unknown_loops: int
    conditional: bool
    cycles_in_flight: int | None

    @property
    def total_bytes(self) -> int:
        """``bytes`` times ``count``."""
        return self.bytes * self.count


def collectives(module: Module, devices: Devices) -> tuple[Collective, ...]:
    """The collectives of a program that move data between devices, in the order of its text."""
    return tuple(_collectives(module, devices))


def _collectives(module: Module, devices: Devices) -> Iterator[Collective]:
    found = [
        (run, *groups)
        for run in runs(module)
        if (groups := _groups(run.instruction, devices)) is not None
    ]
    started = {_channel(run.instruction) for run, *_ in found if _starts(run)}
    for run, operation, positions in found:
        axes = devices.axes(positions)
        fused = run.frame.role == "fusion"
        # A TPU advances a collective in several fusions, and all of them repeat it.
        repeated = fused and _channel(run.instruction) in started and not _starts(run)
        if fused and run.frame.name.startswith("all-reduce-scatter"):
            operation = "reduce-scatter"  # an all-reduce of which each device keeps its part
        if axes and not repeated:
            yield _collective(module, run, operation, positions, axes, devices)


def _channel(instruction: Instruction) -> str | None:
    found = re.search(r"channel_id=(\d+)", instruction.attributes)
    return found[1] if found else None


def _starts(run: Run) -> bool:
    """Whether a collective in a fusion is started there, and continued in other fusions."""
    return run.frame.role == "fusion" and any(
        'custom_call_target="AsyncCollectiveStart"' in each.attributes
        and run.instruction.name in each.inputs
        for each in run.frame.own.values()
    )


def _groups(instruction: Instruction, devices: Devices) -> tuple[str, list[list[int]]] | None:
    """The operation of a collective, and its groups of positions in the mesh."""
    text = instruction.attributes
    if found := _COLLECTIVE.fullmatch(instruction.opcode):
        return found[1], devices.positions(groups_of(text, devices.count))
    if instruction.opcode != "send":
        return None
    if found := _BETWEEN_SLICES.search(text):
        operation = found[1].lower().replace("_", "-")
        operation = "collective-permute" if operation == "one-to-one" else operation
        return operation, devices.positions_of_ids(groups_between_slices(text))
    if _PAIRS in text:  # XLA splits permutations into a send and a receive to overlap them
        pairs = text.replace(_PAIRS, "source_target_pairs").replace('"', "")
        return "collective-permute", devices.positions(groups_of(pairs, devices.count))
    return None


def _collective(
    module: Module,
    run: Run,
    operation: str,
    positions: list[list[int]],
    axes: tuple[str, ...],
    devices: Devices,
) -> Collective:
    sent = operand_arrays(run.frame.own, run.instruction)
    between_slices = devices.cross_slices(positions)
    wait = cycles_in_flight(module, run.frame, run.instruction) if between_slices else None
    return Collective(
        operation=operation,
        axes=axes,
        dtype="+".join(sorted({array.dtype for array in sent})),
        bytes=sum(array.nbytes for array in sent),
        count=run.times,
        group_size=max(map(len, positions)),
        between_slices=between_slices,
        loops=run.loops,
        unknown_loops=run.unknown_loops,
        conditional=run.conditional,
        cycles_in_flight=wait,
    )
