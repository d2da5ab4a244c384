"""What training in a data center sends between slices, and what network it needs, on TPU v5p.

    python benchmarks/data_center.py [--models 1B,8B] [--slices 2,8] [--json PATH] [--figure PATH]
    python benchmarks/data_center.py --all

Transformers of one, eight and 33 billion parameters on 2, 4 and 8 slices, of which each is a
replica. It compiles data-parallel training, `fax.algorithms.diloco`, the same with DrJAX, and
`fax.algorithms.streaming_diloco` in float32 and in four bits, and reads from the compiled programs
what is sent between slices and the memory of a chip. From that and an assumed share of the peak
that the chips reach in between, it computes the share of time in which they compute, for any
bandwidth between slices. ``--figure`` draws that.

It compiles and runs nothing, so it needs libtpu but no TPU: `pip install 'fax-jax[tpu,bench]'`.
With ``--json``, what is in the file is not compiled again, and each result is added to it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import math
import os
import pathlib
import time
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from data_center_programs import DRJAX, WAYS, Model, is_shape, work
from figures import Figures
from tables import Table, show
from workloads import drjax

import fax
import fax.inspect

SLICES, TENSOR, LENGTH = (2, 4, 8), 4, 2048
STEPS, FRAGMENTS, TAU = 100, 2, 5
PEAK, UTILIZED = 459e12, 0.5  # flop/s in bfloat16 of a chip, and the share of it that is reached
BACKWARD = 2 / 3  # of a step: as long as a gradient can take to be summed without a wait
TARGET, TARGETS = 0.95, (0.5, 0.8, 0.9, 0.95, 0.99)
# Compiles in half the time. What is sent between slices is the same, but cycles are not.
QUICKLY = {"optimization_level": "O1"}
GBITS = np.logspace(-2, 5, 7001)


class Size(NamedTuple):
    """A model, the slice that a replica of it trains on, and its sequences in a step."""

    model: Model
    topology: str
    chips: int
    batch: int

    @property
    def compute(self) -> float:
        """Seconds of a step: flops of the model, forward and backward, without those of remat."""
        model, tokens = self.model, self.batch * LENGTH
        products = model.size() - model.vocabulary * model.width  # a lookup is none
        attention = model.layers * model.heads * model.head * LENGTH  # two of them, half masked
        return 6 * (products + attention) * tokens / (self.chips * PEAK * UTILIZED)


SIZES = {
    # The shapes of TinyLlama, Llama 3 8B and Qwen 3 32B.
    "1B": Size(Model(22, 2048, 5632, 32, 4, 64, 32000), "v5p:4x4x4", 64, 64),
    "8B": Size(Model(32, 4096, 14336, 32, 8, 128, 128256), "v5p:4x8x8", 256, 256),
    "33B": Size(Model(64, 5120, 25600, 64, 8, 128, 151936), "v5p:8x8x8", 512, 512),
}
DEFAULT = (["1B"], [2])


# Figures


def measure(name: str, slices: int, way: str) -> dict[str, Any]:
    """The memory of a chip, and what it sends between slices in a step, on average."""
    size, start = SIZES[name], time.process_time()
    task = work(size.model, replicas=slices, batch=size.batch, length=LENGTH, steps=STEPS)
    devices = fax.sharding.topology(size.topology, slices=slices)
    axes = dict(replicas=slices, data=size.chips // TENSOR, model=TENSOR)
    options = dict(fragments=FRAGMENTS, tau=TAU) if "Streaming" in way else {}
    with jax.set_mesh(fax.sharding.make_mesh(devices=devices, **axes)):
        fn, args, steps = WAYS[way](task, **options)
        found = fax.inspect.report(fn.lower(*args).compile(compiler_options=QUICKLY))

    def total(count) -> float:
        """Of what is sent in branches, too, which DrJAX's program takes every H-th time."""
        return sum(
            count(each) * each.count / (STEPS if each.conditional else steps)
            for each in found.between_slices
        )

    return dict(
        passed_bytes=total(lambda each: each.bytes),
        sent_bytes=total(sent),
        dtypes=sorted({f"{each.operation} {each.dtype}" for each in found.between_slices}),
        argument_bytes=found.memory.argument_bytes,
        temporary_bytes=found.memory.temporary_bytes,
        peak_bytes=found.memory.peak_bytes,
        cpu_seconds=round(time.process_time() - start, 1),
    )


def sent(found: fax.inspect.Collective) -> float:
    """The bytes that leave a chip, by algorithms that send as little as possible."""
    others = found.group_size - 1
    share = {
        "all-reduce": 2 * others / found.group_size,
        "reduce-scatter": others / found.group_size,
        "all-to-all": others / found.group_size,
        "all-gather": others,
    }
    return found.bytes * share.get(found.operation, 1)


class Compiled:
    """What has been compiled, by model, number of slices, and way to train."""

    def __init__(self, path: pathlib.Path | None):
        self._figures = Figures(path)

    def of(self, name: str, slices: int, way: str) -> dict[str, Any]:
        key = f"{name} | {slices} | {way}"
        return self._figures.of(key, lambda: measure(name, slices, way))


# Utilization


def shares(model: Model) -> list[float]:
    """The shares of the parameters that the fragments have."""
    shapes = model.shapes()
    leaves = jax.tree_util.tree_leaves_with_path(shapes, is_leaf=is_shape)
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): shape for p, shape in leaves}
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x, "float32"), shapes, is_leaf=is_shape)

    def part(piece) -> float:
        name, axis, indices = (piece, 0, None) if isinstance(piece, str) else piece
        shape = named[name]
        return math.prod(shape) * (1 if indices is None else len(indices) / shape[axis])

    fragments = fax.algorithms.layer_fragments(types, FRAGMENTS)
    return [sum(map(part, fragment)) / model.size() for fragment in fragments]


def utilization(size: Size, way: str, row: dict[str, Any], gbits: np.ndarray) -> np.ndarray:
    """The share of time in which chips compute, by the bandwidth from a slice to the others.

    A transfer makes chips wait for as long as it takes after what is computed in the meantime: for
    a gradient the backward pass, the papers' assumption; for DiLoCo nothing; for a fragment τ
    steps. Latency, and the outer optimizer, take no time.
    """
    if way == "data-parallel":
        parts, hidden = [1 / STEPS] * STEPS, BACKWARD * size.compute
    elif "Streaming" in way:
        parts, hidden = shares(size.model), TAU * size.compute
    else:
        parts, hidden = [1.0], 0.0
    period = row["sent_bytes"] * size.chips * STEPS
    waits = sum(np.maximum(part * period * 8 / (1e9 * gbits) - hidden, 0) for part in parts)
    return STEPS * size.compute / (STEPS * size.compute + waits)


def needed(size: Size, way: str, row: dict[str, Any], target: float = TARGET) -> float:
    """The least bandwidth in Gbit/s for a utilization."""
    return float(GBITS[np.argmax(utilization(size, way, row, GBITS) >= target)])


# Tables


def ways() -> list[str]:
    if drjax is None:
        print("DrJAX is not installed, and left out")
    return [way for way in WAYS if way != DRJAX or drjax is not None]


def tables(compiled: Compiled, names: list[str], slices: list[int]) -> list[Table]:
    """Tables of the models, of what has been compiled, and of the bandwidth that it needs."""
    sizes, rows, bandwidths = [], [], []
    for name, count in itertools.product(names, slices):
        size = SIZES[name]
        for way in ways():
            row = compiled.of(name, count, way)
            which = {"model": name, "slices": str(count), "": way}
            of = {f"{100 * x:.0f} %": f"{needed(size, way, row, x):.3g}" for x in TARGETS}
            bandwidths.append(which | of)
            rows.append(
                which
                | {
                    "MiB of a chip": f"{row['passed_bytes'] / 2**20:.3g}",
                    "GB from a slice": f"{row['sent_bytes'] * size.chips / 1e9:.3g}",
                    "Gbit/s for 95 %": f"{needed(size, way, row):.3g}",
                    "arguments, GiB": row["argument_bytes"] / 2**30,
                    "temporary, GiB": row["temporary_bytes"] / 2**30,
                    "at most, GiB": row["peak_bytes"] / 2**30,
                    "compiled in, CPU s": f"{row['cpu_seconds']:.0f}",
                    "what is sent": ", ".join(row["dtypes"]),
                }
            )
    for name in names:
        size = SIZES[name]
        sizes.append(
            {
                "model": name,
                "million parameters": f"{size.model.size() / 1e6:,.0f}",
                "a slice": f"{size.chips} chips, {size.topology}",
                "tokens a step": f"{size.batch * LENGTH:,}",
                "a step, assumed, s": f"{size.compute:.3g}",
            }
        )
    title = "between slices in a step, and the memory of a chip"
    of_bandwidth = "Gbit/s from a slice with which chips compute a share of the time"
    return [
        dict(title="a replica", columns=list(sizes[0]), rows=sizes),
        dict(title=title, columns=list(rows[0]), rows=rows),
        dict(title=of_bandwidth, columns=list(bandwidths[0]), rows=bandwidths),
    ]


def draw(compiled: Compiled, names: list[str], slices: int, path: str) -> None:
    """Draws utilization by bandwidth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(names) + 2.2, 3.8), layout="constrained")
    styles = ["-", "-", "--", "-", "-"]
    for number, (axes, name) in enumerate(
        zip(figure.subplots(1, len(names), squeeze=False)[0], names)
    ):
        size = SIZES[name]
        for way, style in zip(ways(), styles):
            found = utilization(size, way, compiled.of(name, slices, way), GBITS)
            axes.plot(GBITS, 100 * found, style, label=way)
        axes.axhline(100 * TARGET, color="gray", linewidth=0.8, linestyle=":", label="95 %")
        title = f"{name}, {slices} slices of {size.chips} chips"
        axes.set(xscale="log", xlim=(0.01, 1e4), ylim=(0, 103), title=title)
        axes.set_xlabel("Gbit/s from each slice")
        if number == 0:
            axes.set_ylabel("time in which chips compute, %")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", help=f"separated by commas, of {', '.join(SIZES)}")
    parser.add_argument("--slices", help="numbers of slices, separated by commas")
    parser.add_argument("--all", action="store_true", help="all models, 2, 4 and 8 slices")
    parser.add_argument("--json", type=pathlib.Path, help="what has been compiled")
    parser.add_argument("--figure", metavar="PATH", help="draw it, for the most slices")
    options = parser.parse_args()
    names, slices = (list(SIZES), list(SLICES)) if options.all else DEFAULT
    if options.models:
        names = options.models.split(",")
        if unknown := set(names) - set(SIZES):
            parser.error(f"--models: {', '.join(unknown)} unknown, choose of {', '.join(SIZES)}")
    if options.slices:
        slices = [int(n) for n in options.slices.split(",")]
    compiled = Compiled(options.json)
    for table in tables(compiled, names, slices):
        show(table)
    if options.figure:
        draw(compiled, names, max(slices), options.figure)
    print(f"\nlibtpu {importlib.metadata.version('libtpu')}, jax {jax.__version__}")


if __name__ == "__main__":
    main()
