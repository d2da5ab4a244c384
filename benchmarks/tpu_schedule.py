"""How many clients to vectorize on TPUs, by the compiler's estimate: fax's default and the best.

    python benchmarks/tpu_schedule.py [--kinds v5e,v6e] [--tasks logistic,dense] [--json PATH]
    python benchmarks/tpu_schedule.py --convolutions    # the settings of convolutions=

Compiles a round of federated averaging for one chip, for each kind of TPU, client function and
number of vectorized clients. It needs libtpu and no TPU: `pip install 'fax-jax[tpu,models]'`. A
compilation takes seconds to minutes. With ``--json``, what is already in the file is not compiled
again, and results are added after each compilation.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import pathlib
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from figures import Figures
from jax.sharding import SingleDeviceSharding
from tables import show
from tpu_clients import DRIVE, GRADIENT, POWER_SGD, TASKS, round_of

import fax
import fax.inspect

KINDS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
CLIENTS, STEPS = 64, 5
VECTORIZED = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = (*TASKS, f"dense{GRADIENT}", f"MLP 4.4 M{GRADIENT}", f"dense{DRIVE}", f"dense{POWER_SGD}")
# Clients with convolutions, and the number of vectorized clients where all settings are compared.
CONVOLUTIONS, SETTINGS, SOME = ("EMNIST CNN", "ResNet-18"), ("auto", "xla", "matmul"), (1, 4)


def versions() -> str:
    return f"libtpu {importlib.metadata.version('libtpu')}, jax {jax.__version__}"


def on_chip(kind: str, shapes: Any) -> Any:
    chip = SingleDeviceSharding(fax.sharding.topology(KINDS[kind])[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), shapes)


def cost(kind: str, fn: Callable, shapes: Any) -> dict[str, Any]:
    """Cycles and temporary memory on a chip, None if it has too little memory."""
    try:
        report = fax.inspect.report(fn, *on_chip(kind, shapes))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return dict(cycles=None, temporary_bytes=None)
    return dict(cycles=report.cycles, temporary_bytes=report.memory.temporary_bytes)


def figures_of(
    figures: Figures, kind: str, task: str, vectorize: int | None, convolutions: str = "auto"
) -> Any:
    """Cycles and temporary memory of a round. ``vectorize`` is None for fax's default."""
    how = dict(vectorize=vectorize, convolutions=convolutions)
    return figures.of(
        f"{kind} | {task} | {vectorize or 'default'} | {convolutions}",
        lambda: cost(kind, *round_of(task, CLIENTS, STEPS, **how)),
    )


def default(kind: str, task: str) -> int | None:
    """Which of the numbers fax chooses, None if another one: that whose program is the same."""

    def text(vectorize: int | None) -> str:
        fn, shapes = round_of(task, CLIENTS, STEPS, vectorize=vectorize)
        return jax.jit(fn).lower(*on_chip(kind, shapes)).as_text()

    chosen = text(None)
    return next((v for v in VECTORIZED if text(v) == chosen), None)


def schedules(figures: Figures, kinds: list[str], tasks: list[str]) -> None:
    """The table of fax's default against the best number of vectorized clients."""
    for kind in kinds:
        rows = []
        for task in tasks:
            found = {v: figures_of(figures, kind, task, v) for v in VECTORIZED}
            chosen = default(kind, task)
            own = figures_of(figures, kind, task, None) if chosen is None else found[chosen]
            fits = {v: row["cycles"] for v, row in found.items() if row["cycles"] is not None}
            best = min(fits, key=lambda v: fits[v])
            cells: dict[str, Any] = {str(v): cycles / fits[1] for v, cycles in fits.items()}
            rows.append(
                {
                    "client": task,
                    **cells,
                    "default": str(chosen or ""),
                    "default / best": own["cycles"] / fits[best],
                    "temporary MiB, 1": found[1]["temporary_bytes"] / 2**20,
                    "default, MiB": own["temporary_bytes"] / 2**20,
                    "best, MiB": found[best]["temporary_bytes"] / 2**20,
                }
            )
        show(dict(title=f"{kind}: cycles by vectorize=", columns=list(rows[0]), rows=rows))


def convolutions(figures: Figures, kinds: list[str]) -> None:
    """The table of the settings of ``convolutions=``."""
    for kind in kinds:
        rows = []
        for task in CONVOLUTIONS:
            for v in SOME:
                found = {s: figures_of(figures, kind, task, v, s)["cycles"] for s in SETTINGS}
                best = min(cycles for cycles in found.values() if cycles is not None)
                ratios = {s: cycles and cycles / best for s, cycles in found.items()}
                rows.append({"client": task, "vectorize": str(v), **ratios})
        show(dict(title=f"{kind}: cycles by convolutions=", columns=list(rows[0]), rows=rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--tasks", default=";".join(ROUNDS), help="separated by semicolons")
    parser.add_argument("--convolutions", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    print(versions())
    figures, kinds = Figures(args.json), args.kinds.split(",")
    if args.convolutions:
        convolutions(figures, kinds)
    else:
        schedules(figures, kinds, args.tasks.split(";"))


if __name__ == "__main__":
    main()
