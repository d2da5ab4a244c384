"""Reports as text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fax.inspect._collectives import Collective
    from fax.inspect._report import Report

_HEADER = ("axes", "operation", "dtype", "bytes", "times", "in total")


def of(report: Report) -> str:
    """The table of a report."""
    memory = report.memory
    parts = [_devices(report), "", "Memory of each device:"]
    parts += aligned(
        [
            ("  arguments", in_bytes(memory.argument_bytes)),
            ("  results", in_bytes(memory.output_bytes)),
            ("    in place of arguments", in_bytes(memory.aliased_bytes)),
            ("  temporary", in_bytes(memory.temporary_bytes)),
            ("  at most", in_bytes(memory.peak_bytes)),
        ],
        right=[1],
    )
    heading = "Collectives of each device in a call:"
    parts += ["", heading if report.collectives else "Nothing is sent."]
    rows = _rows(report.collectives)
    parts += [f"  {line}" for line in aligned([_HEADER, *rows], right=[3, 4, 5])] if rows else []
    parts += ["", *_costs(report)]
    return "\n".join(line.rstrip() for line in parts)


def _devices(report: Report) -> str:
    mesh = " x ".join(f"{name}={size}" for name, size in report.mesh_shape.items())
    slices = f" in {report.num_slices} slices" if report.num_slices > 1 else ""
    plural = "s" if report.num_devices > 1 else ""
    where = f", mesh {mesh}" if mesh else ""
    return f"{report.num_devices} device{plural} ({report.device_kind}){slices}{where}"


def _rows(found: Sequence[Collective]) -> list[tuple[str, ...]]:
    """A line for all collectives that are alike, with how often they run together."""
    alike: dict[Collective, list[Collective]] = {}
    for each in found:
        alike.setdefault(dataclasses.replace(each, count=0, cycles_in_flight=None), []).append(each)
    rows: list[tuple[str, ...]] = []
    for kind, own in alike.items():
        count = sum(each.count for each in own)
        row = (
            ", ".join(kind.axes),
            kind.operation,
            kind.dtype,
            in_bytes(kind.bytes),
            _bound(kind) + f"{count:,}",
            _bound(kind) + in_bytes(count * kind.bytes),
            _between_slices(own) if kind.between_slices else "",
        )
        rows.append(row)
    return rows


def _between_slices(found: Sequence[Collective]) -> str:
    known = [each.cycles_in_flight for each in found if each.cycles_in_flight is not None]
    meanwhile = f", in flight for {min(known):,} cycles" if len(known) == len(found) else ""
    return f"between slices{meanwhile}"


def _bound(each: Collective) -> str:
    if each.unknown_loops:
        return "about " if each.conditional else "at least "
    return "at most " if each.conditional else ""


def _costs(report: Report) -> list[str]:
    at_least = "at least " if report.unknown_loops else ""
    lines = [f"Matrix products and convolutions: {at_least}{_count(report.flops)}flop"]
    if report.cycles is not None:
        time = "" if report.seconds is None else f", {_seconds(report.seconds)}"
        lines += [f"Cycles by the compiler's estimate: {at_least}{report.cycles:,}{time}"]
    if report.unknown_loops:
        lines += ["Loops of unknown length count as one trip."]
    if report.padding is not None:
        own = report.padding
        lines += [
            f"Padding: {own.examples:.0%} of examples, {own.steps:.0%} of steps, "
            f"{own.clients:.0%} of clients"
        ]
    return lines


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    """Rows of cells as lines, in columns. Those with numbers are aligned on the right."""
    most = max(map(len, rows))
    filled = [[*row, *[""] * (most - len(row))] for row in rows]
    widths = [max(map(len, column)) for column in zip(*filled, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in filled
    ]


def in_bytes(number: int) -> str:
    power = min(int(math.log2(number) // 10) if number else 0, 4)
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{number} {unit}" if power == 0 else f"{number / 1024**power:,.1f} {unit}"


def _count(number: int) -> str:
    power = min((len(str(number)) - 1) // 3, 5)
    return f"{number / 1000**power:,.3g} " + ("", "k", "M", "G", "T", "P")[power]


def _seconds(number: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number * 1e6:.3g} µs"
