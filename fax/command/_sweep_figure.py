"""The figure of a sweep: what was reached with which value of a setting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from fax.experiment import _axes, _shown

_TICKS = 7  # the most on a logarithmic axis
Result = tuple[Mapping[str, Any], Mapping[str, float]]


def figure(results: Sequence[Result], by: str) -> Figure | None:
    """A metric by the setting with the most numbers, with a line for each value of the others.

    Args:
      results: pairs of settings and metrics.
      by: the name of the metric.

    Returns:
      The figure, or None if no setting is a number with several values.
    """
    key = _setting(results)
    if key is None:
        return None
    lines: dict[str, list[tuple[float, float]]] = {}
    for setting, metrics in results:
        others = ", ".join(f"{name}={value}" for name, value in setting.items() if name != key)
        lines.setdefault(_axes.literal(others), []).append(
            (setting[key], metrics.get(by, math.nan))
        )
    width = 0.08 * max(map(len, lines)) + 0.6 if len(lines) > 1 else 0  # inches, for the legend
    made, (axes,) = _axes.panels(1, right=width)
    name, scale = _axes.label(_shown.kind_of(by))
    for others, points in lines.items():
        x, y = zip(*sorted(points))
        axes.plot(x, [scale * value for value in y], marker=".", linewidth=1.2, label=others)
    numbers = sorted({setting[key] for setting, _ in results})
    if numbers[0] > 0 and numbers[-1] >= 8 * numbers[0]:
        axes.set_xscale("log")
        shown = numbers[:: -(-len(numbers) // _TICKS)]
        axes.set_xticks(shown, [f"{number:g}" for number in shown])
        axes.minorticks_off()
    axes.set(xlabel=key, ylabel=f"{by.rpartition('/')[0].replace('/', ' ')} {name}".strip())
    if len(lines) > 1:
        made.legend(loc="outside right center", frameon=False, fontsize="small")
    return made


def _setting(results: Sequence[Result]) -> str | None:
    """The setting that is a number in all results and has the most values, at least two."""
    values = {key: {setting[key] for setting, _ in results} for key in results[0][0]}
    counts = {
        key: len(own)
        for key, own in values.items()
        if len(own) > 1 and all(type(value) in (int, float) for value in own)
    }
    return max(counts, key=lambda key: counts[key], default=None)
